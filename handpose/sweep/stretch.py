"""What the driver tells a worker to train, and what the worker tells back. Imports no torch, for quick tests."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ray
from ray import tune

from handpose.sweep.events import FailureKind, Saved
from handpose.sweep.retention import FOLDER

if TYPE_CHECKING:
    from handpose.sweep.space import Params

STRETCH, CHECKPOINT, COSTS, AVOIDED, NODE = "stretch", "checkpoint", "costs", "avoided", "node_id"
"""Keys of Tune's configuration and results. Values lie in a list each, which Tune does not take apart."""

PICTURES = "pictures"
"""Folder of a sweep for pictures on their way from the workers into the log."""


class Stretch(NamedTuple):
    """A part of a trial that one worker trains without a break.

    epoch: trained before. checkpoints: to go on from, oldest first; the newest that is whole counts. folder: of the
    sweep. gpus: its share, where it is not that of all. storage: the URL of the sweep in a store, where its checkpoints
    lie then; None: they lie in the folder.
    """

    trial: int
    stretch: int
    params: "Params"
    epoch: int
    checkpoints: Sequence[Saved]
    folder: str
    gpus: float | None
    storage: str | None = None

    @property
    def name(self) -> str:
        """Of Tune's folder for it."""
        return run_name(self.trial) + (f"_{self.stretch}" if self.stretch > 1 else "")

    def checkpoint_name(self, epoch: int) -> str:
        """Of what is saved after an epoch, from the sweep's folder on: one that no other stretch of the trial uses."""
        return f"{FOLDER}/{run_name(self.trial)}/epoch_{epoch:04d}_stretch_{self.stretch}.ckpt"

    def checkpoint_file(self, epoch: int) -> Path:
        """The same in the folder."""
        return Path(self.folder) / self.checkpoint_name(epoch)

    def picture_file(self, epoch: int, name: str) -> Path:
        """Where to put a picture of the trial's predictions after an epoch, for the driver to find."""
        return Path(self.folder) / PICTURES / f"{_stem(self.trial, epoch)}_{name}.jpg"


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


def run_name(number: int) -> str:
    """Name of a trial's folders and TensorBoard run."""
    return f"trial_{number:04d}"


def pictures_of(folder: Path, trial: int, epoch: int) -> dict[str, Path]:
    """Name -> file of the pictures that a trial of the sweep in that folder has drawn after an epoch."""
    start = f"{_stem(trial, epoch)}_"
    return {file.stem.removeprefix(start): file for file in sorted((folder / PICTURES).glob(f"{start}*.jpg"))}


def _stem(trial: int, epoch: int) -> str:
    return f"{run_name(trial)}_epoch_{epoch:04d}"
