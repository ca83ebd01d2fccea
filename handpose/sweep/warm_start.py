"""What a sweep begins with: configurations to try first, and the results of earlier sweeps.

An earlier result counts as the sweep's own only where it would have been the same here: the same metric, on the same
data, of the same schedule, and with the same value under every configuration key. Of what does not compare the best
configurations are tried first instead.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.errors import UserError
from handpose.schema import nearest
from handpose.sweep.space import ListedSpace, Params, Space, default_point, flattened, from_label, label
from handpose.sweep.study import (
    COSTS,
    PARAMS,
    PENDING,
    SamplerView,
    close_storage,
    excess,
    find_study,
    last_value,
    params_of,
    pending_trial,
    read_storage,
)

ID = "id"
"""User attribute of a study: tells it from others of the same name."""

LINEAGE = "lineage"
"""User attribute of a trial from an earlier sweep: which one's it was, and under `from` where that had it from."""


class Conditions(NamedTuple):
    """Under which a sweep's values are measured.

    fingerprint: of the data. settings: configuration key -> value, which holds for every trial that does not set it.
    """

    metric: str
    mode: Literal["min", "max"]
    max_epochs: int
    fingerprint: str | None
    settings: Mapping[str, Any]


class Beginning(NamedTuple):
    """points: draws by name, to try first. trials: from earlier sweeps, for the study. account: of each such sweep."""

    points: list[Params]
    trials: list[FrozenTrial]
    account: list[dict[str, Any]]


def begin(
    space: Space,
    conditions: Conditions,
    *,
    first: Sequence[Mapping[str, Any]],
    warm_start: Sequence[str],
    num_points: int,
    limits: Mapping[str, float],
) -> Beginning:
    """What a sweep under these conditions begins with: the default configuration, `first`, and the earlier sweeps.

    num_points: tried first of each sweep that does not compare. limits: of the constraints. Raises UserError for an
    entry of `first` that does not lie in the space, and a folder that is no sweep.
    """
    default = default_point(space, conditions.settings)
    points = [default] if default else []
    points += [_first_point(space, entry, conditions.settings) for entry in first]
    here, known = _Here(space, conditions, limits), set[tuple[str, int]]()
    trials, account = [], []
    for name in warm_start:
        found = _sort_out(_read_sweep(name), here, known)
        best = list(_best(found, here, num_points))
        points += best
        trials += found.brought
        account.append(found.account(num_points=len(best)))
    return Beginning([point for i, point in enumerate(points) if point not in points[:i]], trials, account)


# --- points from elsewhere --------------------------------------------------------------------------------------------


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


def place(space: Space, values: Mapping[str, Any]) -> Placed:
    """Put values into a space, by the names of the draws. Values are labels where they are lists."""
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "")
    pending = pending_trial(0, None)
    study = optuna.Study("", SamplerView(storage, study_id, pending), sampler=_Given(values))
    params = space.suggest(optuna.Trial(study, PENDING))
    draws, distributions = pending.params, pending.distributions
    outside = tuple(name for name in draws if name in values and not _equal(values[name], draws[name]))
    missing = tuple(name for name in draws if name not in values and not distributions[name].single())
    return Placed(draws, params, distributions, outside, missing)


def _first_point(space: Space, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Params:
    """The draws of an entry of searcher.first; what it leaves out is the default's, or else the sampler's."""
    given = {key: label(value) for key, value in entry.items()}
    placed = place(space, _labels(defaults) | given)
    for key in given:
        if key in placed.outside:
            raise UserError(
                f"searcher.first: {key}={entry[key]} is out of range; search_space={space.name} has "
                f"{_range(space, key, placed.distributions[key])}"
            )
        if key not in placed.draws and not (key in placed.params and _equal(placed.params[key], entry[key])):
            raise UserError(f"searcher.first: search_space={space.name} does not search {key}{_hint(key, placed)}")
    return placed.without([*placed.outside, *placed.missing])


def _hint(key: str, placed: Placed) -> str:
    near = nearest(key, set(placed.draws))
    return f"; did you mean {' or '.join(near)}?" if near else f" there, but {', '.join(placed.draws)}"


def _range(space: Space, key: str, distribution: BaseDistribution) -> str:
    if isinstance(space, ListedSpace):
        return f"{key}: {space.expressions[key]}"
    if isinstance(distribution, CategoricalDistribution):
        return " or ".join(str(from_label(choice)) for choice in distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return f"{distribution.low:g} to {distribution.high:g}"


class _Given(BaseSampler):
    """Draws the values it is given, and any other where there is none that fits."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
            return _fitted(self._values[param_name], param_distribution)
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[0]
        assert isinstance(param_distribution, (FloatDistribution, IntDistribution))
        return param_distribution.low


def _fitted(value: Any, distribution: BaseDistribution) -> Any:
    """The value as the distribution has it. Raises ValueError where it is out of range."""
    if isinstance(distribution, CategoricalDistribution):
        options = [choice for choice in distribution.choices if _equal(choice, value)]
    else:
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        number = int(value) if isinstance(distribution, IntDistribution) else float(value)
        options = [number] if _equal(number, value) and distribution._contains(number) else []
    if not options:
        raise ValueError(f"{value} is not of {distribution}")
    return options[0]


def _equal(one: Any, other: Any) -> bool:
    """Python has True == 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _labels(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: label(value) for key, value in values.items()}


# --- earlier sweeps ---------------------------------------------------------------------------------------------------


class _Sweep(NamedTuple):
    folder: Path
    name: str
    study: str
    revision: str | None
    conditions: Conditions
    trials: list[FrozenTrial]


def _read_sweep(given: str) -> _Sweep:
    folder = Path(given).expanduser().resolve()
    file = folder / "sweep.yaml"
    if not file.is_file():
        raise UserError(f"searcher.warm_start: {given} is no folder of a sweep, as there is no {file}")
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        config, sweep = record["config"], record["config"]["sweep"]
        settings = flattened(config) | record.get("choices", {})
        fingerprint = record["data_fingerprint"]
        conditions = Conditions(sweep["metric"], sweep["mode"], sweep["max_epochs"], fingerprint, settings)
        name, url = sweep["name"], config["searcher"].get("storage")
        revision = (record.get("git") or {}).get("revision")
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"searcher.warm_start: {file} is damaged ({type(error).__name__}: {error})") from error
    study, trials = _read_study(url, folder, name, relative_to=record.get("folder"))
    return _Sweep(folder, name, study or str(folder), revision, conditions, trials)


def _read_study(
    url: str | None, folder: Path, name: str, *, relative_to: str | None
) -> tuple[str | None, list[FrozenTrial]]:
    """Its identity, if it has one, and its trials."""
    try:
        storage = read_storage(url, folder / "study", relative_to=relative_to)
        with contextlib.closing(storage):
            found = find_study(storage.storage, name)
            if found is None:
                raise UserError(f"its study has no {name}")
            attributes = storage.storage.get_study_user_attrs(found)
            return attributes.get(ID), storage.storage.get_all_trials(found, deepcopy=False)
    except (UserError, ValueError) as error:  # ValueError: of a journal with a broken line
        raise UserError(f"searcher.warm_start: the study of {folder} cannot be read ({error})") from error
