"""The version of the YAML files that a sweep leaves behind, and what has been renamed since earlier versions.

Events have a version of their own (handpose/sweep/record/events.py), and so have checkpoints
(handpose/training/checkpoints.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handpose.errors import UserError

SWEEP_YAML_FORMAT = 3
"""Version of sweep.yaml, as its `format`; to be raised when an earlier version could not read what is written.

1: says no version. 2: `held`. 3: classes of search, schedulers and settings lie in other modules.
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
"""The `_target_` of a class in files of format 1 and 2 -> its `_target_` now."""


def upgrade(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Bring the content of a file that a sweep has written to the names of this version.

    Args:
        content: what the YAML file holds.
        path: of the file, for the error.

    Returns:
        A copy in which every `_target_` names a class of this version.

    Raises:
        UserError: a later version has written the file.
    """
    check_format(content, path)
    return {key: _with_moved_targets(value) for key, value in content.items()}


def check_format(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a file of a later format. Files of format 1 do not say so."""
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
