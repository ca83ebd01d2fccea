"""The format version of the YAML files that a sweep writes, and the names that changed since earlier versions.

Events have their own version (handpose/sweep/record/events.py), and so do checkpoints
(handpose/training/checkpoints.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handpose.errors import UserError

SWEEP_YAML_FORMAT = 3
"""The version of sweep.yaml, stored under `format`. Raise it when an earlier version could not read the file.

1: no `format` key. 2: adds `held`. 3: the classes of search, schedulers and settings are in other modules.
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


def rename_options(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chosen option of each configuration group under the name that it has now."""
    return {group: RENAMED_OPTIONS.get((group, option), option) for group, option in choices.items()}


def upgrade(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert the content of a file that a sweep wrote to the names of this version.

    Args:
        content: the content of the YAML file.
        path: the path of the file, for the error message.

    Returns:
        A copy in which every `_target_` names a class of this version.

    Raises:
        UserError: a later version of the project wrote the file.
    """
    check_format(content, path)
    return {key: _with_moved_targets(value) for key, value in content.items()}


def check_format(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if the file has a later format. Files of format 1 have no `format` key."""
    version = content.get("format", 1)
    if not isinstance(version, int) or version > SWEEP_YAML_FORMAT:
        raise UserError(
            f"{path} is of format {version}, but this version of the project reads formats up to "
            f"{SWEEP_YAML_FORMAT}: use the later version that wrote it"
        )


def _with_moved_targets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MOVED.get(each, each) if key == "_target_" and isinstance(each, str) else _with_moved_targets(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_with_moved_targets(each) for each in value]
    return value
