"""Comparison of the searched ranges with the places of the best trials, for advice and the suggested search space.

Every claim requires a shown effect (see `effects`), so that noise seldom leads to one. The places of the best trials
are only additional information. They are no evidence by themselves, because a sampler places its trials where earlier
ones were good.
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
"""Distance, as a fraction of the range, up to which two values are near each other."""

_MIN_BEST = 5
_MAX_BEST = 20
_EDGE_WIDTH = 0.1  # as a fraction of the range
_MAX_EXACT_INT = 2**53  # the largest integer up to which a study stores all integers exactly
_NARROW_FRACTION = 0.2  # fraction of the range that must be ruled out before a narrower range is suggested


def select_best_trials(record: SweepRecord) -> list[TrialRecord]:
    """Return the best tenth of the ranked trials: at least 5 if there are that many, and at most 20."""
    return record.list_leading_trials(min(_MAX_BEST, max(_MIN_BEST, round(len(record.ranked) / 10))))


class SettledParameter(NamedTuple):
    """A parameter with a shown effect, of which the next sweep can search a smaller part.

    Attributes:
        parameter: the parameter.
        effect: its effect.
        best: of a range: the interval for the best value, in places.
        low: of a range: the lower end of the interval as a value, after widening it to include the best trials.
        high: of a range: the upper end, likewise.
        worse: of a choice: the options to leave out.
    """

    parameter: Parameter
    effect: ShownEffect
    best: BestRange | None = None
    low: float = math.nan
    high: float = math.nan
    worse: Sequence[WorseOption] = ()

    @property
    def summary(self) -> str:
        """The finding, as a sentence without its subject, the parameter."""
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
        """The options of a choice that are not shown to be worse than another option."""
        left_out = {each.option for each in self.worse}
        return [choice for index, choice in enumerate(self.parameter.choices) if index not in left_out]


class CrowdedEdge(NamedTuple):
    """An end of a range where many of the best trials lie, and towards which the metric is shown to improve.

    Attributes:
        parameter: the parameter.
        effect: its effect.
        is_upper: whether it is the upper end.
        num_at_edge: number of best trials at this end.
        num_best: number of best trials that have the parameter.
    """

    parameter: Parameter
    effect: ShownEffect
    is_upper: bool
    num_at_edge: int
    num_best: int


def find_crowded_edges(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[CrowdedEdge]:
    """Find the ends of ranges beyond which the best value may lie.

    The effect of the parameter must be shown, the interval for its best value must reach to this end but not to the
    other one, and at least half of the best trials must be at this end.

    Args:
        record: the sweep.
        shown: the shown effects.
    """
    found: list[CrowdedEdge] = []
    for effect in shown:
        parameter = _get_parameter(record, effect)
        if parameter.kind == "choice" or not parameter.is_declared:
            continue
        best, places = find_best_range(record, parameter, shown), list_places(parameter, select_best_trials(record))
        width = compute_edge_width(parameter)
        for is_upper in (False, True):
            bounded, open_end = (best.lower, best.upper) if is_upper else (best.upper, best.lower)
            num_there = sum(place >= 1 - width if is_upper else place <= width for place in places)
            if bounded is None or open_end is not None or len(places) < _MIN_BEST or 2 * num_there < len(places):
                continue
            if not is_natural_end(parameter, is_upper=is_upper):
                found.append(CrowdedEdge(parameter, effect, is_upper, num_there, len(places)))
    return found


def find_settled_parameters(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[SettledParameter]:
    """Find the parameters of which a part of the range, or some options, are shown to be worse than the rest.

    Args:
        record: the sweep.
        shown: the shown effects.
    """
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
    """Widen the interval to include the best trials.

    They were trained the longest, while the interval may be based on earlier epochs, which can be misleading.
    """
    places = list_places(parameter, select_best_trials(record))
    return min([best.low, *places]), max([best.high, *places])


def _get_value(parameter: Parameter, place: float) -> float:
    """Return the value at a place from 0 to 1. With a step, it is the nearest value that is searched."""
    if place in (0.0, 1.0):
        return parameter.high if place else parameter.low  # exact; logarithms would change the last digits
    value = parameter.to_value(place)
    if parameter.num_values is None or parameter.log:
        return round(value) if parameter.kind == "int" else value
    return _add_steps(parameter.low, parameter, round((value - parameter.low) / (parameter.step or 1)))


def _add_steps(value: float, parameter: Parameter, num_steps: int) -> float:
    """Add steps to a value in exact decimal arithmetic: 0.1 + 2 * 0.1 is 0.3."""
    moved = Fraction(repr(value)) + num_steps * Fraction(repr(parameter.step or 1))
    return int(moved) if parameter.kind == "int" else float(moved)


def _format_distinct(low: float, high: float) -> tuple[str, str]:
    """Format two values with three digits, or with as many as are needed to distinguish them."""
    for digits in (3, *range(4, 17)):
        texts = tuple(f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in (low, high))
        if low == high or texts[0] != texts[1]:
            break
    return texts[0], texts[1]


def _get_parameter(record: SweepRecord, effect: ShownEffect) -> Parameter:
    return next(parameter for parameter in record.parameters if parameter.key == effect.key)


def is_natural_end(parameter: Parameter, *, is_upper: bool) -> bool:
    """Return whether a range need not be widened at an end.

    This is so at a lower end of 0, at the upper end of 1 of a float, and where `widen_range` changes nothing.
    """
    if widen_range(parameter, is_upper=is_upper) == (parameter.low, parameter.high):
        return True
    return parameter.high == 1.0 and parameter.kind == "float" if is_upper else parameter.low == 0


def widen_range(parameter: Parameter, *, is_upper: bool) -> tuple[float, float]:
    """Extend a range by half its length at one end.

    A positive range stays positive, and the steps of a range keep their places.

    Args:
        parameter: a numeric parameter.
        is_upper: whether to extend the upper end.

    Returns:
        The new ends; the old ones if the range cannot be extended, or if the configuration does not accept the new end.
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
    """Round an end of a range to about two digits, away from the range, so that the range does not become smaller.

    The digits are counted in the length of the range, or in the value if the range is logarithmic. Integers are rounded
    to the next integer, and other values with a step are not rounded.

    Args:
        parameter: a numeric parameter.
        value: the end to round.
        up: whether it is the upper end.
    """
    if parameter.kind == "int":
        return math.ceil(value - 1e-9) if up else math.floor(value + 1e-9)
    size = abs(value) if parameter.log else parameter.high - parameter.low
    if parameter.step is not None or not 0 < size < math.inf:
        return value
    num_digits = 1 - math.floor(math.log10(size))  # after the decimal point
    unit = Fraction(10) ** -num_digits
    return float((math.ceil if up else math.floor)(Fraction(repr(value)) / unit) * unit)


def format_range(parameter: Parameter, low: float, high: float) -> str:
    """Format a range as in a search space file, with all digits, so that the file contains the exact numbers."""
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
    """Return the places, from 0 to 1, of the trials that have the parameter."""
    return [parameter.to_place(trial.params[parameter.key]) for trial in trials if parameter.key in trial.params]


def compute_cell_width(parameter: Parameter) -> float:
    """Return the fraction of the range that one value takes; 0 for a continuous or logarithmic range."""
    return 0.0 if parameter.num_values is None or parameter.log else 1 / parameter.num_values


def compute_edge_width(parameter: Parameter) -> float:
    """Return the width of an edge as a fraction of the range. With at most 10 values, an edge is only the last one."""
    return _EDGE_WIDTH if parameter.num_values is None or parameter.num_values > 10 else 1e-9


def is_near(parameter: Parameter, best: TrialRecord, trial: TrialRecord) -> bool:
    """Return whether a trial has a value near that of the best trial, or the same option of a choice."""
    if parameter.key not in best.params or parameter.key not in trial.params:
        return parameter.key not in best.params and parameter.key not in trial.params
    if parameter.kind == "choice":
        return parameter.find_option(best.params[parameter.key]) == parameter.find_option(trial.params[parameter.key])
    distance = abs(parameter.to_place(best.params[parameter.key]) - parameter.to_place(trial.params[parameter.key]))
    return distance <= max(NEAR_DISTANCE, compute_cell_width(parameter))
