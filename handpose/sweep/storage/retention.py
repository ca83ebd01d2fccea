"""Checkpoints of trials on the disk: whole or not, and which of them go when the sweep's budget is full.

Ray's `num_to_keep` is a limit a trial, so that a sweep of many trials fills the disk. Here there is one budget.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from handpose.sweep.record.events import CheckpointRecord

NUM_KEPT_PER_TRIAL = 2
"""The newest, and the one before it in case the newest is damaged."""

CheckpointNeed = Literal["none", "finalist", "resumable"]
"""What a trial's checkpoints are still good for. finalist: it is among the best of those trained to the end."""

_CHUNK_BYTES = 2**20


class RemovableFiles(Protocol):
    """Where the checkpoints lie. remove: may come to pass later. clear: at once, since the names may be used again."""

    def list_names(self) -> set[str]: ...
    def remove(self, name: str, /) -> None: ...
    def clear(self, names: set[str], /) -> None: ...


def describe_checkpoint(file: Path, *, folder: Path, epoch: int) -> CheckpointRecord:
    """Describe a checkpoint that has just been written. folder: of the sweep."""
    size_bytes, checksum = compute_size_and_checksum(file)
    return CheckpointRecord(str(file.relative_to(folder)), epoch, size_bytes, checksum)


def is_intact(checkpoint: CheckpointRecord, folder: Path) -> bool:
    """Whether the file is there with all that was written."""
    try:
        return compute_size_and_checksum(folder / checkpoint.file) == (checkpoint.size_bytes, checkpoint.checksum)
    except OSError:
        return False


def find_newest_intact(checkpoints: Iterable[CheckpointRecord], folder: Path) -> CheckpointRecord | None:
    """Of a trial's checkpoints, oldest first, the newest that is whole."""
    return next((each for each in reversed(list(checkpoints)) if is_intact(each, folder)), None)


def compute_size_and_checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


class CheckpointRetention:
    """The checkpoints that a sweep holds, at most `budget_bytes` of them as long as that is possible.

    files: in which they lie. need: of a trial, by number. loss: of a trial, smaller is better; the worse of two goes
    first. What goes first: checkpoints of trials that need none; the older one of every other trial; finalists; the
    newest of a trial that waits at a rung, which would begin anew. The newest of a trial that runs is never removed.
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
        """A trial's checkpoints, oldest first."""
        return self._checkpoints.get(trial, [])

    def add(self, trial: int, checkpoint: CheckpointRecord) -> None:
        """A trial has a new newest checkpoint."""
        held = self._checkpoints.setdefault(trial, [])
        held.append(checkpoint)
        self.total_bytes += checkpoint.size_bytes

    def enforce_budget(self, trial: int) -> None:
        """Keep no more of this trial than it can use, and of all no more than the budget has room for."""
        self._trim(trial)
        if self.total_bytes <= self.budget_bytes:
            return
        for other, checkpoint in self._list_removable():
            self._remove(other, checkpoint)
            if self.total_bytes <= self.budget_bytes:
                return

    def reconcile(self) -> None:
        """After a crash: forget what is gone, and remove files that no event tells of."""
        there = self.files.list_names()
        for trial, held in list(self._checkpoints.items()):
            for checkpoint in [each for each in held if each.file not in there]:
                self._forget(trial, checkpoint)
            self._trim(trial)
        known = {each.file for held in self._checkpoints.values() for each in held}
        self.files.clear(there - known)

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
