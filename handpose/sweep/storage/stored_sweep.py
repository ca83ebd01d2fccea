"""The copy of a sweep in an object store: its events in chunks, its checkpoints, and the other files of its folder."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handpose.errors import UserError
from handpose.files import expand_home
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.interventions import CONTROL_FOLDER
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.storage.lease import LEASE_FILE
from handpose.sweep.storage.object_store import ObjectStore, check_url_secrets, summarise_store_error
from handpose.urls import is_url

EVENT_CHUNKS_FOLDER = "events"
"""Folder of a store with the chunks of the event log."""

EVENT_LOGS = ("", "confirm/")
"""Prefixes of the event logs: the log of the sweep and the log of its confirmation."""

_EXCLUDED_FOLDERS = ("checkpoints/", "trials/", "pictures/", "events/", f"{CONTROL_FOLDER}/")
_NUM_THREADS = 8


def check_store_url(url: str) -> None:
    """Check the form of `sweep.storage`, without a request to the store.

    Raises:
        UserError: it is not a URL, or contains a secret.
    """
    if not is_url(url):
        raise UserError(f"sweep.storage={url} is not a URL; give one such as s3://bucket/folder or file:///folder")
    check_url_secrets(url)


def check_storage(sweep: SweepSettings) -> None:
    """Check before a sweep starts that its store works and that the name of a new sweep is free there.

    Raises:
        UserError: the URL is invalid, the store cannot be read and written, or it contains a sweep of this name.
    """
    if sweep.storage is None or sweep.storage_url is None:
        return
    check_store_url(sweep.storage)
    ObjectStore(sweep.storage).check()
    if sweep.resume is None and ObjectStore(sweep.storage_url).list_files().keys() - {LEASE_FILE}:
        raise UserError(
            f"{sweep.storage_url} already has a sweep; choose another sweep.name, or continue that sweep with "
            f"sweep.resume={sweep.storage_url}"
        )


def download_sweep(url: str, folder: Path) -> None:
    """Download a sweep so that it can be resumed. The checkpoints stay in the store.

    Args:
        url: URL of the sweep.
        folder: folder to download it to.

    Raises:
        UserError: there is no sweep at the URL, or it cannot be read.
    """
    with _convert_read_errors(url):
        store = ObjectStore(url)
        if "sweep.yaml" not in store.list_files():
            raise UserError(f"sweep.resume={url}: there is no sweep.yaml in it, so there is no sweep to resume")
        restore_folder(store, folder)


@contextlib.contextmanager
def open_sweep_for_reading(place: str) -> Iterator[Path]:
    """Yield the folder of a sweep that is only read.

    For a sweep in a store, this is a copy without checkpoints, which is deleted at the end of the `with` block.

    Args:
        place: folder or URL of the sweep.

    Raises:
        UserError: the store does not answer.
    """
    if not is_url(place):
        yield expand_home(place).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="handpose-sweep-") as folder:
        with _convert_read_errors(place):
            store = ObjectStore(place)
            download_files(store, Path(folder), is_wanted=_is_needed_for_reading)
            download_events(store, Path(folder))
        yield Path(folder)


def open_stored_sweep(url: str) -> ObjectStore:
    """Open the store at the URL of a sweep.

    Raises:
        UserError: there is no sweep at the URL, or it cannot be read.
    """
    store = ObjectStore(url)
    with _convert_read_errors(url):
        try:
            store.read("sweep.yaml", max_bytes=1)
        except FileNotFoundError as error:
            raise UserError(
                f"{url} has no sweep: there is no sweep.yaml in it, or no such bucket; give the URL of a sweep, which "
                "is its sweep.storage followed by its name"
            ) from error
    return store


@contextlib.contextmanager
def _convert_read_errors(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{url} cannot be read ({summarise_store_error(error)})") from error


def _is_needed_for_reading(name: str) -> bool:
    return not is_excluded(name) and not name.startswith("tensorboard/") and not name.endswith(".ckpt")


def restore_folder(store: ObjectStore, folder: Path) -> dict[str, int]:
    """Update a sweep's folder from the store, if the store contains more of the sweep.

    The longer event log wins. The shorter one must be a prefix of it.

    Returns:
        Prefix of each event log -> number of its bytes that are in the store.

    Raises:
        UserError: the folder and the store have different events.
        OSError: the store does not answer.
    """
    theirs = {log: _read_stored_events(store, log) for log in EVENT_LOGS}
    ours = {log: _read_whole_lines(folder / log / EVENTS_FILE) for log in EVENT_LOGS}
    for log in EVENT_LOGS:
        common = min(len(theirs[log]), len(ours[log]))
        if theirs[log][:common] != ours[log][:common]:
            raise UserError(
                f"{folder / log / EVENTS_FILE} and {store} have diverged since they were copied; rename "
                f"{folder} to continue with the copy in the store"
            )
    stored_bytes = {log: len(content) for log, content in theirs.items()}
    if ours[""] and all(len(ours[log]) >= stored_bytes[log] for log in EVENT_LOGS):
        return stored_bytes
    download_files(store, folder, is_wanted=lambda name: not is_excluded(name))
    for log in EVENT_LOGS:
        if len(theirs[log]) > len(ours[log]):
            (folder / log).mkdir(parents=True, exist_ok=True)
            (folder / log / EVENTS_FILE).write_bytes(theirs[log])
    return stored_bytes


def download_files(store: ObjectStore, folder: Path, *, is_wanted: Callable[[str], bool]) -> None:
    """Download the files of a sweep, with their modification times.

    Args:
        store: the store, opened at the URL of the sweep.
        folder: folder to download them to.
        is_wanted: name of a file -> whether to download it.

    Raises:
        OSError: the store does not answer.
    """
    found = {name: stored for name, stored in store.list_files().items() if is_wanted(name)}

    def one(name: str) -> None:
        store.download(name, folder / name)
        os.utime(folder / name, (found[name].modified_s, found[name].modified_s))

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(one, found))


def download_events(store: ObjectStore, folder: Path) -> None:
    """Download the event logs of a sweep and of its confirmation, with the time of the last change.

    Raises:
        OSError: the store does not answer.
    """
    for log in EVENT_LOGS:
        content, segments = _read_stored_events(store, log), store.list_files(f"{log}{EVENT_CHUNKS_FOLDER}")
        if content:
            (folder / log).mkdir(parents=True, exist_ok=True)
            (folder / log / EVENTS_FILE).write_bytes(content)
            modified_s = max(stored.modified_s for stored in segments.values())
            os.utime(folder / log / EVENTS_FILE, (modified_s, modified_s))


def _read_stored_events(store: ObjectStore, log: str) -> bytes:
    names = sorted(store.list_files(f"{log}{EVENT_CHUNKS_FOLDER}"))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return b"".join(pool.map(store.read, names))


def _read_whole_lines(file: Path) -> bytes:
    return read_byte_range(file, 0, count_whole_line_bytes(file)) if file.exists() else b""


def count_whole_line_bytes(file: Path) -> int:
    """Return how many bytes of an event log are complete lines."""
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


def read_byte_range(file: Path, start: int, end: int) -> bytes:
    """Read the bytes from `start` up to, but not including, `end`."""
    with file.open("rb") as log:
        log.seek(start)
        return log.read(end - start)


def list_synced_files(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """List the files that `FolderSync` copies: all except those that `is_excluded` names, such as events.

    Yields:
        Name relative to `folder`, and the state of the file: modification time in nanoseconds and size in bytes.
    """
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not is_excluded(f"{(at / name).as_posix()}/")]
        for each in files:
            name = (at / each).as_posix()
            with contextlib.suppress(FileNotFoundError):
                stat = (folder / name).stat()
                if not is_excluded(name):
                    yield name, (stat.st_mtime_ns, stat.st_size)


def is_excluded(name: str) -> bool:
    """Return whether a file is copied in another way, belongs to one machine only, or is incomplete."""
    own = name.removeprefix("confirm/")
    last = name.rstrip("/").rpartition("/")[2]
    return (
        own.startswith(_EXCLUDED_FOLDERS)
        or own in (EVENTS_FILE, LEASE_FILE)
        or last.startswith(".")
        or last.endswith(".part")
    )
