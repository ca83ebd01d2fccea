"""Fronts against the definition of dominance and Optuna's sorting; the order within one against the words of it."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from optuna.study._multi_objective import _fast_non_domination_rank

from handpose.pareto import order_by_distance, rank_points, sort_into_fronts

WHOLE = st.integers(0, 6).map(float)
POINTS = st.lists(st.tuples(WHOLE, WHOLE) | st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), max_size=40)


def dominates(one, other):
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@given(POINTS)
def test_fronts_are_peeled_off_by_dominance(points):
    left = set(range(len(points)))
    for front in sort_into_fronts(points):
        assert front == sorted(i for i in left if not any(dominates(points[j], points[i]) for j in left))
        left -= set(front)
    assert not left


@given(POINTS)
def test_fronts_are_optunas_ranks(points):
    ranks = _fast_non_domination_rank(np.array(points).reshape(-1, 2))
    ours = {index: rank for rank, front in enumerate(sort_into_fronts(points)) for index in front}
    assert [ours[index] for index in range(len(points))] == ranks.tolist()


@given(POINTS, st.integers(0, 45))
def test_all_points_come_in_order_of_their_fronts_and_fewer_are_the_first_of_them(points, most):
    order = rank_points(points)
    assert sorted(order) == list(range(len(points)))
    front_of = {index: rank for rank, front in enumerate(sort_into_fronts(points)) for index in front}
    assert [front_of[index] for index in order] == sorted(front_of.values())
    assert rank_points(points, max_points=most) == order[:most]


@given(st.lists(WHOLE, max_size=30))
def test_with_one_value_alike_the_order_is_that_of_the_other_and_of_equals_the_first(values):
    expected = sorted(range(len(values)), key=lambda index: values[index])
    assert rank_points([(value, 3.0) for value in values]) == expected
    assert rank_points([(3.0, value) for value in values]) == expected


def test_a_front_is_taken_from_its_ends_inwards_whatever_the_units():
    line = [(10.0, 5e6), (11.0, 4e6), (12.0, 3e6), (13.0, 2e6), (14.0, 1e6)]
    assert list(order_by_distance(line)) == [0, 4, 2, 1, 3]
    assert list(order_by_distance([(1e3 * a, 1e-6 * b) for a, b in line])) == [0, 4, 2, 1, 3]


def test_each_point_is_the_farthest_from_those_before():
    angles = np.random.default_rng(0).uniform(0, math.pi / 2, 30)
    points = [(1 - math.cos(angle), 1 - math.sin(angle)) for angle in angles]
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    places = (np.array(points) - low) / (high - low)
    order = list(order_by_distance(points))
    for place in range(1, 30):
        distances = [min(math.dist(places[i], places[j]) for j in order[:place]) for i in order[place:]]
        assert math.isclose(distances[0], max(distances))


def test_there_may_be_no_points():
    assert (sort_into_fronts([]), rank_points([]), list(order_by_distance([]))) == ([], [], [])
