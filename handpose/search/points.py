"""Points of a search space that no sampler draws: points to try first, grid points, results of earlier sweeps."""

import math
import random
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from handpose.errors import UserError
from handpose.plain_values import is_equal, is_same, to_json_text
from handpose.schema import find_nearest_keys
from handpose.search.distributions import count_values, get_value_at, parse_label, round_to_distribution
from handpose.search.sampler_view import SamplerView
from handpose.search.space import (
    GivenValuesSampler,
    IndependentSampler,
    Params,
    Space,
    YamlSpace,
    count_grid_points,
    find_default_point,
    list_grid_points,
)


class SpacePlacement(NamedTuple):
    """Given values, placed in a search space.

    Attributes:
        draws: name -> drawn value.
        params: configuration key -> value, as the space builds them from the draws.
        distributions: name -> distribution of the draw.
        out_of_range: names of the draws whose given value is out of range. They have the first choice or the lower end.
        missing: names of the draws without a given value that have several possible values. They have the first choice
            or the lower end.
    """

    draws: Params
    params: Params
    distributions: dict[str, BaseDistribution]
    out_of_range: tuple[str, ...]
    missing: tuple[str, ...]

    def drop_draws(self, names: Collection[str]) -> Params:
        """Return the draws without those of the given names."""
        return {name: value for name, value in self.draws.items() if name not in names}


def draw_trial(space: Space, sampler: BaseSampler, *, num_objectives: int = 1) -> tuple[FrozenTrial, Params]:
    """Draw the first trial of an empty study in memory.

    Args:
        space: the search space.
        sampler: the sampler to draw with.
        num_objectives: the number of objectives of the study.

    Returns:
        The trial, and its parameters.
    """
    return SamplerView([StudyDirection.MINIMIZE] * num_objectives).draw(space, sampler)


def place_values(space: Space, values: Mapping[str, Any]) -> SpacePlacement:
    """Place values in a space, by the names of its draws.

    Args:
        space: the search space.
        values: name -> value. Names that the space does not draw are ignored.
    """
    sampler = GivenValuesSampler(values)
    pending, params = draw_trial(space, sampler)
    return SpacePlacement(
        pending.params, params, pending.distributions, sampler.find_out_of_range(pending), sampler.find_missing(pending)
    )


def place_configuration(
    space: Space, params: Mapping[str, Any], defaults: Mapping[str, Any], *, draws: Mapping[str, Any] | None = None
) -> SpacePlacement | None:
    """Place a configuration of another search space in a space.

    Args:
        space: the search space.
        params: configuration key -> value. Keys that are missing have their default values.
        defaults: configuration key -> default value.
        draws: name -> value that was drawn in the other space, for spaces whose names are not their keys.

    Returns:
        The placed configuration, which trains the same network in the same way; None if the space does not contain it.
    """
    try:
        placed = place_values(space, {**defaults, **(draws or {}), **params})
    except UserError:  # the space rejects what stands for the missing values
        return None
    there, here = {**defaults, **params}, {**defaults, **placed.params}
    is_inside = not (placed.out_of_range or placed.missing) and not any(
        has_different_value(key, there, here) for key in {**params, **placed.params}
    )
    return placed if is_inside else None


def has_different_value(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return whether two configurations have different values of a key."""
    if key not in there or key not in here:
        return (key in there) != (key in here)
    if key.startswith("trainer."):  # for Lightning limit_train_batches=1 means one batch, but 1.0 means all batches
        return not is_same(there[key], here[key])
    return not is_equal(there[key], here[key])


def list_first_points(space: Space, first: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[Params]:
    """List the points to try first: the default configuration, if the space contains it, then the entries of `first`.

    Args:
        space: the search space.
        first: configurations to try, as configuration key -> value. Keys that an entry leaves out have their default
            value, and are left to the sampler if that is out of range.
        defaults: configuration key -> default value.

    Returns:
        The draws of each point, by name.

    Raises:
        UserError: an entry is not in the space.
    """
    default = find_default_point(space, defaults)
    return [*([default] if default else []), *(_place_first_point(space, entry, defaults) for entry in first)]


def place_added_point(space: Space, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Params:
    """Return the draws of a configuration that the user adds to a running sweep, by name.

    Args:
        space: the search space.
        entry: configuration key -> value, as an entry of `first` in `list_first_points`.
        defaults: configuration key -> default value.

    Raises:
        UserError: it is not in the space.
    """
    return _place_first_point(space, entry, defaults, place="add")


def find_most_probable_point(space: Space, defaults: Mapping[str, Any]) -> Params:
    """Return the draws with the values of the space's priors, and the default values of other parameters.

    Draws whose value is not in the space are left out.

    Args:
        space: the search space.
        defaults: configuration key -> default value.
    """
    placed = place_values(space, {**defaults, **{key: prior.value for key, prior in space.priors.items()}})
    rounded = {}
    for name in placed.out_of_range:
        distribution = placed.distributions[name]
        if name in space.priors and not space.priors[name].find_problem(distribution):  # between two steps
            assert isinstance(distribution, (FloatDistribution, IntDistribution))
            rounded[name] = round_to_distribution(space.priors[name].value, distribution)
    return placed.drop_draws([*placed.out_of_range, *placed.missing]) | rounded


def order_grid_points(space: Space, first: Sequence[Params], seed: int) -> list[Params]:
    """List every point of a grid once, in the order in which to try them.

    Points that match an entry of `first` come first. The others follow in an order drawn from the seed. Optuna's
    GridSampler is not used: after the last but one point it calls Study.stop, which raises outside Study.optimize.

    Args:
        space: the search space.
        first: draws of the points to try first, by name. They may leave names out.
        seed: the seed of the order.

    Raises:
        UserError: the points cannot be listed.
    """
    points = list_grid_points(space)
    random.Random(seed).shuffle(points)

    def place_among_first(point: Params) -> int:
        return next((i for i, one in enumerate(first) if _matches(point, one)), len(first))

    return sorted(points, key=place_among_first)


class SpacePoint(NamedTuple):
    """A point of a space.

    Attributes:
        draws: name -> drawn value.
        params: configuration key -> value, as the space builds them from the draws.
    """

    draws: Params
    params: Params


class FinitePoints:
    """The points of a finite space, built on demand. No two have the same parameters.

    Args:
        num: the number of points.
        make: builds the point at an index.
    """

    def __init__(self, num: int, make: Callable[[int], SpacePoint]) -> None:
        self.num_points = num
        self._make_point = make

    def find_untried(self, tried: Container[str], *, seed: int) -> SpacePoint | None:
        """Return the first untried point, in order from a random start; None if every point was tried.

        Args:
            tried: the parameters that were tried, as text from `to_json_text`.
            seed: the seed of the start.
        """
        start = random.Random(seed).randrange(self.num_points)
        points = (self._make_point((start + index) % self.num_points) for index in range(self.num_points))
        return next((point for point in points if to_json_text(point.params) not in tried), None)


def find_finite_points(space: Space) -> FinitePoints | None:
    """Return all points of a space, or None if they cannot be listed.

    That is so if there are infinitely many, if a Python space rejects a combination of values, or if its function would
    have to be called more than `_MAX_CALLS` times.
    """
    if isinstance(space, YamlSpace):
        return _index_grid_points(space)
    found: dict[str, SpacePoint] = {}
    sampler = _OdometerSampler()
    for _ in range(_MAX_CALLS):
        try:
            pending, params = draw_trial(space, sampler)
        except UserError:  # the space rejects this combination of values
            return None
        if sampler.is_infinite:
            return None
        found.setdefault(to_json_text(params), SpacePoint(pending.params, params))
        if not sampler.advance():
            points = list(found.values())
            return FinitePoints(len(points), points.__getitem__)
    return None


def count_possible_trials(space: Space, *, is_grid: bool, repeats: bool) -> int | None:
    """Return the largest number of trials that a search of the space can have, or None if there is no limit.

    Args:
        space: the search space.
        is_grid: every point is tried once. Otherwise a sampler proposes the points.
        repeats: trials may repeat the parameters of earlier trials.

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


class _OdometerSampler(IndependentSampler):
    """Sampler that draws every combination of values in turn, as an odometer counts, also of a conditional space.

    Attributes:
        is_infinite: a parameter was drawn from an interval, so the combinations cannot be counted.
    """

    def __init__(self) -> None:
        self.is_infinite = False
        self._indices: list[int] = []
        self._counts: list[int] = []

    def advance(self) -> bool:
        """Advance to the next combination. Returns whether there is one."""
        del self._indices[len(self._counts) :]
        self._indices += [0] * (len(self._counts) - len(self._indices))
        while self._indices and self._indices[-1] + 1 >= self._counts[len(self._indices) - 1]:
            self._indices.pop()
        self._counts = []
        if not self._indices:
            return False
        self._indices[-1] += 1
        return True

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
    return all(is_same(point[name], value) for name, value in one.items())


def _place_first_point(
    space: Space, entry: Mapping[str, Any], defaults: Mapping[str, Any], *, place: str = "searcher.points_to_evaluate"
) -> Params:
    placed = place_values(space, {**defaults, **entry})
    for key, value in entry.items():
        if key in placed.out_of_range:
            raise UserError(
                f"{place}: {key}={value} is out of range; {space.file} has "
                f"{_format_range(space, key, placed.distributions[key])}"
            )
        if key not in placed.draws and not (key in placed.params and is_equal(placed.params[key], value)):
            raise UserError(f"{place}: {space.file} does not search {key}{_suggest_key(key, placed.draws)}")
    return placed.drop_draws([*placed.out_of_range, *placed.missing])


def _suggest_key(key: str, draws: Params) -> str:
    near = find_nearest_keys(key, draws)
    return f"; did you mean {near[0]}?" if near else f"; it searches {', '.join(draws)} there"


def _format_range(space: Space, key: str, distribution: BaseDistribution) -> str:
    if isinstance(space, YamlSpace):
        return f"{key}: {space.expressions[key]}"
    if isinstance(distribution, CategoricalDistribution):
        return " or ".join(str(parse_label(choice)) for choice in distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return f"{distribution.low:g} to {distribution.high:g}"
