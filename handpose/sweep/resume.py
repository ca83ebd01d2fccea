"""Going on with a sweep: its configuration comes from its own folder, not from the command line.

A sweep that was killed may be gone on with days later, by another working folder, after its search space was edited
for the next one. So the space is copied into the folder, and the configuration is composed again and compared.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from handpose.config import compose, location_overrides, plain, quote_override, task_overrides
from handpose.errors import UserError
from handpose.sweep.provenance import FORMAT, check_format
from handpose.sweep.space import Space, flattened, load_space
from handpose.sweep.store import is_url, parent_and_name
from handpose.sweep.stored_sweep import brought_back
from handpose.sweep.study import check_url, without_password

_CHANGEABLE = (
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

_OF_TASK = ("config", "overrides", "locations", "choices")
"""What sweep.yaml has beside the provenance."""

_ELSEWHERE = (
    "paths.",
    "search_space",
    "sweep.folder",
    "sweep.storage",
    "data.source.root",
    "scheduler.population_size",
)
"""What differs between two places or days of the same sweep."""


@dataclass(frozen=True)
class Task:
    """What tune.py is asked to do.

    overrides: as on the command line of the sweep's first day. locations: lead another process to its paths. choices:
    of configuration groups. origin: as `provenance` gives it; None for a new sweep.
    """

    config: Any
    overrides: Sequence[str]
    locations: Sequence[str]
    choices: Mapping[str, str]
    space: Space
    origin: Mapping[str, Any] | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Configuration key -> value of the default configuration; for a group the option chosen."""
        return flattened(_recorded(self.config)) | dict(self.choices)


def new_task(config: Any) -> Task:
    """The task of the command line as it stands. Raises UserError where it says a password."""
    check_url(_as_written(config, "searcher.storage"))
    choices = dict(HydraConfig.get().runtime.choices)
    return Task(config, task_overrides(), location_overrides(config), choices, load_space(config.search_space))


def description(task: Task, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What sweep.yaml keeps of a new sweep."""
    return {
        "format": FORMAT,
        "config": _recorded(task.config),
        **origin,
        "overrides": list(task.overrides),
        "locations": list(task.locations),
        "choices": dict(task.choices),
    }


def _recorded(config: Any) -> dict[str, Any]:
    """The configuration as plain values, but a database by the name of the variable that may hold its password."""
    values = plain(config)
    values["searcher"]["storage"] = _as_written(config, "searcher.storage")
    return values


def _as_written(config: Any, key: str) -> str | None:
    """The value of a key with its interpolations."""
    group, _, name = key.rpartition(".")
    values: Any = OmegaConf.to_container(OmegaConf.select(config, group), resolve=False)
    written: str | None = values.get(name)
    return written


def keep_space(space: Space, folder: Path) -> None:
    """Copy a search space into the folder of a sweep."""
    place = folder / "search_space"
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(space.file, place / space.file.name)


def task_to_resume(config: Any, given: Sequence[str]) -> Task:
    """The task of the sweep that sweep.resume names: a folder, or the URL of one that was kept in a store.

    config: of this command line. given: its overrides, which may change little. A sweep from a store comes into the
    folder that a new one of its name would have here, and works with the paths of this process. Raises UserError where
    there is no sweep, or where what it was cannot be had any more.
    """
    place = config.sweep.resume
    if not is_url(place):
        return recorded_task(Path(place).expanduser().resolve(), given)
    _check_changes(given)
    storage, name = parent_and_name(place)
    folder = Path(config.paths.output) / "sweeps" / name
    brought_back(place, folder)
    return recorded_task(folder, given, storage=storage, locations=location_overrides(config))


def recorded_task(
    folder: Path, given: Sequence[str], *, storage: str | None = None, locations: Sequence[str] | None = None
) -> Task:
    """The task of the sweep in a folder. storage, locations: where they are others than they were; else as above."""
    record = _record(folder)
    _check_changes(given)
    new = [item for item in given if _key(item) != "sweep.resume"]
    here = [item for item in new if _key(item).startswith("paths.")]  # no part of what the trials are
    new = [item for item in new if item not in here]
    place = {"sweep.name": record["config"]["sweep"]["name"], "sweep.folder": folder, "sweep.resume": folder}
    place |= {} if storage is None else {"sweep.storage": storage}
    replaced = {*place, *(_key(item) for item in (*new, *here))}
    kept = [item for item in record["overrides"] if _key(item) not in replaced]
    said = {_key(item) for item in kept}  # on the first day, of places too: workers hear of these last
    before = record["locations"] if locations is None else [item for item in locations if _key(item) not in said]
    locations = [item for item in before if _key(item) not in replaced] + here
    locations += [quote_override(key, str(value)) for key, value in place.items()]
    config = compose("tune", [*kept, *locations, *new])
    _check_config(record["config"], _recorded(config), folder)
    files = sorted((folder / "search_space").glob("*"))
    if len(files) != 1:
        raise UserError(f"{folder / 'search_space'} must hold the one search space of the sweep, but has {len(files)}")
    locations = [item for item in locations if _key(item) not in place]
    origin = {name: value for name, value in record.items() if name not in ("format", *_OF_TASK)}
    return Task(config, [*kept, *new], locations, record["choices"], load_space(str(files[0])), origin)


def check_data(task: Task, fingerprint: str) -> None:
    """Raise UserError where a sweep would go on with other data."""
    before = (task.origin or {}).get("data_fingerprint", fingerprint)
    if fingerprint != before:
        raise UserError(
            f"{task.config.sweep.folder} was begun with other data (fingerprint {before}, and now {fingerprint}): "
            "bring the data back, or begin a new sweep with searcher.warm_start"
        )


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.yaml"
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"sweep.resume={folder}: there is no {file}, so that there is no sweep to go on with"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())})") from error
    missing = [key for key in _OF_TASK if key not in (record or {})]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: it is not of a sweep that can go on")
    check_format(record, file)
    return dict(record)


def _check_changes(given: Sequence[str]) -> None:
    fixed = [item for item in given if _key(item) not in _CHANGEABLE]
    if fixed:
        raise UserError(
            f"{without_password(fixed[0])}: a sweep that goes on keeps its configuration; beside sweep.resume there "
            f"may be {', '.join(key for key in _CHANGEABLE if key != 'sweep.resume')}"
        )


def _check_config(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """The project's own defaults may have been edited since."""
    free = (*_CHANGEABLE, *_ELSEWHERE)
    ours, theirs = flattened(now), flattened(before)
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key) and not key.startswith(free):
            raise UserError(
                f"{folder / 'sweep.yaml'} has {key}={theirs.get(key)}, but configs/ now gives {ours.get(key)}: the "
                "rest of the sweep would not compare with what it has; put configs/ back, or begin a new sweep"
            )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
