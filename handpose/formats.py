"""The format version of the YAML files that a sweep writes, and the names that changed since earlier versions.

Events have their own version (handpose/sweep/record/events.py), and so do checkpoints
(handpose/training/checkpoints.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handpose.errors import UserError

SWEEP_YAML_FORMAT = 4
"""The version of sweep.yaml, stored under `format`. Raise it when an earlier version could not read the file.

1: no `format` key. 2: adds `held`. 3: the classes of search, schedulers and settings are in other modules.
4: `held` is `fixed_params`, and the keys of RENAMED_KEYS have their new names.
"""

MOVED = {
    "handpose.sweep.rules.Fifo": "handpose.schedulers.scheduler.Fifo",
    "handpose.sweep.rules.Asha": "handpose.schedulers.asha.Asha",
    "handpose.sweep.rules.MedianStopping": "handpose.schedulers.median.MedianStopping",
    "handpose.sweep.population.PopulationBased": "handpose.schedulers.population.PopulationBased",
    "handpose.sweep.searcher.OptunaSearcher": "handpose.search.optuna_searcher.OptunaSearcher",
    "handpose.sweep.settings.SweepSettings": "handpose.sweep.record.settings.SweepSettings",
    "handpose.sweep.settings.ConfirmSettings": "handpose.sweep.record.settings.ConfirmSettings",
    "handpose.sweep.settings.RaySettings": "handpose.sweep.record.settings.RaySettings",
}
"""The `_target_` of a class in files of format 1 and 2 -> its current `_target_`."""


RENAMED_OPTIONS = {("searcher", "optuna"): "tpe"}
"""Configuration group and an option's former name -> its name now."""

RENAMED_KEYS = {
    "sweep.set_aside_after": "sweep.quarantine_after_failures",
    "sweep.explosion_factor": "sweep.divergence_factor",
    "searcher.first": "searcher.points_to_evaluate",
}
"""A configuration key's former name -> its name now.

The command line still accepts the former names, with a warning.
"""

FORMER_CHOICES = {"searcher": "tpe"}  # until 2026-12
"""A configuration group -> its default in earlier versions, which a sweep that was begun with it keeps when resumed."""

FORMER_DEFAULTS = {
    "searcher.sampler.multivariate": None,  # joint with one objective, until 2026-11
    "searcher.sampler.group": True,
}
"""A configuration key -> its default in earlier versions, which a sweep that was begun with it keeps when resumed."""

ADDED_KEYS = {
    "folds.num": 1,  # until 2026-12
    "folds.index": 0,
    "sweep.folds": 1,
}
"""A configuration key that earlier versions did not have -> the value that does what they did."""

_RENAMED_ENTRIES = {"held": "fixed_params"}
"""A key of sweep.yaml in files before format 4 -> its name now."""

_RENAMED_EVENTS = {
    "opened": "sweep_opened",
    "asked": "trial_suggested",
    "begun": "segment_started",
    "measured": "costs_measured",
    "reported": "epoch_reported",
    "failed": "segment_failed",
    "setaside": "node_quarantined",
    "ended": "trial_ended",
    "closed": "sweep_closed",
}
"""The kind of an event in event logs before format 4 -> its name now."""

_RENAMED_FAILURES = {"mistake": "user_error", "worn": "unfit_worker"}
"""The kind of a failure in event logs before format 4 -> its name now."""


def rename_options(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chosen option of each configuration group under the name that it has now."""
    return {group: RENAMED_OPTIONS.get((group, option), option) for group, option in choices.items()}


def rename_key(override: str) -> str:
    """Return an override, such as `key=value` or `~key`, with the name that its key has now."""
    parts = re.fullmatch(r"([+~]*)([^=]*)(.*)", override, re.DOTALL)
    assert parts is not None
    prefix, key, value = parts.groups()
    return f"{prefix}{RENAMED_KEYS.get(key, key)}{value}"


def upgrade_event(kind: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Convert an event of an event log before format 4.

    Args:
        kind: the kind of the event.
        values: its fields.

    Returns:
        The kind and the fields with the names of this version.
    """
    upgraded = {"segment" if name == "stretch" else name: value for name, value in values.items()}
    if kind == "failed" and isinstance(upgraded.get("kind"), str):
        upgraded["kind"] = _RENAMED_FAILURES.get(upgraded["kind"], upgraded["kind"])
    return _RENAMED_EVENTS.get(kind, kind), upgraded


def upgrade_checkpoint_name(name: str) -> str:
    """Return the name of a trial's checkpoint as this version writes it. Earlier versions wrote `stretch_2` in it."""
    return name.replace("stretch_", "segment_")


def get_former_checkpoint_name(name: str) -> str:
    """Return the name of a trial's checkpoint as versions before format 4 wrote it."""
    return name.replace("segment_", "stretch_")


def upgrade(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert the content of a file that a sweep wrote to the names of this version.

    Args:
        content: the content of the YAML file.
        path: the path of the file, for the error message.

    Returns:
        A copy in which every `_target_` names a class of this version, and every key has its name of this version. The
        configuration also has the keys that earlier versions did not have.

    Raises:
        UserError: a later version of the project wrote the file.
    """
    check_format(content, path)
    upgraded = {_RENAMED_ENTRIES.get(key, key): _with_moved_targets(value) for key, value in content.items()}
    if isinstance(upgraded.get("config"), dict):
        upgraded["config"] = _add_config_keys(_rename_config_keys(upgraded["config"]))
    if isinstance(upgraded.get("overrides"), list):
        upgraded["overrides"] = [rename_key(item) if isinstance(item, str) else item for item in upgraded["overrides"]]
    return upgraded


def check_format(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if the file has a later format. Files of format 1 have no `format` key."""
    version = content.get("format", 1)
    if not isinstance(version, int) or version > SWEEP_YAML_FORMAT:
        raise UserError(
            f"{path} is of format {version}, but this version of the project reads formats up to "
            f"{SWEEP_YAML_FORMAT}: use the later version that wrote it"
        )


def _rename_config_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {tuple(old.split(".")): new.split(".")[1] for old, new in RENAMED_KEYS.items()}
    return {
        group: {renamed.get((group, name), name): value for name, value in values.items()}
        if isinstance(values, Mapping)
        else values
        for group, values in config.items()
    }


def _add_config_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys that an earlier version did not have. A group that is no mapping stays as it is."""
    added = dict(config)
    for key, value in ADDED_KEYS.items():
        group, name = key.split(".")
        if group != "sweep" or group in added:
            values = added.get(group, {})
            added[group] = {name: value, **values} if isinstance(values, Mapping) else values
    return added


def _with_moved_targets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MOVED.get(each, each) if key == "_target_" and isinstance(each, str) else _with_moved_targets(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_with_moved_targets(each) for each in value]
    return value
