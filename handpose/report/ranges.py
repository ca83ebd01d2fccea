"""The ranges that were searched, held against where the best trials lie: what advice and the next round's space share.

The best trials are the first of the ranking: those trained longest, by their last value. Counts are held against what
trials thrown evenly over a range would give, with Bonferroni's correction for the number of parameters; a sampler does
not throw evenly, so that the probabilities are a bar to pass and no more.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from handpose.report.record import Parameter, SweepRecord, TrialRecord

LEAST_TRIALS = 15
"""Trials with a result, below which nothing is said about ranges."""

LEAST_UNSEEN = 50
"""Trials with a value at one epoch, below which it means nothing that no effect is seen."""

LEAST_BEST = 5
SIGNIFICANT = 0.05
NEAR = 0.15
"""Of a range, to either side."""

_MOST_BEST = 20
_EDGE = 0.1  # of a range


def best_trials(record: SweepRecord) -> list[TrialRecord]:
    """A tenth of the trials with a result, at least 5 and at most 20."""
    return record.leading(min(_MOST_BEST, max(LEAST_BEST, round(len(record.ranked) / 10))))


class Crowd(NamedTuple):
    """Best trials at an edge of a range."""

    parameter: Parameter
    is_upper: bool
    num_there: int
    num_best: int


def crowded_edges(record: SweepRecord) -> list[Crowd]:
    """The edges at which at least half of the best trials lie, with a probability below 5 % over all edges."""
    numeric = [each for each in record.parameters if each.kind != "choice" and each.is_declared]
    found: list[Crowd] = []
    if len(record.ranked) < LEAST_TRIALS:
        return found
    for parameter in numeric:
        width, lie = edge_width(parameter), places(parameter, best_trials(record))
        for is_upper in (False, True):
            num_there = sum(place >= 1 - width if is_upper else place <= width for place in lie)
            if len(lie) < LEAST_BEST or 2 * num_there < len(lie) or is_natural_end(parameter, is_upper=is_upper):
                continue
            odds = stats.binomtest(num_there, len(lie), edge_share(parameter, width), alternative="greater").pvalue
            if odds * 2 * len(numeric) < SIGNIFICANT:
                found.append(Crowd(parameter, is_upper, num_there, len(lie)))
    return found


def settled_span(record: SweepRecord, parameter: Parameter) -> tuple[float, float] | object | None:
    """(low, high) that all best trials lie in, or the one value that they have; None where they are spread.

    None as well where they crowd an edge, beyond which there may be better. For a range: at most a third of it, with a
    probability below 5 % over all parameters, and at least 5 trials tried outside. For a choice: at least four in five
    of the best.
    """
    best = [trial for trial in best_trials(record) if parameter.key in trial.params]
    crowded = {crowd.parameter.key for crowd in crowded_edges(record)}
    if len(record.ranked) < LEAST_TRIALS or len(best) < LEAST_BEST:
        return None
    if not parameter.is_declared or parameter.key in crowded:
        return None
    bar = SIGNIFICANT / len(record.parameters)
    values = [trial.params[parameter.key] for trial in best]
    if parameter.kind == "choice":
        return _settled_choice(record, parameter, values, bar)
    lie = [parameter.place(value) for value in values]
    low, high = min(lie), max(lie)
    outside = [place for place in places(parameter, record.trials) if not low <= place <= high]
    # Of k even places all lie within w of each other with probability k w^(k-1) - (k-1) w^k.
    num, width = len(lie), high - low + cell(parameter)
    if width > 1 / 3 or len(outside) < 5 or num * width ** (num - 1) - (num - 1) * width**num >= bar:
        return None
    return min(values), max(values)


def _settled_choice(record: SweepRecord, parameter: Parameter, values: Sequence[object], bar: float) -> object | None:
    index, number = Counter(map(parameter.index, values)).most_common(1)[0]
    odds = stats.binomtest(number, len(values), 1 / len(parameter.choices), alternative="greater").pvalue
    if len(parameter.choices) < 2 or number < 0.8 * len(values) or odds >= bar:
        return None
    others = sum(
        parameter.index(trial.params[parameter.key]) != index
        for trial in record.trials
        if parameter.key in trial.params
    )
    return parameter.choices[index] if others >= 5 else None


def unseen(record: SweepRecord) -> list[str]:
    """Parameters without an effect at the highest epoch that could be judged, and seen at no other.

    Of LEAST_UNSEEN trials: the importance is below what chance gives, and below 10 % for 19 of 20 halves of the trials.
    That nothing is seen in fewer trials means nothing.
    """
    judged = [at for at in record.importance if at.num_trials >= LEAST_UNSEEN]
    if not judged:
        return []
    seen = {each.key for at in record.importance for each in at.effects if each.is_seen}
    return [
        each.key for each in judged[-1].effects if each.share < each.chance and each.high < 0.1 and each.key not in seen
    ]


def is_natural_end(parameter: Parameter, *, is_upper: bool) -> bool:
    """Whether nothing lies beyond: below 0, or above 1 of a share."""
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


def edge_share(parameter: Parameter, margin: float) -> float:
    """Of trials thrown evenly, those at an edge."""
    return margin if margin >= _EDGE else 1 / (parameter.num_values or 1)


def that_matter(record: SweepRecord) -> list[Parameter]:
    """The parameters whose effect is seen at some epoch; all, where it is not known."""
    seen = {effect.key for at in record.importance for effect in at.effects if effect.is_seen}
    return [each for each in record.parameters if each.key in seen] or list(record.parameters)


def is_near(parameter: Parameter, best: TrialRecord, trial: TrialRecord) -> bool:
    """Whether a trial has about the value that the best one has; of a choice the same."""
    if parameter.key not in best.params or parameter.key not in trial.params:
        return parameter.key not in best.params and parameter.key not in trial.params
    if parameter.kind == "choice":
        return parameter.index(best.params[parameter.key]) == parameter.index(trial.params[parameter.key])
    distance = abs(parameter.place(best.params[parameter.key]) - parameter.place(trial.params[parameter.key]))
    return distance <= max(NEAR, cell(parameter))
