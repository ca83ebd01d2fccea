"""What a worker tells the driver while it trains a segment of a trial."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ray
from ray import tune

from handpose.sweep.record.events import CheckpointRecord, FailureKind
from handpose.sweep.record.trial_segment import TrialSegment

if TYPE_CHECKING:
    pass

SEGMENT_KEY, CHECKPOINT_KEY, COSTS_KEY, AVOIDED_NODES_KEY, NODE_ID_KEY = (
    "stretch",
    "checkpoint",
    "costs",
    "avoided",
    "node_id",
)
"""Keys of Tune's configuration and results. Values lie in a list each, which Tune does not take apart."""


class TrialFunction(Protocol):
    """What a worker runs: it trains the stretch and reports each epoch. Tests have cheap ones."""

    def __call__(self, segment: TrialSegment, /) -> None: ...


class WorkerContext(NamedTuple):
    """This process among those that train a trial together.

    tell: takes what Tune is to hear, and does not return when the stretch ends here; only that of the first one, with
    rank 0, tells.
    """

    rank: int
    num_workers: int
    report: Callable[[Mapping[str, Any]], None]


SINGLE_WORKER = WorkerContext(0, 1, lambda values: tune.report(dict(values)))


_worker_context = SINGLE_WORKER


@contextlib.contextmanager
def set_worker_context(context: WorkerContext) -> Iterator[None]:
    """Be that one for the length of a block."""
    global _worker_context
    before, _worker_context = _worker_context, context
    try:
        yield
    finally:
        _worker_context = before


def get_worker_context() -> WorkerContext:
    """What this process is."""
    return _worker_context


class LostWorkerError(Exception):
    """A worker of several died, or its node did. kind: of failure. node_id: where, if that is known."""

    def __init__(self, kind: FailureKind, text: str, node_id: str = "") -> None:
        super().__init__(kind, text, node_id)
        self.kind = kind
        self.text = text
        self.node_id = node_id

    def __str__(self) -> str:
        return self.text


class UnfitWorkerError(Exception):
    """The worker's process is unfit for another trial, which begins again in a new one without losing a try."""


def report_epoch(
    epoch: int,
    metrics: Mapping[str, float],
    *,
    resumed_from: int = 0,
    checkpoint: CheckpointRecord | None = None,
    note: str = "",
) -> None:
    """Tell Tune the metrics after an epoch, counted from 1. Does not return when the stretch ends here.

    resumed_from: epoch of the checkpoint that the stretch went on from. checkpoint: saved after this epoch. note: what
    went wrong without ending the stretch.
    """
    progress = {"epoch": epoch, "resumed_from": resumed_from, CHECKPOINT_KEY: [checkpoint], "note": note}
    get_worker_context().report({**metrics, **progress, NODE_ID_KEY: _get_node_id()})


def report_costs(costs: Mapping[str, float]) -> None:
    """Tell Tune what the trial costs, before it is trained. Does not return when that is too much."""
    get_worker_context().report({"epoch": 0, COSTS_KEY: [dict(costs)]})


def _get_node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
