"""Slots: the resources that a trial holds, and how many trials run at a time."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from handpose.errors import UserError
from handpose.resources import Memory
from handpose.sweep.record.settings import SweepSettings

MIN_PROCESS_MB = 500.0
"""Memory in MB of a worker that has imported torch, Lightning and timm (518 MiB measured), without shared files."""
_RAY_BYTES = 0.6e9
"""Bytes for Ray's processes (280 MiB measured), its object store, shared libraries and future growth of tune.py."""
_DRIVER_BYTES = 0.7e9
"""Bytes that tune.py takes (580 MiB measured)."""
_MEMORY_THRESHOLD = 0.95
"""Fraction of a node's memory above which Ray kills workers (RAY_memory_usage_threshold)."""


@dataclass(frozen=True)
class Slots:
    """The number of trials that run at a time, and the resources that each of them holds.

    Attributes:
        num_slots: number of trials that run at a time.
        cpus: CPU cores of each worker.
        gpus: GPUs of each worker; may be a fraction.
        num_workers: number of workers of a trial.
        process_mb: main memory of each worker in MB.
    """

    num_slots: int
    cpus: int
    gpus: float
    num_workers: int = 1
    process_mb: float = MIN_PROCESS_MB

    @property
    def process_bytes(self) -> float:
        """Main memory of a worker in bytes, rounded up, as Ray needs it."""
        return math.ceil(1e6 * self.process_mb)

    @property
    def total_gpus(self) -> float:
        """GPUs of a trial: those of all its workers."""
        return self.gpus * self.num_workers


@dataclass(frozen=True)
class NodeCapacity:
    """How many workers of trials fit on each node.

    Attributes:
        workers_by_node: name of the node -> number of workers that fit on it.
        num_workers_needed: number of workers of a trial.
    """

    workers_by_node: Mapping[str, int] = field(default_factory=dict)
    num_workers_needed: int = 1

    @classmethod
    def from_nodes(cls, nodes: Iterable[tuple[str, Mapping[str, float]]], slots: Slots) -> "NodeCapacity":
        """Count the workers that fit on each node.

        Args:
            nodes: name and resources of each node. Nodes with the same name are added up.
            slots: the resources that a trial holds.
        """
        workers: Counter[str] = Counter()
        for name, resources in nodes:
            workers[name] += count_fitting_workers(slots, resources)
        return cls(+workers, slots.num_workers)

    @property
    def nodes(self) -> set[str]:
        """Names of the nodes on which at least one worker fits."""
        return set(self.workers_by_node)

    def find_nodes_without(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes other than these; empty if no trial would fit on them."""
        left = self.nodes.difference(nodes)
        return left if sum(self.workers_by_node[name] for name in left) >= self.num_workers_needed else set()


def count_slots(
    sweep: SweepSettings,
    nodes: Sequence[Mapping[str, float]],
    *,
    gpus: float | None = None,
    process_mb: float = MIN_PROCESS_MB,
) -> Slots:
    """Count how many trials fit into the cores, GPUs and memory of Ray's nodes.

    Args:
        sweep: the settings.
        nodes: Ray's resources of each node: `CPU`, `GPU`, and `memory` in bytes.
        gpus: GPUs of a worker, to be used instead of the settings. Without it, `auto` is a whole GPU if there is one.
        process_mb: main memory of a worker in MB, if it has been measured.

    Raises:
        UserError: no trial fits, or `sweep.gpu_hours` is given although trials hold no GPU.
    """
    num_cpus, num_gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    if gpus is None:
        asked = sweep.gpus_per_trial
        gpus = float(num_gpus >= 1) if asked is None or asked == "auto" else asked
    if sweep.gpu_hours is not None and not gpus:
        raise UserError(
            f"sweep.gpu_hours={sweep.gpu_hours:g} would never be spent: trials use no GPU (Ray has {num_gpus:g}); "
            "give sweep.time_budget_s instead"
        )
    slots = recount_slots(sweep, Slots(0, sweep.cpus_per_trial, gpus, sweep.workers_per_trial, process_mb), nodes)
    if slots.num_slots < 1:
        if recount_slots(sweep, replace(slots, process_mb=0.0), nodes).num_slots:
            raise UserError(_explain_memory_shortage(slots, nodes))
        raise UserError(
            f"no trial fits: sweep.cpus_per_trial={sweep.cpus_per_trial} and sweep.gpus_per_trial={gpus:g}"
            f"{_format_for_each_worker(slots)}, but Ray has {num_cpus:g} cores and {num_gpus:g} "
            f"GPUs{_format_num_nodes(nodes)}"
        )
    return slots


def recount_slots(sweep: SweepSettings, slots: Slots, nodes: Sequence[Mapping[str, float]]) -> Slots:
    """Count the same slots again on other nodes. The result may be 0.

    A trial may use several nodes, but each worker runs on a single node.
    """
    num_slots = count_all_slots(slots, nodes)
    return replace(slots, num_slots=num_slots if sweep.max_concurrent is None else min(num_slots, sweep.max_concurrent))


def count_all_slots(slots: Slots, nodes: Iterable[Mapping[str, float]]) -> int:
    """Count how many trials fit on nodes, even if the user allows fewer."""
    return sum(count_fitting_workers(slots, node) for node in nodes) // slots.num_workers


def count_fitting_workers(slots: Slots, node: Mapping[str, float]) -> int:
    """Return how many workers of trials fit on a node."""
    num_slots = int(node.get("CPU", 0) // slots.cpus)
    if slots.process_mb:
        num_slots = int(min(num_slots, node.get("memory", math.inf) // slots.process_bytes))
    return min(num_slots, _count_gpu_slots(node.get("GPU", 0), slots.gpus)) if slots.gpus else num_slots


def format_memory(sweep: SweepSettings, slots: Slots, nodes: Sequence[Mapping[str, float]]) -> str:
    """Describe that memory allows fewer trials at a time than cores and GPUs do; empty if it does not."""
    without_limit = recount_slots(sweep, replace(slots, process_mb=0.0), nodes).num_slots
    if slots.num_slots >= without_limit:
        return ""
    return (
        f"the memory  {_format_process(slots)}, and {_format_memory(nodes)}: {slots.num_slots} run at a time instead "
        f"of {without_limit}; a smaller data.batch_size needs less memory"
    )


def _explain_memory_shortage(slots: Slots, nodes: Sequence[Mapping[str, float]]) -> str:
    return (
        f"no trial fits: {_format_process(slots)}{_format_for_each_worker(slots)}, but only {_format_memory(nodes)}; "
        "end other programs, "
        "raise the memory limit of the container or job (docker run --memory, limits.memory of a pod, --mem of Slurm), "
        "or give a smaller data.batch_size"
    )


def _format_for_each_worker(slots: Slots) -> str:
    return f" for each of sweep.workers_per_trial={slots.num_workers}" if slots.num_workers > 1 else ""


def _format_process(slots: Slots) -> str:
    return f"the process of a trial may take {slots.process_mb / 1e3:.1f} GB"


def _format_memory(nodes: Sequence[Mapping[str, float]]) -> str:
    amounts = sorted(node["memory"] / 1e9 for node in nodes if "memory" in node and node.get("CPU"))
    least, most = f"{amounts[0]:.1f}", f"{amounts[-1]:.1f}"
    span = least if least == most else f"{least} to {most}"
    return f"{span} GB of memory are free for trials" + (" on each node" if len(nodes) > 1 else "")


def compute_trial_memory(memory: Memory, *, with_driver: bool = False) -> int:
    """Compute how much memory trials can use before Ray or the kernel kills one of them.

    Args:
        memory: memory of the machine.
        with_driver: whether tune.py will run on the machine, too, and has not been started yet.

    Returns:
        Bytes, at least 1.
    """
    kept = (1 - _MEMORY_THRESHOLD) * memory.total + _RAY_BYTES + (_DRIVER_BYTES if with_driver else 0)
    return max(1, int(memory.available - kept))


def _format_num_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    return f" on {len(nodes)} nodes" if len(nodes) > 1 else ""


def _count_gpu_slots(num_gpus: float, per_trial: float) -> int:
    return int(num_gpus * int(1 / per_trial) if per_trial < 1 else num_gpus // per_trial)
