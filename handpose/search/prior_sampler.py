"""Draws from the priors of a search space, and how often a sweep draws from them.

The probability of such a draw falls with the number of results. It also depends on whether the best trials so far are
where the prior says: as in PriorBand (Mallik et al. 2023, arXiv:2306.12370), the prior is weighed by its density there.
PriorBand compares it with the neighbourhood of the best configuration; here it is compared with a uniform draw.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from handpose.search.prior import Prior
from handpose.search.space import Params

_BEST_FRACTION = 1 / 3
"""The fraction of the trials that count as good, as with ASHA's reduction factor."""
_MAX_DENSITY = 3.0
"""The largest density that a good trial counts with, so that one trial near the centre of the prior does not decide."""
_DECAY = 10.0
"""The number of results after which the factor is one half."""


class PriorSampler(BaseSampler):
    """Sampler that draws the parameters that have a prior from it, and the others with another sampler.

    Args:
        sampler: draws the parameters without a prior, or whose prior does not fit a conditional range.
        priors: name -> prior.
        seed: the seed of the draws from the priors.

    Attributes:
        sampler: the other sampler.
        drawn: the names of the parameters drawn from a prior.
    """

    def __init__(self, sampler: BaseSampler, priors: Mapping[str, Prior], *, seed: int) -> None:
        self.drawn: set[str] = set()
        self.sampler, self._priors, self._generator = sampler, priors, np.random.default_rng(seed)

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        found = self.sampler.sample_relative(study, trial, search_space)
        return {name: value for name, value in found.items() if name not in self._priors}

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        prior = self._priors.get(param_name)
        if prior is None or prior.find_problem(param_distribution):
            return self.sampler.sample_independent(study, trial, param_name, param_distribution)
        self.drawn.add(param_name)
        return prior.sample(param_distribution, self._generator)


def sum_log_densities(
    priors: Mapping[str, Prior], draws: Params, distributions: Mapping[str, BaseDistribution]
) -> float:
    """Sum the logarithms of the relative densities of the draws that have a prior which fits.

    Args:
        priors: name -> prior.
        draws: name -> drawn value, as the study stores it.
        distributions: name -> distribution of the draw.
    """
    return sum(
        float(prior.log_density([draws[name]], distributions[name])[0])
        for name, prior in priors.items()
        if name in draws and not prior.find_problem(distributions[name])
    )


def compute_prior_probability(log_densities: Sequence[float], *, initial: float) -> float:
    """Compute the probability that the next proposal is drawn from the prior.

    It is the initial one, multiplied by a factor that falls with the number of results, and by the mean density of the
    best third of the trials, up to a limit.

    Args:
        log_densities: the logarithm of the density under the prior, relative to a uniform draw, of each trial with a
            result; the best trial first.
        initial: the probability before there are results.
    """
    num = len(log_densities)
    best = log_densities[: math.ceil(num * _BEST_FRACTION)]
    top = math.log(_MAX_DENSITY)
    density = sum(math.exp(min(each, top)) for each in best) / len(best) if best else 1.0
    return min(initial * _DECAY / (_DECAY + num) * density, 1.0)


def limit_prior_probability(num_results: int, *, initial: float) -> float:
    """Return the largest probability of a draw from the prior after a number of results."""
    return min(initial * _DECAY / (_DECAY + num_results) * _MAX_DENSITY, 1.0)
