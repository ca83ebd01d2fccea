"""What the driver tells a worker to train, and what the worker tells back. Imports no torch, for quick tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from handpose.sweep.record.events import Saved

if TYPE_CHECKING:
    from handpose.search.space import Params


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


def run_name(number: int) -> str:
    """Name of a trial's folders and TensorBoard run."""
    return f"trial_{number:04d}"


def pictures_of(folder: Path, trial: int, epoch: int) -> dict[str, Path]:
    """Name -> file of the pictures that a trial of the sweep in that folder has drawn after an epoch."""
    start = f"{_stem(trial, epoch)}_"
    return {file.stem.removeprefix(start): file for file in sorted((folder / PICTURES).glob(f"{start}*.jpg"))}


def _stem(trial: int, epoch: int) -> str:
    return f"{run_name(trial)}_epoch_{epoch:04d}"


FOLDER = "checkpoints"
