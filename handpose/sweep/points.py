"""Points of a search space that are not drawn but given: what is tried first, the points of a grid, earlier results."""

import difflib
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from handpose.errors import UserError
from handpose.sweep.distributions import from_label
from handpose.sweep.sampler_view import PENDING, SamplerView, pending_trial
from handpose.sweep.space import Given, ListedSpace, Params, Space, default_point, grid_points
from handpose.values import equal, same


class Placed(NamedTuple):
    """Values from elsewhere, put into a space.

    draws: by name. params: configuration keys and values that the space makes of them. distributions: of the draws.
    outside: draws whose value is out of range; missing: draws that there was no value for. Both have another one.
    """

    draws: Params
    params: Params
    distributions: dict[str, BaseDistribution]
    outside: tuple[str, ...]
    missing: tuple[str, ...]

    def without(self, names: Collection[str]) -> Params:
        """The other draws."""
        return {name: value for name, value in self.draws.items() if name not in names}


def draw(space: Space, sampler: BaseSampler, *, num_objectives: int = 1) -> tuple[FrozenTrial, Params]:
    """A first trial, of no study, and its parameters."""
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE] * num_objectives, "")
    pending = pending_trial(0, None)
    study = optuna.Study("", SamplerView(storage, study_id, pending), sampler=sampler)
    return pending, space.suggest(optuna.Trial(study, PENDING))


def place(space: Space, values: Mapping[str, Any]) -> Placed:
    """Put values into a space, by the names of the draws."""
    sampler = Given(values)
    pending, params = draw(space, sampler)
    return Placed(pending.params, params, pending.distributions, sampler.outside(pending), sampler.missing(pending))


def first_points(space: Space, first: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[Params]:
    """The draws to try first, by name: the default configuration, where it lies in the space, and what `first` has.

    What an entry leaves out is the default's, or the sampler's where that is out of range. defaults: configuration key
    -> value. Raises UserError for an entry that does not lie in the space.
    """
    default = default_point(space, defaults)
    return [*([default] if default else []), *(_first_point(space, entry, defaults) for entry in first)]


def grid_in_order(space: Space, first: Sequence[Params], seed: int) -> list[Params]:
    """Every point once, those that agree with one of `first` at the head, the others in an order drawn from the seed.

    Optuna's GridSampler is not used: told of the last point but one outside Study.optimize it calls Study.stop, which
    raises there. Raises UserError where the points cannot be listed.
    """
    points = grid_points(space)
    random.Random(seed).shuffle(points)

    def place_among_first(point: Params) -> int:
        return next((i for i, one in enumerate(first) if _agrees(point, one)), len(first))

    return sorted(points, key=place_among_first)


def _agrees(point: Params, one: Params) -> bool:
    return all(same(point[name], value) for name, value in one.items())


def _first_point(space: Space, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Params:
    placed = place(space, {**defaults, **entry})
    for key, value in entry.items():
        if key in placed.outside:
            raise UserError(
                f"searcher.first: {key}={value} is out of range; {space.file} has "
                f"{_range(space, key, placed.distributions[key])}"
            )
        if key not in placed.draws and not (key in placed.params and equal(placed.params[key], value)):
            raise UserError(f"searcher.first: {space.file} does not search {key}{_hint(key, placed.draws)}")
    return placed.without([*placed.outside, *placed.missing])


def _hint(key: str, draws: Params) -> str:
    near = [name for name in draws if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, draws, n=1)
    return f"; did you mean {near[0]}?" if near else f"; it searches {', '.join(draws)} there"


def _range(space: Space, key: str, distribution: BaseDistribution) -> str:
    if isinstance(space, ListedSpace):
        return f"{key}: {space.expressions[key]}"
    if isinstance(distribution, CategoricalDistribution):
        return " or ".join(str(from_label(choice)) for choice in distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return f"{distribution.low:g} to {distribution.high:g}"
