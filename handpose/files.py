"""Files that appear under their names when they are whole, so that a reader sees the one before or the new one."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from handpose.errors import UserError, add_file_name, explain_file_error


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A path to write to, that is moved to `path` at the end and removed after an error. The folder is made.

    An OSError names `path`, not the path to write to, and also where it would name none.
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
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, that is renamed to `path` at the end and removed after an error.

    What is left of an earlier attempt, or of a folder `path` that has lost a file, is removed first. Only one process
    at a time may do this.
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


def check_writable(folder: Path) -> None:
    """Raise OSError where no file can be written in a folder, or where it cannot be made; nothing is left behind.

    A file is written, since `os.access` says yes for a network file system that then refuses.
    """
    place = find_nearest_existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    for name in folder.absolute().relative_to(place.absolute()).parts:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place / name)  # which raises where the name is too long
    try:
        descriptor, name = tempfile.mkstemp(dir=place, prefix=".writable-")
        try:
            os.write(descriptor, b"0")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        error.filename = str(place)
        raise


def check_output_file(file: Path, option: str = "--output") -> None:
    """Raise UserError where a file that an option names cannot be written, before it takes work to make it."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        check_writable(file.parent)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(file)  # which raises where the name is too long
    except OSError as error:
        raise UserError(f"{option} {file}: {explain_file_error(error, remedy=f'give another {option}')}") from error


def expand_home(path: str | Path) -> Path:
    """The path with the home folder in place of ~. Raises UserError where the home folder is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: the home folder cannot be found (is HOME set?); give the path without ~") from error


def find_home_folder() -> Path | None:
    """The user's home folder; None in a container whose user is not listed and where HOME is not set."""
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() else None


def find_nearest_existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists; a broken link exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Write a value as JSON; as `to_json`."""
    with write_atomically(path) as part:
        part.write_text(to_json(value, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value that a JSON file holds. Raises UserError where it holds none, and OSError where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # also of bytes that are not UTF-8
        raise UserError(f"{path} does not hold JSON ({error}); it is damaged, or a file of another kind") from error


def to_json(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON that every parser reads (RFC 8259): numbers that are not finite become null.

    Python's own encoder writes NaN and Infinity, which JSON does not have.
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
