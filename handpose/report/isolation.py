"""Isolation plots: what a scientific parameter is worth with the others optimised (Deep Learning Tuning Playbook).

Of each value the best trial counts. But the best of twenty is better than the best of two, whatever the value; so
beside it stands what the best of m trials would be on average, for the m that every value has. That compares fairly if
the trials were drawn at random; a searcher that learns tunes the other parameters better for values it tries often.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from handpose.errors import UserError
from handpose.report.formatting import format_value
from handpose.report.sweep_record import Parameter, SweepRecord

MIN_TRIALS_PER_VALUE = 3
"""Of a value, below which it is left out."""

_MAX_VALUES, _NUM_BINS = 8, 5


class IsolatedValue(NamedTuple):
    """A value, or a part of a range, of the scientific parameter.

    best: of its num_trials trials. expected: of the best of m of them, with 10 and 90 % quantiles low and high.
    """

    label: str
    num_trials: int
    best_trial: int
    best: float
    expected: float
    low: float
    high: float


class IsolationResult(NamedTuple):
    """values: in their order. num_drawn: m. left_out: labels of values with too few trials."""

    parameter: Parameter
    epoch: int
    num_drawn: int
    values: Sequence[IsolatedValue]
    left_out: Sequence[str]


def isolate_parameter(record: SweepRecord, key: str) -> IsolationResult | None:
    """By the values of the highest epoch at which two values have LEAST_TRIALS trials; None where there is none.

    Raises UserError where the sweep does not search the key.
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
    """Mean, 10 % and 90 % quantile of the least of so many losses drawn without putting back.

    That the i-th smallest of n is the least has the odds C(n - i, m - 1) / C(n, m); after Dodge et al. 2019, "Show your
    work", who draw with putting back.
    """
    ascending = np.sort(np.asarray(losses, dtype=float))
    num = len(ascending)
    odds = np.array([math.comb(num - i, num_drawn - 1) for i in range(1, num + 1)]) / math.comb(num, num_drawn)
    below = np.cumsum(odds)
    low, high = (ascending[min(num - 1, int(np.searchsorted(below, level)))] for level in (0.1, 0.9))
    return float(odds @ ascending), float(low), float(high)


def _group_trials(record: SweepRecord, parameter: Parameter, epoch: int) -> dict[str, list[tuple[float, int]]]:
    """Label -> (loss, trial) of the trials that have it, in the order of the range."""
    values = record.get_values_at(epoch)
    owners = [trial for trial in record.trials if trial.number in values and parameter.key in trial.params]
    named = [(_label_value(parameter, trial.params[parameter.key]), trial) for trial in owners]
    groups: dict[str, list[tuple[float, int]]] = {}
    for (_, label), trial in sorted(named, key=lambda item: item[0][0]):
        groups.setdefault(label, []).append((record.sign * values[trial.number], trial.number))
    return groups


def _label_value(parameter: Parameter, value: object) -> tuple[float, str]:
    """Place and name of a value, or of the part of the range that it is in."""
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
