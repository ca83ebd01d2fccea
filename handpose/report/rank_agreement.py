"""An estimate of how well the values at an early epoch predict those at the last one, despite early stopping.

Only trials that were not stopped have both values. They were good early, so their early values lie close together, and
the correlation with their last values is much lower than it would be among all trials (restriction of range). But
whether a trial continues depends only on observed values. So the other values are missing at random (Rubin 1976), and
the regression of each rung on the rungs before it can be estimated from the trials that reached it.

Letters: N trials, R rungs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_AGREEMENT_TRIALS = 8
"""Least number of trials with a value at the first and at the last epoch."""

_NUM_DRAWS = 4000
_SPREAD = 5.0  # median absolute deviations above the median at which bad values are clipped

Array = NDArray[np.float64]


class Agreement(NamedTuple):
    """The correlation of the values at the first and the last epoch among all trials.

    Attributes:
        correlation: the estimate.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        num_trials: number of trials with values at all epochs.
    """

    correlation: float
    low: float
    high: float
    num_trials: int


def estimate_rank_agreement(values: Sequence[Mapping[int, float]]) -> Agreement | None:
    """Estimate the correlation of the values at the first and the last of several epochs, among all trials.

    The model assumes that the values at each epoch are linear in those before it, with normal noise. The estimate is
    the median of the posterior with Jeffreys' prior (Box & Tiao 1973), whose interval is valid for few trials too.

    Args:
        values: for each epoch, ascending: trial -> finite loss. A trial that was stopped has no later losses.

    Returns:
        The estimate, or None if fewer than 8 trials have all values.
    """
    if len(values) < 2 or len(values[0].keys() & values[-1].keys()) < MIN_AGREEMENT_TRIALS:
        return None
    generator = np.random.default_rng(0)
    rungs: list[Mapping[int, float]] = []
    for at in values:  # nested: a value counts only if its trial has all values before it
        kept = set(at) if not rungs else set(at) & set(rungs[-1])
        rungs.append({trial: at[trial] for trial in kept})
    if len(rungs[-1]) < MIN_AGREEMENT_TRIALS:
        return None
    num_rungs = min(len(rungs), len(rungs[-1]) - 2)  # the last regression needs more trials than coefficients
    rungs = [rungs[place] for place in np.linspace(0, len(rungs) - 1, num_rungs).round().astype(int)]
    columns = [_clip_outliers(at) for at in rungs]
    covariance = np.empty((_NUM_DRAWS, len(rungs), len(rungs)))
    for place, at in enumerate(columns):
        trials = sorted(at)
        earlier = np.array([[before[trial] for before in columns[:place]] for trial in trials]).reshape(
            len(trials), place
        )
        slopes, variances = _sample_regression(np.array([at[trial] for trial in trials]), earlier, generator)
        before = covariance[:, :place, :place]
        shared = np.einsum("dij,dj->di", before, slopes)
        covariance[:, :place, place] = covariance[:, place, :place] = shared
        covariance[:, place, place] = variances + np.einsum("di,di->d", shared, slopes)
    drawn = covariance[:, 0, -1] / np.sqrt(covariance[:, 0, 0] * covariance[:, -1, -1])
    low, middle, high = np.quantile(drawn, [0.025, 0.5, 0.975])
    return Agreement(float(middle), float(low), float(high), len(rungs[-1]))


def _sample_regression(target: Array, earlier: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Draw (draws, R) slopes and (draws,) residual variances from their posterior, given (N,) and (N, R) values."""
    num, width = earlier.shape
    design = np.hstack([np.ones((num, 1)), earlier])
    inverse = np.linalg.pinv(design.T @ design)
    weights = inverse @ design.T @ target
    squares = float(((target - design @ weights) ** 2).sum()) + 1e-12
    variances = squares / generator.chisquare(num - width - 1, _NUM_DRAWS)
    root = np.linalg.cholesky(inverse[1:, 1:] + 1e-12 * np.eye(width))
    noise = generator.standard_normal((_NUM_DRAWS, width)) @ root.T
    return weights[1:] + np.sqrt(variances)[:, None] * noise, variances


def _clip_outliers(at: Mapping[int, float]) -> dict[int, float]:
    """Standardise the values by median and spread, and clip those that are far worse than the rest.

    Good values are not clipped: if most trials are about equally bad, the trials that continue are far from the median.
    """
    values = np.array(list(at.values()))
    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle))) or float(values.std()) or 1.0
    cut = np.minimum((values - middle) / spread, _SPREAD)
    return dict(zip(at, cut.tolist(), strict=True))
