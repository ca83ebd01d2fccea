"""What the driver tells a worker to train, and what the worker tells back. Imports no torch, for quick tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from handpose.sweep.record.events import CheckpointRecord

if TYPE_CHECKING:
    from handpose.search.space import Params


PICTURES_FOLDER = "pictures"
"""Folder of a sweep for pictures on their way from the workers into the log."""


class TrialSegment(NamedTuple):
    """A part of a trial that one worker trains without a break.

    epoch: trained before. checkpoints: to go on from, oldest first; the newest that is whole counts. folder: of the
    sweep. gpus: its share, where it is not that of all. storage: the URL of the sweep in a store, where its checkpoints
    lie then; None: they lie in the folder.
    """

    trial: int
    segment_number: int
    params: "Params"
    epoch: int
    checkpoints: Sequence[CheckpointRecord]
    folder: str
    gpus: float | None
    storage: str | None = None

    @property
    def name(self) -> str:
        """Of Tune's folder for it."""
        return make_run_name(self.trial) + (f"_{self.segment_number}" if self.segment_number > 1 else "")

    def make_checkpoint_name(self, epoch: int) -> str:
        """Of what is saved after an epoch, from the sweep's folder on: one that no other stretch of the trial uses."""
        return f"{CHECKPOINTS_FOLDER}/{make_run_name(self.trial)}/epoch_{epoch:04d}_stretch_{self.segment_number}.ckpt"

    def make_checkpoint_path(self, epoch: int) -> Path:
        """The same in the folder."""
        return Path(self.folder) / self.make_checkpoint_name(epoch)

    def make_picture_path(self, epoch: int, name: str) -> Path:
        """Where to put a picture of the trial's predictions after an epoch, for the driver to find."""
        return Path(self.folder) / PICTURES_FOLDER / f"{_make_stem(self.trial, epoch)}_{name}.jpg"


def make_run_name(number: int) -> str:
    """Name of a trial's folders and TensorBoard run."""
    return f"trial_{number:04d}"


def find_pictures(folder: Path, trial: int, epoch: int) -> dict[str, Path]:
    """Name -> file of the pictures that a trial of the sweep in that folder has drawn after an epoch."""
    start = f"{_make_stem(trial, epoch)}_"
    return {file.stem.removeprefix(start): file for file in sorted((folder / PICTURES_FOLDER).glob(f"{start}*.jpg"))}


def _make_stem(trial: int, epoch: int) -> str:
    return f"{make_run_name(trial)}_epoch_{epoch:04d}"


CHECKPOINTS_FOLDER = "checkpoints"
