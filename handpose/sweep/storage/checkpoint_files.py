"""Where the checkpoints of a sweep's trials lie: in its folder, which all nodes share, or in a store.

In a store a checkpoint's name ends with the checksum of its bytes, so that one that no event tells of can be taken in
without being fetched.
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
from handpose.sweep.record.events import EVENTS_FILE, CheckpointRecord
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, TrialSegment, make_run_name
from handpose.sweep.storage.object_store import ObjectStore, summarise_store_error
from handpose.sweep.storage.retention import compute_size_and_checksum, describe_checkpoint, find_newest_intact

_DOWNLOAD_TIMEOUT_S = 600.0
_PAUSE_TIMEOUT_S = 60.0
_NFS_TIMEOUT_S = 10.0
_NUM_THREADS = 8
_FIRST_DELAY_S, _MAX_DELAY_S = 2.0, 60.0
_CHECKPOINT_NAME = re.compile(r"epoch_(\d+)_stretch_(\d+)\.([0-9a-f]{8})\.ckpt")
_Answer = TypeVar("_Answer")


class CheckpointFiles(Protocol):
    """Names are relative to the sweep, as those of `Saved`. The first four are for workers, the others for the driver.

    place: where a checkpoint of that name is to be written on this machine. keep: of one that has been written there;
    is_needed: the trial pauses now. UserError where it cannot be kept. fetched: of a trial's, oldest first, the newest
    that is whole, and where on this machine it is to be read. discard: one that nobody has heard of. left_by: those of
    a stretch of a trial after these epochs. taken_over: the newest whole one of these under another name. remove: may
    come to pass later. clear: remove at once, since the names may be used again.
    """

    def get_local_path(self, name: str, /) -> Path: ...
    def commit(self, file: Path, /, *, epoch: int, is_needed: bool) -> CheckpointRecord: ...
    def fetch_newest(self, checkpoints: Sequence[CheckpointRecord], /) -> tuple[CheckpointRecord, Path] | None: ...
    def discard(self, checkpoint: CheckpointRecord, /) -> None: ...
    def find_unreported(self, trial: int, segment_number: int, epochs: range, /) -> list[CheckpointRecord]: ...
    def copy_newest(self, checkpoints: Sequence[CheckpointRecord], name: str, /) -> CheckpointRecord | None: ...
    def list_names(self) -> set[str]: ...
    def remove(self, name: str, /) -> None: ...
    def clear(self, names: set[str], /) -> None: ...


@contextlib.contextmanager
def open_worker_files(segment: TrialSegment, *, scratch: Path) -> Iterator[CheckpointFiles]:
    """Of the sweep that a stretch belongs to. scratch: folder of this machine for what is on its way to a store.

    Raises FileNotFoundError on a node that does not see the sweep's folder.
    """
    if segment.storage is None:
        if said := explain_unshared_folder(Path(segment.folder) / EVENTS_FILE):
            raise FileNotFoundError(f"the node {said}")
        yield FolderFiles(Path(segment.folder))
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="checkpoints-") as place:
        yield StoreFiles(ObjectStore(segment.storage), Path(place))


def explain_unshared_folder(file: Path, *, timeout_s: float = _NFS_TIMEOUT_S) -> str:
    """Why this node does not do for a sweep in whose folder the driver has written a file; nothing where it does."""
    folder, end = file.parent, time.monotonic() + timeout_s
    while not (folder.is_dir() and file.name in os.listdir(folder)):  # not file.exists(), of which NFS keeps a "no"
        if time.monotonic() > end:
            return (
                f"does not see {folder}, the folder of the sweep: keep it in an object store "
                "(sweep.storage=s3://bucket/folder), or put paths.output on a file system that all nodes share"
            )
        time.sleep(0.5)
    return ""


class FolderFiles:
    """In the sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_local_path(self, name: str) -> Path:
        return self._folder / name

    def commit(self, file: Path, *, epoch: int, is_needed: bool = False) -> CheckpointRecord:
        return describe_checkpoint(file, folder=self._folder, epoch=epoch)

    def fetch_newest(self, checkpoints: Sequence[CheckpointRecord]) -> tuple[CheckpointRecord, Path] | None:
        newest = find_newest_intact(checkpoints, self._folder)
        return None if newest is None else (newest, self._folder / newest.file)

    def discard(self, checkpoint: CheckpointRecord) -> None:
        self.remove(checkpoint.file)

    def find_unreported(self, trial: int, segment_number: int, epochs: range) -> list[CheckpointRecord]:
        """They are whole, since they got their names when they were."""
        files = sorted(
            (self._folder / CHECKPOINTS_FOLDER / make_run_name(trial)).glob(f"epoch_*_stretch_{segment_number}.ckpt")
        )
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
        part = (self._folder / name).with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._folder / newest.file, part)
        os.replace(part, self._folder / name)
        return replace(newest, file=name)

    def list_names(self) -> set[str]:
        return {str(file.relative_to(self._folder)) for file in (self._folder / CHECKPOINTS_FOLDER).glob("*/*")}

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def clear(self, names: set[str]) -> None:
        for name in names:
            self.remove(name)


class StoreFiles:
    """In a store. scratch: folder of this machine, of a worker only.

    A store that does not answer is asked again after growing delays. What a worker cannot upload is left out, and the
    next checkpoint is tried in its place; only what it needs to go on with it waits for. `obsolete` are the names of
    what the driver needs no more: they are removed from the store when it knows the events by which that is so.
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
        return self._scratch / name

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
        """Without trying again: the driver removes, when it goes on with the sweep, what no event tells of."""
        with contextlib.suppress(OSError):
            self._store.remove(checkpoint.file)

    def find_unreported(self, trial: int, segment_number: int, epochs: range) -> list[CheckpointRecord]:
        """None where the store does not answer: the trial goes on from an earlier one then."""
        try:
            files = self._store.list_files(f"{CHECKPOINTS_FOLDER}/{make_run_name(trial)}")
        except OSError:
            return []
        named = [(name, _CHECKPOINT_NAME.fullmatch(name.rpartition("/")[2])) for name in sorted(files)]
        return [
            CheckpointRecord(name, int(found[1]), files[name].size_bytes, int(found[3], 16))
            for name, found in named
            if found is not None and int(found[2]) == segment_number and int(found[1]) in epochs
        ]

    def copy_newest(self, checkpoints: Sequence[CheckpointRecord], name: str) -> CheckpointRecord | None:
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
        """What cannot be removed now is cleared when the sweep is gone on with."""
        with contextlib.suppress(OSError), ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(self._store.remove, names))

    def remove_now(self, name: str) -> None:
        """Remove it from the store. Raises OSError."""
        self._store.remove(name)

    def _upload(self, file: Path, name: str, *, timeout_s: float) -> None:
        """Raises UserError where the store does not take it, also without asking while it is too soon to ask again."""
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
    """Try again with growing delays what a store does not do, but for what is not there; OSError when it takes long."""
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
