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
from handpose.report.record import Parameter, SweepRecord
from handpose.report.words import value_text

LEAST_TRIALS = 3
"""Of a value, below which it is left out."""

_MOST_VALUES, _NUM_BINS = 8, 5


class Isolated(NamedTuple):
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


class Isolation(NamedTuple):
    """values: in their order. num_drawn: m. left_out: labels of values with too few trials."""

    parameter: Parameter
    epoch: int
    num_drawn: int
    values: Sequence[Isolated]
    left_out: Sequence[str]


def isolate(record: SweepRecord, key: str) -> Isolation | None:
    """By the values of the highest epoch at which two values have LEAST_TRIALS trials; None where there is none.

    Raises UserError where the sweep does not search the key.
    """
    parameter = record.parameter(key)
    if parameter is None and not record.trials:
        return None
    if parameter is None:
        searched = ", ".join(each.key for each in record.parameters) or "nothing"
        raise UserError(f"report.scientific={key} is not searched by {record.name}; it searches {searched}")
    for epoch in reversed(record.compared_epochs(least=2 * LEAST_TRIALS)):
        groups = _groups(record, parameter, epoch)
        enough = {label: group for label, group in groups.items() if len(group) >= LEAST_TRIALS}
        if len(enough) >= 2:
            num_drawn = min(map(len, enough.values()))
            values = [_isolated(label, group, num_drawn, record.sign) for label, group in enough.items()]
            return Isolation(parameter, epoch, num_drawn, values, [label for label in groups if label not in enough])
    return None


def best_of(losses: Sequence[float], num_drawn: int) -> tuple[float, float, float]:
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


def _groups(record: SweepRecord, parameter: Parameter, epoch: int) -> dict[str, list[tuple[float, int]]]:
    """Label -> (loss, trial) of the trials that have it, in the order of the range."""
    values = record.values_at(epoch)
    owners = [trial for trial in record.trials if trial.number in values and parameter.key in trial.params]
    named = [(_label(parameter, trial.params[parameter.key]), trial) for trial in owners]
    groups: dict[str, list[tuple[float, int]]] = {}
    for (_, label), trial in sorted(named, key=lambda item: item[0][0]):
        groups.setdefault(label, []).append((record.sign * values[trial.number], trial.number))
    return groups


def _label(parameter: Parameter, value: object) -> tuple[float, str]:
    """Place and name of a value, or of the part of the range that it is in."""
    place = parameter.place(value)
    if parameter.num_values is not None and parameter.num_values <= _MOST_VALUES:
        return place, value_text(value)
    part = min(_NUM_BINS - 1, max(0, int(place * _NUM_BINS)))
    low, high = (parameter.value_at(each / _NUM_BINS) for each in (part, part + 1))
    return part, f"{value_text(low)} to {value_text(high)}"


def _isolated(label: str, group: Sequence[tuple[float, int]], num_drawn: int, sign: float) -> Isolated:
    best, trial = min(group)
    expected, *ends = (sign * each for each in best_of([loss for loss, _ in group], num_drawn))
    return Isolated(label, len(group), trial, sign * best, expected, min(ends), max(ends))
