"""Ends a sweep in good order on SIGINT or SIGTERM, or at once where that is not possible."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from handpose.config import quote_override
from handpose.sweep.record.settings import SweepSettings

INTERRUPTED_STATUS = 75
"""Exit status of a sweep that was ended by hand and can go on; sysexits.h calls it a temporary failure."""


class SweepInterruptedError(Exception):
    """The sweep was ended by hand (SIGINT or SIGTERM); what it knows is kept, and it can go on."""


def format_resume_command(folder: Path) -> str:
    """The command line that goes on with the sweep in a folder."""
    return shlex.join(["python", "tune.py", quote_override("sweep.resume", str(folder))])


@contextlib.contextmanager
def interruptible(sweep: SweepSettings, has_to_end: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM end the sweep in good order, which takes some seconds; a second one leaves at once.

    Yields whether there was one, or the sweep has to end for another reason.
    """
    is_requested = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal is_requested
        if is_requested:
            exit_at_once(sweep, "left at once")
        is_requested = True

    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: is_requested or has_to_end()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_at_once(sweep: SweepSettings, why: str) -> NoReturn:
    """End the process. Whatever is lost by that is lost by a SIGKILL too: nothing that was reported."""
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the live view has hidden it
    message = f"{cursor}\n{why}; to go on: {format_resume_command(sweep.resume_path)}\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(INTERRUPTED_STATUS)
