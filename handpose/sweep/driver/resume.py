"""Going on with a sweep: its configuration comes from its own folder, not from the command line.

A sweep that was killed may be gone on with days later, by another working folder, after its search space was edited
for the next one. So the space is copied into the folder, and the configuration is composed again and compared.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from handpose.config import compose, given_keys, location_overrides, plain, quote_override, task_overrides
from handpose.errors import UserError
from handpose.formats import SWEEP_YAML_FORMAT, upgrade
from handpose.metrics.validation import direction
from handpose.search.space import Space, fix_params, flatten_config, list_keys, load_space
from handpose.search.study import check_storage_url, hide_password
from handpose.sweep.record.provenance import PROCESS_MB, fill_in_modes
from handpose.sweep.storage.stored_sweep import download_sweep
from handpose.urls import is_url, split_url
from handpose.whole_file import expand_home
from handpose.yaml_files import load_yaml, write_yaml

_CHANGEABLE_KEYS = (
    "sweep.resume",
    "sweep.num_trials",
    "sweep.max_concurrent",
    "sweep.time_budget_s",
    "sweep.gpu_hours",
    "sweep.checkpoint_budget_gb",
    "sweep.max_retries",
    "sweep.retry_delay_s",
    "sweep.hang_timeout_s",
    "sweep.set_aside_after",
    "sweep.stop_after_failures",
    "sweep.retrain_devices",
    "sweep.preflight",
    "sweep.retrain",
    "sweep.confirm.top_k",
    "sweep.confirm.seeds",
    "paths.data",
    "paths.output",
    "paths.packed",
    "retrain.use_val",
    "report.scientific",
    "ray.address",
    "ray.num_cpus",
    "data.root",
)
"""What may be given anew: none of it touches what a trial is, or how it is judged. Data have their fingerprint."""

SPACE_FOLDER = "search_space"
"""In the folder of a sweep."""

_TASK_KEYS = ("config", "overrides", "locations", "choices")
"""What sweep.yaml has beside the provenance."""

_LOCATION_KEYS = (
    "paths.",
    "search_space",
    "sweep.folder",
    "sweep.storage",
    "data.source.root",
)
"""What differs between two places or days of the same sweep."""


@dataclass(frozen=True)
class SweepTask:
    """What tune.py is asked to do.

    overrides: as on the command line of the sweep's first day. locations: lead another process to its paths. choices:
    of configuration groups. origin: as `provenance` gives it; None for a new sweep. held: key -> value of what the
    space's file searches and the command line fixes; the space has it in every trial.
    """

    config: Any
    overrides: Sequence[str]
    locations: Sequence[str]
    choices: Mapping[str, str]
    space: Space
    origin: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Configuration key -> value of the default configuration; for a group the option chosen."""
        return flatten_config(_to_plain_config(self.config)) | dict(self.choices)


def make_new_task(config: Any) -> SweepTask:
    """The task of the command line as it stands. Raises UserError where it says a password."""
    check_storage_url(_get_unresolved_value(config, "searcher.storage"))
    choices, space = dict(HydraConfig.get().runtime.choices), load_space(config.search_space)
    values = flatten_config(_to_plain_config(config)) | choices
    held = find_fixed_params(space, given_keys(), values)
    task = (config, task_overrides(), location_overrides(config), choices)
    return SweepTask(*task, fix_params(space, held), fixed=held)


def find_fixed_params(space: Space, given: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of what the space sets and the command line gives: what is given holds for all trials.

    given: keys on the command line. values: configuration key -> value.
    """
    given = [key for key in given if key in values]
    return {key: values[name] for key in list_keys(space) if (name := key.lstrip("+")) in given} if given else {}


def describe_fixed_params(task: SweepTask) -> str:
    """What is not searched because the command line gives it, in a line; empty where there is nothing."""
    if not task.fixed:
        return ""
    values = ", ".join(quote_override(key, value) for key, value in task.fixed.items())
    return f"every trial has {values}, as given on the command line: {task.space.name} does not search it"


def make_sweep_record(task: SweepTask, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What sweep.yaml keeps of a new sweep."""
    return {
        "format": SWEEP_YAML_FORMAT,
        "config": _to_plain_config(task.config),
        **origin,
        "overrides": list(task.overrides),
        "locations": list(task.locations),
        "choices": dict(task.choices),
        "held": dict(task.fixed),
    }


def _to_plain_config(config: Any) -> dict[str, Any]:
    """The configuration as plain values, but a database by the name of the variable that may hold its password."""
    values = plain(config)
    values["searcher"]["storage"] = _get_unresolved_value(config, "searcher.storage")
    return values


def _get_unresolved_value(config: Any, key: str) -> str | None:
    """The value of a key with its interpolations."""
    group, _, name = key.rpartition(".")
    values: Any = OmegaConf.to_container(OmegaConf.select(config, group), resolve=False)
    written: str | None = values.get(name)
    return written


_BUDGET_KEYS = ("num_trials", "time_budget_s", "gpu_hours")


def save_budgets(task: SweepTask) -> None:
    """Record how much a sweep that goes on may use now, so that it need not be given again after an interrupt.

    sweep.yaml keeps the rest as it was.
    """
    file = Path(task.config.sweep.folder) / "sweep.yaml"
    record = _read_sweep_record(file.parent)
    before = record["config"]["sweep"]
    given = {name: task.config.sweep[name] for name in _BUDGET_KEYS if task.config.sweep[name] != before.get(name)}
    if not given:
        return
    keys = {f"sweep.{name}" for name in given}
    record["overrides"] = [item for item in record["overrides"] if _get_override_key(item) not in keys]
    record["overrides"] += [quote_override(f"sweep.{name}", value) for name, value in given.items()]
    before.update(given)
    write_yaml(file, record)


def copy_space(space: Space, folder: Path) -> None:
    """Copy a search space into the folder of a sweep."""
    place = folder / SPACE_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(space.file, place / space.file.name)


def load_task_to_resume(config: Any, given: Sequence[str]) -> SweepTask:
    """The task of the sweep that sweep.resume names: a folder, or the URL of one that was kept in a store.

    config: of this command line. given: its overrides, which may change little. A sweep from a store comes into the
    folder that a new one of its name would have here, and works with the paths of this process. Raises UserError where
    there is no sweep, or where what it was cannot be had any more.
    """
    place = config.sweep.resume
    if not is_url(place):
        return load_recorded_task(expand_home(place).resolve(), given)
    _check_overrides(given)
    storage, name = split_url(place)
    folder = Path(config.paths.output) / "sweeps" / name
    download_sweep(place, folder)
    return load_recorded_task(folder, given, storage=storage, locations=location_overrides(config))


def load_recorded_task(
    folder: Path, given: Sequence[str], *, storage: str | None = None, locations: Sequence[str] | None = None
) -> SweepTask:
    """The task of the sweep in a folder. storage, locations: where they are others than they were; else as above."""
    record = _read_sweep_record(folder)
    _check_overrides(given)
    new = [item for item in given if _get_override_key(item) != "sweep.resume"]
    here = [item for item in new if _get_override_key(item).startswith("paths.")]  # no part of what the trials are
    new = [item for item in new if item not in here]
    place = {"sweep.name": record["config"]["sweep"]["name"], "sweep.folder": folder, "sweep.resume": folder}
    place |= {} if storage is None else {"sweep.storage": storage}
    place |= _find_overrides_fixed_by_events(record["config"])
    replaced = {*place, *(_get_override_key(item) for item in (*new, *here))}
    kept = [item for item in record["overrides"] if _get_override_key(item) not in replaced]
    said = {_get_override_key(item) for item in kept}  # on the first day, of places too: workers hear of these last
    before = (
        record["locations"]
        if locations is None
        else [item for item in locations if _get_override_key(item) not in said]
    )
    locations = [item for item in before if _get_override_key(item) not in replaced] + here
    locations += [quote_override(key, str(value) if isinstance(value, Path) else value) for key, value in place.items()]
    config = compose("tune", [*kept, *locations, *new])
    _check_config(record["config"], _to_plain_config(config), folder)
    files = sorted((folder / SPACE_FOLDER).glob("*"))
    if len(files) != 1:
        raise UserError(f"{folder / 'search_space'} must hold the one search space of the sweep, but has {len(files)}")
    locations = [item for item in locations if _get_override_key(item) not in place]
    origin = {name: value for name, value in record.items() if name not in ("format", *_TASK_KEYS, "held", PROCESS_MB)}
    held = record.get("held") or {}  # which sweeps of earlier versions do not have
    space = fix_params(load_space(str(files[0])), held)
    return SweepTask(config, [*kept, *new], locations, record["choices"], space, origin, held)


def _find_overrides_fixed_by_events(config: Mapping[str, Any]) -> dict[str, Any]:
    """What follows sweep.num_trials in a new sweep, but was decided by in the events of one that goes on.

    A population does not grow with num_trials: further trials join it as slots become free.
    """
    size = (config.get("scheduler") or {}).get("population_size")
    return {} if size is None else {"scheduler.population_size": size}


def check_fingerprint(task: SweepTask, fingerprint: str) -> None:
    """Raise UserError where a sweep would go on with other data."""
    before = (task.origin or {}).get("data_fingerprint", fingerprint)
    if fingerprint != before:
        raise UserError(
            f"{task.config.sweep.folder} was begun with other data (fingerprint {before}, and now {fingerprint}): "
            "bring the data back, or begin a new sweep with searcher.warm_start"
        )


def _read_sweep_record(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.yaml"
    try:
        record = load_yaml(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"sweep.resume={folder}: there is no {file}, so that there is no sweep to go on with"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())})") from error
    missing = [key for key in _TASK_KEYS if key not in (record or {})]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: it is not of a sweep that can go on")
    return upgrade(record, file)


def _check_overrides(given: Sequence[str]) -> None:
    fixed = [item for item in given if _get_override_key(item) not in _CHANGEABLE_KEYS]
    if fixed:
        raise UserError(
            f"{hide_password(fixed[0])}: a sweep that goes on keeps its configuration; beside sweep.resume there "
            f"may be {', '.join(key for key in _CHANGEABLE_KEYS if key != 'sweep.resume')}"
        )


def _check_config(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """The project's own defaults may have been edited since."""
    free = (*_CHANGEABLE_KEYS, *_LOCATION_KEYS)
    ours, theirs = fill_in_modes(flatten_config(now)), fill_in_modes(flatten_config(before))
    _check_direction(theirs, folder)
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key) and not key.startswith(free):
            raise UserError(
                f"{folder / 'sweep.yaml'} has {key}={theirs.get(key)}, but configs/ now gives {ours.get(key)}: the "
                "rest of the sweep would not compare with what it has; put configs/ back, or begin a new sweep"
            )


def _check_direction(before: Mapping[str, Any], folder: Path) -> None:
    """Earlier versions took any mode, so that a sweep could optimise its metric in the wrong direction."""
    metric, mode = before["sweep.metric"], before["sweep.mode"]
    if direction(metric) not in (None, mode):
        raise UserError(
            f"{folder / 'sweep.yaml'} has sweep.mode={mode}, which is the wrong direction of sweep.metric={metric}: "
            f"the sweep cannot go on, but its trials can teach a new one: searcher.warm_start=[{folder}]"
        )


def _get_override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
