"""Distributions of parameters: how an Optuna study stores their values, and how many values there are.

Optuna stores scalars only, and treats choices that Python considers equal (0 and false, 1 and 1.0) as one. So lists,
and all but the first of equal choices, are stored as a label: their type and their JSON text, for example `list [1, 2]`
or `bool false`.
"""

import json
import math
import sys
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, TypeAlias

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.errors import UserError
from handpose.plain_values import is_equal, is_same, to_json_text

Scalar: TypeAlias = bool | int | float | str | None
Numeric: TypeAlias = FloatDistribution | IntDistribution

_TYPES: dict[str, tuple[type, ...]] = {
    "list": (list, dict),
    "bool": (bool,),
    "int": (int,),
    "float": (float,),
    "str": (str,),
}
_MAX_EXACT_INT = 2**53
"""Optuna stores integers as floating point numbers, which are exact up to this one."""


# --- labels -----------------------------------------------------------------------------------------------------------


def make_labels(values: Iterable[Any]) -> list[Scalar]:
    """Return the label of each choice, which stands for it in the study.

    Choices with the same JSON text have the same label.

    Args:
        values: the choices.

    Raises:
        TypeError: JSON cannot represent a value.
    """
    found: dict[str, Scalar] = {}
    taken: set[Scalar] = set()
    texts = []
    for value in values:
        text = to_json_text(value)
        texts.append(text)
        if text not in found:
            found[text] = label if (label := _make_label(value)) not in taken else f"{type(value).__name__} {text}"
            taken.add(found[text])
    return [found[text] for text in texts]


def parse_label(label: Scalar) -> Any:
    """Return the value that a label stands for."""
    if not isinstance(label, str):
        return label
    kind, _, text = label.partition(" ")
    if kind not in _TYPES:
        return label
    try:
        value = json.loads(text)
    except ValueError:
        return label
    return value if type(value) in _TYPES[kind] else label


def _make_label(value: Any) -> Scalar:
    if isinstance(value, (list, dict)):
        return f"list {to_json_text(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float {to_json_text(value)}"  # standard JSON has no such number
    if isinstance(value, str) and not is_same(parse_label(value), value):
        return f"str {to_json_text(value)}"  # the text itself looks like a label
    assert value is None or isinstance(value, (bool, int, float, str))
    return value


# --- values -----------------------------------------------------------------------------------------------------------


def fit_value(value: Any, distribution: BaseDistribution) -> Any:
    """Convert a value to the form that the study stores.

    A choice with the same JSON is preferred to one that is only equal, such as 1.0 and 1.

    Args:
        value: the value of a parameter.
        distribution: the distribution of the parameter.

    Returns:
        The label of a choice, or the number.

    Raises:
        ValueError: the distribution does not contain the value.
    """
    if isinstance(distribution, CategoricalDistribution):
        for matches in (is_same, is_equal):
            for label in distribution.choices:
                if matches(parse_label(label), value):
                    return label
        raise ValueError(f"{value} is not one of {distribution.choices}")
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and distribution.low <= value <= distribution.high:
        number = _round_to_step(value, distribution)
        if number == value or (isinstance(distribution, FloatDistribution) and distribution._contains(value)):
            return number
    raise ValueError(f"{value} is not a value of {distribution}")


def round_to_distribution(value: float, distribution: Numeric) -> float:
    """Return the value of the distribution that is nearest to a number."""
    return _round_to_step(min(max(value, distribution.low), distribution.high), distribution)


def count_values(distribution: BaseDistribution) -> int | None:
    """Count the values of a distribution. None for an interval of infinitely many values."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.step is None:
        return 1 if distribution.low == distribution.high else None
    return (
        round((_to_fraction(distribution.high) - _to_fraction(distribution.low)) / _to_fraction(distribution.step)) + 1
    )


def get_value_at(distribution: BaseDistribution, index: int) -> Any:
    """Return the value at an index, as the study stores it.

    Args:
        distribution: a distribution for which `count_values` is not None.
        index: the index of the value, counted from 0.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[index]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.step is None:
        return distribution.low
    return _compute_step_value(distribution.low, distribution.step, index)


def make_stepped_distribution(start: float, stop: float, step: float) -> FloatDistribution | IntDistribution | None:
    """Return the distribution of Hydra's range(start, stop, step), which excludes the stop.

    The numbers are counted in exact decimals. None if the range is empty.
    """
    count = math.ceil((_to_fraction(stop) - _to_fraction(start)) / _to_fraction(step))
    if count < 1:
        return None
    low, high = sorted((_compute_step_value(start, step, 0), _compute_step_value(start, step, count - 1)))
    if all(isinstance(number, int) for number in (start, stop, step)):
        return IntDistribution(int(low), int(high), step=abs(int(step)))
    return FloatDistribution(float(low), float(high), step=abs(float(step)))


def _round_to_step(value: float, distribution: Numeric) -> float:
    """Round a number to the steps of a distribution, in exact decimals: 0.3 and not 0.1 + 2 * 0.1."""
    if distribution.step is None:
        return float(value)
    number = _compute_step_value(
        distribution.low, distribution.step, round((value - distribution.low) / distribution.step)
    )
    return min(max(number, distribution.low), distribution.high)


def _compute_step_value(low: float, step: float, index: int) -> float:
    exact = _to_fraction(low) + index * _to_fraction(step)
    return int(exact) if isinstance(low, int) and isinstance(step, int) else float(exact)


def _to_fraction(number: float) -> Fraction:
    """Return the exact value of the decimal number as Python prints it."""
    return Fraction(repr(number))


# --- what can be searched ---------------------------------------------------------------------------------------------


def check_range(where: str, low: float, high: float, *, is_integer: bool) -> None:
    """Check that Optuna can draw from a range.

    Args:
        where: the file and the key of the range, for the error message.
        low: the lower end.
        high: the upper end.
        is_integer: whether the range consists of integers.

    Raises:
        UserError: Optuna cannot draw between these ends.
    """
    if not all(isinstance(end, int) or math.isfinite(end) for end in (low, high)):
        raise UserError(f"{where} must have finite ends")
    if is_integer and max(abs(low), abs(high)) > _MAX_EXACT_INT:
        raise UserError(
            f"{where} goes beyond {_MAX_EXACT_INT} (2^53): larger whole numbers are not exact in an Optuna study; "
            "give a smaller range"
        )
    if low > high:
        raise UserError(f"{where}: low must be <= high, but low={low:g} and high={high:g}")
    if not is_integer and not math.isfinite(float(high) - float(low)):
        raise UserError(f"{where} is too wide: high - low must be a finite number; give a smaller range")
    if not is_integer and 0 < float(high) - float(low) < sys.float_info.min:
        raise UserError(
            f"{where} is too narrow: high - low is {float(high) - float(low):g}, and samplers divide by it: it must be "
            f"at least {sys.float_info.min:.2g}; give a larger range, or one value"
        )


def check_steps(where: str, start: float, stop: float, step: float) -> None:
    """Check that a stepped range has at most 2^53 values, the most that Optuna can count.

    Args:
        where: the file and the key of the range, for the error message.
        start: the first value.
        stop: the end of the range.
        step: the distance between two values.

    Raises:
        UserError: the range has more values.
    """
    if step and abs(_to_fraction(stop) - _to_fraction(start)) > _MAX_EXACT_INT * abs(_to_fraction(step)):
        raise UserError(
            f"{where} has more than {_MAX_EXACT_INT} (2^53) values in steps of {step:g}; give a larger step"
        )
