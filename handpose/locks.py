"""File locks between processes. The lock of a process that has ended is free."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from handpose.errors import add_file_name
from handpose.files import check_writable


@contextlib.contextmanager
def hold_lock(file: Path, *, mode: int = 0o777, on_wait: str | None = None) -> Iterator[None]:
    """Hold the lock of a file within a `with` block. The file and its folder are created.

    Args:
        file: the lock file. It is not removed, because another process may be waiting for it.
        mode: permissions of the folder, if it is created.
        on_wait: what to print before waiting for another process that holds the lock.

    Raises:
        Timeout: another process holds the lock and on_wait is None.
        OSError: the file system has no locks or cannot be written. Files and folders created for the lock are removed.
    """
    created = [each for each in (file, *file.parents) if not os.path.lexists(each)]
    lock = FileLock(file)
    try:
        file.parent.mkdir(mode=mode, parents=True, exist_ok=True)
        _acquire(lock, file, on_wait)
    except OSError as error:
        if not isinstance(error, Timeout):
            with contextlib.suppress(OSError):  # another process uses the folder
                for each in created:
                    each.unlink(missing_ok=True) if each == file else each.rmdir()
        raise
    try:
        yield
    finally:
        lock.release()


def is_locked(file: Path) -> bool:
    """Return whether another process holds the lock of a file."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except (Timeout, OSError):
        return True


@contextlib.contextmanager
def hold_write_lock(file: Path, *, on_wait: str, make_error: Callable[[OSError], Exception]) -> Iterator[None]:
    """Hold a lock in the folder in which something is going to be created.

    Args:
        file: the lock file; see `hold_lock`.
        on_wait: what to print before waiting; see `hold_lock`.
        make_error: converts the OSError of a folder that cannot be written or locked to the exception to raise.
    """
    with contextlib.ExitStack() as stack:
        try:
            check_writable(file.parent)
            stack.enter_context(hold_lock(file, on_wait=on_wait))
        except OSError as error:
            raise make_error(error) from None
        yield


def _acquire(lock: FileLock, file: Path, on_wait: str | None) -> None:
    with add_file_name(file):
        try:
            lock.acquire(timeout=0)
        except NotImplementedError as error:  # raised by filelock before 3.30 if the file system has no locks
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
        except Timeout:
            if on_wait is None:
                raise
            print(on_wait, end="\n" * bool(on_wait), file=sys.stderr)
            lock.acquire()
