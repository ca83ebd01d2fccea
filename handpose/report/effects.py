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

from handpose.report.record import Parameter, SweepRecord, TrialRecord
from handpose.report.sequential import largest_null_scores, limit, sequential_scores, tail, trend, weights

LEAST_TRIALS = 15
"""Trials with a value at one epoch, below which no effect is looked for."""

FALSE_ALARMS = 0.01
"""How often a sweep in which nothing matters shows any effect at all. benchmarks/claims.py measures it."""

CONFIDENCE = 0.95
"""Of the interval that holds the best value of a parameter, if its effect is shown."""

_LEAST_SIDE = 3  # trials with and without what a term stands for
_LEAST_GROUP = 8  # trials in each third of a range, or with each choice, before an effect is called small
_NUM_CELLS = 12  # parts of a range with equally many trials, whose unions are looked at for a trend
_RIDGE = 1.0  # of the number of trials, by which an effect that is not shown yet is shrunk
_MOST_VALUES = 8  # of a parameter whose values are looked at one by one

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


class _Observed(NamedTuple):
    """The distinct trials with a value at an epoch, in the order of their proposal. losses: smaller is better."""

    epoch: int
    trials: Sequence[TrialRecord]
    losses: Array


def distinct(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials without those that repeat the parameters of an earlier one."""
    first = {json.dumps(dict(trial.params), sort_keys=True, default=repr): trial for trial in reversed(trials)}
    return sorted(first.values(), key=lambda trial: trial.number)


def observed(record: SweepRecord) -> list[_Observed]:
    """The values of the lowest and the highest epoch at which enough trials can be compared."""
    epochs = record.compared_epochs(least=LEAST_TRIALS)
    found = []
    for epoch in sorted({*epochs[:1], *epochs[-1:]}):
        values = record.values_at(epoch)
        trials = distinct([trial for trial in record.trials if trial.number in values])
        if len(trials) >= LEAST_TRIALS:
            losses = record.sign * np.array([values[trial.number] for trial in trials])
            found.append(_Observed(epoch, trials, losses))
    return found


def shown_effects(record: SweepRecord) -> list[ShownEffect]:
    """The parameters whose effect is shown, the clearest first.

    They are found one after the other: the effect of each is taken out of the values before the next one is looked for,
    so that a parameter which only went along with it is not taken for a cause.
    """
    at_epochs = observed(record)
    shown: list[ShownEffect] = []
    while (found := _clearest(record, at_epochs, shown)) is not None:
        shown.append(found)
    return shown


def _clearest(record: SweepRecord, at_epochs: Sequence[_Observed], shown: Sequence[ShownEffect]) -> ShownEffect | None:
    keys = {effect.key for effect in shown}
    best: tuple[float, str, _Observed] | None = None
    largest = np.zeros(1)
    for at in at_epochs:
        model = _Model(record.parameters, keys, at)
        columns = {key: weights(terms, _nuisance(key, at)) for key, terms in model.terms.items() if key not in keys}
        if not columns:
            continue
        for key, each in columns.items():
            scores = np.abs(sequential_scores(model.without_others(key)) @ each) / model.inflation(key, each)
            score = float(scores.max())
            if best is None or score > best[0]:
                best = score, key, at
        largest = np.maximum(largest, largest_null_scores(np.hstack([*columns.values()]), seed=at.epoch))
    if best is None:
        return None
    score, key, at = best
    p_value = (1 + int((largest >= score).sum())) / (1 + len(largest))
    return ShownEffect(key, at.epoch, len(at.trials), p_value) if p_value <= FALSE_ALARMS else None


def key_that_sets_apart(
    record: SweepRecord, trials: Sequence[TrialRecord], marked: Sequence[TrialRecord]
) -> str | None:
    """The parameter in which the marked ones of these trials are shown to differ from the others, if there is one."""
    ordered = distinct(trials)
    if len(ordered) < LEAST_TRIALS:
        return None
    numbers = {trial.number for trial in marked}
    generator = np.random.default_rng(0)
    losses = np.array([float(trial.number in numbers) for trial in ordered]) + 1e-3 * generator.random(len(ordered))
    at = _Observed(0, ordered, losses)  # values that are equal but for a draw, which the ranks need
    found = _clearest(record, [at], [])
    return None if found is None else found.key


# --- where the best value lies ----------------------------------------------------------------------------------------


def best_range(record: SweepRecord, parameter: Parameter, shown: Sequence[ShownEffect]) -> BestRange:
    """Bound the best value of a numeric parameter whose effect is shown.

    If the best value lay at a place, the values would get worse on either side of it. So a place is ruled out where
    values improve along the trials to its right (all, the nearer half or the nearest quarter of them), or along those
    to its left, as one-sided tests say. The interval reaches from the first place that is not ruled out to the last.
    """
    keys = {effect.key for effect in shown}
    at_epochs = []
    for at in observed(record):
        owners = [index for index, trial in enumerate(at.trials) if parameter.key in trial.params]
        places = np.array([parameter.place(at.trials[index].params[parameter.key]) for index in owners])
        at_epochs.append((at.epoch, places, _Model(record.parameters, keys, at).without_others(parameter.key)[owners]))
    if not at_epochs:
        return BestRange(0.0, 1.0, None, None)
    grid = _grid(np.concatenate([places for _, places, _ in at_epochs]))
    low, lower = _first_possible(grid, at_epochs)
    turned = [(epoch, 1 - places, losses) for epoch, places, losses in at_epochs]
    high, upper = _first_possible(1 - grid[::-1], turned)
    if low > 1 - high:  # more than one optimum
        return BestRange(0.0, 1.0, None, None)
    return BestRange(low if lower else 0.0, 1 - high if upper else 1.0, lower, upper)


def _grid(places: Array) -> Array:
    """Where the best value is looked for, ascending: at each of a few values, or between equal shares of trials."""
    values = np.unique(places)
    return values if len(values) <= _MOST_VALUES else np.unique(np.quantile(places, np.linspace(0, 1, _NUM_CELLS + 1)))


def _first_possible(grid: Array, at_epochs: Sequence[tuple[int, Array, Array]]) -> tuple[float, Bound | None]:
    """The first place of the grid at which the best value can lie, and why not at the one before it."""
    last = None
    for place in grid[:-1]:
        right = [(epoch, places - place, losses, places >= place - 1e-12) for epoch, places, losses in at_epochs]
        bound = _ruled_out([(epoch, distances[there], losses[there]) for epoch, distances, losses, there in right])
        if bound is None:
            return float(place), last
        last = bound
    return float(grid[-1]), last


def _ruled_out(sides: Sequence[tuple[int, Array, Array]]) -> Bound | None:
    """The clearest trend towards better values away from a place, if there is one.

    sides: at each epoch, (N,) distances to the right of the place, and losses.
    """
    tests = []
    for epoch, distances, losses in sides:
        if not len(distances):
            continue
        for nearest in (0.25, 0.5, 1.0):
            inside = distances <= max(_second(distances), float(np.quantile(distances, nearest)))
            if _has_sides(distances[inside]):
                score = trend(losses[inside], distances[inside])
                tests.append((score, Bound(epoch, int(inside.sum()), tail(score) / 2)))
    if not tests:
        return None
    score, bound = min(tests)
    return bound if score < -limit((1 - CONFIDENCE) / 2, len(tests)) else None


def _second(distances: Array) -> float:
    """The second smallest of the different distances."""
    return float(np.unique(distances)[:2].max())


def _has_sides(places: Array) -> bool:
    if len(places) < 2 * _LEAST_SIDE:
        return False
    below = int((places < places.mean()).sum())
    return min(below, len(places) - below) >= _LEAST_SIDE


def worse_options(record: SweepRecord, parameter: Parameter, shown: Sequence[ShownEffect]) -> list[WorseOption]:
    """The choices of a parameter, whose effect is shown, that are shown to be worse than another one."""
    keys = {effect.key for effect in shown}
    compared = []
    for at in observed(record):
        losses = _Model(record.parameters, keys, at).without_others(parameter.key)
        indices = np.array([_index(parameter, trial) for trial in at.trials])
        for first, second in itertools.permutations(range(len(parameter.choices)), 2):
            both = (indices == first) | (indices == second)
            is_first = (indices[both] == first).astype(float)
            if min(is_first.sum(), len(is_first) - is_first.sum()) >= _LEAST_SIDE:
                score = trend(losses[both], is_first)
                compared.append((score, first, second, Bound(at.epoch, int(both.sum()), tail(score) / 2)))
    least = limit(1 - CONFIDENCE, max(1, len(compared) // len(parameter.choices)))  # of the best one with each other
    worse: dict[int, WorseOption] = {}
    for score, first, second, bound in sorted(compared, key=lambda each: -each[0]):
        if score > least:
            worse.setdefault(first, WorseOption(first, second, bound))
    return [worse[index] for index in sorted(worse)]


# --- what makes little difference -------------------------------------------------------------------------------------


def small_effects(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[SmallEffect]:
    """The parameters that are shown to make little difference, at the epoch with the most trials.

    Two one-sided t tests for each pair of thirds or choices (Schuirmann 1987), of which each must have been tried by 8
    trials: a parameter whose alternatives were hardly tried is never called unimportant.
    """
    at_epochs = observed(record)
    if not at_epochs:
        return []
    at = max(at_epochs, key=lambda each: len(each.trials))
    margin = (float(np.median(at.losses)) - float(at.losses.min())) / 2
    keys = {effect.key for effect in shown}
    model = _Model(record.parameters, keys, at, scaled=False)
    found = []
    for parameter in record.parameters:
        if parameter.key in keys:
            continue
        level = (1 - CONFIDENCE) / len(record.parameters)
        bound = _largest_difference(parameter, at.trials, model.without_others(parameter.key), level)
        if bound < margin:
            found.append(SmallEffect(parameter.key, at.epoch, len(at.trials), bound, margin))
    return found


def _largest_difference(parameter: Parameter, trials: Sequence[TrialRecord], losses: Array, level: float) -> float:
    """The largest `_welch_bound` of two groups; infinite with too few trials."""
    groups = np.array([_group(parameter, trial) for trial in trials])
    names = range(_num_groups(parameter))
    values = [losses[groups == name] for name in names]
    if len(values) < 2 or min(map(len, values)) < _LEAST_GROUP:
        return math.inf
    return max(_welch_bound(first, second, level) for first, second in itertools.combinations(values, 2))


def _welch_bound(first: Array, second: Array, level: float) -> float:
    """What the size of a difference of means exceeds with probability `level` (Welch 1947)."""
    parts = np.array([first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)])
    difference = abs(float(first.mean() - second.mean()))
    if parts.sum() == 0:
        return difference
    freedom = parts.sum() ** 2 / (parts**2 / np.array([len(first) - 1, len(second) - 1])).sum()
    return difference + float(stats.t.ppf(1 - level, freedom) * np.sqrt(parts.sum()))


def _num_groups(parameter: Parameter) -> int:
    return 3 if parameter.num_values is None or parameter.num_values > _MOST_VALUES else parameter.num_values


def _group(parameter: Parameter, trial: TrialRecord) -> int:
    """The choice, the value of a few, or the third of a range; -1 without the parameter."""
    if parameter.kind == "choice" or parameter.key not in trial.params:
        return _index(parameter, trial)
    place, num = parameter.place(trial.params[parameter.key]), _num_groups(parameter)
    return min(2, max(0, int(3 * place))) if num == 3 else round(place * (num - 1))


# --- terms ------------------------------------------------------------------------------------------------------------


class _Model:
    """A linear model of the values by all parameters, from which the parts of single ones can be taken.

    Ridge regression: an effect that is not shown yet is taken out in part only, those of `known` parameters in full.
    scaled: of normal scores, which outliers cannot bend; otherwise in the metric's unit.

    terms: parameter -> (N, T) columns.
    """

    def __init__(
        self, parameters: Sequence[Parameter], known: Collection[str], at: _Observed, *, scaled: bool = True
    ) -> None:
        columns = {parameter.key: _terms(parameter, at.trials) for parameter in parameters}
        self.terms = {key: np.stack(each, axis=1) for key, each in columns.items() if each}
        self._values = _normal_scores(at.losses) if scaled else at.losses
        self._parts: dict[str, Array] = {}
        self._owners = np.repeat(list(self.terms), [columns.shape[1] for columns in self.terms.values()])
        if self.terms:
            self._fit(known)

    def without_others(self, key: str) -> Array:
        """(N,) the values less the effects of all parameters but this one."""
        parts = [part for other, part in self._parts.items() if other != key]
        return self._values - np.sum(parts, axis=0) if parts else self._values

    def inflation(self, key: str, columns: Array) -> Array:
        """(T,) how much larger sums with these weights are in noise after the other parameters' parts were taken out.

        What the others explain by chance is gone from the values, which leaves the more weight to this parameter.
        """
        design, solver = self._design[:, self._owners != key], self._solver[self._owners != key]
        own = columns - solver.T @ (design.T @ columns)
        gram = design.T @ design
        trace = len(design) - 2 * float((design.T * solver).sum()) + float((gram * (solver @ solver.T)).sum())
        return np.maximum(1.0, np.linalg.norm(own, axis=0) / np.sqrt(max(trace / len(design), 1e-12)))

    def _fit(self, known: Collection[str]) -> None:
        design = np.hstack([*self.terms.values()])
        design = design - design.mean(axis=0)
        spread = design.std(axis=0)
        self._design = design = design / np.where(spread > 0, spread, 1.0)
        penalty = len(design) * np.where(np.isin(self._owners, list(known)), 1e-6, _RIDGE)
        self._solver = np.linalg.solve(design.T @ design + np.diag(penalty), design.T)
        factors = self._solver @ (self._values - self._values.mean())
        parts = {key: self._owners == key for key in self.terms}
        self._parts = {key: design[:, own] @ factors[own] for key, own in parts.items()}


def _index(parameter: Parameter, trial: TrialRecord) -> int:
    return parameter.index(trial.params[parameter.key]) if parameter.key in trial.params else -1


def _terms(parameter: Parameter, trials: Sequence[TrialRecord]) -> list[Array]:
    """(N,) columns: a slope and a bend along a range, or a column for each choice that enough trials have or lack."""
    has = np.array([parameter.key in trial.params for trial in trials])
    if parameter.kind == "choice":
        indices = np.array([_index(parameter, trial) for trial in trials])
        columns = [indices == index for index in range(len(parameter.choices))]
        return [column.astype(float) for column in columns if min(column.sum(), (has & ~column).sum()) >= _LEAST_SIDE]
    places = np.array(
        [
            parameter.place(trial.params[parameter.key]) - 0.5 if parameter.key in trial.params else 0.0
            for trial in trials
        ]
    )
    num_values = len(np.unique(places[has]))
    return [places, places**2][: max(0, min(2, num_values - 1))]


def _nuisance(key: str, at: _Observed) -> Array:
    """(N, 1 or 2) the mean, and whether a trial has the parameter at all."""
    has = np.array([[1.0, float(key in trial.params)] for trial in at.trials])
    return np.unique(has, axis=1)


def _normal_scores(values: Array) -> Array:
    scores: Array = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))
    return scores
