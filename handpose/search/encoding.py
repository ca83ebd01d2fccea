"""Configurations as vectors, for models that measure distances between them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from handpose.plain_values import to_json_text
from handpose.search.space import Params

_MIN_RATIO_OF_LOG = 20.0
"""A number that is not drawn itself is compared by its logarithm if its ends have at least this ratio and most of its
values lie in the lower quarter of its range."""
_LEAST = 1e-300
"""In place of 0, which has no logarithm."""
_MAX_TRIALS = 500
_NOISE = 0.05
"""Variance of the values that `interpolate` allows for noise."""


class _Column(NamedTuple):
    """An entry of the vectors.

    Attributes:
        key: configuration key.
        option: JSON text of the option that the entry indicates; empty: it is a number, or indicates whether the key is
            present.
        low, high: for a number, the ends of its range, as logarithms if is_log.
        is_number: whether it is a number.
        is_log: whether it is compared by its logarithm.
    """

    key: str
    option: str = ""
    low: float = 0.0
    high: float = 1.0
    is_number: bool = False
    is_log: bool = False


class ParamsEncoder:
    """Encodes configurations as vectors whose entries lie mostly between 0 and 1.

    A number lies between the ends of its range, by its logarithm if the range is logarithmic. Anything else has an
    entry for each option. A key that only some configurations have has an entry that says so; its other entries are 0.5
    where it is missing. A key that always has the same value has no entry. A range that no distribution gives is that
    of the examples.

    Args:
        examples: random configurations of a search space.
        distributions: the distributions of their draws, name -> distribution.
    """

    def __init__(self, examples: Sequence[Params], distributions: Sequence[Mapping[str, BaseDistribution]]) -> None:
        self._columns: list[_Column] = []
        for key in sorted({key for each in examples for key in each}):
            values = [each[key] for each in examples if key in each]
            self._columns += _list_columns(key, values, [each[key] for each in distributions if key in each])
            if len(values) < len(examples):
                self._columns.append(_Column(key))

    @property
    def num_entries(self) -> int:
        """Length of the vectors."""
        return len(self._columns)

    def encode(self, params: Sequence[Params]) -> np.ndarray:
        """Return the vectors (n, num_entries) of n configurations."""
        rows = [[_encode_value(each, column) for column in self._columns] for each in params]
        return np.array(rows, dtype=float).reshape(len(params), len(self._columns))


def _list_columns(key: str, values: Sequence[Any], distributions: Sequence[BaseDistribution]) -> list[_Column]:
    numbers = [value for value in values if _is_number(value)]
    options = sorted({to_json_text(value) for value in values if not _is_number(value)})
    columns = [_Column(key, option) for option in options]
    if numbers and (low := min(numbers)) < (high := max(numbers)):
        ranges = [each for each in distributions if isinstance(each, (FloatDistribution, IntDistribution))]
        if ranges:  # a conditional one may have several
            low, high = min(each.low for each in ranges), max(each.high for each in ranges)
            is_log = all(each.log for each in ranges)
        else:
            is_skewed = float(np.median(numbers)) < low + (high - low) / 4
            is_log = low > 0 and high / low >= _MIN_RATIO_OF_LOG and is_skewed
        ends = (math.log(low), math.log(high)) if is_log else (float(low), float(high))
        columns.append(_Column(key, "", *ends, is_number=True, is_log=is_log))
    elif len(columns) + bool(numbers) < 2:
        return []
    return columns


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _encode_value(params: Params, column: _Column) -> float:
    if not (column.option or column.is_number):
        return float(column.key in params)
    if column.key not in params:
        return 0.5
    value = params[column.key]
    if column.option:
        return float(to_json_text(value) == column.option)
    if not _is_number(value):
        return 0.5
    number = math.log(max(value, _LEAST)) if column.is_log else float(value)
    place = (number - column.low) / (column.high - column.low)
    return min(max(place, -1.0), 2.0)  # such as 0 in place of a number with a logarithm


def interpolate(vectors: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Interpolate values between configurations: the mean of a Gaussian process with a fixed length scale.

    Args:
        vectors: configurations with a value (n, d). The newest 500 are used.
        values: their values (n,), around 0.
        wanted: configurations to predict (m, d).

    Returns:
        The values (m,); 0 far from all of them.
    """
    if not len(values):
        return np.zeros(len(wanted))
    vectors, values = vectors[-_MAX_TRIALS:], values[-_MAX_TRIALS:]
    weights = np.linalg.solve(_compare(vectors, vectors) + _NOISE * np.eye(len(values)), values)
    return _compare(wanted, vectors) @ weights


def predict_seconds(
    vectors: Sequence[np.ndarray], seconds: Sequence[float], wanted: np.ndarray, *, otherwise: float
) -> np.ndarray:
    """Predict how long configurations take, from those that were timed.

    Args:
        vectors: the timed configurations, n vectors (d,).
        seconds: their seconds (n,), above 0.
        wanted: the configurations to predict (m, d).
        otherwise: seconds far from all of them.

    Returns:
        The seconds (m,).
    """
    return otherwise * np.exp(interpolate(np.array(vectors), np.log(np.array(seconds) / otherwise), wanted))


def _compare(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the similarities (n, m) of configurations; the scale grows as the distances with the dimension."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.exp(-0.5 * np.maximum(squares, 0.0) / (0.25 * first.shape[1]))
