"""How well an early epoch predicts the last one, although only the trials that were not stopped have both values.

Early stopping keeps the trials that are good early. Among them the early values lie close together, so that their
correlation with the last ones is much lower than among all trials (restriction of range). But whether a trial goes on
depends only on values that are known, so the missing ones are missing at random (Rubin 1976), and what each rung says
of the next one can be estimated from the trials that reached it.

Letters: N trials, R rungs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_AGREEMENT_TRIALS = 8
"""Trials with a value at the last epoch."""

_NUM_DRAWS = 4000
_SPREAD = 5.0  # median absolute deviations, beyond which a bad value is cut off

Array = NDArray[np.float64]


class Agreement(NamedTuple):
    """The correlation between the first epoch and the last one among all trials, with its 95 % interval."""

    correlation: float
    low: float
    high: float
    num_trials: int


def estimate_rank_agreement(values: Sequence[Mapping[int, float]]) -> Agreement | None:
    """Estimate how values at the first of several epochs agree with those at the last, among all trials.

    Args:
        values: at each epoch, ascending, trial -> finite value, of which smaller is better. Of a trial that was stopped
            the later ones are missing.

    Returns:
        The median and the 95 % interval of the correlation; None if fewer than 8 trials have both values. The values at
        each epoch are taken to be linear in those before it, with normal noise; the interval is that of the posterior
        with Jeffreys' prior (Box & Tiao 1973), which holds for few trials too.
    """
    if len(values) < 2 or len(values[0].keys() & values[-1].keys()) < MIN_AGREEMENT_TRIALS:
        return None
    generator = np.random.default_rng(0)
    rungs: list[Mapping[int, float]] = []
    for at in values:  # nested: a later epoch counts for the trials that have all values before it
        kept = set(at) if not rungs else set(at) & set(rungs[-1])
        rungs.append({trial: at[trial] for trial in kept})
    rungs = [at for at in rungs if len(at) >= len(rungs) + 2]
    if len(rungs) < 2 or len(rungs[-1]) < MIN_AGREEMENT_TRIALS:
        return None
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
    """(draws, R) slopes and (draws,) residual variances from their posterior, given (N,) targets and (N, R) values."""
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
    """The values with those cut off that are far worse than the rest, in units of their spread.

    Good values are left as they are: where most trials are about equally bad, those that go on lie far from the median.
    """
    values = np.array(list(at.values()))
    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle))) or float(values.std()) or 1.0
    cut = np.minimum((values - middle) / spread, _SPREAD)
    return dict(zip(at, cut.tolist(), strict=True))
