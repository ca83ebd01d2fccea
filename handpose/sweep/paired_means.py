"""Means of configurations that were trained with the same seeds, and what can be said of their differences.

The model is additive: value of configuration i with seed j = mean of i + effect of the seed j + noise, with the same
variance of the noise for all (a randomised block design, the seeds being the blocks).
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import studentized_range, t

_CONFIDENCE = 0.95

METHOD = (
    "Additive model of configuration and seed: the interval of a mean is a 95 % t interval for seeds in general, from "
    "the variance over seeds pooled over the configurations (Satterthwaite's degrees of freedom, since they share the "
    "seeds); intervals of differences are Tukey's, from the residual variance, and hold at 95 % for all pairs at once, "
    "so also for a winner that was picked by these values."
)


class Estimate(NamedTuple):
    """A mean and its 95 % interval, whose ends are None where one seed alone tells nothing of the noise."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool | None:
        """Whether zero lies outside the interval; None where there is none."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0

    def negated(self) -> "Estimate":
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Estimate(0.0 - self.mean, low, high)  # no -0.0 in files


def mean_estimates(values: NDArray[np.float64]) -> list[Estimate]:
    """The mean of each configuration over seeds in general; each interval holds at 95 % by itself.

    values: (configurations, seeds), finite. The variance of a mean has the seeds' own in it, and is estimated from
    the two mean squares of the analysis of variance. Satterthwaite's (1946) degrees of freedom are approximate: with
    three seeds and four configurations 93 to 96 % of the intervals cover, by how much the seeds have in common.
    """
    num, num_seeds = values.shape
    means = values.mean(axis=1)
    if num_seeds == 1:
        return [Estimate(float(mean), None, None) for mean in means]
    of_seeds, residual = _mean_squares(values)
    parts = np.array([of_seeds / num, (num - 1) * residual / num])  # they add up to the variance within configurations
    freedom = np.array([num_seeds - 1, (num - 1) * (num_seeds - 1)])
    spread = 0.0
    if parts.sum() > 0:
        pooled_freedom = parts.sum() ** 2 / (parts[freedom > 0] ** 2 / freedom[freedom > 0]).sum()
        spread = float(t.ppf((1 + _CONFIDENCE) / 2, pooled_freedom) * np.sqrt(parts.sum() / num_seeds))
    return [Estimate(float(mean), float(mean - spread), float(mean + spread)) for mean in means]


def difference_estimates(values: NDArray[np.float64], to: int) -> list[Estimate]:
    """The mean of each configuration less that of configuration `to`; together the intervals hold at 95 %.

    values: (configurations, seeds), finite. Tukey's honestly significant differences: they hold for every pair of
    configurations, whichever is picked as `to` by looking at the values. Of two configurations that is the paired t
    test.
    """
    num, num_seeds = values.shape
    means = values.mean(axis=1) - values[to].mean()
    if num_seeds == 1 or num == 1:
        return [Estimate(float(mean), None, None) for mean in means]
    _, residual = _mean_squares(values)
    spread = _tukey(num, (num - 1) * (num_seeds - 1)) * float(np.sqrt(residual / num_seeds))
    return [Estimate(float(mean), float(mean - spread), float(mean + spread)) for mean in means]


def _mean_squares(values: NDArray[np.float64]) -> tuple[float, float]:
    """Of the seeds and of the residual, (configurations, seeds) with at least two seeds."""
    num, num_seeds = values.shape
    of_seeds = values.mean(axis=0) - values.mean()
    residual = values - values.mean(axis=1, keepdims=True) - of_seeds
    freedom = (num - 1) * (num_seeds - 1)
    between = num * float((of_seeds**2).sum()) / (num_seeds - 1)
    return between, float((residual**2).sum()) / freedom if freedom else 0.0


@cache
def _tukey(num: int, freedom: int) -> float:
    """The quantile of the studentized range: of the widest difference among `num` means, in their standard errors."""
    return float(studentized_range.ppf(_CONFIDENCE, num, freedom))
