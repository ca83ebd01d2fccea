"""Rank tests that hold for trials proposed by a sampler that learns from the trials before.

TPE and Gaussian processes propose new trials near those that did well. A test that assumes even draws, or that shuffles
the values among the trials, then finds effects in pure noise: a trial that was good by luck has followers, which lie
where it lies. The tests here compare each trial only with the trials proposed before it. If no parameter has an effect,
the rank of a trial's value among the earlier values is uniform, and independent of where the sampler put the trial,
whatever the sampler has learnt (sequential ranks: Renyi 1962; Barndorff-Nielsen 1963). Their sum, weighted by where the
trials lie, is a martingale with a known variance.

Letters: N trials in the order of their proposal, T terms.
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
        losses: (N,) values in the order of the proposals; smaller is better. Ties share their mean rank.

    Returns:
        (N,) normal scores with mean 0 and variance 1 if the values are exchangeable; negative is better than before.
        The first one is 0, since there is nothing to compare it with.
    """
    ranks, before = [], list[float]()
    for loss in losses.tolist():
        low, high = bisect_left(before, loss), bisect_right(before, loss)
        ranks.append((low + high) / 2)
        before.insert(high, loss)
    return _compute_scores(np.array(ranks))


def _compute_scores(ranks: Array) -> Array:
    """Normal scores of (..., N) sequential ranks, counted from 0."""
    num_before = np.arange(ranks.shape[-1])
    scores: Array = ndtri((ranks + 0.5) / (num_before + 1)) / _compute_std(ranks.shape[-1])
    return scores


@cache
def _compute_std(num: int) -> Array:
    """(N,) standard deviation of the normal scores of a uniform rank among 1, 2, ... N; 1 for the first."""
    squares = [np.mean(ndtri((np.arange(size) + 0.5) / size) ** 2) for size in range(2, num + 1)]
    return np.sqrt(np.array([1.0, *squares]))[:num]


def make_weights(terms: Array, nuisance: Array) -> Array:
    """Turn terms into the weights of sums of scores.

    Args:
        terms: (N, T) where the trials lie, a column for each term.
        nuisance: (N, any) columns whose part in the terms is removed, such as the mean.

    Returns:
        (N, T) columns of length 1, orthogonal to the nuisance. A sum of scores with these weights is standard normal if
        nothing has an effect, and negative where a larger term goes with better values. A column is 0 if the nuisance
        explains its term.
    """
    left, sizes, _ = np.linalg.svd(nuisance, full_matrices=False)
    basis = left[:, sizes > 1e-8 * sizes[:1].sum()]
    rest = terms - basis @ (basis.T @ terms)
    lengths = np.linalg.norm(rest, axis=0)
    is_left = lengths > 1e-6 * np.maximum(1.0, np.linalg.norm(terms, axis=0))
    return np.where(is_left, rest / np.where(is_left, lengths, 1.0), 0.0)


def draw_largest_null_scores(columns: Array, *, seed: int = 0) -> Array:
    """Draw how large the largest of several weighted sums is, in size, when nothing has an effect.

    Args:
        columns: (N, T) weights.
        seed: of the draws.

    Returns:
        (4000,) draws. Their quantiles are the limits that hold for all sums together (Westfall & Young 1993).
    """
    generator = np.random.default_rng(seed)
    num = len(columns)
    largest = []
    for _ in range(_NUM_DRAWS // _DRAWS_AT_ONCE):  # in parts, since thousands of trials would fill the memory
        ranks = np.floor(generator.random((_DRAWS_AT_ONCE, num)) * np.arange(1, num + 1))
        largest.append(np.abs(_compute_scores(ranks) @ columns).max(axis=1, initial=0.0))
    return np.concatenate(largest)


def measure_trend(losses: Array, places: Array) -> float:
    """Measure whether the values improve along a range.

    Args:
        losses: (N,) values in the order of the proposals.
        places: (N,) where the trials lie in the range.

    Returns:
        Standard normal if the values do not depend on the place; negative where they improve with it.
    """
    return float(compute_sequential_scores(losses) @ make_weights(places[:, None], np.ones((len(losses), 1)))[:, 0])


def compute_threshold(level: float, num_tests: int) -> float:
    """The standard normal value that one of `num_tests` one-sided tests exceeds with probability `level` (Sidak)."""
    return float(-ndtri(1 - (1 - level) ** (1 / num_tests)))


def compute_tail_probability(score: float) -> float:
    """The probability that a standard normal variable exceeds `score` in size."""
    return float(2 * ndtr(-abs(score)))
