"""Programs that run beside a test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def start_program(file: Path, *arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start a program of this project, which says where each of its threads is if `wait_for_end` ends it."""
    return subprocess.Popen(
        [sys.executable, str(file), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_end(process: subprocess.Popen[str], *, timeout_s: float) -> tuple[int, str, str]:
    """Wait until a program has ended. Return its exit status, its output and its errors.

    A program that does not end in time is ended, and the test fails with the stack of each thread of the program.
    """
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        status = process.poll()
        process.send_signal(signal.SIGABRT)
        try:
            _, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:  # another process holds its output open
            process.kill()
            err = "(no stack)"
        pytest.fail(f"not ended after {timeout_s:.0f} s (exit status {status}):\n{err[-20_000:]}")
    return process.returncode, out, err
