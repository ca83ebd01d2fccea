"""Retention of checkpoints: which are intact, and which are removed when the sweep's disk budget is full.

Ray's `num_to_keep` limits the checkpoints of each trial, so a sweep with many trials can still fill the disk. Here one
budget applies to the whole sweep.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from handpose.files import join_inside
from handpose.sweep.record.events import CheckpointRecord

NUM_KEPT_PER_TRIAL = 2
"""The newest checkpoint, and the one before it in case the newest is damaged."""

CheckpointNeed = Literal["none", "finalist", "resumable"]
"""Why a trial's checkpoints are still needed.

- none: they are not needed.
- finalist: the trial is among the best of those that were trained to the end.
- resumable: the trial is not over and may be resumed.
"""

_CHUNK_BYTES = 2**20


class RemovableFiles(Protocol):
    """Files from which `CheckpointRetention` removes checkpoints."""

    def list_names(self) -> set[str]:
        """List the names of all checkpoints."""

    def remove(self, name: str, /) -> None:
        """Remove a checkpoint, at once or later."""

    def clear(self, names: set[str], /) -> None:
        """Remove checkpoints at once, because their names may be used again."""


def describe_checkpoint(file: Path, *, folder: Path, epoch: int) -> CheckpointRecord:
    """Make the record of a checkpoint that has just been written.

    Args:
        file: the checkpoint.
        folder: folder of the sweep. The name in the record is relative to it.
        epoch: number of epochs trained.
    """
    size_bytes, checksum = compute_size_and_checksum(file)
    return CheckpointRecord(str(file.relative_to(folder)), epoch, size_bytes, checksum)


def is_intact(checkpoint: CheckpointRecord, folder: Path) -> bool:
    """Return whether the checkpoint's file exists and has the recorded size and checksum."""
    try:
        return compute_size_and_checksum(join_inside(folder, checkpoint.file)) == (
            checkpoint.size_bytes,
            checkpoint.checksum,
        )
    except OSError:
        return False


def find_newest_intact(checkpoints: Iterable[CheckpointRecord], folder: Path) -> CheckpointRecord | None:
    """Find the newest intact checkpoint.

    Args:
        checkpoints: checkpoints of a trial, oldest first.
        folder: folder of the sweep.

    Returns:
        The checkpoint; None if none is intact.
    """
    return next((each for each in reversed(list(checkpoints)) if is_intact(each, folder)), None)


def compute_size_and_checksum(file: Path) -> tuple[int, int]:
    """Compute the size in bytes and the CRC-32 of a file."""
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


class CheckpointRetention:
    """The checkpoints that a sweep keeps, limited to `budget_bytes` in total as far as possible.

    When the budget is exceeded, checkpoints are removed in this order, and those of worse trials first:

    1. all checkpoints of trials that do not need them;
    2. the older checkpoint of every other trial;
    3. the newest checkpoint of finalists;
    4. the newest checkpoint of trials paused at a rung, which then start from scratch if they are promoted.

    The newest checkpoint of a running or waiting trial is never removed, even if the budget is exceeded.

    Args:
        files: where the checkpoints are.
        budget_bytes: disk space for all checkpoints together.
        get_need: number of a trial -> why its checkpoints are needed.
        get_loss: number of a trial -> its loss; smaller is better.
        is_running: number of a trial -> whether it runs, or waits to be started again.
    """

    def __init__(
        self,
        files: RemovableFiles,
        budget_bytes: float,
        *,
        get_need: Callable[[int], CheckpointNeed],
        get_loss: Callable[[int], float],
        is_running: Callable[[int], bool],
    ) -> None:
        self.files = files
        self.budget_bytes = budget_bytes
        self.total_bytes = 0
        self._get_need = get_need
        self._get_loss = get_loss
        self._is_running = is_running
        self._checkpoints: dict[int, list[CheckpointRecord]] = {}

    def list_checkpoints(self, trial: int) -> list[CheckpointRecord]:
        """List a trial's checkpoints, oldest first."""
        return self._checkpoints.get(trial, [])

    def add(self, trial: int, checkpoint: CheckpointRecord) -> None:
        """Add a checkpoint as the newest of a trial."""
        held = self._checkpoints.setdefault(trial, [])
        held.append(checkpoint)
        self.total_bytes += checkpoint.size_bytes

    def enforce_budget(self, trial: int) -> None:
        """Remove superfluous checkpoints of this trial, then checkpoints of any trials until the budget is met."""
        self._trim(trial)
        if self.total_bytes <= self.budget_bytes:
            return
        for other, checkpoint in self._list_removable():
            self._remove(other, checkpoint)
            if self.total_bytes <= self.budget_bytes:
                return

    def reconcile(self) -> None:
        """Reconcile records and files after a crash: forget missing files and remove files without a record."""
        there = self.files.list_names()
        for trial, held in list(self._checkpoints.items()):
            for checkpoint in [each for each in held if each.file not in there]:
                self._forget(trial, checkpoint)
            self._trim(trial)
        recorded = {each.file for held in self._checkpoints.values() for each in held}
        self.files.clear(there - recorded)

    def _trim(self, trial: int) -> None:
        for checkpoint in self.list_checkpoints(trial)[:-NUM_KEPT_PER_TRIAL]:
            self._remove(trial, checkpoint)

    def _list_removable(self) -> list[tuple[int, CheckpointRecord]]:
        ranked: list[tuple[int, float, int, CheckpointRecord]] = []
        for trial, held in self._checkpoints.items():
            need, loss = self._get_need(trial), self._get_loss(trial)
            for place, checkpoint in enumerate(reversed(held)):
                rank = self._get_removal_rank(trial, need, is_newest=place == 0)
                if rank is not None:
                    ranked.append((rank, -loss, trial, checkpoint))
        return [(trial, checkpoint) for _, _, trial, checkpoint in sorted(ranked, key=lambda item: item[:3])]

    def _get_removal_rank(self, trial: int, need: CheckpointNeed, *, is_newest: bool) -> int | None:
        if need == "none":
            return 0
        if not is_newest:
            return 1
        if need == "finalist":
            return 2
        return None if self._is_running(trial) else 3

    def _remove(self, trial: int, checkpoint: CheckpointRecord) -> None:
        self._forget(trial, checkpoint)
        self.files.remove(checkpoint.file)

    def _forget(self, trial: int, checkpoint: CheckpointRecord) -> None:
        self._checkpoints[trial].remove(checkpoint)
        self.total_bytes -= checkpoint.size_bytes
        if not self._checkpoints[trial]:
            del self._checkpoints[trial]
