"""What the driver sends to a worker to train, and the names of its files. Imports no torch, so that tests are fast."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from handpose.sweep.record.events import CheckpointRecord

if TYPE_CHECKING:
    from handpose.search.space import Params


PICTURES_FOLDER = "pictures"
"""Subfolder of a sweep in which workers leave pictures until the driver has logged them."""


class TrialSegment(NamedTuple):
    """A part of a trial that is trained without interruption.

    Attributes:
        trial: number of the trial.
        segment_number: number of the segment within the trial, counted from 1.
        params: the trial's parameters.
        epoch: number of epochs trained before this segment.
        checkpoints: checkpoints to resume from, oldest first. The newest intact one is used.
        folder: folder of the sweep.
        gpus: GPUs that the trial holds; None: the same as other trials.
        storage: URL of the sweep in an object store that contains its checkpoints; None: they are in `folder`.
        max_epochs: number of epochs of a complete trial if the user has raised it; None: as configured.
        rungs: with `max_epochs`, the epochs at which the scheduler compares trials.
        may_pause: with `max_epochs`, whether a trial may pause there.
    """

    trial: int
    segment_number: int
    params: "Params"
    epoch: int
    checkpoints: Sequence[CheckpointRecord]
    folder: str
    gpus: float | None
    storage: str | None = None
    max_epochs: int | None = None
    rungs: Sequence[int] = ()
    may_pause: bool = False

    @property
    def name(self) -> str:
        """Name of Ray Tune's trial and its folder for this segment."""
        return make_run_name(self.trial) + (f"_{self.segment_number}" if self.segment_number > 1 else "")

    def make_checkpoint_name(self, epoch: int) -> str:
        """Make the name of the checkpoint after an epoch, relative to the sweep. No other segment uses the same name.

        Args:
            epoch: number of epochs trained.
        """
        return f"{CHECKPOINTS_FOLDER}/{make_run_name(self.trial)}/epoch_{epoch:04d}_segment_{self.segment_number}.ckpt"

    def make_checkpoint_path(self, epoch: int) -> Path:
        """Make the path of the checkpoint after an epoch in the sweep's folder."""
        return Path(self.folder) / self.make_checkpoint_name(epoch)

    def make_picture_path(self, epoch: int, name: str) -> Path:
        """Make the path of a picture of the trial's predictions after an epoch, where the driver will find it."""
        return Path(self.folder) / PICTURES_FOLDER / f"{_make_stem(self.trial, epoch)}_{name}.jpg"


def make_run_name(number: int) -> str:
    """Make the name of a trial's folders and of its TensorBoard run."""
    return f"trial_{number:04d}"


def find_pictures(folder: Path, trial: int, epoch: int) -> dict[str, Path]:
    """Find the pictures that a trial has drawn after an epoch.

    Args:
        folder: folder of the sweep.
        trial: number of the trial.
        epoch: number of epochs trained.

    Returns:
        Name of the picture -> file.
    """
    start = f"{_make_stem(trial, epoch)}_"
    return {file.stem.removeprefix(start): file for file in sorted((folder / PICTURES_FOLDER).glob(f"{start}*.jpg"))}


def _make_stem(trial: int, epoch: int) -> str:
    return f"{make_run_name(trial)}_epoch_{epoch:04d}"


CHECKPOINTS_FOLDER = "checkpoints"
