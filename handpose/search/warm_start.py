"""Warm start: the configurations that a sweep tries first, and the results that it imports from earlier sweeps.

A result is imported only if the new sweep would have measured the same value: the same metric, the same data, the same
schedule, and the same value of every configuration key. Of the trials that are not comparable, the best configurations
are tried first instead.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.config import SWEEP_GROUPS
from handpose.errors import UserError
from handpose.files import expand_home
from handpose.formats import upgrade
from handpose.metrics.target import Mode, TargetMetric
from handpose.metrics.validation import get_direction
from handpose.search.points import (
    SpacePlacement,
    find_most_probable_point,
    has_different_value,
    list_first_points,
    place_values,
)
from handpose.search.space import Params, Space, flatten_config
from handpose.search.study import (
    COST_NAMES,
    PARAMS_ATTRIBUTE,
    STUDY_ID_ATTRIBUTE,
    close_storage,
    compute_excess,
    find_newest_study,
    get_last_value,
    get_trial_params,
    open_storage_for_reading,
    resolve_storage_url,
)
from handpose.yaml_files import load_yaml, read_yaml

LINEAGE_ATTRIBUTE = "lineage"
"""User attribute of an imported trial: the sweep it comes from. `from` has the lineage it already had there, if any."""

_IRRELEVANT_GROUPS = {
    *SWEEP_GROUPS,
    *("best", "checkpoints", "experiment", "folds", "logger", "num_rotations", "num_threads", "paths", "pictures"),
    *("resume", "seed", "test", "test_time"),
}
"""Groups and keys that do not affect the result of a configuration; `seed` only draws another sample of it.

`folds` has the same values in every sweep: the folds of a sweep are those of `sweep.folds`, which is compared.
"""

_IRRELEVANT_KEYS = (
    "data.num_workers",
    "data.root",  # the fingerprint identifies the data
    "data.source.num_workers",
    "data.source.root",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",  # a sweep uses sweep.max_epochs
)

_MACHINE_DEPENDENT_COSTS = ("latency_ms", "memory_mb")
"""Costs that are comparable only if measured on the same machine under the same load, which is not recorded."""


class Conditions(NamedTuple):
    """The conditions under which a sweep measures its values.

    Attributes:
        metric: the optimised metric.
        mode: `min` or `max`, its better direction.
        max_epochs: the number of epochs of a complete trial.
        fingerprint: the fingerprint of the data; None if there is none.
        settings: configuration key -> value, for the trials that do not set the key themselves.
        folds: the number of folds that a complete trial is trained with.
    """

    metric: str
    mode: Mode
    max_epochs: int
    fingerprint: str | None
    settings: Mapping[str, Any]
    folds: int = 1


@dataclass
class InitialTrials:
    """The points and trials that a sweep starts with.

    Attributes:
        points: the points to try first, each as name -> drawn value.
        origins: where each of these points comes from, in words.
        trials: the trials imported from earlier sweeps, for the study.
        import_summaries: one summary for each earlier sweep, in plain values. It counts the trials that were imported,
            were out of range (by parameter), were not comparable (by reason), had failed, had no value, or had already
            come with another sweep; and the points of the sweep that are tried first.
    """

    points: list[Params] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    trials: list[FrozenTrial] = field(default_factory=list)
    import_summaries: list[dict[str, Any]] = field(default_factory=list)


class _EarlierSweep(NamedTuple):
    folder: Path
    name: str
    study: str
    revision: str | None
    conditions: Conditions
    trials: list[FrozenTrial]


def prepare_initial_trials(
    space: Space,
    here: Conditions,
    *,
    first: Sequence[Mapping[str, Any]],
    warm_start: Sequence[str],
    num_points: int,
    limits: Mapping[str, float],
    second_objective: str | None = None,
    tries_prior: bool = False,
) -> InitialTrials:
    """Collect the points and trials that a sweep over this space starts with.

    Args:
        space: the search space.
        here: the conditions of the new sweep.
        first: configurations to try first, as configuration key -> value.
        warm_start: folders of earlier sweeps.
        num_points: how many of the best configurations of each earlier sweep to try first, among its trials that are
            not comparable.
        limits: constraint -> upper limit.
        second_objective: the cost that is the second objective. A trial without it is not comparable.
        tries_prior: try the most probable configuration of the space's prior after `first`.

    Raises:
        UserError: a configuration is not in the space, or a folder is not that of a readable sweep.
    """
    points = list_first_points(space, first, here.settings)
    given = [f"point {place} of searcher.points_to_evaluate" for place in range(1, len(first) + 1)]
    origins = ["the default configuration"] * (len(points) - len(first)) + given
    if tries_prior:
        points.append(find_most_probable_point(space, here.settings))
        origins.append("the most probable configuration of the prior")
    initial_trials = InitialTrials(points, origins)
    seen_origins: set[tuple[str, int]] = set()
    for folder in warm_start:
        _Importer(_read_earlier_sweep(folder), space, here, limits, second_objective, seen_origins).import_into(
            initial_trials, num_points
        )
    points, origins = initial_trials.points, initial_trials.origins
    kept = [i for i, point in enumerate(points) if point not in points[:i]]
    initial_trials.points, initial_trials.origins = [points[i] for i in kept], [origins[i] for i in kept]
    return initial_trials


class _Importer:
    """Importer of the trials of one earlier sweep.

    Args:
        seen_origins: (study, number) of the origin of each trial met so far, shared between the importers.
    """

    def __init__(
        self,
        sweep: _EarlierSweep,
        space: Space,
        here: Conditions,
        limits: Mapping[str, float],
        second_objective: str | None,
        seen_origins: set[tuple[str, int]],
    ) -> None:
        self._sweep, self._space, self._limits, self._seen_origins = sweep, space, limits, seen_origins
        self._second_objectives = [] if second_objective is None else [second_objective]
        self._their_settings, self._our_settings = sweep.conditions.settings, here.settings
        self._incompatibility = _find_incompatibility(sweep.conditions, here)
        self._differing_keys = {
            key
            for key in {**self._their_settings, **self._our_settings}
            if _affects_result(key) and has_different_value(key, self._their_settings, self._our_settings)
        }
        self._counts: Counter[str] = Counter()
        self._out_of_range: Counter[str] = Counter()
        self._incomparable: Counter[str] = Counter()

    def import_into(self, initial_trials: InitialTrials, num_points: int) -> None:
        others = []
        for trial in self._sweep.trials:
            refusal = self._find_rejection(trial)
            if refusal:
                self._counts[refusal] += 1
                continue
            placed = place_values(self._space, {**self._their_settings, **trial.params, **get_trial_params(trial)})
            reason = self._incompatibility or self._find_difference(trial, placed)
            if reason:
                self._incomparable[reason] += 1
                others.append(trial)
            elif name := self._find_out_of_range_key(trial, placed):
                self._out_of_range[name] += 1
            else:
                self._counts["brought"] += 1
                initial_trials.trials.append(self._make_trial(trial, placed))
        chosen = list(self._choose_best_points(others, num_points))
        initial_trials.points += [point for _, point in chosen]
        initial_trials.origins += [f"trial {number} of the earlier sweep {self._sweep.name}" for number, _ in chosen]
        initial_trials.import_summaries.append(self._summarise_import(len(chosen)))

    def _find_rejection(self, trial: FrozenTrial) -> str:
        """Return why the trial cannot be used, or an empty string if it can. It counts as seen from then on."""
        origin = _find_origin(self._make_lineage(trial))
        if origin in self._seen_origins:
            return "known"
        self._seen_origins.add(origin)
        if trial.state == TrialState.FAIL:
            return "failed"
        value = get_last_value(trial)
        return "" if value is not None and math.isfinite(value) else "without_value"

    def _find_difference(self, trial: FrozenTrial, placed: SpacePlacement) -> str:
        """Return why the new sweep would not measure the same value, or an empty string if it would.

        Differences in a key that the trial or the new space sets are left to `_find_out_of_range_key`.
        """
        for key in sorted(self._differing_keys - get_trial_params(trial).keys() - placed.params.keys()):
            theirs, ours = (each.get(key, "not there") for each in (self._their_settings, self._our_settings))
            return f"{key} was {theirs} and is {ours}"
        for name in self._second_objectives:
            if name in _MACHINE_DEPENDENT_COSTS:
                return f"{name} depends on the machine"
        lacking = [name for name in (*self._limits, *self._second_objectives) if name not in trial.user_attrs]
        if lacking:
            return f"{lacking[0]} was not measured"
        foreign = [name for name in self._limits if name in _MACHINE_DEPENDENT_COSTS]
        return f"{foreign[0]} depends on the machine" if foreign else ""

    def _find_out_of_range_key(self, trial: FrozenTrial, placed: SpacePlacement) -> str:
        """Return a parameter that cannot have the trial's value in the new space, or an empty string."""
        params = get_trial_params(trial)
        there, here = {**self._their_settings, **params}, {**self._our_settings, **placed.params}
        differing = (key for key in {**params, **placed.params} if has_different_value(key, there, here))
        return next(itertools.chain(placed.out_of_range, placed.missing, differing), "")

    def _choose_best_points(self, trials: Sequence[FrozenTrial], num_points: int) -> Iterator[tuple[int, Params]]:
        """Yield the number and the point of the best trials, the longest trained first.

        Trials out of range are left out, and so are those above a limit that does not depend on the machine.
        """
        conditions = self._sweep.conditions
        target = TargetMetric(conditions.metric, conditions.mode)

        def rank(trial: FrozenTrial) -> tuple[float, float, int]:
            value = get_last_value(trial)
            assert value is not None
            return -(trial.last_step or 0), target.to_loss(value), trial.number

        for trial in sorted(trials, key=rank):
            if num_points <= 0:
                return
            params = get_trial_params(trial)
            placed = place_values(self._space, {**self._their_settings, **trial.params, **params})
            own = [name for name in placed.out_of_range if name in params or name in trial.params]
            if own:
                self._out_of_range[own[0]] += 1
            elif not any(cost > 0 for cost in compute_excess(_get_portable_costs(trial), self._limits).values()):
                num_points -= 1
                yield trial.number, placed.drop_draws([*placed.out_of_range, *placed.missing])

    def _make_trial(self, trial: FrozenTrial, placed: SpacePlacement) -> FrozenTrial:
        """Convert a trial to one of the new study. A trial that has not ended counts as stopped at its last epoch."""
        is_complete, costs = trial.state == TrialState.COMPLETE, _get_portable_costs(trial)
        value = get_last_value(trial)
        assert value is not None
        record = create_trial(
            state=TrialState.COMPLETE if is_complete else TrialState.PRUNED,
            values=[value, *(costs[name] for name in self._second_objectives)],
            params=placed.draws,
            distributions=placed.distributions,
            user_attrs={**costs, PARAMS_ATTRIBUTE: placed.params, LINEAGE_ATTRIBUTE: self._make_lineage(trial)},
            system_attrs=compute_excess(costs, self._limits),
            intermediate_values=trial.intermediate_values,
        )
        record.datetime_start = trial.datetime_start or record.datetime_start
        record.datetime_complete = trial.datetime_complete or record.datetime_complete
        return record

    def _make_lineage(self, trial: FrozenTrial) -> dict[str, Any]:
        sweep = self._sweep
        lineage = {
            "sweep": sweep.name,
            "study": sweep.study,
            "number": trial.number,
            "data": sweep.conditions.fingerprint,
            "revision": sweep.revision,
            "folder": str(sweep.folder),
        }
        before = trial.user_attrs.get(LINEAGE_ATTRIBUTE)
        return {**lineage, "from": before} if before else lineage

    def _summarise_import(self, num_points: int) -> dict[str, Any]:
        return {
            "folder": str(self._sweep.folder),
            "sweep": self._sweep.name,
            "brought": self._counts["brought"],
            "dropped_out_of_range": dict(self._out_of_range),
            "not_comparable": dict(self._incomparable),
            "tried_first": num_points,
            **{name: self._counts[name] for name in ("failed", "without_value", "known")},
        }


def _find_incompatibility(there: Conditions, here: Conditions) -> str:
    """Return why no value of one sweep is comparable with those of the other, or an empty string if they are."""
    if (there.metric, there.mode) != (here.metric, here.mode):
        return f"it optimised {there.metric} ({there.mode})"
    if there.folds != here.folds:
        return f"it measured the mean over sweep.folds={there.folds}, not {here.folds}"
    if there.max_epochs != here.max_epochs:
        return f"its schedule ends at epoch {there.max_epochs}"
    if there.fingerprint is None or there.fingerprint != here.fingerprint:
        return "it was trained on other data"
    return ""


def _affects_result(key: str) -> bool:
    return re.split(r"[./]", key)[0] not in _IRRELEVANT_GROUPS and key not in _IRRELEVANT_KEYS


def _get_portable_costs(trial: FrozenTrial) -> dict[str, float]:
    """Return the costs that do not depend on the machine."""
    return {
        name: trial.user_attrs[name]
        for name in COST_NAMES
        if name in trial.user_attrs and name not in _MACHINE_DEPENDENT_COSTS
    }


def _find_origin(lineage: Mapping[str, Any]) -> tuple[str, int]:
    """Return the identifier of the study that trained the trial, and its number in that study."""
    while "from" in lineage:
        lineage = lineage["from"]
    return lineage["study"], lineage["number"]


def find_used_seeds(folders: Sequence[str]) -> set[int]:
    """Return the training seeds of earlier sweeps, of the sweeps they were warm-started from, and of confirmations.

    Values measured with these seeds may have led to the configurations that this sweep tries, so they cannot confirm
    them. A folder that no longer exists adds only the default seed 0. Seeds that an earlier sweep searched are not
    included.

    Args:
        folders: folders of earlier sweeps.
    """
    seeds: set[int] = set()
    for given in folders:
        folder = expand_home(given)
        config = read_yaml(folder / "sweep.yaml").get("config") or {}
        confirmed = read_yaml(folder / "confirm" / "confirm.yaml")
        seeds |= {config.get("seed", 0), *confirmed.get("seeds", [])}
        seeds |= find_used_seeds(config.get("searcher", {}).get("warm_start") or [])
    return seeds


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_earlier_sweep(given: str) -> _EarlierSweep:
    """Read the sweep in a folder. Raises UserError if there is none or it cannot be read."""
    folder = expand_home(given).resolve()
    file = folder / "sweep.yaml"
    if not file.is_file():
        raise UserError(f"searcher.warm_start={given} is not the folder of a sweep: there is no {file}")
    try:
        record = upgrade(load_yaml(file), file)
        config, sweep = record["config"], record["config"]["sweep"]
        conditions = Conditions(
            sweep["metric"],
            _resolve_mode(sweep["metric"], sweep["mode"]),
            sweep["max_epochs"] * sweep["folds"],
            record["data_fingerprint"],
            {**flatten_config(config), **record.get("choices", {})},
            sweep["folds"],
        )
        revision = (record.get("git") or {}).get("revision")
        url = resolve_storage_url(config["searcher"].get("storage"))
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"searcher.warm_start: {file} is damaged, or not the file of a sweep ({reason})") from error
    study, raised_epochs, trials = _read_study(url, folder, sweep["name"])
    conditions = conditions._replace(max_epochs=raised_epochs or conditions.max_epochs)
    return _EarlierSweep(folder, sweep["name"], study, revision, conditions, trials)


def _resolve_mode(metric: str, recorded: Mode | None) -> Mode:
    """Return the better direction of a metric. Earlier versions recorded `min` for every metric by default."""
    return recorded if recorded == "max" else get_direction(metric) or "min"


def _read_study(url: str | None, folder: Path, name: str) -> tuple[str, int | None, list[FrozenTrial]]:
    """Return the identifier of the newest study, the epochs to which trials were raised (or None), and its trials."""
    try:
        storage = open_storage_for_reading(url, folder / "study")
        try:
            found = find_newest_study(storage, name)
            if found is None:
                raise UserError(f"there is no study {name} in it")
            study, raised_epochs = found
            name = storage.get_study_user_attrs(study).get(STUDY_ID_ATTRIBUTE, str(folder))
            return name, raised_epochs, storage.get_all_trials(study, deepcopy=False)
        finally:
            close_storage(storage)
    except (OSError, ValueError, KeyError, AssertionError) as error:  # Optuna raises these for a damaged journal
        raise UserError(f"searcher.warm_start: the study of {folder} cannot be read: {error}") from error
