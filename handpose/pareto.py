"""Points that two things are wanted of, both as small as can be: which of them are best when neither goes first.

Fronts are those of NSGA-II (Deb et al. 2002), the order within a front that of Schmucker et al. 2021
(arXiv:2106.12639): a greedy epsilon-net, whose every beginning is spread along the front.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt


def sort_into_fronts(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """The indices of the points by front, ascending within each; no point may be NaN.

    A point dominates another that is no better in anything and worse in something. On the first front are those that
    none dominates, on the next those that only points of the fronts before dominate. Equal points are on one front.
    """
    front_of = [0] * len(points)
    ends: list[tuple[float, float]] = []  # (second, first) of the last point on each front, which has its least second
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        first, second = points[index]
        front_of[index] = place = bisect_left(ends, (second, first))  # the fronts before have a point that dominates
        ends[place : place + 1] = [(second, first)]
    members: list[list[int]] = [[] for _ in ends]
    for index, front in enumerate(front_of):
        members[front].append(index)
    return members


def rank_points(points: Sequence[tuple[float, float]], *, max_points: int | None = None) -> list[int]:
    """The indices of the points, the best first, or the best `max_points` of them.

    By fronts; within a front as `order_by_distance` has it.
    """
    return list(islice(_sort_two_objectives(points), max_points))


def order_by_distance(points: Sequence[tuple[float, float]]) -> Iterator[int]:
    """The indices of the points, each the farthest from all before it, the one with the least first value at the head.

    Distances are Euclidean, with the range of the points in either direction as its unit. Ties go to the smaller index.
    """
    if not points:
        return
    places = np.asarray(points, dtype=float)
    extent = np.ptp(places, axis=0)
    places = (places - places.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    left = np.full(len(points), np.inf)  # squared distance from those that were chosen
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
    return across * across + along * along  # without a root, which libraries round differently
