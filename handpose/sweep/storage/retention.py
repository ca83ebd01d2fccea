"""Checkpoints of trials on the disk: whole or not, and which of them go when the sweep's budget is full.

Ray's `num_to_keep` is a limit a trial, so that a sweep of many trials fills the disk. Here there is one budget.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from handpose.sweep.record.events import Saved

KEPT_A_TRIAL = 2
"""The newest, and the one before it in case the newest is damaged."""

Need = Literal["none", "finalist", "resumable"]
"""What a trial's checkpoints are still good for. finalist: it is among the best of those trained to the end."""

_CHUNK_BYTES = 2**20


class Files(Protocol):
    """Where the checkpoints lie. remove: may come to pass later. clear: at once, since the names may be used again."""

    def names(self) -> set[str]: ...
    def remove(self, name: str, /) -> None: ...
    def clear(self, names: set[str], /) -> None: ...


def saved(file: Path, *, folder: Path, epoch: int) -> Saved:
    """Describe a checkpoint that has just been written. folder: of the sweep."""
    size_bytes, checksum = file_sum(file)
    return Saved(str(file.relative_to(folder)), epoch, size_bytes, checksum)


def is_whole(checkpoint: Saved, folder: Path) -> bool:
    """Whether the file is there with all that was written."""
    try:
        return file_sum(folder / checkpoint.file) == (checkpoint.size_bytes, checkpoint.checksum)
    except OSError:
        return False


def newest_whole(checkpoints: Iterable[Saved], folder: Path) -> Saved | None:
    """Of a trial's checkpoints, oldest first, the newest that is whole."""
    return next((each for each in reversed(list(checkpoints)) if is_whole(each, folder)), None)


def file_sum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


class CheckpointShelf:
    """The checkpoints that a sweep holds, at most `budget_bytes` of them as long as that is possible.

    files: in which they lie. need: of a trial, by number. loss: of a trial, smaller is better; the worse of two goes
    first. What goes first: checkpoints of trials that need none; the older one of every other trial; finalists; the
    newest of a trial that waits at a rung, which would begin anew. The newest of a trial that runs is never removed.
    """

    def __init__(
        self,
        files: Files,
        budget_bytes: float,
        *,
        need: Callable[[int], Need],
        loss: Callable[[int], float],
        is_running: Callable[[int], bool],
    ) -> None:
        self.files = files
        self.budget_bytes = budget_bytes
        self.total_bytes = 0
        self._need = need
        self._loss = loss
        self._is_running = is_running
        self._held: dict[int, list[Saved]] = {}

    def of(self, trial: int) -> list[Saved]:
        """A trial's checkpoints, oldest first."""
        return self._held.get(trial, [])

    def put(self, trial: int, checkpoint: Saved) -> None:
        """A trial has a new newest checkpoint."""
        held = self._held.setdefault(trial, [])
        held.append(checkpoint)
        self.total_bytes += checkpoint.size_bytes

    def tidy(self, trial: int) -> None:
        """Keep no more of this trial than it can use, and of all no more than the budget has room for."""
        self._trim(trial)
        if self.total_bytes <= self.budget_bytes:
            return
        for other, checkpoint in self._in_order():
            self._remove(other, checkpoint)
            if self.total_bytes <= self.budget_bytes:
                return

    def settle(self) -> None:
        """After a crash: forget what is gone, and remove files that no event tells of."""
        there = self.files.names()
        for trial, held in list(self._held.items()):
            for checkpoint in [each for each in held if each.file not in there]:
                self._forget(trial, checkpoint)
            self._trim(trial)
        known = {each.file for held in self._held.values() for each in held}
        self.files.clear(there - known)

    def _trim(self, trial: int) -> None:
        for checkpoint in self.of(trial)[:-KEPT_A_TRIAL]:
            self._remove(trial, checkpoint)

    def _in_order(self) -> list[tuple[int, Saved]]:
        ranked: list[tuple[int, float, int, Saved]] = []
        for trial, held in self._held.items():
            need, loss = self._need(trial), self._loss(trial)
            for place, checkpoint in enumerate(reversed(held)):
                rank = self._rank(trial, need, is_newest=place == 0)
                if rank is not None:
                    ranked.append((rank, -loss, trial, checkpoint))
        return [(trial, checkpoint) for _, _, trial, checkpoint in sorted(ranked, key=lambda item: item[:3])]

    def _rank(self, trial: int, need: Need, *, is_newest: bool) -> int | None:
        if need == "none":
            return 0
        if not is_newest:
            return 1
        if need == "finalist":
            return 2
        return None if self._is_running(trial) else 3

    def _remove(self, trial: int, checkpoint: Saved) -> None:
        self._forget(trial, checkpoint)
        self.files.remove(checkpoint.file)

    def _forget(self, trial: int, checkpoint: Saved) -> None:
        self._held[trial].remove(checkpoint)
        self.total_bytes -= checkpoint.size_bytes
        if not self._held[trial]:
            del self._held[trial]
