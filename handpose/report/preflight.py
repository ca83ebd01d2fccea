"""The cost forecast of a sweep for the terminal: a few lines, and on request a table of the measured points."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from handpose.errors import format_size
from handpose.report.formatting import format_duration, format_value
from handpose.report.trial_table import shorten_names


class PointRow(NamedTuple):
    """A measured point of the search space.

    Attributes:
        label: name of the point.
        params: configuration key -> value.
        num_parameters: number of parameters of the network.
        step_s: seconds per training step.
        trial_s: seconds of a complete trial.
        memory_mb: peak memory of a training step.
        process_mb: peak main memory of the process; NaN if it is not known.
        latency_ms: time of one image through the network.
        checkpoint_mb: size of a checkpoint.
    """

    label: str
    params: Mapping[str, Any]
    num_parameters: int
    step_s: float
    trial_s: float
    memory_mb: float
    process_mb: float
    latency_ms: float
    checkpoint_mb: float


class WorkEstimate(NamedTuple):
    """The time that some work takes.

    Attributes:
        slot_s: slot-seconds, summed over all slots.
        wall_s: seconds until the work is done.
    """

    slot_s: float
    wall_s: float


def format_trial_cost(rows: Sequence[PointRow], *, typical_s: float, gpu: str) -> str:
    """Format what one trial takes.

    Args:
        rows: the measured points.
        typical_s: mean seconds of a trial.
        gpu: name of the GPU; empty without one.
    """
    seconds, memory, parameters = zip(*((row.trial_s, row.memory_mb, row.num_parameters) for row in rows), strict=True)
    parts = [
        f"about {_format_rough_duration(typical_s)} ({_format_span(seconds, _format_rough_duration)})",
        f"{_format_span([number / 1e6 for number in parameters], '{:.2g}'.format)} million parameters",
        f"{_format_span(memory, '{:.0f}'.format)} MB of memory in a training step" + (f" on {gpu}" if gpu else ""),
    ]
    process_mb = max(row.process_mb for row in rows)
    if math.isfinite(process_mb):
        parts.append(f"{process_mb / 1e3:.1f} GB in a process")
    return "a trial     " + ", ".join(parts)


def format_sweep_cost(
    *, num_trials: int, num_slots: int, whole: WorkEstimate, expected: WorkEstimate, time_budget_s: float | None
) -> str:
    """Format what all trials take.

    Args:
        num_trials: number of trials.
        num_slots: number of concurrent trials.
        whole: the work if all trials are complete.
        expected: the expected work with early stopping.
        time_budget_s: the time that the sweep may take; None for no limit.
    """
    slots = f"{num_slots} slot{'' if num_slots == 1 else 's'}"
    line = f"the sweep   {num_trials} trials in {slots}: {_format_work(whole)}"
    if expected.slot_s < 0.99 * whole.slot_s:
        line += f" without early stopping; about {_format_work(expected)} with it"
    if time_budget_s is not None and time_budget_s < expected.wall_s:
        line += f"; sweep.time_budget_s ends it after {_format_rough_duration(time_budget_s)}"
    return line


def format_confirm_cost(*, num_runs: int, work: WorkEstimate) -> str:
    """Format what the confirmation of the finalists takes. It does not count towards the budgets of the sweep."""
    return f"to confirm  {num_runs} runs at most, afterwards: {_format_work(work)}"


def format_retrain_cost(*, epochs: int, num_seeds: int, num_devices: int, wall_s: float) -> str:
    """Format what the retraining of the winner takes at the measured speed of trials.

    Args:
        epochs: number of epochs, of all seeds together.
        num_seeds: number of seeds.
        num_devices: devices that share each batch.
        wall_s: seconds.
    """
    seeds = "" if num_seeds == 1 else f" with {num_seeds} seeds"
    devices = f"{num_devices} device{'' if num_devices == 1 else 's'}"
    return (
        f"to retrain  {epochs} epochs{seeds} on {devices}, afterwards: about {_format_rough_duration(wall_s)} at the "
        "speed of a trial"
    )


def format_total_cost(works: Sequence[WorkEstimate], *, retraining_s: float) -> str:
    """Format the total of the sweep and the confirmation (`works`), and of the retraining."""
    slot_s, wall_s = (sum(each) for each in zip(*works, strict=True))
    retraining = " and the retraining" if retraining_s else ""
    return (
        f"in all      {slot_s / 3600:.2g} slot-hours{retraining}: about {_format_rough_duration(wall_s + retraining_s)}"
    )


def format_disk_use(*, checkpoint_mb: float, needed_gb: float, budget_gb: float, free_gb: float, folder: str) -> str:
    """Format the disk space that checkpoints take.

    Args:
        checkpoint_mb: size of a checkpoint.
        needed_gb: space that the checkpoints need at least.
        budget_gb: space that the checkpoints take at most.
        free_gb: free space on the disk.
        folder: a folder on the disk.
    """
    return (
        f"the disk    {checkpoint_mb:.0f} MB per checkpoint, at least {needed_gb:.2g} GB and at most "
        f"{budget_gb:g} GB of checkpoints; {format_size(1e9 * free_gb)} free in {folder}"
    )


def format_points_table(rows: Sequence[PointRow]) -> str:
    """Format a table with one line per point. It is not truncated to the width of the terminal."""
    names = shorten_names(list(dict.fromkeys(key for row in rows for key in row.params)))
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("point", no_wrap=True)
    costs = ("parameters", "step ms", "trial", "memory MB", "latency ms", "checkpoint MB")
    for title in (*names.values(), *costs):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.label,
            *(format_value(row.params[key]) if key in row.params else "" for key in names),
            f"{row.num_parameters:,}",
            f"{1e3 * row.step_s:.3g}",
            format_duration(row.trial_s),
            f"{row.memory_mb:.0f}",
            f"{row.latency_ms:.3g}",
            f"{row.checkpoint_mb:.1f}",
        )
    console = Console(width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _format_work(work: WorkEstimate) -> str:
    return f"{work.slot_s / 3600:.2g} slot-hours, {_format_rough_duration(work.wall_s)}"


def _format_rough_duration(seconds: float) -> str:
    return format_duration(seconds, is_rough=True)


def _format_span(values: Sequence[float], shown: Any) -> str:
    least, most = shown(min(values)), shown(max(values))
    return least if least == most else f"{least} to {most}"
