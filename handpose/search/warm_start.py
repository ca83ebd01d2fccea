"""What a sweep begins with: configurations to try first, and the results of earlier sweeps.

A result counts as the new sweep's own only where it would have been the same there: the same metric, on the same data,
of the same schedule, and with the same value under every configuration key. Of what does not compare, the best
configurations are tried first instead.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.errors import UserError
from handpose.formats import upgrade
from handpose.metrics.target import Mode, TargetMetric
from handpose.metrics.validation import direction
from handpose.search.points import Placed, first_points, place
from handpose.search.space import Params, Space, flattened
from handpose.search.study import (
    COSTS,
    ID,
    PARAMS,
    close_storage,
    excess,
    find_study,
    last_value,
    params_of,
    read_storage,
    resolved_url,
)
from handpose.values import equal, same
from handpose.whole_file import expand_home
from handpose.yaml_files import load_yaml, read_yaml

LINEAGE = "lineage"
"""User attribute of a trial from an earlier sweep: which one's it was, and under `from` where that had it from."""

_NO_MATTER = {
    *(
        "best",
        "checkpoints",
        "experiment",
        "hydra",
        "logger",
        "num_rotations",
        "num_threads",
        "paths",
        "pictures",
        "ray",
        "report",
        "retrain",
    ),
    *("resume", "scheduler", "search_space", "searcher", "seed", "sweep", "test", "test_time"),
}
"""Groups and keys that do not change what a configuration is worth; `seed` only draws another sample of that."""

_NO_MATTER_EITHER = (
    "data.num_workers",
    "data.root",  # the data are known by their fingerprint
    "data.source.num_workers",
    "data.source.root",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",  # a sweep has its own
)

_OF_A_MACHINE = ("latency_ms", "memory_mb")
"""Costs that are not comparable as values where nobody knows that it is the same machine, and as busy."""


class Conditions(NamedTuple):
    """Under which a sweep's values are measured.

    fingerprint: of the data. settings: configuration key -> value, which holds for every trial that does not set it.
    """

    metric: str
    mode: Mode
    max_epochs: int
    fingerprint: str | None
    settings: Mapping[str, Any]


@dataclass
class Beginning:
    """What a sweep begins with.

    points: draws by name, to try first. trials: from earlier sweeps, for the study. account: of each earlier sweep, in
    plain values, what became of its trials: how many were brought in, how many lie out of range and for which
    parameter, how many do not compare and why, how many had failed, had no value, or had come with another sweep
    already, and how many of its points are tried first.
    """

    points: list[Params] = field(default_factory=list)
    trials: list[FrozenTrial] = field(default_factory=list)
    account: list[dict[str, Any]] = field(default_factory=list)


class _Sweep(NamedTuple):
    folder: Path
    name: str
    study: str
    revision: str | None
    conditions: Conditions
    trials: list[FrozenTrial]


def begin(
    space: Space,
    here: Conditions,
    *,
    first: Sequence[Mapping[str, Any]],
    warm_start: Sequence[str],
    num_points: int,
    limits: Mapping[str, float],
    second_objective: str | None = None,
) -> Beginning:
    """What a sweep over this space begins with.

    here: the conditions of the sweep. first: configurations to try. warm_start: folders of earlier sweeps; of each the
    best num_points are tried first among the trials that do not compare. limits: of the constraints. second_objective:
    without which a trial does not compare. Raises UserError for a configuration that does not lie in the space, and for
    a folder that is no sweep.
    """
    beginning = Beginning(first_points(space, first, here.settings))
    known: set[tuple[str, int]] = set()
    for folder in warm_start:
        _Importer(_read(folder), space, here, limits, second_objective, known).bring_into(beginning, num_points)
    points = beginning.points
    beginning.points = [point for i, point in enumerate(points) if point not in points[:i]]
    return beginning


class _Importer:
    """Sorts out the trials of one earlier sweep. known: (study, number) where each was first, of those met before."""

    def __init__(
        self,
        sweep: _Sweep,
        space: Space,
        here: Conditions,
        limits: Mapping[str, float],
        second_objective: str | None,
        known: set[tuple[str, int]],
    ) -> None:
        self._sweep, self._space, self._limits, self._known = sweep, space, limits, known
        self._second = [] if second_objective is None else [second_objective]
        self._there, self._here = sweep.conditions.settings, here.settings
        self._obstacle = _obstacle(sweep.conditions, here)
        self._differing = {
            key for key in {**self._there, **self._here} if _matters(key) and _differ(key, self._there, self._here)
        }
        self._counts: Counter[str] = Counter()
        self._outside: Counter[str] = Counter()
        self._incomparable: Counter[str] = Counter()

    def bring_into(self, beginning: Beginning, num_points: int) -> None:
        others = []
        for trial in self._sweep.trials:
            refusal = self._refusal(trial)
            if refusal:
                self._counts[refusal] += 1
                continue
            placed = place(self._space, {**self._there, **trial.params, **params_of(trial)})
            reason = self._obstacle or self._foreign(trial, placed)
            if reason:
                self._incomparable[reason] += 1
                others.append(trial)
            elif name := self._out_of_range(trial, placed):
                self._outside[name] += 1
            else:
                self._counts["brought"] += 1
                beginning.trials.append(self._record(trial, placed))
        points = list(self._best(others, num_points))
        beginning.points += points
        beginning.account.append(self._account(len(points)))

    def _refusal(self, trial: FrozenTrial) -> str:
        """Why nothing can be had of a trial."""
        origin = _origin(self._lineage(trial))
        if origin in self._known:
            return "known"
        self._known.add(origin)
        if trial.state == TrialState.FAIL:
            return "failed"
        value = last_value(trial)
        return "" if value is not None and math.isfinite(value) else "without_value"

    def _foreign(self, trial: FrozenTrial, placed: Placed) -> str:
        """What kept the trial's value from being measured here, that neither of the two searches."""
        for key in sorted(self._differing - params_of(trial).keys() - placed.params.keys()):
            return f"{key} was {self._there.get(key, 'not there')} and is {self._here.get(key, 'not there')}"
        for name in self._second:
            if name in _OF_A_MACHINE:
                return f"{name} depends on the machine"
        lacking = [name for name in (*self._limits, *self._second) if name not in trial.user_attrs]
        if lacking:
            return f"{lacking[0]} was not measured"
        foreign = [name for name in self._limits if name in _OF_A_MACHINE]
        return f"{foreign[0]} depends on the machine" if foreign else ""

    def _out_of_range(self, trial: FrozenTrial, placed: Placed) -> str:
        """A parameter that cannot have the trial's value here."""
        for name in (*placed.outside, *placed.missing):
            return name
        params = params_of(trial)
        there, here = {**self._there, **params}, {**self._here, **placed.params}
        for key in {**params, **placed.params}:
            if _differ(key, there, here):
                return key
        return ""

    def _best(self, trials: Sequence[FrozenTrial], num_points: int) -> Iterator[Params]:
        """Points of the best trials, the most trained first, as far as they lie in the space."""
        conditions = self._sweep.conditions
        target = TargetMetric(conditions.metric, conditions.mode)

        def rank(trial: FrozenTrial) -> tuple[float, float, int]:
            value = last_value(trial)
            assert value is not None
            return -(trial.last_step or 0), target.loss(value), trial.number

        for trial in sorted(trials, key=rank):
            if num_points <= 0:
                return
            params = params_of(trial)
            placed = place(self._space, {**self._there, **trial.params, **params})
            own = [name for name in placed.outside if name in params or name in trial.params]
            if own:
                self._outside[own[0]] += 1
            elif not any(cost > 0 for cost in excess(_costs(trial), self._limits).values()):
                num_points -= 1
                yield placed.without([*placed.outside, *placed.missing])

    def _record(self, trial: FrozenTrial, placed: Placed) -> FrozenTrial:
        """The trial as one of the new study. One that has not ended counts as stopped where it is."""
        is_complete, costs, value = trial.state == TrialState.COMPLETE, _costs(trial), last_value(trial)
        assert value is not None
        record = create_trial(
            state=TrialState.COMPLETE if is_complete else TrialState.PRUNED,
            values=[value, *(costs[name] for name in self._second)],
            params=placed.draws,
            distributions=placed.distributions,
            user_attrs={**costs, PARAMS: placed.params, LINEAGE: self._lineage(trial)},
            system_attrs=excess(costs, self._limits),
            intermediate_values=trial.intermediate_values,
        )
        record.datetime_start = trial.datetime_start or record.datetime_start
        record.datetime_complete = trial.datetime_complete or record.datetime_complete
        return record

    def _lineage(self, trial: FrozenTrial) -> dict[str, Any]:
        sweep = self._sweep
        lineage = {
            "sweep": sweep.name,
            "study": sweep.study,
            "number": trial.number,
            "data": sweep.conditions.fingerprint,
            "revision": sweep.revision,
            "folder": str(sweep.folder),
        }
        before = trial.user_attrs.get(LINEAGE)
        return {**lineage, "from": before} if before else lineage

    def _account(self, num_points: int) -> dict[str, Any]:
        return {
            "folder": str(self._sweep.folder),
            "sweep": self._sweep.name,
            "brought": self._counts["brought"],
            "dropped_out_of_range": dict(self._outside),
            "not_comparable": dict(self._incomparable),
            "tried_first": num_points,
            **{name: self._counts[name] for name in ("failed", "without_value", "known")},
        }


def _obstacle(there: Conditions, here: Conditions) -> str:
    """Why no value of a sweep compares with those of another, if so."""
    if (there.metric, there.mode) != (here.metric, here.mode):
        return f"it was judged by {there.metric} ({there.mode})"
    if there.max_epochs != here.max_epochs:
        return f"its schedule ends at epoch {there.max_epochs}"
    if there.fingerprint is None or there.fingerprint != here.fingerprint:
        return "it was trained on other data"
    return ""


def _differ(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two configurations have different values under a key."""
    if key not in there or key not in here:
        return (key in there) != (key in here)
    if key.startswith("trainer."):  # for Lightning limit_train_batches=1 is one batch, and 1.0 all of them
        return not same(there[key], here[key])
    return not equal(there[key], here[key])


def _matters(key: str) -> bool:
    return re.split(r"[./]", key)[0] not in _NO_MATTER and key not in _NO_MATTER_EITHER


def _costs(trial: FrozenTrial) -> dict[str, float]:
    """What the trial costs on any machine."""
    return {name: trial.user_attrs[name] for name in COSTS if name in trial.user_attrs and name not in _OF_A_MACHINE}


def _origin(lineage: Mapping[str, Any]) -> tuple[str, int]:
    """The study and the number under which a trial was trained."""
    while "from" in lineage:
        lineage = lineage["from"]
    return lineage["study"], lineage["number"]


def training_seeds(folders: Sequence[str]) -> set[int]:
    """Return the seeds that earlier sweeps, those they began with, and their confirmations have trained with.

    Values of these seeds may have led to the configurations that this sweep tries, so they confirm nothing. A folder
    that is no longer there is left out, and so are seeds that an earlier sweep has searched.
    """
    seeds: set[int] = set()
    for given in folders:
        folder = expand_home(given)
        config = read_yaml(folder / "sweep.yaml").get("config") or {}
        confirmed = read_yaml(folder / "confirm" / "confirm.yaml")
        seeds |= {config.get("seed", 0), *confirmed.get("seeds", [])}
        seeds |= training_seeds(config.get("searcher", {}).get("warm_start") or [])
    return seeds


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(given: str) -> _Sweep:
    """The sweep in a folder. Raises UserError where there is none that can be read."""
    folder = expand_home(given).resolve()
    file = folder / "sweep.yaml"
    if not file.is_file():
        raise UserError(f"searcher.warm_start={given} is not the folder of a sweep: there is no {file}")
    try:
        record = load_yaml(file)
        record = upgrade(record, file)
        config, sweep = record["config"], record["config"]["sweep"]
        conditions = Conditions(
            sweep["metric"],
            _mode(sweep["metric"], sweep["mode"]),
            sweep["max_epochs"],
            record["data_fingerprint"],
            {**flattened(config), **record.get("choices", {})},
        )
        revision = (record.get("git") or {}).get("revision")
        url = resolved_url(config["searcher"].get("storage"))
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"searcher.warm_start: {file} is not that of a sweep, or damaged ({reason})") from error
    study, trials = _read_study(url, folder, sweep["name"])
    return _Sweep(folder, sweep["name"], study, revision, conditions, trials)


def _mode(metric: str, recorded: Mode | None) -> Mode:
    """The better direction of a metric. Earlier versions recorded `min` for every metric unless told otherwise."""
    return recorded if recorded == "max" else direction(metric) or "min"


def _read_study(url: str | None, folder: Path, name: str) -> tuple[str, list[FrozenTrial]]:
    """What tells the study from others, and its trials."""
    try:
        storage = read_storage(url, folder / "study")
        try:
            found = find_study(storage, name)
            if found is None:
                raise UserError(f"there is no study {name} in it")
            attributes = storage.get_study_user_attrs(found)
            return attributes.get(ID, str(folder)), storage.get_all_trials(found, deepcopy=False)
        finally:
            close_storage(storage)
    except (OSError, ValueError, KeyError, AssertionError) as error:  # what Optuna raises for a damaged journal
        raise UserError(f"searcher.warm_start: the study of {folder} cannot be read: {error}") from error
