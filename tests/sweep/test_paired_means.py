"""Means over shared seeds: held against scipy's tests where those exist, printed tables, and how often they cover."""

import numpy as np
import pytest
from scipy import stats

from handpose.sweep import paired_means
from handpose.sweep.paired_means import difference_estimates, mean_estimates


def drawn(rng, *, num=4, num_seeds=3, of_seeds=0.0, noise=1.0, means=None):
    """Values of the model, (configurations, seeds)."""
    true = np.zeros(num) if means is None else np.asarray(means)
    return true[:, None] + of_seeds * rng.standard_normal(num_seeds) + noise * rng.standard_normal((num, num_seeds))


def test_two_configurations_are_compared_by_the_paired_t_test():
    values = drawn(np.random.default_rng(0), num=2, num_seeds=5, of_seeds=3.0)
    expected = stats.ttest_rel(values[0], values[1]).confidence_interval(0.95)
    ours = difference_estimates(values, to=1)[0]
    assert ours.mean == pytest.approx(values[0].mean() - values[1].mean())
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))


def test_one_configuration_has_the_t_interval_of_its_seeds():
    values = drawn(np.random.default_rng(1), num=1, num_seeds=6)
    expected = stats.ttest_1samp(values[0], 0.0).confidence_interval(0.95)
    (ours,) = mean_estimates(values)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("num", "freedom", "quantile"), [(3, 12, 3.773), (4, 6, 4.896), (10, 20, 5.008)])
def test_the_quantile_is_that_of_printed_tables(num, freedom, quantile):
    assert paired_means._tukey(num, freedom) == pytest.approx(quantile, abs=1e-3)


def test_the_variance_within_configurations_is_pooled():
    values = drawn(np.random.default_rng(2), num=3, num_seeds=4, of_seeds=1.0)
    of_seeds, residual = paired_means._mean_squares(values)
    assert (of_seeds + 2 * residual) / 3 == pytest.approx(values.var(axis=1, ddof=1).mean())


@pytest.mark.parametrize("of_seeds", [0.0, 1.0, 5.0])
def test_what_all_have_in_common_with_a_seed_does_not_blur_the_differences(of_seeds):
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((4, 3))
    plain, shifted = noise, noise + of_seeds * rng.standard_normal(3)
    for ours, expected in zip(difference_estimates(shifted, to=0), difference_estimates(plain, to=0), strict=True):
        assert ours == pytest.approx(expected)


@pytest.mark.parametrize("of_seeds", [0.0, 0.5, 3.0])
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(of_seeds):
    rng = np.random.default_rng(4)
    rounds = [mean_estimates(drawn(rng, of_seeds=of_seeds)) for _ in range(600)]
    covered = np.mean([each.low <= 0.0 <= each.high for estimates in rounds for each in estimates])
    assert 0.91 < covered < 0.98


@pytest.mark.parametrize("means", [(0, 0, 0, 0), (0, 0.5, 1, 4)])
def test_all_differences_to_a_winner_picked_by_the_values_are_covered_together(means):
    rng, missed = np.random.default_rng(5), 0
    for _ in range(600):
        values = drawn(rng, of_seeds=1.0, means=means)
        winner = int(np.argmin(values.mean(axis=1)))
        estimates = difference_estimates(values, to=winner)
        true = np.asarray(means) - means[winner]
        missed += any(not each.low <= of <= each.high for each, of in zip(estimates, true, strict=True))
    assert missed / 600 < 0.07


def test_one_seed_gives_no_interval():
    values = np.array([[1.0], [2.0]])
    assert mean_estimates(values)[0] == (1.0, None, None)
    assert difference_estimates(values, to=0)[1] == (1.0, None, None)
    assert difference_estimates(values, to=0)[1].excludes_zero is None


def test_values_without_noise_have_no_width():
    values = np.array([[1.0, 1.0], [2.0, 2.0]])
    assert mean_estimates(values)[0] == (1.0, 1.0, 1.0)
    assert difference_estimates(values, to=0)[1].excludes_zero


def test_a_difference_the_other_way_round_is_negated():
    one, other = (difference_estimates(drawn(np.random.default_rng(6)), to=to)[1 - to] for to in (0, 1))
    assert one.negated() == pytest.approx(other)
