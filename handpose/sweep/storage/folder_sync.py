"""Copies a sweep's folder to an object store, so that the sweep can be resumed when the driver's machine is lost.

The driver works in its local folder, and a background thread copies it. New events are copied every few seconds, other
changed files every minute, and everything at the end. The store therefore contains the sweep as it was a moment ago.
After a loss, epochs that were reported since then are trained again. The lease of the sweep is renewed by another
thread, so that it does not expire while a large file is copied. A third thread looks for commands of the user in the
store and uploads their answers (`control_sync`), so that neither waits for a large file.

Events are copied in chunks of a fixed size, of which only the last one changes. Workers upload the checkpoints
themselves. An obsolete checkpoint is removed only after the store has received the events that made it obsolete.
Before that, the sweep in the store still needs the checkpoint. The study is copied only while nothing runs, so that it
never contains more than the events. When the sweep is resumed, the missing results are added to it from the events.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from handpose.errors import UserError
from handpose.report.formatting import format_duration
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.settings import SweepSettings, format_resume_command
from handpose.sweep.storage.checkpoint_files import CheckpointFiles, FolderFiles, StoreFiles, retry_store_call
from handpose.sweep.storage.control_sync import ControlSync
from handpose.sweep.storage.lease import RENEW_EVERY_S, Lease, LeaseLostError
from handpose.sweep.storage.object_store import ObjectStore, summarise_store_error
from handpose.sweep.storage.stored_sweep import (
    EVENT_CHUNKS_FOLDER,
    EVENT_LOGS,
    count_whole_line_bytes,
    is_excluded,
    list_synced_files,
    read_byte_range,
    restore_folder,
)

_CHUNK_BYTES = 2**20
_EVENTS_EVERY_S = 3.0
_FULL_SYNC_EVERY_S = 60.0
_COMMANDS_EVERY_S = 5.0
"""Seconds between two looks for commands in the store, each a request that lists a folder.

A user waits this long for an answer. On Amazon's S3, where 1,000 such requests cost 0.005 USD, this is 0.09 USD a day.
A renewal of the lease takes five requests, three of which have this price.
"""
_ANSWERS_EVERY_S = 0.5
_MAX_DELAY_S = 60.0
_FINAL_TIMEOUT_S = 300.0
_NUM_THREADS = 8
_UNKNOWN_STATE = (0, 0)
_RETRY_NOTE = "; the sweep continues and is copied when the store answers again"


class SyncIncompleteError(Exception):
    """The sweep is done, but its last changes could not be copied to the store. Resuming the sweep copies them."""


class FolderSync:
    """Copies the folder of a sweep to an object store.

    Args:
        folder: folder of the sweep.
        store: the store, opened at the URL of the sweep.

    Attributes:
        has_lost_lease: whether another process has taken over the sweep. This process must then stop.
    """

    def __init__(self, folder: Path, store: ObjectStore) -> None:
        self.has_lost_lease = False
        self._folder = folder
        self._store = store
        self._every_s = _EVENTS_EVERY_S
        self._checkpoint_files: list[StoreFiles] = []
        self._copied_bytes = dict.fromkeys(EVENT_LOGS, 0)
        self._copied_files: dict[str, tuple[int, int]] = {}
        self._next_full_sync = 0.0
        self._lease = Lease(store)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._control = ControlSync(folder, store, check_lease=self._check_lease)
        self._control_thread = threading.Thread(target=self._run_control, name="control", daemon=True)
        self._sync_lock, self._events_lock = threading.Lock(), threading.Lock()
        self._outage: str | None = None
        self._has_control_problem = False

    def connect(self) -> None:
        """Acquire the lease of the sweep and bring the folder and the store to the same state.

        Raises:
            UserError: another process runs the sweep, the store does not answer, or the events in the folder and in the
                store differ.
        """
        try:
            self._lease.acquire()
            with self._keep_lease():
                self._copied_bytes = restore_folder(self._store, self._folder)
                self._copied_files = self._find_stored_files()
                self._copy_events()
                self._control.connect()
        except LeaseLostError as error:
            raise UserError(str(error)) from error
        except OSError as error:
            raise UserError(f"sweep.storage: {self._store} does not answer ({summarise_store_error(error)})") from error

    def _find_stored_files(self) -> dict[str, tuple[int, int]]:
        """List the files that the store and the folder have, so that a file that is deleted now is deleted in both."""
        names = (name for name in self._store.list_files() if not is_excluded(name))
        return {name: _UNKNOWN_STATE for name in names if (self._folder / name).is_file()}

    def add_checkpoint_files(self, folder: Path) -> StoreFiles:
        """Open the checkpoints of this sweep or of its confirmation.

        Args:
            folder: folder of the sweep, or of its confirmation.
        """
        name = folder.relative_to(self._folder).as_posix()
        files = StoreFiles(self._store if name == "." else self._store.open_subfolder(name))
        self._checkpoint_files.append(files)
        return files

    def sync_changes(self) -> None:
        """Copy new events and, about once a minute, other changed files.

        Raises:
            OSError: the store does not answer.
            LeaseLostError: another process has taken over the sweep.
        """
        self._lease.renew()
        obsolete = self._count_obsolete()
        self._copy_events()
        self._remove_obsolete(obsolete)
        if time.monotonic() >= self._next_full_sync:
            began = time.monotonic()
            self._copy_other_files(with_study=False)
            # Copying takes at most a twentieth of the time, however much there is to copy.
            self._next_full_sync = began + max(_FULL_SYNC_EVERY_S, 20 * (time.monotonic() - began))

    def sync_all(self) -> None:
        """Copy everything, including the study. No trial may be running.

        If the store does not answer, a message is printed, and the files are copied later.
        """
        with self._sync_lock:
            try:
                self._copy_all()
            except LeaseLostError as error:
                self._report_lost_lease(error)
            except OSError as error:
                self._report_outage(error, _RETRY_NOTE)

    def start(self) -> None:
        """Start the background threads."""
        self._thread.start()
        self._control_thread.start()

    def finish(self, *, timeout_s: float, with_study: bool = True) -> None:
        """Stop the threads, copy everything that is left and release the lease.

        Args:
            timeout_s: how long to wait for a store that does not answer.
            with_study: whether to copy the study, too. No trial may be running then.

        Raises:
            OSError: the store still does not answer after that time.
        """
        self._stop.set()
        for thread in (self._thread, self._control_thread):
            if thread.is_alive():
                thread.join()
        if self.has_lost_lease:
            return
        try:
            with self._keep_lease():
                self._retry_until(partial(self._sync_last, with_study=with_study), timeout_s)
        except LeaseLostError as error:
            self._report_lost_lease(error)
        if not self.has_lost_lease:
            self._retry_until(self._lease.release, timeout_s)

    def _sync_last(self, *, with_study: bool) -> None:
        self._copy_all(with_study=with_study)
        self._sync_control(with_commands=True)
        self._remove_obsolete(self._count_obsolete())

    def _retry_until(self, call: Callable[[], None], timeout_s: float) -> None:
        try:
            call()
        except OSError as error:
            self._report_outage(error, f"; waiting for it for at most {format_duration(timeout_s, is_rough=True)}")
            retry_store_call(call, timeout_s)
        self._report_recovery()

    # --- background thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay_s = self._every_s
        with self._keep_lease():
            while not self._stop.wait(delay_s):
                try:
                    with self._sync_lock:
                        self.sync_changes()
                    delay_s = self._every_s
                    self._report_recovery()
                except LeaseLostError as error:
                    self._report_lost_lease(error)
                    return
                except OSError as error:
                    self._report_outage(error, _RETRY_NOTE)
                    delay_s = min(2 * delay_s, _MAX_DELAY_S)

    def _run_control(self) -> None:
        delay_s, next_look = _ANSWERS_EVERY_S, 0.0
        while not self._stop.wait(delay_s):
            is_due = time.monotonic() >= next_look
            try:
                self._sync_control(with_commands=is_due)
                delay_s = _ANSWERS_EVERY_S
            except LeaseLostError:  # the other threads say so
                return
            except OSError:  # the copying fails, too, and reports the outage
                delay_s = min(2 * delay_s, _MAX_DELAY_S)
            if is_due:
                next_look = time.monotonic() + _COMMANDS_EVERY_S

    def _sync_control(self, *, with_commands: bool) -> None:
        """Upload new answers, and events before them; with `with_commands`, copy new commands first."""
        try:
            if with_commands:
                self._control.sync_commands()
            if answers := self._control.find_new_answers(with_changed=with_commands):
                self._copy_events()
                self._control.upload_answers(answers)
        except UserError as error:
            if not self._has_control_problem:
                print(f"storage     commands in {self._store} are ignored: {error}", file=sys.stderr, flush=True)
            self._has_control_problem = True

    @contextlib.contextmanager
    def _keep_lease(self) -> Iterator[None]:
        """Renew the lease in a thread within the block."""
        is_over = threading.Event()
        thread = threading.Thread(target=self._renew_lease, args=(is_over,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _renew_lease(self, is_over: threading.Event) -> None:
        while not is_over.wait(RENEW_EVERY_S):
            try:
                self._lease.renew()
            except LeaseLostError as error:
                self._report_lost_lease(error)
                return
            except OSError:  # the copying fails, too, and reports the outage
                continue

    def _report_lost_lease(self, error: LeaseLostError) -> None:
        if not self.has_lost_lease:
            self.has_lost_lease = True
            print(error, file=sys.stderr, flush=True)

    def _check_lease(self) -> None:
        """Raise LeaseLostError if another process runs the sweep: its files must not be overwritten."""
        if self.has_lost_lease:
            raise LeaseLostError(f"storage     {self._store} is run by another process now")

    def _report_outage(self, error: OSError, consequence: str) -> None:
        if self._outage is None:
            self._outage = summarise_store_error(error)
            print(
                f"storage     {self._store} does not answer ({self._outage}){consequence}", file=sys.stderr, flush=True
            )

    def _report_recovery(self) -> None:
        if self._outage is not None:
            self._outage = None
            print(f"storage     {self._store} answers again", file=sys.stderr, flush=True)

    # --- copying ------------------------------------------------------------------------------------------------------

    def _copy_all(self, *, with_study: bool = True) -> None:
        self._copy_events()
        self._copy_other_files(with_study=with_study)

    def _count_obsolete(self) -> list[tuple[StoreFiles, int]]:
        """Return the number of obsolete checkpoints at this moment, for the sweep and for its confirmation."""
        return [(files, len(files.obsolete)) for files in self._checkpoint_files]

    def _remove_obsolete(self, obsolete: list[tuple[StoreFiles, int]]) -> None:
        for files, number in obsolete:
            self._check_lease()
            with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="mirror") as pool:
                list(pool.map(files.remove_now, [files.obsolete[place] for place in range(number)]))
            for _ in range(number):
                files.obsolete.popleft()

    def _copy_events(self) -> None:
        with self._events_lock:
            for log in EVENT_LOGS:
                self._copy_event_log(log)

    def _copy_event_log(self, log: str) -> None:
        content_bytes = count_whole_line_bytes(self._folder / f"{log}{EVENTS_FILE}")
        if content_bytes < self._copied_bytes[log]:  # the last line could not be written and was removed
            self._copied_bytes[log] = content_bytes - content_bytes % _CHUNK_BYTES
        while self._copied_bytes[log] < content_bytes:
            segment = self._copied_bytes[log] // _CHUNK_BYTES
            end = min((segment + 1) * _CHUNK_BYTES, content_bytes)
            content = read_byte_range(self._folder / f"{log}{EVENTS_FILE}", segment * _CHUNK_BYTES, end)
            self._check_lease()
            self._store.write(f"{log}{EVENT_CHUNKS_FOLDER}/{segment:06d}.jsonl", content)
            self._copied_bytes[log] = end

    def _copy_other_files(self, *, with_study: bool) -> None:
        found = {
            name: state
            for name, state in list_synced_files(self._folder)
            if with_study or not name.startswith("study/")
        }
        changed = [name for name, state in found.items() if self._copied_files.get(name) != state]
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="mirror") as pool:
            for name in pool.map(self._copy_file, changed):
                if name is not None:
                    self._copied_files[name] = found[name]
            gone = [name for name in self._copied_files.keys() - found.keys() if not (self._folder / name).exists()]
            list(pool.map(self._store.remove, gone))
        for name in gone:
            del self._copied_files[name]

    def _copy_file(self, name: str) -> str | None:
        self._check_lease()
        try:
            self._store.upload(self._folder / name, name)
        except FileNotFoundError:
            if (self._folder / name).is_file():
                raise
            return None  # the file was removed in the meantime
        return name


@contextlib.contextmanager
def sync_sweep_folder(sweep: SweepSettings) -> Iterator[FolderSync | None]:
    """Keep a sweep in its object store within a `with` block. Yields None if the sweep has no store.

    At the start, the folder and the store are brought to the same state: the longer event log wins. At the end,
    everything is copied, even after an exception.

    Raises:
        UserError: at the start, the store does not answer or contains different events, or another process runs the
            sweep.
        SyncIncompleteError: the store does not answer at the end of a block that raised no exception.
    """
    url = sweep.storage_url
    if url is None:
        yield None
        return
    folder_sync = FolderSync(sweep.path, ObjectStore(url))
    folder_sync.connect()
    folder_sync.start()
    print(f"storage     {url}, any machine can resume the sweep: {format_resume_command(url)}", flush=True)
    go_on = f"{format_resume_command(sweep.path)} copies it later"
    try:
        yield folder_sync
    except BaseException:
        try:
            folder_sync.finish(timeout_s=_FINAL_TIMEOUT_S / 5)
        except OSError as error:
            print(
                f"storage     {url} lacks the latest part of the sweep ({summarise_store_error(error)}); {go_on}",
                file=sys.stderr,
            )
        raise
    try:
        folder_sync.finish(timeout_s=_FINAL_TIMEOUT_S)
    except OSError as error:
        raise SyncIncompleteError(
            f"the sweep is done, but {url} lacks the latest part of it ({summarise_store_error(error)}); {go_on}"
        ) from error


def open_checkpoint_files(folder_sync: FolderSync | None, folder: Path) -> CheckpointFiles:
    """Open the checkpoints of the sweep in a folder: in the store if the sweep is kept in one, else in the folder."""
    return FolderFiles(folder) if folder_sync is None else folder_sync.add_checkpoint_files(folder)
