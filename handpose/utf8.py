"""UTF-8 in all programs of the project, whatever the locale: text files, names of files, and what is printed."""

import io
import os
import sys
from pathlib import Path

from handpose.errors import UserError


def use_utf8() -> None:
    """Restart the program in Python's UTF-8 mode (PEP 540) if the locale has another encoding.

    To be called first by what runs as a program, never by a library: it replaces the process. TensorBoard, PyArrow and
    Ray take names of files for UTF-8 in every locale, so that Python has to do the same. Whatever cannot be printed
    is escaped instead of raising UnicodeEncodeError. Workers and subprocesses inherit the mode through PYTHONUTF8.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":  # which -X utf8=0 can overrule
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_utf8(path: Path) -> str:
    """The text of a file that a user wrote, without the byte-order mark that editors on Windows put first.

    Raises UserError if the file is not UTF-8, and OSError.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions count from behind a byte-order mark.
        before = content.removeprefix(b"\xef\xbb\xbf")[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}, column {column}; save the "
            "file in UTF-8"
        ) from error


def is_utf8(text: str) -> bool:
    """Whether a name from the command line, the environment or a folder was valid UTF-8 (else PEP 383 escapes it)."""
    return not any("\udc80" <= character <= "\udcff" for character in text)
