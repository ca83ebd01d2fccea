"""Slots: what a trial holds, and how many of them there are at a time."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from handpose.errors import UserError
from handpose.sweep.settings import SweepSettings


@dataclass(frozen=True)
class Slots:
    """Trials at a time, and what each of them holds."""

    num_slots: int
    cpus: int
    gpus: float


def count_slots(sweep: SweepSettings, resources: Mapping[str, float], *, gpus: float | None = None) -> Slots:
    """How many trials fit into what Ray has; raises UserError where none does.

    gpus: of a trial, where that is known better than the settings say. Until then `auto` is a whole GPU.
    """
    if gpus is None:
        asked = sweep.gpus_per_trial
        gpus = float(resources.get("GPU", 0) >= 1) if asked is None or asked == "auto" else asked
    num_slots = int(resources.get("CPU", 0) // sweep.cpus_per_trial)
    if gpus:
        num_slots = min(num_slots, _gpu_slots(resources.get("GPU", 0), gpus))
    if num_slots < 1:
        raise UserError(
            f"no trial fits: sweep.cpus_per_trial={sweep.cpus_per_trial} and sweep.gpus_per_trial={gpus:g}, but Ray "
            f"has {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs"
        )
    num_slots = num_slots if sweep.max_concurrent is None else min(num_slots, sweep.max_concurrent)
    return Slots(num_slots, sweep.cpus_per_trial, gpus)


def _gpu_slots(num_gpus: float, per_trial: float) -> int:
    return int(num_gpus * int(1 / per_trial) if per_trial < 1 else num_gpus // per_trial)


def num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
