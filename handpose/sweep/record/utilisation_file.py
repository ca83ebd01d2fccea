"""The file utilisation.jsonl in the folder of a sweep: what each trial used, one line for each reported epoch.

The driver appends to it. It is not part of the event log, because nothing is decided from it, and because measurements
differ from run to run while the replay of events must not. A sweep of an earlier version has no such file. A line that
a crash has cut is left out.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from handpose.report.utilisation import PHASES, EpochUtilisation, Phase, Utilisation

UTILISATION_FILE = "utilisation.jsonl"

_DIGITS = 3


def append_utilisation(path: Path, trial: int, measured: EpochUtilisation) -> None:
    """Append a line. The file is created if it does not exist.

    Args:
        path: the file.
        trial: number of the trial.
        measured: what it used.

    Raises:
        OSError: the file cannot be written.
    """
    values = asdict(measured.used)
    seconds = {f"{phase}_s": round(value, _DIGITS) for phase, value in values.pop("seconds").items()}
    others = {name: round(value, _DIGITS) for name, value in values.items() if value is not None}
    line = {"trial": trial, "segment": measured.segment, "epoch": measured.epoch, **seconds, **others}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_utilisation(path: Path) -> dict[int, list[EpochUtilisation]]:
    """Read the file of a sweep, which may still be running.

    Args:
        path: the file. If it does not exist, nothing was measured.

    Returns:
        Number of a trial -> what it used, in the order in which it was reported.
    """
    measured: dict[int, list[EpochUtilisation]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            measured.setdefault(int(values["trial"]), []).append(_parse(values))
        except (ValueError, TypeError, KeyError):
            continue
    return measured


def _parse(values: Mapping[str, Any]) -> EpochUtilisation:
    seconds = cast(dict[Phase, float], {phase: float(values[f"{phase}_s"]) for phase in PHASES})
    named = {
        name: float(values[name])
        for name in ("cpu_percent", "memory_mb", "gpus", "gpu_percent", "gpu_memory_mb", "gpu_power_w")
        if name in values
    }
    return EpochUtilisation(int(values["segment"]), int(values["epoch"]), Utilisation(seconds, **named))
