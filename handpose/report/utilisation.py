"""Where the time of trials went, how much of their CPUs and GPUs they used, and a verdict on what slowed them down.

This module reads no files and measures nothing: workers measure (handpose/sweep/trainable/utilisation_meter.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Phase = Literal["start_up", "data", "training", "validation", "report"]
"""A part of the time of a trial.

- start_up: from the start of a segment to its first training step: the worker process, the network, the data set, the
    first batch, and the measurement of costs.
- data: waiting for training batches.
- training: training steps.
- validation: validation, including its batches.
- report: checkpoints, reports, and waiting for the decision of the sweep.
"""

PHASES: tuple[Phase, ...] = ("start_up", "data", "training", "validation", "report")

PHASE_NAMES: Mapping[Phase, str] = {
    "start_up": "start-up",
    "data": "waiting for data",
    "training": "training",
    "validation": "validation",
    "report": "checkpoints and reports",
}
"""Phase -> its name in reports."""

WORKER_PREFIX = "worker/"
"""Prefix of the scalars in TensorBoard.

TensorBoard's HParams tab shows the first five scalars by name, and `val/` must come before these.
"""

Verdict = Literal[
    "busy", "starved by data", "starved by validation", "starved by start-up", "starved by reports", "unknown"
]

MIN_SHARE = 1 / 3
"""Least share of the time that a phase other than training must take to be named as the cause."""

BUSY_GPU_PERCENT = 80.0
"""A GPU in use for at least this share of the time is not waiting for data."""

IDLE_GPU_PERCENT = 50.0
"""A GPU in use for less than this share of the time has room for another trial."""


@dataclass(frozen=True)
class Utilisation:
    """What a trial used during a part of its time, such as the time between two reports.

    With several workers per trial, these are the values of the first worker. Memory and the GPU are sampled, and the
    times and the CPU time are complete. None: not measured, for example without an NVIDIA GPU.

    Attributes:
        seconds: phase -> seconds, as the program on the CPU sees them.
        cpu_percent: CPU time of the worker and its data loader processes, as a share of the cores of the worker's slot.
            It is above 100 if they use more cores than that.
        memory_mb: the largest sampled main memory of these processes, in 1e6 bytes. Memory that several processes
            share is divided among them (proportional set size).
        gpus: GPUs that the worker holds. Below 1, the next three values are those of the whole GPU, with all trials
            that share it.
        gpu_percent: share of the time in which the GPU executed anything.
        gpu_memory_mb: the largest sampled memory in use on the GPU, by all processes, in 1e6 bytes.
        gpu_power_w: mean power of the GPU in watts.
    """

    seconds: Mapping[Phase, float]
    cpu_percent: float | None = None
    memory_mb: float | None = None
    gpus: float = 0.0
    gpu_percent: float | None = None
    gpu_memory_mb: float | None = None
    gpu_power_w: float | None = None

    @property
    def total_s(self) -> float:
        """Seconds of all phases together."""
        return sum(self.seconds.values())

    def get_share(self, phase: Phase) -> float:
        """Return the share of the time that a phase took; 0 if no time was measured."""
        return self.seconds.get(phase, 0.0) / self.total_s if self.total_s else 0.0

    def to_scalars(self) -> dict[str, float]:
        """Return tag -> value of what was measured: resources, and the share of the time of each phase in percent."""
        resources = {
            "cpu_percent": self.cpu_percent,
            "memory_mb": self.memory_mb,
            "gpu_percent": self.gpu_percent,
            "gpu_memory_mb": self.gpu_memory_mb,
            "gpu_power_w": self.gpu_power_w,
        }
        shares = {f"{phase}_percent": 100 * self.get_share(phase) for phase in PHASES}
        return {f"{WORKER_PREFIX}{name}": value for name, value in {**resources, **shares}.items() if value is not None}

    def complete(self, slot_s: float) -> "Utilisation":
        """Return the same with all the time for which the slot was held, as the driver has measured it.

        The worker does not see the start of its own process, nor how long its report travels. So time that it did not
        measure counts as start-up if the first step of a segment is in this part, otherwise as report.

        Args:
            slot_s: seconds since the start of the segment, or since the last report.
        """
        phase: Phase = "start_up" if self.seconds.get("start_up") else "report"
        unseen_s = max(0.0, slot_s - self.total_s)
        return replace(self, seconds={**self.seconds, phase: self.seconds.get(phase, 0.0) + unseen_s})


class EpochUtilisation(NamedTuple):
    """What a trial used from its last report, or from the start of the segment, to the report of an epoch.

    Attributes:
        segment: number of the segment within the trial, counted from 1.
        epoch: the epoch, counted from 1.
        used: what it used.
    """

    segment: int
    epoch: int
    used: Utilisation


def combine(parts: Sequence[Utilisation]) -> Utilisation:
    """Combine the utilisation of parts of a trial, or of several trials.

    Times are added, memory is the largest, and percentages and power are means weighted by time. `gpus` is the least.

    Args:
        parts: at least one part.
    """
    return Utilisation(
        seconds={phase: sum(part.seconds.get(phase, 0.0) for part in parts) for phase in PHASES},
        cpu_percent=_average(parts, lambda part: part.cpu_percent),
        memory_mb=_find_largest(part.memory_mb for part in parts),
        gpus=min(part.gpus for part in parts),
        gpu_percent=_average(parts, lambda part: part.gpu_percent),
        gpu_memory_mb=_find_largest(part.gpu_memory_mb for part in parts),
        gpu_power_w=_average(parts, lambda part: part.gpu_power_w),
    )


def _average(parts: Iterable[Utilisation], read: Callable[[Utilisation], float | None]) -> float | None:
    known = [(value, part.total_s) for part in parts if (value := read(part)) is not None]
    weight = math.fsum(seconds for _, seconds in known)
    return math.fsum(value * seconds for value, seconds in known) / weight if weight else None


def _find_largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


class Judgement(NamedTuple):
    """What slowed a trial or a sweep down.

    Attributes:
        verdict: `busy`, what it was starved by, or `unknown`.
        phase: the phase that the verdict is about; training if it is busy.
        share: the share of the time that this phase took.
        remedy: a sentence that names the configuration keys to change; empty if there is nothing to do.
    """

    verdict: Verdict
    phase: Phase
    share: float
    remedy: str


_STARVED: Mapping[Phase, tuple[Verdict, str]] = {
    "data": (
        "starved by data",
        "Load batches in more processes (data.num_workers, with more sweep.cpus_per_trial), or keep the packed images "
        "on a local disk (paths.packed).",
    ),
    "validation": (
        "starved by validation",
        "Validate on fewer batches (trainer.limit_val_batches), or less often (trainer.check_val_every_n_epoch).",
    ),
    "start_up": (
        "starved by start-up",
        "Train longer once a trial has started: raise sweep.max_epochs, or the first rung (scheduler.grace_period).",
    ),
    "report": (
        "starved by reports",
        "Save checkpoints less often (sweep.checkpoint_every_epochs), or put the sweep on a faster disk "
        "(paths.output).",
    ),
}


_UNKNOWN_REMEDY = (
    "Batches came late, but the use of the GPU cannot be read (MIG, or a driver without NVML), so it may have been "
    "busy all the same."
)


def judge(used: Utilisation) -> Judgement:
    """Judge what slowed a trial or a sweep down.

    The rule: the longest phase other than training is the cause if it took at least a third of the time (`MIN_SHARE`).
    Otherwise it is busy. Waiting for data is no cause while the GPU is in use for at least 80 % of the time
    (`BUSY_GPU_PERCENT`): the program on the CPU runs ahead of a GPU, so it may wait for the next batch while the GPU
    still has work. On a GPU that several trials share, their common use counts, because faster loading would not make
    a full GPU faster. If the utilisation of the GPU cannot be read, the verdict is `unknown` where it would be data.

    Args:
        used: what it used; several parts or trials are combined first.
    """
    is_gpu_busy = used.gpu_percent is not None and used.gpu_percent >= BUSY_GPU_PERCENT
    causes = [phase for phase in _STARVED if not (phase == "data" and is_gpu_busy)]
    cause = max(causes, key=used.get_share)
    if used.get_share(cause) < MIN_SHARE:
        return Judgement("busy", "training", used.get_share("training"), _suggest_for_busy(used))
    verdict, remedy = _STARVED[cause]
    if cause == "data" and used.gpus and used.gpu_percent is None:
        verdict, remedy = "unknown", _UNKNOWN_REMEDY
    return Judgement(verdict, cause, used.get_share(cause), remedy)


def _suggest_for_busy(used: Utilisation) -> str:
    if used.gpu_percent is None or used.gpu_percent >= IDLE_GPU_PERCENT:
        return ""
    return (
        f"The GPU was in use only {used.gpu_percent:.0f} % of the time: let more trials share a GPU "
        "(sweep.gpus_per_trial=auto), or raise data.batch_size."
    )
