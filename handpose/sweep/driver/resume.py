"""Resumes a sweep: its configuration comes from its own folder, not from the command line.

A killed sweep may be resumed days later, from another working folder, after its search space was edited for the next
sweep. Therefore the space is copied into the sweep's folder, and the configuration is composed again and compared.
"""

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from handpose.budget import BudgetSettings
from handpose.config import compose, list_location_overrides, override_key, quote_override, to_plain_values
from handpose.errors import UserError, join_lines
from handpose.files import expand_home, write_atomically
from handpose.formats import FORMER_CHOICES, FORMER_DEFAULTS, SWEEP_YAML_FORMAT, rename_options, upgrade
from handpose.metrics.validation import get_direction
from handpose.program import list_given_keys, list_task_overrides
from handpose.search.space import Space, fix_params, flatten_config, list_keys, load_space, parse_space
from handpose.search.study import check_storage_url
from handpose.sweep.record.events import (
    EVENTS_FILE,
    Event,
    SpaceRecord,
    SweepSteered,
    read_events,
    scan_event_lines,
)
from handpose.sweep.record.interventions import LIMITS
from handpose.sweep.record.provenance import PROCESS_MB, fill_in_modes
from handpose.sweep.storage.stored_sweep import download_sweep
from handpose.urls import hide_secrets, is_url, split_url
from handpose.yaml_files import load_yaml, write_yaml

_CHANGEABLE_KEYS = (
    "sweep.resume",
    "sweep.num_trials",
    "sweep.max_concurrent",
    "sweep.time_budget_s",
    "sweep.gpu_hours",
    "sweep.stop_when",
    "sweep.checkpoint_budget_gb",
    "sweep.max_retries",
    "sweep.retry_delay_s",
    "sweep.hang_timeout_s",
    "sweep.quarantine_after_failures",
    "sweep.stop_after_failures",
    "sweep.retrain_devices",
    "sweep.preflight",
    "sweep.retrain",
    "sweep.confirm.top_k",
    "sweep.confirm.seeds",
    "budget.minutes",
    "budget.hours",
    "budget.gpu_hours",
    "budget.finish_by",
    "paths.data",
    "paths.output",
    "paths.packed",
    "retrain.use_val",
    "retrain.seeds",
    "retrain.predict",
    "report.scientific",
    "notify.events",
    "notify.gap_s",
    "ray.address",
    "ray.num_cpus",
    "ray.autoscale",
    "ray.node_timeout_s",
    "ray.weight",
    "data.root",
)
"""Keys that may change when a sweep is resumed.

None of them changes what a trial is or how it is judged. Other data are detected by their fingerprint.
"""

SPACE_FOLDER = "search_space"
"""Folder for the copy of the search space, in the folder of a sweep.

Spaces to which the user has changed are in folders of this name followed by `_2`, `_3` and so on.
"""

_TASK_KEYS = ("config", "overrides", "locations", "choices")
"""Required keys of sweep.yaml, in addition to the provenance."""

_LOCATION_KEYS = (
    "budget._target_",  # sweeps of earlier versions have no budget
    "paths.",
    "search_space",
    "sweep.folder",
    "sweep.storage",
    "data.source.root",
)
"""Keys and key prefixes that may differ when the same sweep runs at another place or on another day."""


@dataclass(frozen=True)
class SweepTask:
    """What tune.py is asked to run.

    Attributes:
        config: the composed configuration.
        overrides: the overrides that define the sweep, as they were given on the command line.
        locations: overrides that give another process the paths of this one.
        choices: configuration group -> chosen option.
        space: the search space; the newest one if the user has changed it while the sweep ran.
        origin: the result of `collect_provenance`; None for a new sweep.
        fixed: key -> value of what the space's file searches but the command line fixes. Every trial has these values.
        steered: key -> value of limits that the user has changed while the sweep ran, and that sweep.yaml lacks.
        last_intervention: id of the last intervention whose limits are in `config`; empty if there is none.
        earlier_spaces: the search spaces before the newest one, in order.
    """

    config: Any
    overrides: Sequence[str]
    locations: Sequence[str]
    choices: Mapping[str, str]
    space: Space
    origin: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    steered: Mapping[str, Any] = field(default_factory=dict)
    last_intervention: str = ""
    earlier_spaces: Sequence[Space] = ()

    @property
    def spaces(self) -> list[Space]:
        """All search spaces, in the order in which the user has chosen them."""
        return [*self.earlier_spaces, self.space]

    def load_space(self, record: SpaceRecord) -> Space:
        """Make a search space to which the user has changed, with what the command line fixes. May run its code.

        Raises:
            UserError: something in it cannot be searched.
        """
        return _load_later_space(record, Path(record.name), self.fixed)

    @property
    def defaults(self) -> dict[str, Any]:
        """Configuration key -> value in the default configuration; for a group, the chosen option."""
        return flatten_config(_to_plain_config(self.config)) | dict(self.choices)


def make_new_task(config: Any) -> SweepTask:
    """Make the task of a new sweep from the command line.

    Raises:
        UserError: the storage URL of the searcher contains a password, or the search space is invalid.
    """
    check_study_url(config)
    choices, space = dict(HydraConfig.get().runtime.choices), load_space(config.search_space)
    values = flatten_config(_to_plain_config(config)) | choices
    fixed = find_fixed_params(space, list_given_keys(), values)
    task = (config, list_task_overrides(), list_location_overrides(config), choices)
    return SweepTask(*task, fix_params(space, fixed), fixed=fixed)


def check_study_url(config: Any) -> None:
    """Raise UserError if `searcher.storage`, as the user wrote it, contains a password."""
    check_storage_url(_get_unresolved_value(config, "searcher.storage"))


def find_fixed_params(space: Space, given: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that the space sets and the command line fixes for all trials.

    Args:
        space: the search space.
        given: keys on the command line.
        values: configuration key -> value.

    Returns:
        Key -> value.
    """
    given = [key for key in given if key in values]
    return {key: values[name] for key in list_keys(space) if (name := key.lstrip("+")) in given} if given else {}


def describe_fixed_params(task: SweepTask) -> str:
    """Return a line about the parameters that the command line fixes; empty if there are none."""
    if not task.fixed:
        return ""
    values = ", ".join(quote_override(key, value) for key, value in task.fixed.items())
    return f"every trial has {values}, as given on the command line: {task.spaces[0].name} does not search it"


def make_sweep_record(task: SweepTask, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of sweep.yaml for a new sweep."""
    config = _to_plain_config(task.config)
    # Recorded, because the metric may be in a folder of the user that is not given when the sweep is read.
    config["sweep"]["mode"] = config["sweep"]["mode"] or get_direction(config["sweep"]["metric"])
    return {
        "format": SWEEP_YAML_FORMAT,
        "config": config,
        **origin,
        "overrides": list(task.overrides),
        "locations": list(task.locations),
        "choices": dict(task.choices),
        "fixed_params": dict(task.fixed),
    }


def _to_plain_config(config: Any) -> dict[str, Any]:
    """Return the configuration as plain values. The storage URL keeps the variable that may hold its password."""
    values = to_plain_values(config)
    if "storage" in values["searcher"]:
        values["searcher"]["storage"] = _get_unresolved_value(config, "searcher.storage")
    return values


def _get_unresolved_value(config: Any, key: str) -> str | None:
    """Return the value of a key without resolving its interpolations."""
    group, _, name = key.rpartition(".")
    values: Any = OmegaConf.to_container(OmegaConf.select(config, group), resolve=False)
    written: str | None = values.get(name)
    return written


_LAST_INTERVENTION = "last_intervention"
"""Key of sweep.yaml: id of the last intervention whose limits it contains."""

_BUDGET_KEYS = {
    "sweep": LIMITS,
    "budget": ("minutes", "hours", "gpu_hours", "finish_by"),
}


def read_recorded_budget(folder: Path) -> BudgetSettings | None:
    """Return the budget in the sweep.yaml of a folder; None if a version without budgets has written it.

    Raises:
        UserError: sweep.yaml is missing or damaged.
    """
    recorded = _read_sweep_record(folder)["config"].get("budget")
    return None if recorded is None else BudgetSettings(**{name: recorded[name] for name in _BUDGET_KEYS["budget"]})


def save_budgets(task: SweepTask) -> None:
    """Record the new budgets of a resumed sweep in sweep.yaml, so that a later resume need not repeat them.

    The rest of sweep.yaml does not change.
    """
    file = Path(task.config.sweep.folder) / "sweep.yaml"
    record = _read_sweep_record(file.parent)
    given = {
        f"{group}.{name}": task.config[group][name]
        for group, names in _BUDGET_KEYS.items()
        for name in names
        if task.config[group][name] != record["config"].get(group, task.config[group]).get(name)
    }
    if not given and task.last_intervention == record.get(_LAST_INTERVENTION, ""):
        return
    record |= {_LAST_INTERVENTION: task.last_intervention} if task.last_intervention else {}
    _replace_overrides(record, given)
    for key, value in given.items():
        group, _, name = key.partition(".")
        record["config"][group][name] = value
    write_yaml(file, {**record, "format": SWEEP_YAML_FORMAT})


def change_task(task: SweepTask, values: Mapping[str, Any]) -> SweepTask:
    """Return a new sweep's task with other values (configuration key -> value), as if the user had given them."""
    config = copy.deepcopy(task.config)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    kept = [item for item in task.overrides if override_key(item) not in values]
    return replace(
        task, config=config, overrides=[*kept, *(quote_override(key, value) for key, value in values.items())]
    )


def copy_space(space: Space, folder: Path) -> None:
    """Copy a search space into the folder of a sweep."""
    place = folder / SPACE_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(space.file, place / space.file.name)


def load_task_to_resume(config: Any, given: Sequence[str]) -> SweepTask:
    """Load the task of the sweep that `sweep.resume` names: a folder, or the URL of a sweep in a store.

    A sweep from a store is downloaded to the folder that a new sweep of this name would have here. It uses the paths of
    this process.

    Args:
        config: the configuration of this command line.
        given: the overrides of this command line; only a few keys may change.

    Raises:
        UserError: there is no sweep, its files are damaged, or its configuration cannot be composed again.
    """
    place = config.sweep.resume
    if not is_url(place):
        return load_recorded_task(expand_home(place).resolve(), given, is_steered=True)
    check_task_overrides(given)
    storage, name = split_url(place)
    folder = Path(config.paths.output) / "sweeps" / name
    download_sweep(place, folder)
    locations = list_location_overrides(config)
    return load_recorded_task(folder, given, storage=storage, locations=locations, is_steered=True)


def load_recorded_task(
    folder: Path,
    given: Sequence[str],
    *,
    storage: str | None = None,
    locations: Sequence[str] | None = None,
    is_steered: bool = False,
) -> SweepTask:
    """Load the task of the sweep in a folder.

    Args:
        folder: the folder of the sweep.
        given: the overrides of this command line; only a few keys may change.
        storage: the new folder of sweeps in the store; None: as recorded.
        locations: the new overrides for paths; None: as recorded.
        is_steered: whether limits that the user has changed while the sweep ran replace those in sweep.yaml. The newest
            statement counts, so `given` replaces both.

    Raises:
        UserError: as for `load_task_to_resume`.
    """
    record = _read_sweep_record(folder)
    check_task_overrides(given)
    steered, last = _read_steered_limits(folder, record) if is_steered else ({}, record.get(_LAST_INTERVENTION, ""))
    steered = {key: value for key, value in steered.items() if key not in map(override_key, given)}
    _replace_overrides(record, steered)
    new = [item for item in given if override_key(item) != "sweep.resume"]
    new += _drop_other_unit(new)
    here = [item for item in new if override_key(item).startswith("paths.")]  # do not define trials
    new = [item for item in new if item not in here]
    place = {"sweep.name": record["config"]["sweep"]["name"], "sweep.folder": folder, "sweep.resume": folder}
    place |= {} if storage is None else {"sweep.storage": storage}
    replaced = {*place, *(override_key(item) for item in (*new, *here))}
    kept = [item for item in record["overrides"] if override_key(item) not in replaced]
    kept += _list_former_defaults(record)
    kept_keys = {override_key(item) for item in kept}  # they may set locations too; workers apply them last
    before = (
        record["locations"]
        if locations is None
        else [item for item in locations if override_key(item) not in kept_keys]
    )
    locations = [item for item in before if override_key(item) not in replaced] + here
    locations += [quote_override(key, str(value) if isinstance(value, Path) else value) for key, value in place.items()]
    config = compose("tune", [*kept, *locations, *new])
    _keep_initial_budget(config, record["config"])
    _check_config(record["config"], _to_plain_config(config), folder)
    files = sorted((folder / SPACE_FOLDER).glob("*"))
    if len(files) != 1:
        raise UserError(f"{folder / 'search_space'} must hold the one search space of the sweep, but has {len(files)}")
    locations = [item for item in locations if override_key(item) not in place]
    origin = {
        name: value
        for name, value in record.items()
        if name not in ("format", *_TASK_KEYS, "fixed_params", PROCESS_MB, _LAST_INTERVENTION)
    }
    fixed = record.get("fixed_params") or {}  # sweeps of earlier versions lack the key
    spaces = [fix_params(load_space(str(files[0])), fixed)]
    for number, each in enumerate(list_later_spaces(_read_valid_events(folder / EVENTS_FILE)), start=2):
        spaces.append(_load_later_space(each, _make_space_path(folder, number, each), fixed))
    task = SweepTask(config, [*kept, *new], locations, record["choices"], spaces[-1], origin, fixed, steered, last)
    return replace(task, earlier_spaces=spaces[:-1])


def _read_valid_events(file: Path) -> Iterator[Event]:
    """Yield the events that can be read. The audit describes a damaged file, and a sweep is not resumed from it."""
    content = file.read_bytes() if file.is_file() else b""
    yield from (line.event for line in scan_event_lines(content) if line.event is not None)


def list_later_spaces(events: Iterable[Event]) -> list[SpaceRecord]:
    """List the search spaces to which the user has changed, in order."""
    return [event.space for event in events if isinstance(event, SweepSteered) and event.space is not None]


def write_later_spaces(events: Iterable[Event], folder: Path) -> None:
    """Write the search spaces to which the user has changed into the folder of the sweep, for whoever reads it.

    The events contain them, so that nothing depends on these files.
    """
    for number, record in enumerate(list_later_spaces(events), start=2):
        file = _make_space_path(folder, number, record)
        if not file.is_file() or file.read_bytes() != record.text.encode():
            file.parent.mkdir(exist_ok=True)
            with write_atomically(file) as part:
                part.write_bytes(record.text.encode())


def _make_space_path(folder: Path, number: int, record: SpaceRecord) -> Path:
    return folder / f"{SPACE_FOLDER}_{number}" / record.name


def _load_later_space(record: SpaceRecord, file: Path, fixed: Mapping[str, Any]) -> Space:
    space = parse_space(record.text, file)
    keys = list_keys(space) if fixed else []
    return fix_params(space, {key: value for key, value in fixed.items() if key in keys})


def _read_steered_limits(folder: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return key -> value of the limits that interventions have changed since sweep.yaml, and the last one's id."""
    values: dict[str, Any] = {}
    last = record.get(_LAST_INTERVENTION, "")
    steered = [event for event in read_events(folder / EVENTS_FILE) if isinstance(event, SweepSteered)]
    ids = [event.intervention for event in steered]
    for event in steered[ids.index(last) + 1 if last in ids else 0 :]:
        values |= {f"sweep.{name}": value for name, value in event.limits.items() if name in LIMITS}
        last = event.intervention
    return values, last


def _list_former_defaults(record: Mapping[str, Any]) -> list[str]:
    """Return an override for each group and key with the default of an earlier version, if none is given yet."""
    recorded = flatten_config(record["config"])
    given = {override_key(item) for item in record["overrides"]}
    recorded |= rename_options(record["choices"])
    return [
        quote_override(key, value)
        for key, value in {**FORMER_CHOICES, **FORMER_DEFAULTS}.items()
        if key in recorded and recorded[key] == value and key not in given
    ]


def _replace_overrides(record: dict[str, Any], values: Mapping[str, Any]) -> None:
    record["overrides"] = [item for item in record["overrides"] if override_key(item) not in values]
    record["overrides"] += [quote_override(key, value) for key, value in values.items()]


def _keep_initial_budget(config: Any, before: Mapping[str, Any]) -> None:
    """Give the scheduler the values with which the sweep started where it refers to keys that may change.

    The scheduler's earlier decisions depend on them. The size of a population, `${sweep.num_trials}`, is one: if the
    sweep is resumed with more trials, these join the population as slots become free.
    """
    recorded = before.get("scheduler") or {}
    for name in config.scheduler:
        if OmegaConf.is_interpolation(config.scheduler, name) and name in recorded:
            OmegaConf.update(config, f"scheduler.{name}", recorded[name])


def check_fingerprint(task: SweepTask, fingerprint: str) -> None:
    """Raise UserError if a sweep would be resumed with other data."""
    before = (task.origin or {}).get("data_fingerprint", fingerprint)
    if fingerprint != before:
        raise UserError(
            f"{task.config.sweep.folder} was started with other data (fingerprint {before}, and now {fingerprint}): "
            "bring the data back, or start a new sweep with searcher.warm_start"
        )


def _read_sweep_record(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.yaml"
    try:
        record = load_yaml(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"sweep.resume={folder}: there is no {file}, so there is no sweep to resume") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is damaged ({join_lines(error)})") from error
    missing = [key for key in _TASK_KEYS if key not in (record or {})]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: this sweep cannot be resumed")
    return upgrade(record, file)


def _drop_other_unit(given: Sequence[str]) -> list[str]:
    """Return an override that removes the recorded `budget.minutes` if `budget.hours` is given, and the reverse."""
    units = {"budget.minutes": "budget.hours", "budget.hours": "budget.minutes"}
    keys = {override_key(item) for item in given}
    return [f"{units[key]}=null" for key in keys & units.keys() if units[key] not in keys]


def check_task_overrides(given: Sequence[str]) -> None:
    """Raise UserError if an override changes what must stay the same when a sweep is resumed."""
    fixed = [item for item in given if override_key(item) not in _CHANGEABLE_KEYS]
    places = [hide_secrets(item.partition("=")[2]) for item in given if override_key(item) == "sweep.resume"]
    place = places[0] if places else "DIR"
    if fixed and override_key(fixed[0]) == "sweep.max_epochs":
        raise UserError(
            f"{fixed[0]}: the epochs of a sweep that has begun are raised by a command, which resuming executes: "
            f"python -m handpose.sweep.control {place} epochs N, with N above the present number"
        )
    if fixed and override_key(fixed[0]) == "search_space":
        raise UserError(
            f"{fixed[0]}: the search space of a sweep that has begun is changed by a command, which resuming executes: "
            f"python -m handpose.sweep.control {place} space {fixed[0].partition('=')[2]}"
        )
    if fixed:
        raise UserError(
            f"{hide_secrets(fixed[0])}: a resumed sweep keeps its configuration; besides sweep.resume you can "
            f"give {', '.join(key for key in _CHANGEABLE_KEYS if key != 'sweep.resume')}"
        )


def _check_config(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Check that the resumed configuration equals the recorded one: the defaults in configs/ may have been edited."""
    free = (*_CHANGEABLE_KEYS, *_LOCATION_KEYS)
    ours, theirs = fill_in_modes(flatten_config(now)), fill_in_modes(flatten_config(before))
    _check_direction(theirs, folder)
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key) and not key.startswith(free):
            raise UserError(
                f"{folder / 'sweep.yaml'} has {key}={theirs.get(key)}, but configs/ now gives {ours.get(key)}: the "
                "rest of the sweep would not be comparable with its first part; restore configs/, or start a new sweep"
            )


def _check_direction(before: Mapping[str, Any], folder: Path) -> None:
    """Check the recorded mode: earlier versions accepted a mode that optimises the metric in the wrong direction."""
    metric, mode = before["sweep.metric"], before["sweep.mode"]
    if get_direction(metric) not in (None, mode):
        raise UserError(
            f"{folder / 'sweep.yaml'} has sweep.mode={mode}, which is the wrong direction of sweep.metric={metric}: "
            f"the sweep cannot be resumed, but a new sweep can learn from its trials: searcher.warm_start=[{folder}]"
        )
