"""Locks that let one of several processes make something; those of a process that is gone are free."""

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
    """Hold the lock of a file, which is made with its folder.

    Args:
        file: it stays where it is, since another process may wait for it.
        mode: of the folder.
        on_wait: what to print where another process holds the lock, before waiting for it.

    Raises:
        Timeout: another process holds the lock and on_wait is None.
        OSError: the file system has no locks, or cannot be written. What was made for the lock is removed then.
    """
    made = [each for each in (file, *file.parents) if not os.path.lexists(each)]
    lock = FileLock(file)
    try:
        file.parent.mkdir(mode=mode, parents=True, exist_ok=True)
        _acquire(lock, file, on_wait)
    except OSError as error:
        if not isinstance(error, Timeout):
            with contextlib.suppress(OSError):  # another process has put something there
                for each in made:
                    each.unlink(missing_ok=True) if each == file else each.rmdir()
        raise
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def hold_write_lock(file: Path, *, on_wait: str, make_error: Callable[[OSError], Exception]) -> Iterator[None]:
    """Hold the lock of a file beside something that is to be made in the same folder.

    Args:
        file: as `hold_lock` takes it.
        on_wait: as `hold_lock` takes it.
        make_error: makes the exception to raise from the OSError of a folder that cannot be written or locked.
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
        except NotImplementedError as error:  # of filelock before 3.30, where the file system has no locks
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
        except Timeout:
            if on_wait is None:
                raise
            print(on_wait, end="\n" * bool(on_wait), file=sys.stderr)
            lock.acquire()
