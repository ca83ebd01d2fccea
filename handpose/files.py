"""Files and folders that appear under their names only when they are complete: readers find the old or the new ones."""

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from handpose.errors import UserError, add_file_name, explain_file_error


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It is renamed to `path` at the end, and removed after an error.

    The folder is created if necessary. An OSError names `path`, not the temporary path, even if it would name no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with add_file_name(path):
            yield part
            os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def write_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into. It is renamed to `path` at the end, and removed after an error.

    The remains of an earlier attempt, and an incomplete folder at `path`, are removed first. Only one process at a time
    may use this for the same path.
    """
    partial = path.with_name(f".{path.name}.partial")
    for remains in (partial, path):
        if remains.exists():
            shutil.rmtree(remains)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def archive(folder: Path) -> None:
    """Rename a folder to NAME_1, NAME_2 and so on, the first of which that does not exist."""
    numbered = (folder.with_name(f"{folder.name}_{number}") for number in itertools.count(1))
    folder.rename(next(path for path in numbered if not path.exists()))


def check_writable(folder: Path) -> None:
    """Check that files can be written in a folder, or that it can be created. Nothing is left behind.

    This writes a file, because `os.access` returns true on network file systems that refuse to write.

    Raises:
        OSError: the folder cannot be written.
    """
    existing = find_nearest_existing(folder)
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    for name in folder.absolute().relative_to(existing.absolute()).parts:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(existing / name)  # raises if the name is too long
    try:
        descriptor, name = tempfile.mkstemp(dir=existing, prefix=".writable-")
        try:
            os.write(descriptor, b"0")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        error.filename = str(existing)
        raise


def check_output_file(file: Path, option: str = "--output") -> None:
    """Check that the file of an output option can be written, before the work to create it starts.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        check_writable(file.parent)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(file)  # raises if the name is too long
    except OSError as error:
        raise UserError(f"{option} {file}: {explain_file_error(error, remedy=f'give another {option}')}") from error


def expand_home(path: str | Path) -> Path:
    """Replace ~ in a path by the home folder.

    Raises:
        UserError: the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: the home folder cannot be found (is HOME set?); give the path without ~") from error


def find_home_folder() -> Path | None:
    """Return the user's home folder; None in a container whose user is not listed if HOME is not set."""
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() else None


def find_nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest parent that exists. A broken link counts as existing."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def check_owner(folder: Path) -> None:
    """Check that no other user has made a folder, or one above it, where everybody can make folders, as in /tmp.

    Such a folder of this user's name may be waiting for what this user writes and reads there.

    Raises:
        UserError: another user (not root) has made it.
    """
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        is_public = os.path.lexists(place) and bool(place.parent.stat().st_mode & stat.S_IWOTH)
        if is_public and place.lstat().st_uid not in (os.getuid(), 0):
            raise UserError(
                f"{place} belongs to another user, who can change what is in it, and everyone can make folders next to "
                f"it; use a folder of your own instead of {folder}"
            )


def stays_inside(name: str) -> bool:
    """Whether a name, relative to a folder, stays in that folder: it is not absolute and has no `..` in it."""
    return not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def join_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder. Its name comes from a file or a store that someone else may have written.

    Raises:
        UserError: the name leaves the folder.
    """
    if not stays_inside(name):
        raise UserError(f"{name!r} is not the name of a file in {folder}: names must not be absolute or contain '..'")
    return folder / name


def write_json(path: Path, value: Any, *, indent: int | None = None, is_durable: bool = False) -> None:
    """Write a value as JSON; see `to_json`.

    Args:
        path: the file.
        value: the value.
        indent: spaces of each level; None: everything in one line.
        is_durable: whether the file is complete, old or new, even after a power failure. This takes milliseconds.
    """
    with write_atomically(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(to_json(value, indent=indent) + "\n")
        file.flush()
        if is_durable:
            os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read the value in a JSON file.

    Raises:
        UserError: the file is not JSON.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # also raised for bytes that are not UTF-8
        raise UserError(f"{path} does not hold JSON ({error}); it is damaged, or a file of another kind") from error


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Convert a value to JSON that every parser can read (RFC 8259). Numbers that are not finite become null.

    Python's encoder would write NaN and Infinity, which are not JSON.
    """
    return json.dumps(_replace_non_finite(value), indent=indent, allow_nan=False)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return value
