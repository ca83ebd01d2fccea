"""Comparison of the values of a scientific parameter, with all other parameters optimised.

This is the isolation plot of the Deep Learning Tuning Playbook: each value is represented by its best trial. But the
best of twenty trials is better than the best of two, whatever the value. So the expected best of m trials is computed
too, where m is the smallest number of trials of any value. This comparison is fair if the trials were drawn at random.
A searcher that learns tunes the other parameters better for the values that it tries often.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from handpose.errors import UserError
from handpose.report.formatting import format_value
from handpose.report.sweep_record import Parameter, SweepRecord

MIN_TRIALS_PER_VALUE = 3
"""Least number of trials with a value; values with fewer trials are left out."""

_MAX_VALUES, _NUM_BINS = 8, 5


class IsolatedValue(NamedTuple):
    """A value of the scientific parameter, or a part of its range.

    Attributes:
        label: the value or the part, as text.
        num_trials: number of its trials.
        best_trial: number of its best trial.
        best: value of the metric of that trial.
        expected: mean of the best value among m of its trials.
        low: the lower of the 10 % and 90 % quantiles of that best value.
        high: the higher of the two quantiles.
    """

    label: str
    num_trials: int
    best_trial: int
    best: float
    expected: float
    low: float
    high: float


class IsolationResult(NamedTuple):
    """The comparison of the values of a scientific parameter.

    Attributes:
        parameter: the scientific parameter.
        epoch: the epoch at which the trials were compared.
        num_drawn: the number m of trials that `IsolatedValue.expected` is the best of.
        values: its values, in the order of the range.
        left_out: labels of the values with too few trials.
    """

    parameter: Parameter
    epoch: int
    num_drawn: int
    values: Sequence[IsolatedValue]
    left_out: Sequence[str]


def isolate_parameter(record: SweepRecord, key: str) -> IsolationResult | None:
    """Compare the values of a parameter at the highest epoch at which at least two of them have enough trials.

    Args:
        record: the sweep.
        key: configuration key of the scientific parameter.

    Returns:
        The comparison; None if there is no such epoch.

    Raises:
        UserError: the sweep does not search the key.
    """
    parameter = record.find_parameter(key)
    if parameter is None and not record.trials:
        return None
    if parameter is None:
        searched = ", ".join(each.key for each in record.parameters) or "nothing"
        raise UserError(f"report.scientific={key} is not searched by {record.name}; it searches {searched}")
    for epoch in reversed(record.list_compared_epochs(min_trials=2 * MIN_TRIALS_PER_VALUE)):
        groups = _group_trials(record, parameter, epoch)
        enough = {label: group for label, group in groups.items() if len(group) >= MIN_TRIALS_PER_VALUE}
        if len(enough) >= 2:
            num_drawn = min(map(len, enough.values()))
            values = [_summarise_group(label, group, num_drawn, record.sign) for label, group in enough.items()]
            return IsolationResult(
                parameter, epoch, num_drawn, values, [label for label in groups if label not in enough]
            )
    return None


def compute_best_of(losses: Sequence[float], num_drawn: int) -> tuple[float, float, float]:
    """Compute the distribution of the smallest of m losses that are drawn without replacement.

    The i-th smallest of n losses is the smallest of m draws with probability C(n - i, m - 1) / C(n, m). Dodge et al.
    2019, "Show Your Work", draw with replacement instead.

    Args:
        losses: n losses.
        num_drawn: the number m of draws, at most n.

    Returns:
        Mean, 10 % quantile and 90 % quantile of the smallest loss.
    """
    ascending = np.sort(np.asarray(losses, dtype=float))
    num = len(ascending)
    odds = np.array([math.comb(num - i, num_drawn - 1) for i in range(1, num + 1)]) / math.comb(num, num_drawn)
    below = np.cumsum(odds)
    low, high = (ascending[min(num - 1, int(np.searchsorted(below, level)))] for level in (0.1, 0.9))
    return float(odds @ ascending), float(low), float(high)


def _group_trials(record: SweepRecord, parameter: Parameter, epoch: int) -> dict[str, list[tuple[float, int]]]:
    """Return label -> (loss, number) of its trials. The labels are in the order of the range."""
    values = record.get_values_at(epoch)
    owners = [trial for trial in record.trials if trial.number in values and parameter.key in trial.params]
    named = [(_label_value(parameter, trial.params[parameter.key]), trial) for trial in owners]
    groups: dict[str, list[tuple[float, int]]] = {}
    for (_, label), trial in sorted(named, key=lambda item: item[0][0]):
        groups.setdefault(label, []).append((record.sign * values[trial.number], trial.number))
    return groups


def _label_value(parameter: Parameter, value: object) -> tuple[float, str]:
    """Return the sort key and the label of a value, or of the part of the range that contains it."""
    place = parameter.to_place(value)
    if parameter.num_values is not None and parameter.num_values <= _MAX_VALUES:
        return place, format_value(value)
    part = min(_NUM_BINS - 1, max(0, int(place * _NUM_BINS)))
    low, high = (parameter.to_value(each / _NUM_BINS) for each in (part, part + 1))
    return part, f"{format_value(low)} to {format_value(high)}"


def _summarise_group(label: str, group: Sequence[tuple[float, int]], num_drawn: int, sign: float) -> IsolatedValue:
    best, trial = min(group)
    expected, *ends = (sign * each for each in compute_best_of([loss for loss, _ in group], num_drawn))
    return IsolatedValue(label, len(group), trial, sign * best, expected, min(ends), max(ends))
