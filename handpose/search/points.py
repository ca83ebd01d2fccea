"""Points of a search space that are not drawn but given: what is tried first, the points of a grid, earlier results."""

import difflib
import math
import random
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from handpose.errors import UserError
from handpose.search.distributions import count_values, get_value_at, parse_label
from handpose.search.sampler_view import PENDING_TRIAL_ID, SamplerView, make_pending_trial
from handpose.search.space import (
    GivenValuesSampler,
    Params,
    Space,
    YamlSpace,
    count_grid_points,
    find_default_point,
    list_grid_points,
)
from handpose.values import equal, same, written


class SpacePlacement(NamedTuple):
    """Values from elsewhere, put into a space.

    draws: by name. params: configuration keys and values that the space makes of them. distributions: of the draws.
    outside: draws whose value is out of range; missing: draws that there was no value for. Both have another one.
    """

    draws: Params
    params: Params
    distributions: dict[str, BaseDistribution]
    out_of_range: tuple[str, ...]
    missing: tuple[str, ...]

    def drop_draws(self, names: Collection[str]) -> Params:
        """The other draws."""
        return {name: value for name, value in self.draws.items() if name not in names}


def draw_trial(space: Space, sampler: BaseSampler, *, num_objectives: int = 1) -> tuple[FrozenTrial, Params]:
    """A first trial, of no study, and its parameters."""
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE] * num_objectives, "")
    pending = make_pending_trial(0, None)
    study = optuna.Study("", SamplerView(storage, study_id, pending), sampler=sampler)
    return pending, space.sample(optuna.Trial(study, PENDING_TRIAL_ID))


def place_values(space: Space, values: Mapping[str, Any]) -> SpacePlacement:
    """Put values into a space, by the names of the draws."""
    sampler = GivenValuesSampler(values)
    pending, params = draw_trial(space, sampler)
    return SpacePlacement(
        pending.params, params, pending.distributions, sampler.find_out_of_range(pending), sampler.find_missing(pending)
    )


def list_first_points(space: Space, first: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[Params]:
    """The draws to try first, by name: the default configuration, where it lies in the space, and what `first` has.

    What an entry leaves out is the default's, or the sampler's where that is out of range. defaults: configuration key
    -> value. Raises UserError for an entry that does not lie in the space.
    """
    default = find_default_point(space, defaults)
    return [*([default] if default else []), *(_place_first_point(space, entry, defaults) for entry in first)]


def order_grid_points(space: Space, first: Sequence[Params], seed: int) -> list[Params]:
    """Every point once, those that agree with one of `first` at the head, the others in an order drawn from the seed.

    Optuna's GridSampler is not used: told of the last point but one outside Study.optimize it calls Study.stop, which
    raises there. Raises UserError where the points cannot be listed.
    """
    points = list_grid_points(space)
    random.Random(seed).shuffle(points)

    def place_among_first(point: Params) -> int:
        return next((i for i, one in enumerate(first) if _matches(point, one)), len(first))

    return sorted(points, key=place_among_first)


class SpacePoint(NamedTuple):
    """A point of a space: draws by name, and the parameters that the space makes of them."""

    draws: Params
    params: Params


class FinitePoints:
    """All points of a space that has finitely many: `num` of them, each with other parameters, made when asked for."""

    def __init__(self, num: int, make: Callable[[int], SpacePoint]) -> None:
        self.num_points = num
        self._make_point = make

    def find_untried(self, tried: Container[str], *, seed: int) -> SpacePoint | None:
        """The first point whose parameters, as `written`, have not been tried, in turn from a random one on."""
        start = random.Random(seed).randrange(self.num_points)
        points = (self._make_point((start + index) % self.num_points) for index in range(self.num_points))
        return next((point for point in points if written(point.params) not in tried), None)


def find_finite_points(space: Space) -> FinitePoints | None:
    """All points of a space; None where there are infinitely many, or too many to call a Python space for each."""
    if isinstance(space, YamlSpace):
        return _index_grid_points(space)
    found: dict[str, SpacePoint] = {}
    sampler = _OdometerSampler()
    for _ in range(_MAX_CALLS):
        try:
            pending, params = draw_trial(space, sampler)
        except UserError:  # it does not take every combination
            return None
        if sampler.is_infinite:
            return None
        found.setdefault(written(params), SpacePoint(pending.params, params))
        if not sampler.advance():
            points = list(found.values())
            return FinitePoints(len(points), points.__getitem__)
    return None


def count_possible_trials(space: Space, *, is_grid: bool, repeats: bool) -> int | None:
    """How many trials a search of the space has at most; None where there is no such limit.

    Args:
        space: what is searched.
        is_grid: every point is tried once; otherwise a sampler proposes.
        repeats: trials may have the parameters of earlier ones.

    Raises:
        UserError: the points of a grid cannot be listed, or are too many.
    """
    if is_grid:
        return count_grid_points(space)
    points = None if repeats else find_finite_points(space)
    return None if points is None else points.num_points


def _index_grid_points(space: YamlSpace) -> FinitePoints | None:
    counts = {name: count_values(distribution) for name, distribution in space.parameters.items()}
    if None in counts.values():
        return None

    def make(index: int) -> SpacePoint:
        draws: Params = {}
        for name, distribution in space.parameters.items():
            index, place = divmod(index, counts[name] or 1)
            draws[name] = get_value_at(distribution, place)
        return SpacePoint(draws, space.build_params(draws))

    return FinitePoints(math.prod(count or 1 for count in counts.values()), make)


_MAX_CALLS = 2000


class _OdometerSampler(BaseSampler):
    """Draws every combination of values in turn, of whatever is drawn: as an odometer counts.

    is_infinite: something was drawn from an interval.
    """

    def __init__(self) -> None:
        self.is_infinite = False
        self._indices: list[int] = []
        self._counts: list[int] = []

    def advance(self) -> bool:
        """Go on to the next combination; whether there is one."""
        del self._indices[len(self._counts) :]
        self._indices += [0] * (len(self._counts) - len(self._indices))
        while self._indices and self._indices[-1] + 1 >= self._counts[len(self._indices) - 1]:
            self._indices.pop()
        self._counts = []
        if not self._indices:
            return False
        self._indices[-1] += 1
        return True

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        count = count_values(param_distribution)
        if count is None:
            self.is_infinite, count = True, 1
        place = len(self._counts)
        self._counts.append(count)
        index = self._indices[place] if place < len(self._indices) else 0
        if self.is_infinite:
            assert isinstance(param_distribution, FloatDistribution)
            return param_distribution.low
        return get_value_at(param_distribution, index)


def _matches(point: Params, one: Params) -> bool:
    return all(same(point[name], value) for name, value in one.items())


def _place_first_point(space: Space, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Params:
    placed = place_values(space, {**defaults, **entry})
    for key, value in entry.items():
        if key in placed.out_of_range:
            raise UserError(
                f"searcher.first: {key}={value} is out of range; {space.file} has "
                f"{_format_range(space, key, placed.distributions[key])}"
            )
        if key not in placed.draws and not (key in placed.params and equal(placed.params[key], value)):
            raise UserError(f"searcher.first: {space.file} does not search {key}{_suggest_key(key, placed.draws)}")
    return placed.drop_draws([*placed.out_of_range, *placed.missing])


def _suggest_key(key: str, draws: Params) -> str:
    near = [name for name in draws if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, draws, n=1)
    return f"; did you mean {near[0]}?" if near else f"; it searches {', '.join(draws)} there"


def _format_range(space: Space, key: str, distribution: BaseDistribution) -> str:
    if isinstance(space, YamlSpace):
        return f"{key}: {space.expressions[key]}"
    if isinstance(distribution, CategoricalDistribution):
        return " or ".join(str(parse_label(choice)) for choice in distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return f"{distribution.low:g} to {distribution.high:g}"
