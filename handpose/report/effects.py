"""Which searched parameters are shown to have an effect, and where their best values can lie.

Every claim about a parameter begins here: advice, the next round's space and the importance chart speak only of effects
that are shown. The tests are those of `sequential`, so that they hold for every searcher and scheduler; the level holds
for all parameters and epochs of a sweep together. Trials with equal parameters count once, since with one training seed
they are one training.
"""

import itertools
import json
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from handpose.report.sequential import (
    compute_sequential_scores,
    compute_tail_probability,
    compute_threshold,
    draw_largest_null_scores,
    make_weights,
    measure_trend,
)
from handpose.report.sweep_record import Parameter, SweepRecord, TrialRecord

MIN_EFFECT_TRIALS = 15
"""Trials with a value at one epoch, below which no effect is looked for."""

FALSE_ALARM_RATE = 0.01
"""How often a sweep in which nothing matters shows any effect at all. benchmarks/claims.py measures it."""

CONFIDENCE = 0.95
"""Of the interval that holds the best value of a parameter, if its effect is shown."""

_MIN_SIDE_TRIALS = 3  # trials with and without what a term stands for
_MIN_GROUP_TRIALS = 8  # trials in each third of a range, or with each choice, before an effect is called small
_NUM_CELLS = 12  # parts of a range with equally many trials, whose unions are looked at for a trend
_RIDGE = 1.0  # of the number of trials, by which an effect that is not shown yet is shrunk
_MAX_VALUES = 8  # of a parameter whose values are looked at one by one

Array = NDArray[np.float64]


class ShownEffect(NamedTuple):
    """A parameter whose effect is shown.

    epoch, num_trials: where it is clearest. p_value: holds for all parameters and epochs of the sweep together.
    """

    key: str
    epoch: int
    num_trials: int
    p_value: float


class Bound(NamedTuple):
    """Why the best value does not lie beyond an end of an interval: a trend within a window of the range.

    epoch: at which the values were compared. num_trials: in the window. p_value: of the trend, not corrected.
    """

    epoch: int
    num_trials: int
    p_value: float


class BestRange(NamedTuple):
    """Where the best value of a numeric parameter lies, in places from 0 to 1.

    The interval holds with 95 % confidence if the values get steadily worse on either side of the best one. lower,
    upper: what bounds it; None where the interval reaches to the end of the searched range.
    """

    low: float
    high: float
    lower: Bound | None
    upper: Bound | None


class WorseOption(NamedTuple):
    """A choice that is shown to be worse than `better`, another one."""

    option: int
    better: int
    bound: Bound


class SmallEffect(NamedTuple):
    """A parameter that makes little difference, as shown by an equivalence test.

    bound: the mean values of any two thirds of its range, or of any two choices, differ by less. With 95 % confidence
    this holds for all parameters of the sweep together.
    margin: half of what the best trial gained over the median one.
    """

    key: str
    epoch: int
    num_trials: int
    bound: float
    margin: float


class _EpochValues(NamedTuple):
    """The distinct trials with a value at an epoch, in the order of their proposal. losses: smaller is better."""

    epoch: int
    trials: Sequence[TrialRecord]
    losses: Array


def drop_repeated_trials(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials without those that repeat the parameters of an earlier one."""
    first = {json.dumps(dict(trial.params), sort_keys=True, default=repr): trial for trial in reversed(trials)}
    return sorted(first.values(), key=lambda trial: trial.number)


def collect_epoch_values(record: SweepRecord) -> list[_EpochValues]:
    """The values of the lowest and the highest epoch at which enough trials can be compared."""
    epochs = record.list_compared_epochs(min_trials=MIN_EFFECT_TRIALS)
    found = []
    for epoch in sorted({*epochs[:1], *epochs[-1:]}):
        values = record.get_values_at(epoch)
        trials = drop_repeated_trials([trial for trial in record.trials if trial.number in values])
        if len(trials) >= MIN_EFFECT_TRIALS:
            losses = record.sign * np.array([values[trial.number] for trial in trials])
            found.append(_EpochValues(epoch, trials, losses))
    return found


def find_shown_effects(record: SweepRecord) -> list[ShownEffect]:
    """The parameters whose effect is shown, the clearest first.

    They are found one after the other: the effect of each is taken out of the values before the next one is looked for,
    so that a parameter which only went along with it is not taken for a cause.
    """
    at_epochs = collect_epoch_values(record)
    shown: list[ShownEffect] = []
    while (found := _find_clearest(record, at_epochs, shown)) is not None:
        shown.append(found)
    return shown


def _find_clearest(
    record: SweepRecord, at_epochs: Sequence[_EpochValues], shown: Sequence[ShownEffect]
) -> ShownEffect | None:
    keys = {effect.key for effect in shown}
    best: tuple[float, str, _EpochValues] | None = None
    largest = np.zeros(1)
    for at in at_epochs:
        model = _LinearModel(record.parameters, keys, at)
        columns = {
            key: make_weights(terms, _make_nuisance_columns(key, at))
            for key, terms in model.terms.items()
            if key not in keys
        }
        if not columns:
            continue
        for key, each in columns.items():
            scores = np.abs(
                compute_sequential_scores(model.remove_other_effects(key)) @ each
            ) / model.compute_inflation(key, each)
            score = float(scores.max())
            if best is None or score > best[0]:
                best = score, key, at
        largest = np.maximum(largest, draw_largest_null_scores(np.hstack([*columns.values()]), seed=at.epoch))
    if best is None:
        return None
    score, key, at = best
    p_value = (1 + int((largest >= score).sum())) / (1 + len(largest))
    return ShownEffect(key, at.epoch, len(at.trials), p_value) if p_value <= FALSE_ALARM_RATE else None


def find_distinguishing_key(
    record: SweepRecord, trials: Sequence[TrialRecord], marked: Sequence[TrialRecord]
) -> str | None:
    """The parameter in which the marked ones of these trials are shown to differ from the others, if there is one."""
    ordered = drop_repeated_trials(trials)
    if len(ordered) < MIN_EFFECT_TRIALS:
        return None
    numbers = {trial.number for trial in marked}
    generator = np.random.default_rng(0)
    losses = np.array([float(trial.number in numbers) for trial in ordered]) + 1e-3 * generator.random(len(ordered))
    at = _EpochValues(0, ordered, losses)  # values that are equal but for a draw, which the ranks need
    found = _find_clearest(record, [at], [])
    return None if found is None else found.key


# --- where the best value lies ----------------------------------------------------------------------------------------


def find_best_range(record: SweepRecord, parameter: Parameter, shown: Sequence[ShownEffect]) -> BestRange:
    """Bound the best value of a numeric parameter whose effect is shown.

    If the best value lay at a place, the values would get worse on either side of it. So a place is ruled out where
    values improve along the trials to its right (all, the nearer half or the nearest quarter of them), or along those
    to its left, as one-sided tests say. The interval reaches from the first place that is not ruled out to the last.
    """
    keys = {effect.key for effect in shown}
    at_epochs = []
    for at in collect_epoch_values(record):
        owners = [index for index, trial in enumerate(at.trials) if parameter.key in trial.params]
        places = np.array([parameter.to_place(at.trials[index].params[parameter.key]) for index in owners])
        at_epochs.append(
            (at.epoch, places, _LinearModel(record.parameters, keys, at).remove_other_effects(parameter.key)[owners])
        )
    if not at_epochs:
        return BestRange(0.0, 1.0, None, None)
    grid = _make_grid(np.concatenate([places for _, places, _ in at_epochs]))
    low, lower = _find_first_possible(grid, at_epochs)
    turned = [(epoch, 1 - places, losses) for epoch, places, losses in at_epochs]
    high, upper = _find_first_possible(1 - grid[::-1], turned)
    if low > 1 - high:  # more than one optimum
        return BestRange(0.0, 1.0, None, None)
    return BestRange(low if lower else 0.0, 1 - high if upper else 1.0, lower, upper)


def _make_grid(places: Array) -> Array:
    """Where the best value is looked for, ascending: at each of a few values, or between equal shares of trials."""
    values = np.unique(places)
    return values if len(values) <= _MAX_VALUES else np.unique(np.quantile(places, np.linspace(0, 1, _NUM_CELLS + 1)))


def _find_first_possible(grid: Array, at_epochs: Sequence[tuple[int, Array, Array]]) -> tuple[float, Bound | None]:
    """The first place of the grid at which the best value can lie, and why not at the one before it."""
    last = None
    for place in grid[:-1]:
        right = [(epoch, places - place, losses, places >= place - 1e-12) for epoch, places, losses in at_epochs]
        bound = _find_exclusion([(epoch, distances[there], losses[there]) for epoch, distances, losses, there in right])
        if bound is None:
            return float(place), last
        last = bound
    return float(grid[-1]), last


def _find_exclusion(sides: Sequence[tuple[int, Array, Array]]) -> Bound | None:
    """The clearest trend towards better values away from a place, if there is one.

    sides: at each epoch, (N,) distances to the right of the place, and losses.
    """
    tests = []
    for epoch, distances, losses in sides:
        if not len(distances):
            continue
        for nearest in (0.25, 0.5, 1.0):
            inside = distances <= max(_get_second_smallest(distances), float(np.quantile(distances, nearest)))
            if _has_sides(distances[inside]):
                score = measure_trend(losses[inside], distances[inside])
                tests.append((score, Bound(epoch, int(inside.sum()), compute_tail_probability(score) / 2)))
    if not tests:
        return None
    score, bound = min(tests)
    return bound if score < -compute_threshold((1 - CONFIDENCE) / 2, len(tests)) else None


def _get_second_smallest(distances: Array) -> float:
    """The second smallest of the different distances."""
    return float(np.unique(distances)[:2].max())


def _has_sides(places: Array) -> bool:
    if len(places) < 2 * _MIN_SIDE_TRIALS:
        return False
    below = int((places < places.mean()).sum())
    return min(below, len(places) - below) >= _MIN_SIDE_TRIALS


def find_worse_options(record: SweepRecord, parameter: Parameter, shown: Sequence[ShownEffect]) -> list[WorseOption]:
    """The choices of a parameter, whose effect is shown, that are shown to be worse than another one."""
    keys = {effect.key for effect in shown}
    compared = []
    for at in collect_epoch_values(record):
        losses = _LinearModel(record.parameters, keys, at).remove_other_effects(parameter.key)
        indices = np.array([_get_index(parameter, trial) for trial in at.trials])
        for first, second in itertools.permutations(range(len(parameter.choices)), 2):
            both = (indices == first) | (indices == second)
            is_first = (indices[both] == first).astype(float)
            if min(is_first.sum(), len(is_first) - is_first.sum()) >= _MIN_SIDE_TRIALS:
                score = measure_trend(losses[both], is_first)
                compared.append(
                    (score, first, second, Bound(at.epoch, int(both.sum()), compute_tail_probability(score) / 2))
                )
    least = compute_threshold(
        1 - CONFIDENCE, max(1, len(compared) // len(parameter.choices))
    )  # of the best one with each other
    worse: dict[int, WorseOption] = {}
    for score, first, second, bound in sorted(compared, key=lambda each: -each[0]):
        if score > least:
            worse.setdefault(first, WorseOption(first, second, bound))
    return [worse[index] for index in sorted(worse)]


# --- what makes little difference -------------------------------------------------------------------------------------


def find_small_effects(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[SmallEffect]:
    """The parameters that are shown to make little difference, at the epoch with the most trials.

    Two one-sided t tests for each pair of thirds or choices (Schuirmann 1987), of which each must have been tried by 8
    trials: a parameter whose alternatives were hardly tried is never called unimportant.
    """
    at_epochs = collect_epoch_values(record)
    if not at_epochs:
        return []
    at = max(at_epochs, key=lambda each: len(each.trials))
    margin = (float(np.median(at.losses)) - float(at.losses.min())) / 2
    keys = {effect.key for effect in shown}
    model = _LinearModel(record.parameters, keys, at, scaled=False)
    found = []
    for parameter in record.parameters:
        if parameter.key in keys:
            continue
        level = (1 - CONFIDENCE) / len(record.parameters)
        bound = _bound_largest_difference(parameter, at.trials, model.remove_other_effects(parameter.key), level)
        if bound < margin:
            found.append(SmallEffect(parameter.key, at.epoch, len(at.trials), bound, margin))
    return found


def _bound_largest_difference(
    parameter: Parameter, trials: Sequence[TrialRecord], losses: Array, level: float
) -> float:
    """The largest `_compute_welch_bound` of two groups; infinite with too few trials."""
    groups = np.array([_assign_group(parameter, trial) for trial in trials])
    names = range(_count_groups(parameter))
    values = [losses[groups == name] for name in names]
    if len(values) < 2 or min(map(len, values)) < _MIN_GROUP_TRIALS:
        return math.inf
    return max(_compute_welch_bound(first, second, level) for first, second in itertools.combinations(values, 2))


def _compute_welch_bound(first: Array, second: Array, level: float) -> float:
    """What the size of a difference of means exceeds with probability `level` (Welch 1947)."""
    parts = np.array([first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)])
    difference = abs(float(first.mean() - second.mean()))
    if parts.sum() == 0:
        return difference
    freedom = parts.sum() ** 2 / (parts**2 / np.array([len(first) - 1, len(second) - 1])).sum()
    return difference + float(stats.t.ppf(1 - level, freedom) * np.sqrt(parts.sum()))


def _count_groups(parameter: Parameter) -> int:
    return 3 if parameter.num_values is None or parameter.num_values > _MAX_VALUES else parameter.num_values


def _assign_group(parameter: Parameter, trial: TrialRecord) -> int:
    """The choice, the value of a few, or the third of a range; -1 without the parameter."""
    if parameter.kind == "choice" or parameter.key not in trial.params:
        return _get_index(parameter, trial)
    place, num = parameter.to_place(trial.params[parameter.key]), _count_groups(parameter)
    return min(2, max(0, int(3 * place))) if num == 3 else round(place * (num - 1))


# --- terms ------------------------------------------------------------------------------------------------------------


class _LinearModel:
    """A linear model of the values by all parameters, from which the parts of single ones can be taken.

    Ridge regression: an effect that is not shown yet is taken out in part only, those of `known` parameters in full.
    scaled: of normal scores, which outliers cannot bend; otherwise in the metric's unit.

    terms: parameter -> (N, T) columns.
    """

    def __init__(
        self, parameters: Sequence[Parameter], is_finite: Collection[str], at: _EpochValues, *, scaled: bool = True
    ) -> None:
        columns = {parameter.key: _make_terms(parameter, at.trials) for parameter in parameters}
        self.terms = {key: np.stack(each, axis=1) for key, each in columns.items() if each}
        self._values = _compute_normal_scores(at.losses) if scaled else at.losses
        self._parts: dict[str, Array] = {}
        self._owners = np.repeat(list(self.terms), [columns.shape[1] for columns in self.terms.values()])
        if self.terms:
            self._fit(is_finite)

    def remove_other_effects(self, key: str) -> Array:
        """(N,) the values less the effects of all parameters but this one."""
        parts = [part for other, part in self._parts.items() if other != key]
        return self._values - np.sum(parts, axis=0) if parts else self._values

    def compute_inflation(self, key: str, columns: Array) -> Array:
        """(T,) how much larger sums with these weights are in noise after the other parameters' parts were taken out.

        What the others explain by chance is gone from the values, which leaves the more weight to this parameter.
        """
        design, solver = self._design[:, self._owners != key], self._solver[self._owners != key]
        own = columns - solver.T @ (design.T @ columns)
        gram = design.T @ design
        trace = len(design) - 2 * float((design.T * solver).sum()) + float((gram * (solver @ solver.T)).sum())
        return np.maximum(1.0, np.linalg.norm(own, axis=0) / np.sqrt(max(trace / len(design), 1e-12)))

    def _fit(self, is_finite: Collection[str]) -> None:
        design = np.hstack([*self.terms.values()])
        design = design - design.mean(axis=0)
        spread = design.std(axis=0)
        self._design = design = design / np.where(spread > 0, spread, 1.0)
        penalty = len(design) * np.where(np.isin(self._owners, list(is_finite)), 1e-6, _RIDGE)
        self._solver = np.linalg.solve(design.T @ design + np.diag(penalty), design.T)
        factors = self._solver @ (self._values - self._values.mean())
        parts = {key: self._owners == key for key in self.terms}
        self._parts = {key: design[:, own] @ factors[own] for key, own in parts.items()}


def _get_index(parameter: Parameter, trial: TrialRecord) -> int:
    return parameter.find_option(trial.params[parameter.key]) if parameter.key in trial.params else -1


def _make_terms(parameter: Parameter, trials: Sequence[TrialRecord]) -> list[Array]:
    """(N,) columns: a slope and a bend along a range, or a column for each choice that enough trials have or lack."""
    has = np.array([parameter.key in trial.params for trial in trials])
    if parameter.kind == "choice":
        indices = np.array([_get_index(parameter, trial) for trial in trials])
        columns = [indices == index for index in range(len(parameter.choices))]
        return [
            column.astype(float) for column in columns if min(column.sum(), (has & ~column).sum()) >= _MIN_SIDE_TRIALS
        ]
    places = np.array(
        [
            parameter.to_place(trial.params[parameter.key]) - 0.5 if parameter.key in trial.params else 0.0
            for trial in trials
        ]
    )
    num_values = len(np.unique(places[has]))
    return [places, places**2][: max(0, min(2, num_values - 1))]


def _make_nuisance_columns(key: str, at: _EpochValues) -> Array:
    """(N, 1 or 2) the mean, and whether a trial has the parameter at all."""
    has = np.array([[1.0, float(key in trial.params)] for trial in at.trials])
    return np.unique(has, axis=1)


def _compute_normal_scores(values: Array) -> Array:
    scores: Array = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))
    return scores
