"""Rank tests that are valid for trials proposed by a sampler that learns from earlier trials.

TPE and Gaussian processes propose new trials near good ones. A test that assumes uniform draws, or that shuffles the
values among the trials, then finds effects in pure noise: a trial that is good by luck attracts others to its place.
The tests here compare each trial only with the trials that were proposed before it. If no parameter has an effect, the
rank of a trial's value among the earlier values is uniform and independent of the place that the sampler chose for the
trial, whatever the sampler has learned (sequential ranks: Renyi 1962; Barndorff-Nielsen 1963). The sum of the ranks,
weighted by the places of the trials, is a martingale with a known variance.

Letters: N trials in the order in which they were proposed, T terms.
"""

from bisect import bisect_left, bisect_right
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

_NUM_DRAWS = 4000
_DRAWS_AT_ONCE = 500

Array = NDArray[np.float64]


def compute_sequential_scores(losses: Array) -> Array:
    """Score each value by its rank among the values before it.

    Args:
        losses: (N,) losses in the order of the proposals. Ties get their mean rank.

    Returns:
        (N,) normal scores with mean 0 and variance 1 if the losses are exchangeable. A negative score means better than
        the values before. The first score is 0, because there is nothing to compare it with.
    """
    ranks, before = [], list[float]()
    for loss in losses.tolist():
        low, high = bisect_left(before, loss), bisect_right(before, loss)
        ranks.append((low + high) / 2)
        before.insert(high, loss)
    return _compute_scores(np.array(ranks))


def _compute_scores(ranks: Array) -> Array:
    """Compute the normal scores of (..., N) sequential ranks, which are counted from 0."""
    num_before = np.arange(ranks.shape[-1])
    scores: Array = ndtri((ranks + 0.5) / (num_before + 1)) / _compute_std(ranks.shape[-1])
    return scores


@cache
def _compute_std(num: int) -> Array:
    """Compute the (N,) standard deviations of the normal score of a uniform rank among 1, 2, ... N; the first is 1."""
    squares = [np.mean(ndtri((np.arange(size) + 0.5) / size) ** 2) for size in range(2, num + 1)]
    return np.sqrt(np.array([1.0, *squares]))[:num]


def make_weights(terms: Array, nuisance: Array) -> Array:
    """Convert terms to weights for sums of scores.

    Args:
        terms: (N, T) places of the trials, one column for each term.
        nuisance: (N, any) columns whose contribution is removed from the terms, such as the mean.

    Returns:
        (N, T) columns of length 1, orthogonal to the nuisance columns. A sum of scores with these weights is standard
        normal if nothing has an effect, and negative if the values improve as the term increases. A column is 0 if the
        nuisance columns explain its term.
    """
    left, sizes, _ = np.linalg.svd(nuisance, full_matrices=False)
    basis = left[:, sizes > 1e-8 * sizes[:1].sum()]
    rest = terms - basis @ (basis.T @ terms)
    lengths = np.linalg.norm(rest, axis=0)
    is_left = lengths > 1e-6 * np.maximum(1.0, np.linalg.norm(terms, axis=0))
    return np.where(is_left, rest / np.where(is_left, lengths, 1.0), 0.0)


def draw_largest_null_scores(columns: Array, *, seed: int = 0) -> Array:
    """Draw the largest absolute value of several weighted sums under the null hypothesis that nothing has an effect.

    Args:
        columns: (N, T) weights of the sums.
        seed: seed of the draws.

    Returns:
        (4000,) draws. Their quantiles are critical values for all sums together (Westfall & Young 1993).
    """
    generator = np.random.default_rng(seed)
    num = len(columns)
    largest = []
    for _ in range(_NUM_DRAWS // _DRAWS_AT_ONCE):  # in batches, because thousands of trials would fill the memory
        ranks = np.floor(generator.random((_DRAWS_AT_ONCE, num)) * np.arange(1, num + 1))
        largest.append(np.abs(_compute_scores(ranks) @ columns).max(axis=1, initial=0.0))
    return np.concatenate(largest)


def measure_trend(losses: Array, places: Array) -> float:
    """Measure whether the values improve along a range.

    Args:
        losses: (N,) losses in the order of the proposals.
        places: (N,) places of the trials in the range.

    Returns:
        A score that is standard normal if the losses do not depend on the place, and negative if they improve as the
        place increases.
    """
    return float(compute_sequential_scores(losses) @ make_weights(places[:, None], np.ones((len(losses), 1)))[:, 0])


def compute_threshold(level: float, num_tests: int) -> float:
    """Compute the critical value that any of `num_tests` one-sided tests exceeds with probability `level` (Sidak)."""
    return float(-ndtri(1 - (1 - level) ** (1 / num_tests)))


def compute_tail_probability(score: float) -> float:
    """Compute the two-sided p-value of a standard normal score."""
    return float(2 * ndtr(-abs(score)))
