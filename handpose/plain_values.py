"""Plain values of a configuration: null, booleans, numbers, text, and lists of these."""

import json
from typing import Any

import numpy as np

_ENCODER = json.JSONEncoder(sort_keys=True)
"""json.dumps with sort_keys makes one for each call, which takes most of its time."""


def to_json_text(value: Any) -> str:
    """Return the value as JSON text.

    The text distinguishes values that Python considers equal: 1, 1.0 and true, and 0.0 and -0.0.
    """
    return _ENCODER.encode(value)


def is_same(one: Any, other: Any) -> bool:
    """Whether two plain values have the same JSON text, so that they give the same configuration."""
    return to_json_text(one) == to_json_text(other)


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, also in lists. Unlike in Python, true and 1 differ; 1 and 1.0 are equal."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def is_plain(value: Any) -> bool:
    """Whether a value can be written to YAML and to a command line, and read back unchanged."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def to_plain(value: Any) -> Any:
    """Convert NumPy numbers to Python numbers, and arrays and tuples to lists. Return other values unchanged."""
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value
