"""Slots: what a trial holds, and how many of them there are at a time."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from handpose.errors import UserError
from handpose.sweep.settings import SweepSettings


@dataclass(frozen=True)
class Slots:
    """Trials at a time, and what each of them holds: cpus and gpus for each of its workers."""

    num_slots: int
    cpus: int
    gpus: float
    workers: int = 1

    @property
    def all_gpus(self) -> float:
        """Of a trial."""
        return self.gpus * self.workers


@dataclass(frozen=True)
class Room:
    """For how many workers of trials there is room on each node, by its name, and how many a trial has."""

    workers: Mapping[str, int] = field(default_factory=dict)
    needed: int = 1

    @classmethod
    def on(cls, nodes: Iterable[tuple[str, Mapping[str, float]]], slots: Slots) -> "Room":
        """nodes: name and resources of each."""
        workers: Counter[str] = Counter()
        for name, resources in nodes:
            workers[name] += num_fitting(slots, resources)
        return cls(+workers, slots.workers)

    @property
    def nodes(self) -> set[str]:
        return set(self.workers)

    def without(self, nodes: Collection[str]) -> set[str]:
        """The other nodes, where a trial fits onto these; else none."""
        left = self.nodes.difference(nodes)
        return left if sum(self.workers[name] for name in left) >= self.needed else set()


def count_slots(sweep: SweepSettings, nodes: Sequence[Mapping[str, float]], *, gpus: float | None = None) -> Slots:
    """How many trials fit into what Ray's nodes have; raises UserError where none does.

    gpus: of a worker, where that is known better than the settings say. Until then `auto` is a whole GPU.
    """
    num_cpus, num_gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    if gpus is None:
        asked = sweep.gpus_per_trial
        gpus = float(num_gpus >= 1) if asked is None or asked == "auto" else asked
    if sweep.gpu_hours is not None and not gpus:
        raise UserError(
            f"sweep.gpu_hours={sweep.gpu_hours:g} would never be used up: trials hold no GPU (Ray has {num_gpus:g}); "
            "give sweep.time_budget_s instead"
        )
    slots = counted_again(sweep, Slots(0, sweep.cpus_per_trial, gpus, sweep.workers_per_trial), nodes)
    if slots.num_slots < 1:
        times = f" for each of sweep.workers_per_trial={slots.workers}" if slots.workers > 1 else ""
        raise UserError(
            f"no trial fits: sweep.cpus_per_trial={sweep.cpus_per_trial} and sweep.gpus_per_trial={gpus:g}{times}, but "
            f"Ray has {num_cpus:g} cores and {num_gpus:g} GPUs{_apart(nodes)}"
        )
    return slots


def counted_again(sweep: SweepSettings, slots: Slots, nodes: Sequence[Mapping[str, float]]) -> Slots:
    """The same slots on other nodes than before; there may be none. A worker does not lie across two nodes."""
    num_slots = sum(num_fitting(slots, node) for node in nodes) // slots.workers
    return replace(slots, num_slots=num_slots if sweep.max_concurrent is None else min(num_slots, sweep.max_concurrent))


def num_fitting(slots: Slots, node: Mapping[str, float]) -> int:
    """How many workers of trials a node has room for."""
    num_slots = int(node.get("CPU", 0) // slots.cpus)
    return min(num_slots, _gpu_slots(node.get("GPU", 0), slots.gpus)) if slots.gpus else num_slots


def _apart(nodes: Sequence[Mapping[str, float]]) -> str:
    return f" on {len(nodes)} nodes" if len(nodes) > 1 else ""


def _gpu_slots(num_gpus: float, per_trial: float) -> int:
    return int(num_gpus * int(1 / per_trial) if per_trial < 1 else num_gpus // per_trial)


def num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
