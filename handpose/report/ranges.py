"""The searched ranges, held against where the best trials lie: what advice and the next round's space share.

Every claim here needs an effect that is shown (`effects`), so that noise gives none. Where the best trials lie is said
beside it, and is no evidence by itself: a sampler puts its trials where earlier ones were good.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from handpose.report.effects import BestRange, ShownEffect, WorseOption, best_range, worse_options
from handpose.report.record import Parameter, SweepRecord, TrialRecord
from handpose.report.words import value_text

NEAR = 0.15
"""Part of a range to either side of a value that counts as near it."""

_LEAST_BEST = 5
_MOST_BEST = 20
_EDGE = 0.1  # part of a range
_NARROW = 0.2  # part of a range that must be ruled out before anything is said


def best_trials(record: SweepRecord) -> list[TrialRecord]:
    """A tenth of the trials with a result, at least 5 and at most 20."""
    return record.leading(min(_MOST_BEST, max(_LEAST_BEST, round(len(record.ranked) / 10))))


class Settled(NamedTuple):
    """What is known of a parameter whose effect is shown, enough to search less of it.

    For a range: best, with low and high, the values between which the best one lies. For a choice: worse, the options
    that can be left out.
    """

    parameter: Parameter
    effect: ShownEffect
    best: BestRange | None = None
    low: float = math.nan
    high: float = math.nan
    worse: Sequence[WorseOption] = ()

    @property
    def text(self) -> str:
        """What is known, as the end of a sentence about the parameter."""
        if self.parameter.kind == "choice":
            worse = ", ".join(value_text(self.parameter.choices[each.option]) for each in self.worse)
            if len(self.kept) == 1:
                return f"is best at {value_text(self.kept[0])}: {worse} did worse"
            return f"is not best at {worse}"
        low, high = value_text(self.low), value_text(self.high)
        if low == high:
            return f"is best at {low}"
        if self.low > self.parameter.low and self.high < self.parameter.high:
            return f"is best between {low} and {high}"
        return f"is best at {low} or above" if self.low > self.parameter.low else f"is best at {high} or below"

    @property
    def kept(self) -> list[Any]:
        """The options of a choice that are not shown to be worse than another one."""
        left_out = {each.option for each in self.worse}
        return [choice for index, choice in enumerate(self.parameter.choices) if index not in left_out]


class Crowd(NamedTuple):
    """Best trials at an edge of a range, towards which the metric is shown to improve."""

    parameter: Parameter
    effect: ShownEffect
    is_upper: bool
    num_there: int
    num_best: int


def crowded_edges(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[Crowd]:
    """The edges at which the best value may be cut off by the searched range.

    The effect of the parameter is shown, the interval for its best value reaches to this edge and not to the other one,
    and at least half of the best trials lie here.
    """
    found: list[Crowd] = []
    for effect in shown:
        parameter = _parameter(record, effect)
        if parameter.kind == "choice" or not parameter.is_declared:
            continue
        best, lie = best_range(record, parameter, shown), places(parameter, best_trials(record))
        width = edge_width(parameter)
        for is_upper in (False, True):
            bounded, open_end = (best.lower, best.upper) if is_upper else (best.upper, best.lower)
            num_there = sum(place >= 1 - width if is_upper else place <= width for place in lie)
            if bounded is None or open_end is not None or len(lie) < _LEAST_BEST or 2 * num_there < len(lie):
                continue
            if not is_natural_end(parameter, is_upper=is_upper):
                found.append(Crowd(parameter, effect, is_upper, num_there, len(lie)))
    return found


def settled(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[Settled]:
    """The parameters of which a part of the range, or some options, are shown to be worse than the rest."""
    found = []
    for effect in shown:
        parameter = _parameter(record, effect)
        if not parameter.is_declared:
            continue
        if parameter.kind == "choice":
            each = Settled(parameter, effect, worse=worse_options(record, parameter, shown))
            if each.worse and each.kept:
                found.append(each)
            continue
        best = best_range(record, parameter, shown)
        low, high = _with_best_trials(record, parameter, best)
        if low + (1 - high) >= _NARROW:
            found.append(Settled(parameter, effect, best, _value(parameter, low), _value(parameter, high)))
    return found


def _with_best_trials(record: SweepRecord, parameter: Parameter, best: BestRange) -> tuple[float, float]:
    """The interval, widened to hold the best trials: they were trained the longest, and earlier epochs may mislead."""
    lie = places(parameter, best_trials(record))
    return min([best.low, *lie]), max([best.high, *lie])


def _value(parameter: Parameter, place: float) -> float:
    """The value at a place; of numbers with a step the nearest one that is searched."""
    value = parameter.value_at(place)
    if parameter.num_values is None or parameter.log:
        return round(value) if parameter.kind == "int" else value
    step = parameter.step or 1
    value = parameter.low + round((value - parameter.low) / step) * step
    return int(value) if parameter.kind == "int" else value


def _parameter(record: SweepRecord, effect: ShownEffect) -> Parameter:
    return next(parameter for parameter in record.parameters if parameter.key == effect.key)


def is_natural_end(parameter: Parameter, *, is_upper: bool) -> bool:
    """Whether nothing lies beyond: below 0, above 1 of a share, or where `widened` does not go."""
    if widened(parameter, is_upper=is_upper) == (parameter.low, parameter.high):
        return True
    return parameter.high == 1.0 and parameter.kind == "float" if is_upper else parameter.low == 0


def widened(parameter: Parameter, *, is_upper: bool) -> tuple[float, float]:
    """The range with half of its length added at an end; a range of numbers above 0 stays above it."""
    added = parameter.value_at(1.5 if is_upper else -0.5)
    if parameter.kind == "int":
        added = math.ceil(added) if is_upper else max(math.floor(added), min(1, int(parameter.low)))
    elif not is_upper and not parameter.log and parameter.low > 0:
        added = max(added, 0.0)
    return (parameter.low, rounded(added)) if is_upper else (rounded(added), parameter.high)


def expression(parameter: Parameter, low: float, high: float) -> str:
    """A range as a search space writes it."""
    if parameter.kind == "int":
        if parameter.log:
            return f"tag(int, log, interval({int(low)}, {int(high)}))"
        step = int(parameter.step or 1)
        return f"range({int(low)}, {int(high) + 1})" if step == 1 else f"range({int(low)}, {int(high) + step}, {step})"
    if parameter.step is not None:
        return f"range({low:.6g}, {high + parameter.step / 2:.6g}, {parameter.step:.6g})"
    numbers = f"interval({_float_text(low)}, {_float_text(high)})"
    return f"tag(log, {numbers})" if parameter.log else numbers


def rounded(value: float, digits: int = 2) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


def _float_text(value: float) -> str:
    """So that Hydra reads a float, not a whole number."""
    text = f"{value:.4g}"
    return text if any(mark in text for mark in ".en") else f"{text}.0"


def places(parameter: Parameter, trials: Sequence[TrialRecord]) -> list[float]:
    """Where the trials that have the parameter lie in its range."""
    return [parameter.place(trial.params[parameter.key]) for trial in trials if parameter.key in trial.params]


def cell(parameter: Parameter) -> float:
    """What one value takes of the range."""
    return 0.0 if parameter.num_values is None or parameter.log else 1 / parameter.num_values


def edge_width(parameter: Parameter) -> float:
    """The part of a range that is an edge; of a few values the last one."""
    return _EDGE if parameter.num_values is None or parameter.num_values > 10 else 1e-9


def is_near(parameter: Parameter, best: TrialRecord, trial: TrialRecord) -> bool:
    """Whether a trial has about the value that the best one has; of a choice the same."""
    if parameter.key not in best.params or parameter.key not in trial.params:
        return parameter.key not in best.params and parameter.key not in trial.params
    if parameter.kind == "choice":
        return parameter.index(best.params[parameter.key]) == parameter.index(trial.params[parameter.key])
    distance = abs(parameter.place(best.params[parameter.key]) - parameter.place(trial.params[parameter.key]))
    return distance <= max(NEAR, cell(parameter))
