"""Ends a sweep in an orderly way on SIGINT or SIGTERM, or immediately where that is not possible."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from handpose.program import forget_sigterm, is_repeated_sigterm
from handpose.sweep.record.settings import SweepSettings, format_resume_command

INTERRUPTED_STATUS = 75
"""Exit status of a sweep that was interrupted and can be resumed; sysexits.h calls it a temporary failure."""


_STDERR = 2


class SweepInterruptedError(Exception):
    """The sweep was interrupted by SIGINT or SIGTERM. Its state is saved, and it can be resumed."""


@contextlib.contextmanager
def handle_interrupts(sweep: SweepSettings, has_to_end: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM end the sweep in an orderly way, which takes some seconds; a second one ends it at once.

    A SIGTERM within some seconds of another one is the same request, also after this block, when the sweep is copied to
    its store.

    Args:
        sweep: the settings of the sweep.
        has_to_end: returns whether the sweep has to end for another reason.

    Yields:
        A function that returns whether a signal came or `has_to_end` is true.
    """
    is_requested = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal is_requested
        if is_repeated_sigterm(number):
            return
        if is_requested:
            exit_at_once(sweep, "stopped immediately")
        is_requested = True
        with contextlib.suppress(OSError):
            os.write(_STDERR, b"\nthe sweep is being stopped; Ctrl-C again ends it at once\n")

    forget_sigterm()
    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: is_requested or has_to_end()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_at_once(sweep: SweepSettings, why: str) -> NoReturn:
    """Print how to resume, and end the process immediately. Nothing is lost that was reported, just as with SIGKILL."""
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # shows the cursor, which the live view hides
    message = f"{cursor}\n{why}; to resume: {format_resume_command(sweep.resume_path)}\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(INTERRUPTED_STATUS)
