"""The exception for mistakes of the user, and messages for what the operating system reports about user files."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCK_ERRNOS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_ERRNOS_WITHOUT_FILE = (
    *_DISK_FULL_ERRNOS,
    *_NO_LOCK_ERRNOS,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)
"""Errors of calls that do not know a path, such as writing to an open file."""

_MIN_FREE_FILES = 16
_DISK_FULL_REMEDY = "free some space, or choose a folder on another disk (DIR_SCRATCH for results)"
_REMEDIES = {
    errno.EACCES: "check the permissions of the file and of the folders above it",
    errno.EPERM: "check the permissions of the file and of the folders above it",
    errno.EROFS: "choose a folder that can be written (DIR_SCRATCH for results)",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "a part of the path is a file and not a folder",
    errno.EEXIST: "a file or a broken link of this name already exists",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the limit on open files of the machine",
    **dict.fromkeys(_DISK_FULL_ERRNOS, _DISK_FULL_REMEDY),
    **dict.fromkeys(_NO_LOCK_ERRNOS, "choose a folder on a file system with file locks, such as a local disk"),
}


class UserError(ValueError):
    """A mistake that the user can correct. The message is one sentence with the value, the file and the remedy.

    The scripts print it without a traceback and exit with status 2. Any other exception is a bug in this project.
    """


def join_lines(text: object) -> str:
    """Return a text, such as the message of an exception, as a single line."""
    return " ".join(str(text).split())


def is_about_files(error: OSError) -> bool:
    """Whether an error is about a file or folder of the user, and not a bug in this project or a network problem.

    Such an error names a path outside the package. Or it reports that a disk, a file system or the environment (the
    working folder, the folder for temporary files) lacks what every program needs.
    """
    if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
        return False
    if error.filename is None:
        return error.errno in _ERRNOS_WITHOUT_FILE or isinstance(error, FileNotFoundError)
    if not isinstance(error.filename, (str, bytes, os.PathLike)):  # a file descriptor
        return False
    return not Path(os.path.abspath(os.fsdecode(error.filename))).is_relative_to(_PACKAGE)


def explain_file_error(error: OSError, path: str | Path | None = None, *, verb: str = "used", remedy: str = "") -> str:
    """Explain what went wrong with a file: its path, the reason, the space that is left on a full disk, and the remedy.

    Args:
        error: the error of the operating system.
        path: the path of the file, if the error does not name it or names another one, such as a temporary file.
        verb: what cannot be done with the file.
        remedy: replaces the standard remedy for this reason.
    """
    named = path if path is not None else error.filename
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC and named is not None:
        reason += f": {_format_free_space(Path(os.fsdecode(named)))}"
    remedy = remedy or _REMEDIES.get(error.errno or 0, "")
    if named is None and reason == os.strerror(errno.ENOENT):  # raised by os.getcwd
        return "the working folder no longer exists; change to another folder"
    if named is None:
        return f"{reason}; {remedy}" if remedy else reason
    verb = "written" if error.errno in (*_DISK_FULL_ERRNOS, errno.EROFS) else verb
    return f"{os.fsdecode(named)} cannot be {verb} ({reason})" + (f"; {remedy}" if remedy else "")


@contextmanager
def add_file_name(path: str | Path) -> Iterator[None]:
    """Set the file name of an OSError that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _ERRNOS_WITHOUT_FILE:
            error.filename = str(path)
        raise


def get_free_bytes(path: Path) -> int:
    """Return the free space for a file at a path. The file need not exist."""
    return shutil.disk_usage(_find_existing_parent(path)).free


def _format_free_space(path: Path) -> str:
    """Describe the space left for a file that could not be written. Some of it may have been freed since."""
    found = os.statvfs(_find_existing_parent(path))
    if found.f_files and found.f_favail < _MIN_FREE_FILES:
        return f"{found.f_favail} more files (inodes) are not enough"
    return f"{format_size(get_free_bytes(path))} free are not enough"


def _find_existing_parent(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def format_size(num_bytes: float) -> str:
    """Format a size with a suitable unit: 12 GB, 3.4 MB, 0 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            number = num_bytes / factor
            return f"{number:.0f} {unit}" if number >= 9.95 else f"{number:.2g} {unit}"
    return "0 MB"
