"""The searched ranges, held against where the best trials lie: what advice and the next round's space share.

Every claim here needs an effect that is shown (`effects`), so that noise gives none. Where the best trials lie is said
beside it, and is no evidence by itself: a sampler puts its trials where earlier ones were good.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from handpose.report.effects import BestRange, ShownEffect, WorseOption, find_best_range, find_worse_options
from handpose.report.formatting import format_value
from handpose.report.sweep_record import Parameter, SweepRecord, TrialRecord
from handpose.schema import is_allowed

NEAR_DISTANCE = 0.15
"""Part of a range to either side of a value that counts as near it."""

_MIN_BEST = 5
_MAX_BEST = 20
_EDGE_WIDTH = 0.1  # part of a range
_MAX_EXACT_INT = 2**53  # that a study keeps exactly
_NARROW_FRACTION = 0.2  # part of a range that must be ruled out before anything is said


def select_best_trials(record: SweepRecord) -> list[TrialRecord]:
    """A tenth of the trials with a result, at least 5 and at most 20."""
    return record.list_leading_trials(min(_MAX_BEST, max(_MIN_BEST, round(len(record.ranked) / 10))))


class SettledParameter(NamedTuple):
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
    def summary(self) -> str:
        """What is known, as the end of a sentence about the parameter."""
        if self.parameter.kind == "choice":
            worse = ", ".join(format_value(self.parameter.choices[each.option]) for each in self.worse)
            if len(self.kept_options) == 1:
                return f"is best at {format_value(self.kept_options[0])}: {worse} did worse"
            return f"is not best at {worse}"
        low, high = _format_distinct(self.low, self.high)
        if low == high:
            return f"is best at {low}"
        if self.low > self.parameter.low and self.high < self.parameter.high:
            return f"is best between {low} and {high}"
        return f"is best at {low} or above" if self.low > self.parameter.low else f"is best at {high} or below"

    @property
    def kept_options(self) -> list[Any]:
        """The options of a choice that are not shown to be worse than another one."""
        left_out = {each.option for each in self.worse}
        return [choice for index, choice in enumerate(self.parameter.choices) if index not in left_out]


class CrowdedEdge(NamedTuple):
    """Best trials at an edge of a range, towards which the metric is shown to improve."""

    parameter: Parameter
    effect: ShownEffect
    is_upper: bool
    num_at_edge: int
    num_best: int


def find_crowded_edges(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[CrowdedEdge]:
    """The edges at which the best value may be cut off by the searched range.

    The effect of the parameter is shown, the interval for its best value reaches to this edge and not to the other one,
    and at least half of the best trials lie here.
    """
    found: list[CrowdedEdge] = []
    for effect in shown:
        parameter = _get_parameter(record, effect)
        if parameter.kind == "choice" or not parameter.is_declared:
            continue
        best, lie = find_best_range(record, parameter, shown), list_places(parameter, select_best_trials(record))
        width = compute_edge_width(parameter)
        for is_upper in (False, True):
            bounded, open_end = (best.lower, best.upper) if is_upper else (best.upper, best.lower)
            num_there = sum(place >= 1 - width if is_upper else place <= width for place in lie)
            if bounded is None or open_end is not None or len(lie) < _MIN_BEST or 2 * num_there < len(lie):
                continue
            if not is_natural_end(parameter, is_upper=is_upper):
                found.append(CrowdedEdge(parameter, effect, is_upper, num_there, len(lie)))
    return found


def find_settled_parameters(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[SettledParameter]:
    """The parameters of which a part of the range, or some options, are shown to be worse than the rest."""
    found = []
    for effect in shown:
        parameter = _get_parameter(record, effect)
        if not parameter.is_declared:
            continue
        if parameter.kind == "choice":
            each = SettledParameter(parameter, effect, worse=find_worse_options(record, parameter, shown))
            if each.worse and each.kept_options:
                found.append(each)
            continue
        best = find_best_range(record, parameter, shown)
        low, high = _include_best_trials(record, parameter, best)
        if low + (1 - high) >= _NARROW_FRACTION:
            found.append(
                SettledParameter(parameter, effect, best, _get_value(parameter, low), _get_value(parameter, high))
            )
    return found


def _include_best_trials(record: SweepRecord, parameter: Parameter, best: BestRange) -> tuple[float, float]:
    """The interval, widened to hold the best trials: they were trained the longest, and earlier epochs may mislead."""
    lie = list_places(parameter, select_best_trials(record))
    return min([best.low, *lie]), max([best.high, *lie])


def _get_value(parameter: Parameter, place: float) -> float:
    """The value at a place from 0 to 1; of numbers with a step the nearest one that is searched."""
    if place in (0.0, 1.0):
        return parameter.high if place else parameter.low  # to the last digit, which logarithms lose
    value = parameter.to_value(place)
    if parameter.num_values is None or parameter.log:
        return round(value) if parameter.kind == "int" else value
    return _add_steps(parameter.low, parameter, round((value - parameter.low) / (parameter.step or 1)))


def _add_steps(value: float, parameter: Parameter, num_steps: int) -> float:
    """So many steps above a value, counted in decimals: 0.3 and not 0.1 + 2 * 0.1."""
    moved = Fraction(repr(value)) + num_steps * Fraction(repr(parameter.step or 1))
    return int(moved) if parameter.kind == "int" else float(moved)


def _format_distinct(low: float, high: float) -> tuple[str, str]:
    """Two values as texts, with as many digits as it takes to see that they differ."""
    for digits in (3, *range(4, 17)):
        texts = tuple(f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in (low, high))
        if low == high or texts[0] != texts[1]:
            break
    return texts[0], texts[1]


def _get_parameter(record: SweepRecord, effect: ShownEffect) -> Parameter:
    return next(parameter for parameter in record.parameters if parameter.key == effect.key)


def is_natural_end(parameter: Parameter, *, is_upper: bool) -> bool:
    """Whether nothing lies beyond: below 0, above 1 of a share, or where `widen_range` does not go."""
    if widen_range(parameter, is_upper=is_upper) == (parameter.low, parameter.high):
        return True
    return parameter.high == 1.0 and parameter.kind == "float" if is_upper else parameter.low == 0


def widen_range(parameter: Parameter, *, is_upper: bool) -> tuple[float, float]:
    """The range with half of its length added at an end; a range of numbers above 0 stays above it.

    The steps of a range remain where they are. Where so much cannot be added, as a configuration does not take it, the
    range is the one before.
    """
    low, high = _widen(parameter, is_upper=is_upper)
    return (low, high) if is_allowed(parameter.key, high if is_upper else low) else (parameter.low, parameter.high)


def _widen(parameter: Parameter, *, is_upper: bool) -> tuple[float, float]:
    low, high = parameter.low, parameter.high
    least = -math.inf if low <= 0 else 0.0 if parameter.kind == "float" else min(1, int(low))
    if parameter.step is not None and not parameter.log:
        num_steps = math.ceil((high - low) / parameter.step / 2)
        if is_upper:
            added = _add_steps(high, parameter, num_steps)
            return low, added if abs(added) <= _MAX_EXACT_INT else high
        if math.isfinite(least):
            num_steps = min(num_steps, math.floor((low - least) / parameter.step + 1e-9))
        return _add_steps(low, parameter, -num_steps), high
    try:
        added = round_outward(parameter, parameter.to_value(1.5 if is_upper else -0.5), up=is_upper)
    except OverflowError:
        return low, high
    if parameter.kind == "int" and abs(added) > _MAX_EXACT_INT:
        return low, high
    if not is_upper:
        added = max(added, least)
    if not math.isfinite(added) or not math.isfinite(high - added) or (parameter.log and added <= 0):
        return low, high
    return (low, max(added, high)) if is_upper else (min(added, low), high)


def round_outward(parameter: Parameter, value: float, *, up: bool) -> float:
    """A value of the range with about two digits less than the range has, so that the range does not become smaller."""
    if parameter.kind == "int":
        return math.ceil(value - 1e-9) if up else math.floor(value + 1e-9)
    size = abs(value) if parameter.log else parameter.high - parameter.low
    if parameter.step is not None or not 0 < size < math.inf:
        return value
    num_digits = 1 - math.floor(math.log10(size))  # behind the point
    unit = Fraction(10) ** -num_digits
    return float((math.ceil if up else math.floor)(Fraction(repr(value)) / unit) * unit)


def format_range(parameter: Parameter, low: float, high: float) -> str:
    """A range as a search space writes it: with all digits, so that the file has the very numbers."""
    if parameter.kind == "int":
        if parameter.log:
            return f"tag(int, log, interval({int(low)}, {int(high)}))"
        step = int(parameter.step or 1)
        return f"range({int(low)}, {int(high) + 1})" if step == 1 else f"range({int(low)}, {int(high) + step}, {step})"
    if parameter.step is not None:
        stop = float(Fraction(repr(float(high))) + Fraction(repr(float(parameter.step))) / 2)
        return f"range({float(low)!r}, {stop!r}, {float(parameter.step)!r})"
    numbers = f"interval({float(low)!r}, {float(high)!r})"
    return f"tag(log, {numbers})" if parameter.log else numbers


def list_places(parameter: Parameter, trials: Sequence[TrialRecord]) -> list[float]:
    """Where the trials that have the parameter lie in its range."""
    return [parameter.to_place(trial.params[parameter.key]) for trial in trials if parameter.key in trial.params]


def compute_cell_width(parameter: Parameter) -> float:
    """What one value takes of the range."""
    return 0.0 if parameter.num_values is None or parameter.log else 1 / parameter.num_values


def compute_edge_width(parameter: Parameter) -> float:
    """The part of a range that is an edge; of a few values the last one."""
    return _EDGE_WIDTH if parameter.num_values is None or parameter.num_values > 10 else 1e-9


def is_near(parameter: Parameter, best: TrialRecord, trial: TrialRecord) -> bool:
    """Whether a trial has about the value that the best one has; of a choice the same."""
    if parameter.key not in best.params or parameter.key not in trial.params:
        return parameter.key not in best.params and parameter.key not in trial.params
    if parameter.kind == "choice":
        return parameter.find_option(best.params[parameter.key]) == parameter.find_option(trial.params[parameter.key])
    distance = abs(parameter.to_place(best.params[parameter.key]) - parameter.to_place(trial.params[parameter.key]))
    return distance <= max(NEAR_DISTANCE, compute_cell_width(parameter))
