"""Two sweeps: what may be compared, and that chance alone is seldom called a difference."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from handpose.report.comparison import compare_sweeps, correct_p_values
from handpose.report.sweep_record import Candidate, Confirmation, Interval
from tests.report.fabricated_records import make_record, make_trial

RANDOM = {
    "searcher": {"sampler": {"_target_": "optuna.samplers.RandomSampler"}},
}


def make_sweep(name, values, **rest):
    rest = {"configuration": RANDOM, "selects_only_at_rungs": True} | rest
    trials = [make_trial(number, {}, [9.0, 8.0, 7.0, value]) for number, value in enumerate(values)]
    return make_record(trials, name=name, **rest)


def make_confirmed(name, values, *, num_others=0):
    winner = Candidate("trial 0", 0, {}, dict(enumerate(values)), Interval(1.0, 0.0, 2.0), None, None)
    others = [replace(winner, label=f"trial {number}") for number in range(1, num_others + 1)]
    out = replace(winner, label="default", out="failed with seed 1")
    confirmation = Confirmation(4, [0, 1, 2], [winner, *others, out], winner, None, "")
    return make_sweep(name, [1.0] * 10, confirmation=confirmation)


def test_holm_as_its_paper_has_it():
    assert correct_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_p_values([math.nan, 0.5])[1] == 0.5
    assert math.isnan(correct_p_values([math.nan, 0.5])[0])


def test_confirmed_winners_are_compared_by_their_seeds():
    ours, theirs = [10.0, 10.2, 10.1], [12.0, 12.3, 11.9]
    (found,) = compare_sweeps([make_confirmed("one", ours), make_confirmed("two", theirs)])
    assert "the winner of one is better by PA-MPJPE 1.97 mm; distinguishable" in found.text
    assert found.p_value == pytest.approx(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)


def test_a_winner_that_was_picked_from_several_needs_a_larger_lead():
    ours, theirs = [10.0, 10.2, 10.1], [12.0, 12.3, 11.9]
    alone = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    for first, second, num in ((ours, theirs, 4), (theirs, ours, 1)):
        records = [make_confirmed("one", first, num_others=3), make_confirmed("two", second)]
        assert compare_sweeps(records)[0].p_value == pytest.approx(min(1.0, num * alone))


def test_equal_sweeps_with_a_winner_picked_from_several_are_seldom_called_different():
    """Without a correction some 15 % are."""
    draws, found = np.random.default_rng(1), 0
    for _ in range(200):
        values = draws.standard_normal((11, 3))
        best = values[values.mean(axis=1).argmin()]
        ((_, _, _, text, _),) = compare_sweeps(
            [make_confirmed("one", best, num_others=10), make_confirmed("two", draws.normal(size=3))]
        )
        found += "; distinguishable" in text
    assert found <= 16  # 5 % of 200 are 10 +- 3


@pytest.mark.parametrize("values", [([1.0], [2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_values_that_show_no_noise_are_not_compared(values):
    (found,) = compare_sweeps([make_confirmed("one", values[0]), make_confirmed("two", values[1])])
    assert "the mean of one's winner is better by PA-MPJPE 1.00 mm; unknown whether by chance" in found.text
    assert math.isnan(found.p_value)


def test_sweeps_that_are_not_confirmed_are_compared_by_all_their_trials():
    (found,) = compare_sweeps([make_sweep("one", range(20)), make_sweep("two", range(10, 30))])
    assert "all trials at epoch 4, 20 and 20" in found.test
    assert "a trial of one is better in 88% of the pairs; distinguishable" in found.text


@pytest.mark.parametrize(
    "rest",
    [
        {"configuration": {"searcher": {"sampler": {"_target_": "optuna.samplers.TPESampler"}}}},
        {"rungs": (1, 3)},
        {"selects_only_at_rungs": False},
    ],
)
def test_trials_that_depend_on_each_other_are_not_tested(rest):
    """A lucky trial of a searcher that learns has many followers: runs of one sweep then differ by more than chance."""
    (found,) = compare_sweeps([make_sweep("one", range(20), **rest), make_sweep("two", range(10, 30))])
    assert "better in 88% of the pairs; not tested, because their trials depend on each other" in found.text
    assert math.isnan(found.p_value)


def test_more_may_be_better():
    (found,) = compare_sweeps([make_sweep("one", range(20), mode="max"), make_sweep("two", range(10, 30), mode="max")])
    assert "a trial of two is better in 88% of the pairs" in found.text


def test_equal_sweeps_are_seldom_called_different():
    draws = random.Random(0)
    found = [
        compare_sweeps([make_sweep(name, [draws.gauss(0, 1) for _ in range(12)]) for name in ("one", "two")])[0]
        for _ in range(100)
    ]
    assert sum("; distinguishable" in each.text for each in found) <= 10


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ({"origin": {"data_fingerprint": "other"}}, "different data"),
        ({"max_epochs": 9}, "One trains for 4 epochs, the other for 9"),
        ({"metric": "val/pck_auc"}, "One optimises"),
    ],
)
def test_what_does_not_measure_the_same_is_not_compared(rest, reason):
    (found,) = compare_sweeps([make_sweep("one", range(20)), make_sweep("two", range(20), **rest)])
    assert reason in found.text
    assert math.isnan(found.p_value)


def test_every_pair_is_compared_once():
    pairs = [(each.first, each.second) for each in compare_sweeps([make_sweep(name, range(20)) for name in "abc"])]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


def test_too_few_trials_say_nothing():
    (found,) = compare_sweeps([make_sweep("one", range(3)), make_sweep("two", range(3))])
    assert "cannot be compared" in found.text
