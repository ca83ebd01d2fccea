"""UTF-8 for text files, file names and printed text in all programs of this project, in every locale."""

import io
import os
import sys
from pathlib import Path

from handpose.errors import UserError


def use_utf8() -> None:
    """Restart the program in Python's UTF-8 mode (PEP 540) if the locale has another encoding.

    Programs call this first. A library must not, because it replaces the process. TensorBoard, PyArrow and Ray treat
    file names as UTF-8 in every locale, so Python must do the same. Characters that cannot be printed are escaped
    instead of raising UnicodeEncodeError. Workers and subprocesses inherit the mode through PYTHONUTF8.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":  # -X utf8=0 takes precedence
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_utf8(path: Path) -> str:
    """Read a text file that a user wrote, without the byte-order mark that editors on Windows add.

    Raises:
        UserError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    return decode_utf8(path.read_bytes(), path)


def decode_utf8(content: bytes, path: Path) -> str:
    """Decode the content of a text file that a user wrote, as `read_utf8` does.

    Args:
        content: the bytes of the file.
        path: the path of the file, for the error message.

    Raises:
        UserError: the content is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions are relative to the end of the byte-order mark.
        before = content.removeprefix(b"\xef\xbb\xbf")[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}, column {column}; save the "
            "file in UTF-8"
        ) from error


def is_utf8(text: str) -> bool:
    """Whether a name was valid UTF-8. In one that was not, Python has escaped the invalid bytes (PEP 383)."""
    return not any("\udc80" <= character <= "\udcff" for character in text)
