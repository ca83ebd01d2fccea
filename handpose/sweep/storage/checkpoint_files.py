"""Access to the checkpoints of a sweep: in its folder, which all nodes share, or in an object store.

In an object store, the name of a checkpoint ends with the checksum of its content. A checkpoint that no event mentions
can therefore be adopted without downloading it.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from handpose.errors import UserError
from handpose.files import join_inside, write_atomically
from handpose.formats import get_former_checkpoint_name
from handpose.sweep.record.events import EVENTS_FILE, CheckpointRecord
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, TrialSegment, make_run_name
from handpose.sweep.storage.object_store import ObjectStore, summarise_store_error
from handpose.sweep.storage.retention import (
    RemovableFiles,
    compute_size_and_checksum,
    describe_checkpoint,
    find_newest_intact,
)

_DOWNLOAD_TIMEOUT_S = 600.0
_PAUSE_TIMEOUT_S = 60.0
_NFS_TIMEOUT_S = 10.0
_NUM_THREADS = 8
_FIRST_DELAY_S, _MAX_DELAY_S = 2.0, 60.0
_CHECKPOINT_NAME = re.compile(r"epoch_(\d+)_(?:segment|stretch)_(\d+)\.([0-9a-f]{8})\.ckpt")
_Answer = TypeVar("_Answer")


class CheckpointFiles(RemovableFiles, Protocol):
    """Access to the checkpoints of a sweep.

    Names are relative to the sweep, as in `CheckpointRecord.file`. Workers call the first four methods, the driver
    calls the others and those of `RemovableFiles`.
    """

    def get_local_path(self, name: str, /) -> Path:
        """Return the path on this machine to which a checkpoint of that name must be written."""

    def commit(self, file: Path, /, *, epoch: int, is_needed: bool) -> CheckpointRecord:
        """Keep a checkpoint that has been written to its local path.

        Args:
            file: the local path.
            epoch: number of epochs trained.
            is_needed: whether the trial pauses now, so that it needs this checkpoint to resume.

        Raises:
            UserError: the checkpoint cannot be kept.
        """

    def fetch_newest(self, checkpoints: Sequence[CheckpointRecord], /) -> tuple[CheckpointRecord, Path] | None:
        """Find the newest intact checkpoint of a trial.

        Args:
            checkpoints: the trial's checkpoints, oldest first.

        Returns:
            The checkpoint and its path on this machine; None if none is intact.
        """

    def discard(self, checkpoint: CheckpointRecord, /) -> None:
        """Remove a checkpoint that has not been reported."""

    def find_unreported(self, trial: int, segment_number: int, epochs: range, /) -> list[CheckpointRecord]:
        """Find the checkpoints that a segment of a trial has saved after the given epochs."""

    def copy_newest(self, checkpoints: Sequence[CheckpointRecord], name: str, /) -> CheckpointRecord | None:
        """Copy the newest intact checkpoint to another name.

        Args:
            checkpoints: checkpoints of a trial, oldest first.
            name: name of the copy.

        Returns:
            The copy; None if no checkpoint could be copied.
        """


@contextlib.contextmanager
def open_worker_files(segment: TrialSegment, *, scratch: Path) -> Iterator[CheckpointFiles]:
    """Open the checkpoints of a segment's sweep on a worker, within a `with` block.

    Args:
        segment: the segment that the worker trains.
        scratch: local folder for files that are being copied to or from an object store.

    Raises:
        FileNotFoundError: this node does not see the sweep's folder.
    """
    if segment.storage is None:
        if said := explain_unshared_folder(Path(segment.folder) / EVENTS_FILE):
            raise FileNotFoundError(f"the node {said}")
        yield FolderFiles(Path(segment.folder))
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="checkpoints-") as place:
        yield StoreFiles(ObjectStore(segment.storage), Path(place))


def explain_unshared_folder(file: Path, *, timeout_s: float = _NFS_TIMEOUT_S) -> str:
    """Explain why this node cannot run trials of a sweep, because it does not see a file in the sweep's folder.

    Args:
        file: a file that the driver has written in the sweep's folder.
        timeout_s: how long to wait for the file to appear.

    Returns:
        The explanation; empty if the node sees the file.
    """
    folder, end = file.parent, time.monotonic() + timeout_s
    while not (folder.is_dir() and file.name in os.listdir(folder)):  # not file.exists(): NFS caches a negative answer
        if time.monotonic() > end:
            return (
                f"cannot access {folder}, the folder of the sweep: keep it in an object store "
                "(sweep.storage=s3://bucket/folder), or put paths.output on a file system that all nodes share"
            )
        time.sleep(0.5)
    return ""


class FolderFiles:
    """Checkpoints in the sweep's folder, which all nodes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_local_path(self, name: str) -> Path:
        return join_inside(self._folder, name)

    def commit(self, file: Path, *, epoch: int, is_needed: bool = False) -> CheckpointRecord:
        return describe_checkpoint(file, folder=self._folder, epoch=epoch)

    def fetch_newest(self, checkpoints: Sequence[CheckpointRecord]) -> tuple[CheckpointRecord, Path] | None:
        newest = find_newest_intact(checkpoints, self._folder)
        return None if newest is None else (newest, self.get_local_path(newest.file))

    def discard(self, checkpoint: CheckpointRecord) -> None:
        self.remove(checkpoint.file)

    def find_unreported(self, trial: int, segment_number: int, epochs: range) -> list[CheckpointRecord]:
        """Find the checkpoints on the disk. They are intact: a file gets its name only when it is complete."""
        place, pattern = (
            self._folder / CHECKPOINTS_FOLDER / make_run_name(trial),
            f"epoch_*_segment_{segment_number}.ckpt",
        )
        files = sorted([*place.glob(get_former_checkpoint_name(pattern)), *place.glob(pattern)])
        by_epoch = {int(file.name.split("_")[1]): file for file in files}
        return [
            describe_checkpoint(file, folder=self._folder, epoch=epoch)
            for epoch, file in by_epoch.items()
            if epoch in epochs
        ]

    def copy_newest(self, checkpoints: Sequence[CheckpointRecord], name: str) -> CheckpointRecord | None:
        newest = find_newest_intact(checkpoints, self._folder)
        if newest is None:
            return None
        with write_atomically(self.get_local_path(name)) as part:
            shutil.copyfile(self.get_local_path(newest.file), part)
        return replace(newest, file=name)

    def list_names(self) -> set[str]:
        return {str(file.relative_to(self._folder)) for file in (self._folder / CHECKPOINTS_FOLDER).glob("*/*")}

    def remove(self, name: str) -> None:
        self.get_local_path(name).unlink(missing_ok=True)

    def clear(self, names: set[str]) -> None:
        for name in names:
            self.remove(name)


class StoreFiles:
    """Checkpoints in an object store.

    If the store does not answer, most requests are retried with growing delays. Uploads are different: if a worker
    cannot upload a checkpoint, it drops the checkpoint and tries again with the next one. It retries the same upload
    only when the trial pauses, because the trial then needs the checkpoint to resume.

    Args:
        store: the store, opened at the URL of the sweep.
        scratch: local folder for copies. Only workers need one.

    Attributes:
        obsolete: names that the driver no longer needs. They are removed only after the store has received the events
            that made them obsolete.
    """

    def __init__(self, store: ObjectStore, scratch: Path | None = None) -> None:
        self.obsolete: deque[str] = deque()
        self._store = store
        self._scratch = scratch
        self._next_attempt_at = 0.0
        self._delay_s = _FIRST_DELAY_S
        self._upload_error = ""

    def get_local_path(self, name: str) -> Path:
        assert self._scratch is not None, "the driver writes no checkpoints"
        return join_inside(self._scratch, name)

    def commit(self, file: Path, *, epoch: int, is_needed: bool = False) -> CheckpointRecord:
        try:
            size_bytes, checksum = compute_size_and_checksum(file)
            name = f"{file.relative_to(self._scratch or file).with_suffix('')}.{checksum:08x}.ckpt"
            self._upload(file, name, timeout_s=_PAUSE_TIMEOUT_S if is_needed else 0.0)
        finally:
            file.unlink(missing_ok=True)
        return CheckpointRecord(name, epoch, size_bytes, checksum)

    def fetch_newest(self, checkpoints: Sequence[CheckpointRecord]) -> tuple[CheckpointRecord, Path] | None:
        for checkpoint in reversed(checkpoints):
            file = self.get_local_path(checkpoint.file)
            with contextlib.suppress(FileNotFoundError):
                retry_store_call(partial(self._store.download, checkpoint.file, file), _DOWNLOAD_TIMEOUT_S)
                if compute_size_and_checksum(file) == (checkpoint.size_bytes, checkpoint.checksum):
                    return checkpoint, file
        return None

    def discard(self, checkpoint: CheckpointRecord) -> None:
        """Remove an unreported checkpoint without retries.

        If this fails, the driver removes the checkpoint when it resumes the sweep, since no event mentions it.
        """
        with contextlib.suppress(OSError):
            self._store.remove(checkpoint.file)

    def find_unreported(self, trial: int, segment_number: int, epochs: range) -> list[CheckpointRecord]:
        """Find the checkpoints by name. Obsolete ones that are still there are not among them.

        If the store does not answer, the result is empty, and the trial resumes from an earlier checkpoint.
        """
        try:
            files = self._store.list_files(f"{CHECKPOINTS_FOLDER}/{make_run_name(trial)}")
        except OSError:
            return []
        named = [(name, _CHECKPOINT_NAME.fullmatch(name.rpartition("/")[2])) for name in sorted(files)]
        return [
            CheckpointRecord(name, int(found[1]), files[name].size_bytes, int(found[3], 16))
            for name, found in named
            if found is not None
            and int(found[2]) == segment_number
            and int(found[1]) in epochs
            and name not in self.obsolete
        ]

    def copy_newest(self, checkpoints: Sequence[CheckpointRecord], name: str) -> CheckpointRecord | None:
        """Copy the newest checkpoint that exists in the store. Its content is not verified."""
        for checkpoint in reversed(checkpoints):
            with contextlib.suppress(FileNotFoundError):
                retry_store_call(partial(self._store.copy, checkpoint.file, name), _PAUSE_TIMEOUT_S)
                return replace(checkpoint, file=name)
        return None

    def list_names(self) -> set[str]:
        return set(retry_store_call(lambda: self._store.list_files(CHECKPOINTS_FOLDER), _PAUSE_TIMEOUT_S))

    def remove(self, name: str) -> None:
        self.obsolete.append(name)

    def clear(self, names: set[str]) -> None:
        """Remove checkpoints at once. What cannot be removed now is removed when the sweep is resumed."""
        with contextlib.suppress(OSError), ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(self._store.remove, names))

    def remove_now(self, name: str) -> None:
        """Remove a checkpoint from the store.

        Raises:
            OSError: the store does not answer.
        """
        self._store.remove(name)

    def _upload(self, file: Path, name: str, *, timeout_s: float) -> None:
        """Upload a checkpoint.

        After a failure, calls without a timeout fail at once until the next attempt is due.

        Raises:
            UserError: the store does not accept the file.
        """
        if not timeout_s and time.monotonic() < self._next_attempt_at:
            raise UserError(self._upload_error)
        try:
            retry_store_call(lambda: self._store.upload(file, name), timeout_s)
        except OSError as error:
            self._upload_error = f"the checkpoint cannot be kept in {self._store} ({summarise_store_error(error)})"
            self._next_attempt_at = time.monotonic() + self._delay_s
            self._delay_s = min(2 * self._delay_s, _MAX_DELAY_S)
            raise UserError(self._upload_error) from error
        self._delay_s = _FIRST_DELAY_S


def retry_store_call(call: Callable[[], _Answer], timeout_s: float) -> _Answer:
    """Call a function of the store, and retry with growing delays while it fails.

    Args:
        call: the function. It is always called at least once.
        timeout_s: seconds after which no new attempt is made.

    Raises:
        FileNotFoundError: a file does not exist. This is not retried.
        OSError: the last attempt failed.
    """
    end, delay_s = time.monotonic() + timeout_s, _FIRST_DELAY_S
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError:
            if time.monotonic() + delay_s > end:
                raise
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, _MAX_DELAY_S)
