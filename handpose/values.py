"""Plain values of a configuration: null, true and false, numbers, text, and lists of them."""

import json
from typing import Any

import numpy as np


def written(value: Any) -> str:
    """The value as JSON, which tells apart what Python considers equal: 1, 1.0 and true, and 0.0 and -0.0."""
    return json.dumps(value, sort_keys=True)


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are written alike, so that a configuration with either is the same configuration."""
    return written(one) == written(other)


def equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, also within lists. Unlike in Python, true is not 1; 1 and 1.0 are equal."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def is_plain(value: Any) -> bool:
    """Whether a value can be written into YAML and on a command line, and read back."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def as_plain(value: Any) -> Any:
    """NumPy's numbers and arrays, and tuples, as Python's numbers and lists; other values as they are."""
    if isinstance(value, np.ndarray):
        return as_plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return value
