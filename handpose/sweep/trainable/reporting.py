"""What a worker tells the driver while it trains a segment of a trial."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ray
from ray import tune

from handpose.sweep.record.events import FailureKind, Saved
from handpose.sweep.record.trial_segment import Stretch

if TYPE_CHECKING:
    pass

STRETCH, CHECKPOINT, COSTS, AVOIDED, NODE = "stretch", "checkpoint", "costs", "avoided", "node_id"
"""Keys of Tune's configuration and results. Values lie in a list each, which Tune does not take apart."""


class Objective(Protocol):
    """What a worker runs: it trains the stretch and reports each epoch. Tests have cheap ones."""

    def __call__(self, stretch: Stretch, /) -> None: ...


class Member(NamedTuple):
    """This process among those that train a trial together.

    tell: takes what Tune is to hear, and does not return when the stretch ends here; only that of the first one, with
    rank 0, tells.
    """

    rank: int
    num: int
    tell: Callable[[Mapping[str, Any]], None]


ALONE = Member(0, 1, lambda values: tune.report(dict(values)))


_member = ALONE


@contextlib.contextmanager
def joined(member: Member) -> Iterator[None]:
    """Be that one for the length of a block."""
    global _member
    before, _member = _member, member
    try:
        yield
    finally:
        _member = before


def this_member() -> Member:
    """What this process is."""
    return _member


class LostMemberError(Exception):
    """A worker of several died, or its node did. kind: of failure. node_id: where, if that is known."""

    def __init__(self, kind: FailureKind, text: str, node_id: str = "") -> None:
        super().__init__(kind, text, node_id)
        self.kind = kind
        self.text = text
        self.node_id = node_id

    def __str__(self) -> str:
        return self.text


class WornWorkerError(Exception):
    """The worker's process is unfit for another trial, which begins again in a new one without losing a try."""


def report(
    epoch: int,
    metrics: Mapping[str, float],
    *,
    resumed_from: int = 0,
    checkpoint: Saved | None = None,
    note: str = "",
) -> None:
    """Tell Tune the metrics after an epoch, counted from 1. Does not return when the stretch ends here.

    resumed_from: epoch of the checkpoint that the stretch went on from. checkpoint: saved after this epoch. note: what
    went wrong without ending the stretch.
    """
    told = {"epoch": epoch, "resumed_from": resumed_from, CHECKPOINT: [checkpoint], "note": note}
    this_member().tell({**metrics, **told, NODE: _node_id()})


def measured(costs: Mapping[str, float]) -> None:
    """Tell Tune what the trial costs, before it is trained. Does not return when that is too much."""
    this_member().tell({"epoch": 0, COSTS: [dict(costs)]})


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
