"""What a worker reports to the driver while it trains a segment of a trial."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import ray
from ray import tune

from handpose.report.utilisation import Utilisation
from handpose.sweep.record.events import CheckpointRecord, FailureKind
from handpose.sweep.record.trial_segment import TrialSegment

SEGMENT_KEY, CHECKPOINT_KEY, COSTS_KEY, UTILISATION_KEY, AVOIDED_NODES_KEY, NODE_ID_KEY = (
    "segment",
    "checkpoint",
    "costs",
    "utilisation",
    "avoided",
    "node_id",
)
"""Keys of Tune's configuration and results.

Except for the node id, each value is wrapped in a list, because Tune would flatten it otherwise.
"""


class TrialFunction(Protocol):
    """The function that a worker runs: it trains the segment and reports each epoch. Tests use cheap ones."""

    def __call__(self, segment: TrialSegment, /) -> None: ...


class WorkerContext(NamedTuple):
    """The role of this process among the workers that train a trial together.

    Attributes:
        rank: rank of this worker; only rank 0 reports to Tune.
        num_workers: number of workers of the trial.
        report: takes the values of a report. It does not return if the segment ends at this report.
    """

    rank: int
    num_workers: int
    report: Callable[[Mapping[str, Any]], None]


SINGLE_WORKER = WorkerContext(0, 1, lambda values: tune.report(dict(values)))


_worker_context = SINGLE_WORKER


@contextlib.contextmanager
def set_worker_context(context: WorkerContext) -> Iterator[None]:
    """Set this process's worker context within a `with` block."""
    global _worker_context
    before, _worker_context = _worker_context, context
    try:
        yield
    finally:
        _worker_context = before


def get_worker_context() -> WorkerContext:
    """Return this process's worker context."""
    return _worker_context


class LostWorkerError(Exception):
    """One of several workers of a trial died, or its node did.

    Args:
        kind: the kind of the failure.
        text: the message.
        node_id: the node of the worker; empty if it is unknown.
    """

    def __init__(self, kind: FailureKind, text: str, node_id: str = "") -> None:
        super().__init__(kind, text, node_id)
        self.kind = kind
        self.text = text
        self.node_id = node_id

    def __str__(self) -> str:
        return self.text


class UnfitWorkerError(Exception):
    """The worker process is unfit for another trial. The trial starts again in a new process; this is not a retry."""


def report_epoch(
    epoch: int,
    metrics: Mapping[str, float],
    *,
    resumed_from: int = 0,
    checkpoint: CheckpointRecord | None = None,
    note: str = "",
    utilisation: Utilisation | None = None,
) -> None:
    """Report the metrics of an epoch to Tune. Does not return if the segment ends here.

    Args:
        epoch: counted from 1.
        metrics: name -> value.
        resumed_from: epoch of the checkpoint from which the segment was resumed; 0: it started from scratch.
        checkpoint: the newest checkpoint saved since the last report.
        note: what went wrong without ending the segment.
        utilisation: what the segment has used since the last report; None: not measured.
    """
    progress = {"epoch": epoch, "resumed_from": resumed_from, CHECKPOINT_KEY: [checkpoint], "note": note}
    get_worker_context().report({**metrics, **progress, UTILISATION_KEY: [utilisation], NODE_ID_KEY: _get_node_id()})


def report_costs(costs: Mapping[str, float]) -> None:
    """Report the costs of a trial to Tune before it is trained. Does not return if the trial is too expensive."""
    get_worker_context().report({"epoch": 0, COSTS_KEY: [dict(costs)]})


def _get_node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
