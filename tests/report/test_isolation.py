"""Isolation of a scientific parameter: the best of equally many trials, by hand and by brute force."""

import itertools

import numpy as np
import pytest

from handpose.errors import UserError
from handpose.report.isolation import compute_best_of, isolate_parameter
from tests.report.fabricated_records import DEPTH, RATE, make_record, make_swept_record, make_trial


@pytest.mark.parametrize("num_drawn", [1, 2, 4])
def test_the_best_of_some_is_the_mean_over_all_ways_to_draw_them(num_drawn):
    losses = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    bests = [min(drawn) for drawn in itertools.combinations(losses, num_drawn)]
    mean, low, high = compute_best_of(losses, num_drawn)
    assert mean == pytest.approx(np.mean(bests))
    assert low == np.quantile(bests, 0.1, method="inverted_cdf")
    assert high == np.quantile(bests, 0.9, method="inverted_cdf")


def test_a_value_that_was_tried_more_often_gets_no_advantage():
    often = [make_trial(number, {"model.decoder.depth": 2}, [5.0 + number % 10] * 4) for number in range(40)]
    seldom = [make_trial(100 + number, {"model.decoder.depth": 3}, [5.0 + number % 10] * 4) for number in (3, 5, 7)]
    isolated = isolate_parameter(make_record(often + seldom, [DEPTH]), "model.decoder.depth")
    two, three = isolated.values
    assert (two.num_trials, three.num_trials, isolated.num_drawn) == (40, 3, 3)
    assert two.best == 5.0
    assert three.best == three.expected == 8.0
    assert two.expected > 6.5  # the best of any three of its trials is not its best of forty


def test_ranges_are_cut_into_parts_and_rare_values_left_out():
    made = make_swept_record(lambda params: params["optimizer.lr"], [RATE], num_trials=50)
    isolated = isolate_parameter(made, "optimizer.lr")
    assert len(isolated.values) == 5
    assert sum(value.num_trials for value in isolated.values) == 50
    rare = [make_trial(number, {"model.decoder.depth": 1 + number // 4}, [float(number)] * 4) for number in range(9)]
    assert isolate_parameter(make_record(rare, [DEPTH]), "model.decoder.depth").left_out == ["3"]


def test_a_key_that_is_not_searched_is_refused():
    with pytest.raises(UserError, match=r"report.scientific=seed is not searched by made; it searches optimizer.lr"):
        isolate_parameter(make_swept_record(lambda params: 1.0, [RATE]), "seed")
