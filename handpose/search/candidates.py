"""Configurations that a model of the search may propose: random ones, and changed ones of good trials."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler

from handpose.errors import UserError
from handpose.search.distributions import round_to_distribution
from handpose.search.encoding import ParamsEncoder
from handpose.search.points import draw_trial, place_values
from handpose.search.space import Params, Space

_NUM_DRAWN = 500
"""Number of random configurations that are drawn once, as candidates and as examples for the encoder."""
_MEAN_CHANGES = 1.5
"""How many draws of a configuration are changed, on average."""
_STEP = 0.15
"""Standard deviation of a small change, as a fraction of the range."""


class Candidate(NamedTuple):
    """A configuration of a search space.

    Attributes:
        draws: name -> drawn value, as the study stores it.
        distributions: name -> distribution of the draw.
        params: configuration key -> value.
    """

    draws: Params
    distributions: Mapping[str, BaseDistribution]
    params: Params


def make_candidate(space: Space, params: Params) -> Candidate | None:
    """Return the candidate with given parameters; None if they do not tell its draws.

    A Python space may draw under other names than its configuration keys.

    Args:
        space: the search space.
        params: configuration key -> value.
    """
    try:
        placed = place_values(space, params)
    except UserError:  # the space rejects what stands for the missing draws
        return None
    return Candidate(placed.draws, placed.distributions, params) if placed.params == params else None


class CandidatePool:
    """Draws candidates from a search space.

    Args:
        space: the search space.
    """

    def __init__(self, space: Space) -> None:
        self._space = space

    @cached_property
    def _drawn(self) -> list[Candidate]:
        """Random configurations, without those that a Python space rejects."""
        sampler = RandomSampler(seed=0)
        drawn = [self._draw(sampler)]  # if the first draw fails, the space is at fault
        for _ in range(3 * _NUM_DRAWN):
            if len(drawn) == _NUM_DRAWN:
                break
            with contextlib.suppress(UserError):
                drawn.append(self._draw(sampler))
        return drawn

    @cached_property
    def _vectors(self) -> np.ndarray:
        return self.encoder.encode([candidate.params for candidate in self._drawn])

    @cached_property
    def num_parameters(self) -> int:
        """Number of searched parameters."""
        drawn = (candidate.distributions.items() for candidate in self._drawn)
        return len({name for items in drawn for name, distribution in items if not distribution.single()})

    @cached_property
    def encoder(self) -> ParamsEncoder:
        """The encoder of the space."""
        examples = [candidate.params for candidate in self._drawn]
        return ParamsEncoder(examples, [candidate.distributions for candidate in self._drawn])

    def draw(
        self, rng: np.random.Generator, *, num_random: int, good: Sequence[Candidate], num_changed: int
    ) -> tuple[list[Candidate], np.ndarray]:
        """Draw candidates.

        Args:
            rng: decides what is drawn.
            num_random: number of random configurations.
            good: configurations to change, if there are any.
            num_changed: number of changed configurations.

        Returns:
            The candidates, and their vectors (n, d).
        """
        chosen = rng.choice(len(self._drawn), min(num_random, len(self._drawn)), replace=False)
        sampler = RandomSampler(seed=int(rng.integers(2**31)))
        changed = [self._change(good[index % len(good)], rng, sampler) for index in range(num_changed if good else 0)]
        together = [self._drawn[index] for index in chosen] + changed
        return together, np.concatenate([self._vectors[chosen], self.encoder.encode([each.params for each in changed])])

    def _draw(self, sampler: BaseSampler) -> Candidate:
        trial, params = draw_trial(self._space, sampler)
        return Candidate(trial.params, trial.distributions, params)

    def _place(self, point: Params, sampler: RandomSampler) -> Candidate:
        """Return the candidate with these draws; those that are missing, or that do not fit, are drawn at random."""
        trial = _PointTrial(point, sampler)
        params = self._space.sample(trial)
        return Candidate(trial.params, trial.distributions, params)

    def _change(self, candidate: Candidate, rng: np.random.Generator, sampler: RandomSampler) -> Candidate:
        """Change some draws: a number by a small step or to any other, a choice to any other."""
        names = [name for name, distribution in candidate.distributions.items() if not distribution.single()]
        num = min(len(names), max(1, int(rng.binomial(len(names), min(1.0, _MEAN_CHANGES / max(len(names), 1))))))
        changed = set(rng.choice(names, num, replace=False)) if names else set()
        point = {name: value for name, value in candidate.draws.items() if name not in changed}
        for name in sorted(changed):
            distribution = candidate.distributions[name]
            if isinstance(distribution, (FloatDistribution, IntDistribution)) and rng.random() < 0.5:
                point[name] = _step(candidate.draws[name], distribution, rng)
        try:
            return self._place(point, sampler)
        except UserError:  # the space rejects the combination
            return candidate


class _PointTrial(optuna.trial.FixedTrial):
    """A trial with given draws. Unlike Optuna's, it draws those that are missing or do not fit a conditional range.

    A trial of a study asks its sampler and its storage for each draw, and takes several times as long.

    Args:
        point: name -> drawn value.
        otherwise: draws the others.
    """

    def __init__(self, point: Params, otherwise: RandomSampler) -> None:
        super().__init__(dict(point))
        self._otherwise = otherwise

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._suggested_params:
            self._distributions[name] = distribution
            self._suggested_params[name] = self._find_value(name, distribution)
        return self._suggested_params[name]

    def _find_value(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self._params:
            with contextlib.suppress(ValueError):  # it is not among the choices
                if distribution._contains(distribution.to_internal_repr(self._params[name])):
                    return self._params[name]
        return self._otherwise.sample_independent(None, None, name, distribution)  # type: ignore[arg-type]


def _step(value: float, distribution: FloatDistribution | IntDistribution, rng: np.random.Generator) -> float:
    low, high = float(distribution.low), float(distribution.high)
    step = _STEP * float(rng.standard_normal())
    if distribution.log:
        moved = value * (high / low) ** step
    else:
        smallest = float(distribution.step or 0)
        moved = value + max(abs(step) * (high - low), smallest) * (1 if step > 0 else -1)
    return round_to_distribution(min(max(moved, low), high), distribution)
