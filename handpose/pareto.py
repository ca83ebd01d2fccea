"""Pareto ranking of points with two objectives, both to be minimised.

The fronts are those of NSGA-II (Deb et al. 2002). The order within a front is that of Schmucker et al. 2021
(arXiv:2106.12639): a greedy epsilon-net, of which the first n points, for any n, are spread along the front.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt


def sort_into_fronts(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Sort points into Pareto fronts.

    A point dominates another one if it is at least as good in both objectives and better in one. The first front has
    the points that no point dominates. The next front has those that only points of earlier fronts dominate. Equal
    points are on the same front.

    Args:
        points: the points. None may be NaN.

    Returns:
        The indices of the points on each front, in ascending order.
    """
    front_of = [0] * len(points)
    ends: list[tuple[float, float]] = []  # (second, first) of each front's last point, which has its smallest second
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        first, second = points[index]
        front_of[index] = place = bisect_left(ends, (second, first))  # a point on each earlier front dominates it
        ends[place : place + 1] = [(second, first)]
    members: list[list[int]] = [[] for _ in ends]
    for index, front in enumerate(front_of):
        members[front].append(index)
    return members


def rank_points(points: Sequence[tuple[float, float]], *, max_points: int | None = None) -> list[int]:
    """Rank points: by front, and within a front as in `order_by_distance`.

    Args:
        points: the points.
        max_points: return only the best so many; None: all.

    Returns:
        The indices of the points, the best first.
    """
    return list(islice(_sort_two_objectives(points), max_points))


def order_by_distance(points: Sequence[tuple[float, float]]) -> Iterator[int]:
    """Yield the indices of the points so that each is the farthest from all earlier ones.

    The first is the point with the smallest first objective. Distances are Euclidean, in units of the range of the
    points along each axis. Ties go to the smaller index.
    """
    if not points:
        return
    places = np.asarray(points, dtype=float)
    extent = np.ptp(places, axis=0)
    places = (places - places.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    left = np.full(len(points), np.inf)  # squared distance from the points chosen so far
    index = min(range(len(points)), key=lambda index: points[index])
    for _ in range(len(points)):
        yield index
        left = np.minimum(left, _compute_squared_distances(places, places[index]))
        left[index] = -np.inf
        index = int(np.argmax(left))


def _sort_two_objectives(points: Sequence[tuple[float, float]]) -> Iterator[int]:
    for front in sort_into_fronts(points):
        yield from (front[place] for place in order_by_distance([points[index] for index in front]))


def _compute_squared_distances(
    places: npt.NDArray[np.float64], place: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    across, along = places[:, 0] - place[0], places[:, 1] - place[1]
    return across * across + along * along  # no root, because libraries round it differently
