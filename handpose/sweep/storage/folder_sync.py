"""A sweep's folder, kept in a store as well, so that it goes on when the driver's machine is gone.

The driver works in its folder, and a thread copies: every few seconds what has happened, every minute whatever else has
changed, and at the end all of it. What the store has is a sweep of a moment ago: epochs reported since are trained
again. Events go as segments of a fixed size, of which only the last one changes. Checkpoints are put there by the
workers; one that is needed no more is removed when the store knows the events that say so, or the sweep that it has
would lack it. The study is copied while nothing runs, so that it never knows more than the events; what it lacks is
told to it again.
"""

import contextlib
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.report.words import duration
from handpose.sweep.record.events import EVENTS
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.storage.checkpoint_files import CheckpointFiles, FolderFiles, StoreFiles, patiently
from handpose.sweep.storage.lease import OtherOwnerError, Owner
from handpose.sweep.storage.object_store import Store, reason
from handpose.sweep.storage.stored_sweep import LOGS, SEGMENTS, bring_back, files_beside, part_of, whole_bytes

_SEGMENT_BYTES = 2**20
_EVENTS_EVERY_S = 3.0
_REST_EVERY_S = 60.0
_LONGEST_DELAY_S = 60.0
_LAST_PATIENCE_S = 300.0
_THREADS = 8
_TUNE = ("python", "tune.py")
_GOES_ON = "; the sweep goes on, and is copied when it answers"


class NotKeptError(Exception):
    """The sweep is done, but the store lacks the last of it; it can go on, and copies it then."""


class Mirror:
    """Copies the folder of a sweep into a store. `is_lost`: another process runs the sweep now, and this one must not.

    every_s: between two looks at the events.
    """

    def __init__(self, folder: Path, store: Store, *, every_s: float = _EVENTS_EVERY_S) -> None:
        self.is_lost = False
        self._folder = folder
        self._store = store
        self._every_s = every_s
        self._shelves: list[StoreFiles] = []
        self._copied_bytes = dict.fromkeys(LOGS, 0)
        self._copied_files: dict[str, tuple[int, int]] = {}
        self._next_rest = 0.0
        self._owner = Owner(store)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._copying = threading.Lock()
        self._outage: str | None = None

    def begin(self) -> None:
        """Bring folder and store to the same state, and see that nobody else runs the sweep. Raises UserError."""
        try:
            self._owner.take()
            self._copied_bytes = bring_back(self._store, self._folder)
            self._copy_events()
        except OSError as error:
            raise UserError(f"sweep.storage: {self._store} does not answer ({reason(error)})") from error

    def checkpoint_files(self, folder: Path) -> StoreFiles:
        """Where the checkpoints of the sweep in a folder lie: of this one, or of its confirmation."""
        name = folder.relative_to(self._folder).as_posix()
        files = StoreFiles(self._store if name == "." else self._store.below(name))
        self._shelves.append(files)
        return files

    def copy(self) -> None:
        """Copy what has happened since, and now and then the rest. Raises OSError, OtherOwnerError."""
        self._owner.beat()
        obsolete = self._obsolete()
        self._copy_events()
        self._remove(obsolete)
        if time.monotonic() >= self._next_rest:
            began = time.monotonic()
            self._copy_rest(with_study=False)
            # However much there is, copying it takes at most a twentieth of the time.
            self._next_rest = began + max(_REST_EVERY_S, 20 * (time.monotonic() - began))

    def copy_at_rest(self) -> None:
        """Copy everything, the study too: nothing may be running. A store that does not answer lacks it for a while."""
        with self._copying:
            try:
                self._copy_all()
            except OSError as error:
                self._tell_outage(error, _GOES_ON)

    def start(self) -> None:
        self._thread.start()

    def finish(self, *, patience_s: float) -> None:
        """End the thread, copy everything that is left, and give the sweep free. Raises OSError."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.is_lost:
            return
        self._patiently(self._last, patience_s)

    def _last(self) -> None:
        self._copy_all()
        self._remove(self._obsolete())
        self._owner.release()

    def _patiently(self, act: Callable[[], None], patience_s: float) -> None:
        try:
            act()
        except OSError as error:
            self._tell_outage(error, f"; waiting for it for at most {duration(patience_s, rough=True)}")
            patiently(act, patience_s)
        self._tell_return()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay_s = self._every_s
        while not self._stop.wait(delay_s):
            try:
                with self._copying:
                    self.copy()
                delay_s = self._every_s
                self._tell_return()
            except OtherOwnerError as error:
                self.is_lost = True
                print(error, file=sys.stderr, flush=True)
                return
            except OSError as error:
                self._tell_outage(error, _GOES_ON)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _tell_outage(self, error: OSError, more: str) -> None:
        if self._outage is None:
            self._outage = reason(error)
            print(f"storage     {self._store} does not answer ({self._outage}){more}", file=sys.stderr, flush=True)

    def _tell_return(self) -> None:
        if self._outage is not None:
            self._outage = None
            print(f"storage     {self._store} answers again", file=sys.stderr, flush=True)

    # --- what is copied -----------------------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        self._copy_events()
        self._copy_rest(with_study=True)

    def _obsolete(self) -> list[tuple[StoreFiles, int]]:
        """How many checkpoints of each are needed no more as of now."""
        return [(files, len(files.obsolete)) for files in self._shelves]

    def _remove(self, obsolete: list[tuple[StoreFiles, int]]) -> None:
        for files, number in obsolete:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="mirror") as pool:
                list(pool.map(files.remove_now, [files.obsolete[place] for place in range(number)]))
            for _ in range(number):
                files.obsolete.popleft()

    def _copy_events(self) -> None:
        for log in LOGS:
            content_bytes = whole_bytes(self._folder / f"{log}{EVENTS}")
            if content_bytes < self._copied_bytes[log]:  # a line was taken back, since the disk did not take it
                self._copied_bytes[log] = content_bytes - content_bytes % _SEGMENT_BYTES
            while self._copied_bytes[log] < content_bytes:
                segment = self._copied_bytes[log] // _SEGMENT_BYTES
                end = min((segment + 1) * _SEGMENT_BYTES, content_bytes)
                content = part_of(self._folder / f"{log}{EVENTS}", segment * _SEGMENT_BYTES, end)
                self._store.write(f"{log}{SEGMENTS}/{segment:06d}.jsonl", content)
                self._copied_bytes[log] = end

    def _copy_rest(self, *, with_study: bool) -> None:
        found = {
            name: state for name, state in files_beside(self._folder) if with_study or not name.startswith("study/")
        }
        changed = [name for name, state in found.items() if self._copied_files.get(name) != state]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="mirror") as pool:
            for name in pool.map(self._copied, changed):
                if name is not None:
                    self._copied_files[name] = found[name]
            gone = [name for name in self._copied_files.keys() - found.keys() if not (self._folder / name).exists()]
            list(pool.map(self._store.remove, gone))
        for name in gone:
            del self._copied_files[name]

    def _copied(self, name: str) -> str | None:
        try:
            self._store.upload(self._folder / name, name)
        except FileNotFoundError:
            if (self._folder / name).is_file():
                raise
            return None  # it has gone meanwhile
        return name


@contextlib.contextmanager
def mirrored(sweep: SweepSettings) -> Iterator[Mirror | None]:
    """Keep a sweep in its store too, for the length of a block; without one there is no mirror.

    Before the block folder and store are brought to the same state, the longer of the two; after it everything is
    copied, whatever has ended it. Raises UserError where the store does not answer at the beginning, holds another
    sweep, or another process runs this one, and NotKeptError where it does not answer at the end.
    """
    url = sweep.stored_at
    if url is None:
        yield None
        return
    mirror = Mirror(sweep.path, Store(url))
    mirror.begin()
    mirror.start()
    print(f"storage     {url}, where any machine can go on: {_resumed_at(url)}", flush=True)
    go_on = f"{_resumed_at(str(sweep.path))} copies it then"
    try:
        yield mirror
    except BaseException:
        try:
            mirror.finish(patience_s=_LAST_PATIENCE_S / 5)
        except OSError as error:
            print(f"storage     {url} lacks the last of the sweep ({reason(error)}); {go_on}", file=sys.stderr)
        raise
    try:
        mirror.finish(patience_s=_LAST_PATIENCE_S)
    except OSError as error:
        raise NotKeptError(f"the sweep is done, but {url} lacks the last of it ({reason(error)}); {go_on}") from error


def _resumed_at(place: str) -> str:
    """The command that goes on with the sweep in a folder or a store."""
    return shlex.join([*_TUNE, quote_override("sweep.resume", place)])


def files_of(mirror: Mirror | None, folder: Path) -> CheckpointFiles:
    """Where the checkpoints of the sweep in a folder lie."""
    return FolderFiles(folder) if mirror is None else mirror.checkpoint_files(folder)
