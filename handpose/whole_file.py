"""Files that appear under their names when they are whole, so that a reader sees the one before or the new one."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, that is moved to `path` at the end and removed after an error. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Write a value as JSON; as `to_json`."""
    with whole_file(path) as part:
        part.write_text(to_json(value, indent=indent) + "\n", encoding="utf-8")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON that every parser reads (RFC 8259): numbers that are not finite become null.

    Python's own encoder writes NaN and Infinity, which JSON does not have.
    """
    return json.dumps(_with_null(value), indent=indent, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(item) for item in value]
    return value
