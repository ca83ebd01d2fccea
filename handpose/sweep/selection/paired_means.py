"""Means of configurations that were trained with the same seeds, and confidence intervals of their differences.

The model is additive: value of configuration i with seed j = mean of i + effect of seed j + noise, where the noise has
the same variance for every configuration (a randomised block design whose blocks are the seeds).
benchmarks/confirmation.py simulates how often the intervals below are right, and how wide they are.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import studentized_range, t

_CONFIDENCE = 0.95
_ROUNDING = 1e-12
"""Relative to the values: a smaller deviation is attributed to rounding, not to noise."""

METHOD = (
    "The value of a run is modelled as the mean of its configuration + the effect of its seed + noise. The interval of "
    "a mean is a 95 % interval for new seeds on the same validation images, and remains one for the winner, although "
    "it was picked as the best of these means: the interval is widened for that (Bonferroni's correction). The "
    "winner's mean itself is too good on average, since it was picked for being good; `optimism` estimates by how "
    "much, and the gain over the default configuration is too good by as much or more. Intervals of differences, the "
    "gain among them, are Tukey's and hold at 95 % for all pairs at once, so they allow for the choice of the winner, "
    "too. All of this assumes that the noise has the same variance for every configuration. In simulations the "
    "winner's interval holds its true mean in at least 95 % of the cases with normal or heavy-tailed noise, 92 % with "
    "skewed and 87 % with exponential noise, and at most 6 % claim a difference that does not exist. If the standard "
    "deviation of one configuration's noise is three times that of the others, these figures are 79 % and 16 %."
)
ONE_SEED = "one seed does not show how much the values vary between seeds; set sweep.confirm.seeds to 2 or more"
ONE_CONFIGURATION = "no other configuration was trained to the end with every seed"
NO_NOISE = "the seeds show no noise to compare with: they leave every difference between configurations the same"
SAME_VALUES = "every seed gave the same value, so the values do not show how much they vary between seeds"


class Estimate(NamedTuple):
    """A mean and its 95 % interval.

    Attributes:
        mean: the estimated mean.
        low: lower end of the interval; None if the values do not show how large the noise is.
        high: upper end of the interval; None like `low`.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool | None:
        """Whether zero lies outside the interval; None if there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0

    def negate(self) -> "Estimate":
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Estimate(0.0 - self.mean, low, high)  # no -0.0 in files


def estimate_means(values: NDArray[np.float64]) -> list[Estimate]:
    """Estimate the mean of each configuration over all possible seeds.

    The interval of the configuration with the best mean holds at 95 % although that configuration was picked by these
    values, and so does the interval of any single configuration. It combines two independent parts by the square root
    of the sum of squares (MOVER, Zou and Donner 2008). The first part is the t interval of the mean over all
    configurations: it contains the effects of the seeds, and picking a winner does not bias it. The second part is the
    Bonferroni-corrected t interval of a configuration's deviation from that mean.

    Args:
        values: (configurations, seeds), finite.

    Returns:
        One estimate per configuration, without an interval if `explain_missing_interval` gives a reason.
    """
    half_width = float(compute_mean_half_width(values)) if explain_missing_interval(values) is None else None
    return _make_estimates(values.mean(axis=1), half_width)


def estimate_differences(values: NDArray[np.float64], reference: int) -> list[Estimate]:
    """Estimate the mean of each configuration minus that of the configuration `reference`.

    The intervals are Tukey's honestly significant differences: at 95 % they hold for all pairs of configurations at
    once, even if `reference` was picked by looking at the values. For two configurations this is the paired t test.

    Args:
        values: (configurations, seeds), finite.
        reference: index of the configuration that the others are compared with.

    Returns:
        One estimate per configuration, without an interval if `explain_incomparability` gives a reason.
    """
    half_width = float(compute_difference_half_width(values)) if explain_incomparability(values) is None else None
    return _make_estimates(values.mean(axis=1) - values[reference].mean(), half_width)


def compute_mean_half_width(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return half the width of the interval of a mean.

    Args:
        values: (..., configurations, seeds), at least two seeds.

    Returns:
        (...) half widths.
    """
    *_, num, num_seeds = values.shape
    of_seeds, residual = _compute_mean_squares(values)
    variance = _get_t_quantile(num_seeds - 1, 1) ** 2 * of_seeds / num
    if num > 1:
        variance = variance + _get_t_quantile((num - 1) * (num_seeds - 1), num) ** 2 * residual * (num - 1) / num
    return np.sqrt(variance / num_seeds)


def compute_difference_half_width(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return half the width of the interval of a difference between two means.

    Args:
        values: (..., configurations, seeds), at least two of both.

    Returns:
        (...) half widths.
    """
    *_, num, num_seeds = values.shape
    return _get_tukey_quantile(num, (num - 1) * (num_seeds - 1)) * _compute_standard_error(values)


def explain_missing_interval(values: NDArray[np.float64]) -> str | None:
    """Explain why the (configurations, seeds) values give no interval of a mean; None if they give one."""
    if values.shape[1] == 1:
        return ONE_SEED
    return None if _has_variation(values - values.mean(axis=1, keepdims=True), values) else SAME_VALUES


def explain_incomparability(values: NDArray[np.float64]) -> str | None:
    """Explain why the (configurations, seeds) values do not show which differences are real; None if they do."""
    num, num_seeds = values.shape
    if num == 1:
        return ONE_CONFIGURATION
    if num_seeds == 1:
        return ONE_SEED
    return None if _has_variation(_compute_residuals(values), values) else NO_NOISE


def estimate_optimism(values: NDArray[np.float64], selectable: Sequence[int], *, mode: str) -> float | None:
    """Estimate how much better, on average, the best of several observed means is than its configuration's true mean.

    This is the expectation of that difference if the true means were the observed ones and the noise were as large as
    the residuals: a parametric bootstrap by numerical integration. It removes a half to three quarters of the bias if
    all configurations are equally good, and almost nothing if one is clearly the best.

    Args:
        values: (configurations, seeds), finite.
        selectable: indices of the configurations that can be picked.
        mode: "min" or "max", which values are better.

    Returns:
        The estimate, at least 0; None if the values do not show how large the noise is.
    """
    if len(selectable) == 1:
        return 0.0
    if explain_incomparability(values) is not None:
        return None
    error = float(_compute_standard_error(values))
    means = (1 if mode == "min" else -1) * values.mean(axis=1)[list(selectable)] / error
    noise = np.linspace(-8.0, 8.0, 201)
    others_are_worse = ndtr(means[:, None] - means[:, None, None] - noise)  # (picked, others, noise)
    others_are_worse[np.arange(len(means)), np.arange(len(means))] = 1.0
    density = others_are_worse.prod(axis=1).sum(axis=0) * np.exp(-(noise**2) / 2) / np.sqrt(2 * np.pi)
    return max(0.0, -error * float(np.trapezoid(noise * density, noise)))


def _make_estimates(means: NDArray[np.float64], half_width: float | None) -> list[Estimate]:
    if half_width is None:
        return [Estimate(float(mean), None, None) for mean in means]
    return [Estimate(float(mean), float(mean - half_width), float(mean + half_width)) for mean in means]


def _compute_residuals(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtract the means of configurations and of seeds from (..., configurations, seeds) values."""
    of_configurations, of_seeds = values.mean(axis=-1, keepdims=True), values.mean(axis=-2, keepdims=True)
    return values - of_configurations - of_seeds + values.mean(axis=(-2, -1), keepdims=True)


def _has_variation(deviations: NDArray[np.float64], values: NDArray[np.float64]) -> bool:
    return bool(np.abs(deviations).max() > _ROUNDING * np.abs(values).max())


def _compute_mean_squares(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean squares of seeds and of residuals of (..., configurations, seeds) with at least two seeds."""
    *_, num, num_seeds = values.shape
    of_seeds = num * values.mean(axis=-2).var(axis=-1, ddof=1)
    residual = (_compute_residuals(values) ** 2).sum(axis=(-2, -1)) / max(1, (num - 1) * (num_seeds - 1))
    return of_seeds, residual


def _compute_standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of a mean, without the effects of the seeds, which all means share."""
    return np.sqrt(_compute_mean_squares(values)[1] / values.shape[-1])


@cache
def _get_t_quantile(freedom: int, num: int) -> float:
    """Return the two-sided quantile of Student's t, corrected for `num` comparisons."""
    return float(t.ppf(1 - (1 - _CONFIDENCE) / 2 / num, freedom))


@cache
def _get_tukey_quantile(num: int, freedom: int) -> float:
    """Return the quantile of the studentized range: the largest difference among `num` means, in standard errors."""
    return float(studentized_range.ppf(_CONFIDENCE, num, freedom))
