"""Means over shared seeds: held against scipy's tests where those exist, printed tables, and how often they cover."""

import math

import numpy as np
import pytest
from scipy import stats

from handpose.sweep.selection import paired_means
from handpose.sweep.selection.paired_means import (
    estimate_differences,
    estimate_means,
    estimate_optimism,
    explain_incomparability,
    explain_missing_interval,
)


def draw_values(rng, *, num=4, num_seeds=3, of_seeds=0.0, noise=1.0, means=None):
    """Values of the model, (configurations, seeds)."""
    true = np.zeros(num) if means is None else np.asarray(means)
    return true[:, None] + of_seeds * rng.standard_normal(num_seeds) + noise * rng.standard_normal((num, num_seeds))


def test_two_configurations_are_compared_by_the_paired_t_test():
    values = draw_values(np.random.default_rng(0), num=2, num_seeds=5, of_seeds=3.0)
    expected = stats.ttest_rel(values[0], values[1]).confidence_interval(0.95)
    ours = estimate_differences(values, reference=1)[0]
    assert ours.mean == pytest.approx(values[0].mean() - values[1].mean())
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))


def test_one_configuration_has_the_t_interval_of_its_seeds():
    values = draw_values(np.random.default_rng(1), num=1, num_seeds=6)
    expected = stats.ttest_1samp(values[0], 0.0).confidence_interval(0.95)
    (ours,) = estimate_means(values)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("num", "freedom", "quantile"), [(3, 12, 3.773), (4, 6, 4.896), (10, 20, 5.008)])
def test_the_quantile_is_that_of_printed_tables(num, freedom, quantile):
    assert paired_means._get_tukey_quantile(num, freedom) == pytest.approx(quantile, abs=1e-3)


def test_the_variance_within_configurations_is_pooled():
    values = draw_values(np.random.default_rng(2), num=3, num_seeds=4, of_seeds=1.0)
    of_seeds, residual = paired_means._compute_mean_squares(values)
    assert (of_seeds + 2 * residual) / 3 == pytest.approx(values.var(axis=1, ddof=1).mean())


@pytest.mark.parametrize("of_seeds", [0.0, 1.0, 5.0])
def test_what_all_have_in_common_with_a_seed_does_not_blur_the_differences(of_seeds):
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((4, 3))
    plain, shifted = noise, noise + of_seeds * rng.standard_normal(3)
    for ours, expected in zip(
        estimate_differences(shifted, reference=0), estimate_differences(plain, reference=0), strict=True
    ):
        assert ours == pytest.approx(expected)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("num", [2, 4, 11])
@pytest.mark.parametrize("of_seeds", [0.0, 1.0, 3.0])
def test_the_interval_of_a_winner_picked_as_the_best_mean_covers_its_mean(of_seeds, num, num_seeds):
    """Of equally good configurations, where picking the best flatters it the most; 5 % of 600 are 30 +- 5.3."""
    rng = np.random.default_rng(4)
    rounds = [
        min(
            estimate_means(draw_values(rng, num=num, num_seeds=num_seeds, of_seeds=of_seeds)),
            key=lambda each: each.mean,
        )
        for _ in range(600)
    ]
    assert sum(not each.low <= 0.0 <= each.high for each in rounds) <= 30 + 3 * 5.3


@pytest.mark.parametrize("means", [(0, 0, 0, 0), (0, 0.5, 1, 4)])
def test_all_differences_to_a_winner_picked_by_the_values_are_covered_together(means):
    rng, missed = np.random.default_rng(5), 0
    for _ in range(600):
        values = draw_values(rng, of_seeds=1.0, means=means)
        winner = int(np.argmin(values.mean(axis=1)))
        estimates = estimate_differences(values, reference=winner)
        true = np.asarray(means) - means[winner]
        missed += any(not each.low <= of <= each.high for each, of in zip(estimates, true, strict=True))
    assert missed / 600 < 0.07


def test_one_seed_gives_no_interval():
    values = np.array([[1.0], [2.0]])
    assert estimate_means(values)[0] == (1.0, None, None)
    assert estimate_differences(values, reference=0)[1] == (1.0, None, None)
    assert estimate_differences(values, reference=0)[1].excludes_zero is None
    assert explain_missing_interval(values) == explain_incomparability(values) == paired_means.ONE_SEED


@pytest.mark.parametrize("values", [[[1.1] * 3, [2.3] * 3], [[0.0] * 2] * 3, [[7.1] * 2], [[1e-9] * 2, [3e-9] * 2]])
def test_seeds_that_change_nothing_give_no_certainty(values):
    values = np.array(values)
    assert explain_missing_interval(values) == paired_means.SAME_VALUES
    assert all(each.low is None for each in estimate_means(values))
    assert explain_incomparability(values) is not None
    assert all(each.excludes_zero is None for each in estimate_differences(values, reference=0))


def test_differences_that_every_seed_repeats_are_not_certain_but_the_means_have_the_interval_of_the_seeds():
    of_seeds = np.array([0.1, 0.25, 0.7])
    values = np.array([1.1, 2.3, 3.7])[:, None] + of_seeds
    assert explain_incomparability(values) == paired_means.NO_NOISE
    assert estimate_differences(values, reference=0)[1].low is None
    expected = stats.ttest_1samp(values[0], 0.0).confidence_interval(0.95)
    assert estimate_means(values)[0][1:] == pytest.approx((expected.low, expected.high))


def test_one_configuration_is_compared_with_nothing():
    values = np.array([[1.0, 2.0]])
    assert explain_incomparability(values) == paired_means.ONE_CONFIGURATION
    assert estimate_differences(values, reference=0)[0].low is None
    assert estimate_means(values)[0].low is not None


@pytest.mark.parametrize(
    ("num", "expected"), [(2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (4, 1.02938)]
)
def test_the_optimism_of_the_best_of_equal_means_is_the_expected_largest_of_normal_draws(num, expected):
    values = np.array([[1.0, -1.0], [-1.0, 1.0], [2.0, -2.0], [-2.0, 2.0]])[:num]
    values -= values.mean(axis=1, keepdims=True)
    _, residual = paired_means._compute_mean_squares(values)
    for mode in ("min", "max"):
        found = estimate_optimism(values, range(num), mode=mode)
        assert found == pytest.approx(expected * math.sqrt(residual / 2), rel=1e-4)


def test_what_stands_far_apart_or_cannot_win_causes_no_optimism():
    values = draw_values(np.random.default_rng(7), means=(0, 0, 0, 30))
    assert estimate_optimism(values, range(4), mode="max") == pytest.approx(0.0, abs=1e-9)
    assert estimate_optimism(values, [1], mode="min") == 0.0
    assert estimate_optimism(values, [0, 3], mode="min") == pytest.approx(0.0, abs=1e-9)
    assert estimate_optimism(values, range(4), mode="min") > 0.05
    assert estimate_optimism(values[:, :1], range(4), mode="min") is None
    assert estimate_optimism(np.ones((3, 2)), range(3), mode="min") is None


@pytest.mark.parametrize("means", [(0, 0, 0, 0), (0, 0.7, 1.4, 2.0), (0, 6, 6, 6)])
def test_optimism_brings_the_winner_nearer_its_true_mean(means):
    rng, errors, corrected = np.random.default_rng(8), [], []
    for _ in range(400):
        values = draw_values(rng, num_seeds=2, means=means)
        winner = int(np.argmin(values.mean(axis=1)))
        errors.append(values[winner].mean() - means[winner])
        corrected.append(errors[-1] + estimate_optimism(values, range(4), mode="min"))
    assert abs(np.mean(corrected)) < max(0.6 * abs(np.mean(errors)), 0.1)  # the standard error is 0.035


def test_a_difference_the_other_way_round_is_negated():
    one, other = (estimate_differences(draw_values(np.random.default_rng(6)), reference=to)[1 - to] for to in (0, 1))
    assert one.negate() == pytest.approx(other)
