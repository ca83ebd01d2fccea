"""A sweep as a store has it: its events in segments, its checkpoints, and whatever else lies in its folder."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handpose.errors import UserError
from handpose.sweep.record.events import EVENTS
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.storage.lease import OWNER
from handpose.sweep.storage.object_store import Store, reason
from handpose.urls import is_url
from handpose.whole_file import expand_home

SEGMENTS = "events"
"""Folder of a store for what is events.jsonl in the folder of a sweep."""

LOGS = ("", "confirm/")
"""Where there are events: of the sweep, and of its confirmation."""

_LEFT_OUT = ("checkpoints/", "trials/", "pictures/", "events/")
_THREADS = 8


def check_storage(sweep: SweepSettings) -> None:
    """See that the store of a sweep can be used, before work starts, and that a new sweep has its name to itself there.

    Raises UserError.
    """
    if sweep.storage is None or sweep.stored_at is None:
        return
    if not is_url(sweep.storage):
        raise UserError(f"sweep.storage={sweep.storage} is no URL; give one as s3://bucket/folder or file:///folder")
    Store(sweep.storage).check()
    if sweep.resume is None and Store(sweep.stored_at).files().keys() - {OWNER}:
        raise UserError(
            f"there is a sweep in {sweep.stored_at} already; choose another sweep.name, or continue that sweep with "
            f"sweep.resume={sweep.stored_at}"
        )


def brought_back(url: str, folder: Path) -> None:
    """Bring a sweep that was kept at a URL into a folder. Raises UserError where there is none, or it cannot be had."""
    with _told(url):
        store = Store(url)
        if "sweep.yaml" not in store.files():
            raise UserError(
                f"sweep.resume={url}: there is no sweep.yaml in it, so that there is no sweep to go on with"
            )
        bring_back(store, folder)


@contextlib.contextmanager
def looked_at(place: str) -> Iterator[Path]:
    """The folder of a sweep that is only to be read; of one in a store a copy without checkpoints, for a block.

    Raises UserError where the store does not answer.
    """
    if not is_url(place):
        yield expand_home(place).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="handpose-sweep-") as folder:
        with _told(place):
            store = Store(place)
            fetch(store, Path(folder), which=_is_read)
            fetch_events(store, Path(folder))
        yield Path(folder)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{url} cannot be read ({reason(error)})") from error


def _is_read(name: str) -> bool:
    return not is_left_out(name) and not name.startswith("tensorboard/") and not name.endswith(".ckpt")


def bring_back(store: Store, folder: Path) -> dict[str, int]:
    """Bring a folder to what the store knows of its sweep, where that is more; how many bytes of each log it has.

    The longer log of events wins; one must be the beginning of the other. Raises UserError, OSError.
    """
    theirs, ours = ({log: read(log) for log in LOGS} for read in (_in_store(store), _in_folder(folder)))
    for log in LOGS:
        common = min(len(theirs[log]), len(ours[log]))
        if theirs[log][:common] != ours[log][:common]:
            raise UserError(
                f"{folder / log / EVENTS} and {store} have gone different ways since they were copied; rename "
                f"{folder} to continue with what the store has"
            )
    stored_bytes = {log: len(content) for log, content in theirs.items()}
    if ours[""] and all(len(ours[log]) >= stored_bytes[log] for log in LOGS):
        return stored_bytes
    fetch(store, folder, which=lambda name: not is_left_out(name))
    for log in LOGS:
        if len(theirs[log]) > len(ours[log]):
            (folder / log).mkdir(parents=True, exist_ok=True)
            (folder / log / EVENTS).write_bytes(theirs[log])
    return stored_bytes


def fetch(store: Store, folder: Path, *, which: Callable[[str], bool]) -> None:
    """Fetch files of a sweep, and its events. Raises OSError."""
    found = {name: stored for name, stored in store.files().items() if which(name)}

    def one(name: str) -> None:
        store.download(name, folder / name)
        os.utime(folder / name, (found[name].modified_s, found[name].modified_s))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(one, found))


def fetch_events(store: Store, folder: Path) -> None:
    """Write the events of a sweep and of its confirmation into a folder, with the time of the last. Raises OSError."""
    for log in LOGS:
        content, segments = _in_store(store)(log), store.files(f"{log}{SEGMENTS}")
        if content:
            (folder / log).mkdir(parents=True, exist_ok=True)
            (folder / log / EVENTS).write_bytes(content)
            modified_s = max(stored.modified_s for stored in segments.values())
            os.utime(folder / log / EVENTS, (modified_s, modified_s))


def _in_store(store: Store) -> Callable[[str], bytes]:
    def read(log: str) -> bytes:
        names = sorted(store.files(f"{log}{SEGMENTS}"))
        with ThreadPoolExecutor(_THREADS) as pool:
            return b"".join(pool.map(store.read, names))

    return read


def _in_folder(folder: Path) -> Callable[[str], bytes]:
    def read(log: str) -> bytes:
        file = folder / log / EVENTS
        return part_of(file, 0, whole_bytes(file)) if file.exists() else b""

    return read


def whole_bytes(file: Path) -> int:
    """How many bytes of a log are whole lines."""
    if not file.exists():
        return 0
    with file.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 2**16)
            log.seek(start)
            at = log.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def part_of(file: Path, start: int, end: int) -> bytes:
    with file.open("rb") as log:
        log.seek(start)
        return log.read(end - start)


def files_beside(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Files beside events and checkpoints, and when and how long each is."""
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not is_left_out(f"{(at / name).as_posix()}/")]
        for each in files:
            name = (at / each).as_posix()
            with contextlib.suppress(FileNotFoundError):
                stat = (folder / name).stat()
                if not is_left_out(name):
                    yield name, (stat.st_mtime_ns, stat.st_size)


def is_left_out(name: str) -> bool:
    """What is copied otherwise, belongs to one machine, or is not whole yet."""
    own = name.removeprefix("confirm/")
    last = name.rstrip("/").rpartition("/")[2]
    return own.startswith(_LEFT_OUT) or own in (EVENTS, OWNER) or last.startswith(".") or last.endswith(".part")
