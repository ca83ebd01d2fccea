"""Statistical tests of which searched parameters have an effect, and of where their best values lie.

All claims about parameters are based on these tests: advice, the suggested search space and the text below the
importance chart only use effects that are shown here. The tests are those of `sequential`, which are valid for every
searcher and scheduler. Their level holds for all parameters and epochs of a sweep together. Trials with equal
parameters count once, because with the same training seed they are the same training.
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
"""Least number of trials with a value at one epoch; with fewer, no effect is tested."""

FALSE_ALARM_RATE = 0.01
"""Probability that any effect is shown in a sweep in which no parameter matters. benchmarks/claims.py measures it."""

CONFIDENCE = 0.95
"""Confidence level of the interval for the best value of a parameter with a shown effect."""

_MIN_SIDE_TRIALS = 3  # least number of trials on either side of a comparison
_MIN_GROUP_TRIALS = 8  # least number of trials in each third of a range, or with each choice, to call an effect small
_NUM_CELLS = 12  # a range is examined at the borders of this many parts, each with equally many trials
_RIDGE = 1.0  # ridge penalty of effects that are not shown yet, as a multiple of the number of trials
_MAX_VALUES = 8  # with at most this many values, the values of a parameter are examined one by one

Array = NDArray[np.float64]


class ShownEffect(NamedTuple):
    """A parameter whose effect is shown.

    Attributes:
        key: its configuration key.
        epoch: the epoch at which the effect is clearest.
        num_trials: number of distinct trials with a value at that epoch.
        p_value: p-value, corrected for all parameters and epochs of the sweep.
    """

    key: str
    epoch: int
    num_trials: int
    p_value: float


class Bound(NamedTuple):
    """The evidence for an end of an interval: a trend in a window of the range.

    Attributes:
        epoch: the epoch at which the values were compared.
        num_trials: number of trials in the window.
        p_value: p-value of the trend, not corrected for multiple tests.
    """

    epoch: int
    num_trials: int
    p_value: float


class BestRange(NamedTuple):
    """An interval for the best value of a numeric parameter, in places from 0 to 1.

    It contains the best value with 95 % confidence if the metric gets steadily worse on both sides of the best value.

    Attributes:
        low: the lower end.
        high: the upper end.
        lower: the evidence for the lower end; None if the interval reaches to the end of the searched range.
        upper: the evidence for the upper end, likewise.
    """

    low: float
    high: float
    lower: Bound | None
    upper: Bound | None


class WorseOption(NamedTuple):
    """An option of a choice that is shown to be worse than another one.

    Attributes:
        option: index of the worse option.
        better: index of the better option.
        bound: the evidence.
    """

    option: int
    better: int
    bound: Bound


class SmallEffect(NamedTuple):
    """A parameter that makes little difference, as shown by an equivalence test.

    Attributes:
        key: its configuration key.
        epoch: the epoch at which the values were compared.
        num_trials: number of distinct trials with a value at that epoch.
        bound: upper bound of the difference between the mean values of any two thirds of the range, or of any two
            options. With 95 % confidence it holds for all parameters of the sweep together.
        margin: half the difference between the median trial and the best trial. `bound` is below it.
    """

    key: str
    epoch: int
    num_trials: int
    bound: float
    margin: float


class _EpochValues(NamedTuple):
    """The distinct trials with a value at an epoch, in the order in which they were proposed.

    Attributes:
        epoch: the epoch.
        trials: the trials.
        losses: (N,) their losses; smaller is better.
    """

    epoch: int
    trials: Sequence[TrialRecord]
    losses: Array


def drop_repeated_trials(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Drop the trials that have the same parameters as an earlier one."""
    first = {json.dumps(dict(trial.params), sort_keys=True, default=repr): trial for trial in reversed(trials)}
    return sorted(first.values(), key=lambda trial: trial.number)


def collect_epoch_values(record: SweepRecord) -> list[_EpochValues]:
    """Collect the values at the lowest and at the highest epoch at which enough trials can be compared."""
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
    """Find the parameters whose effect is shown, the clearest first.

    The parameters are found one after another. The effect of each is removed from the values before the next one is
    tested, so that a parameter that is merely correlated with it does not appear to have an effect.
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
    """Find the parameter in which some trials are shown to differ from the others.

    Args:
        record: the sweep.
        trials: the trials to compare.
        marked: those among them that are compared with the rest.

    Returns:
        The key of the parameter; None if no difference is shown.
    """
    ordered = drop_repeated_trials(trials)
    if len(ordered) < MIN_EFFECT_TRIALS:
        return None
    numbers = {trial.number for trial in marked}
    generator = np.random.default_rng(0)
    losses = np.array([float(trial.number in numbers) for trial in ordered]) + 1e-3 * generator.random(len(ordered))
    at = _EpochValues(0, ordered, losses)  # 0 and 1, plus a small random number, because ranks need distinct values
    found = _find_clearest(record, [at], [])
    return None if found is None else found.key


# --- where the best value lies ----------------------------------------------------------------------------------------


def find_best_range(record: SweepRecord, parameter: Parameter, shown: Sequence[ShownEffect]) -> BestRange:
    """Find an interval for the best value of a numeric parameter whose effect is shown.

    If the best value were at a place, the values would get worse on both sides of it. So a place is ruled out if
    one-sided tests show that the values improve with the distance to its right or to its left. They test all trials on
    that side, the nearer half of them, and the nearest quarter. The interval reaches from the first place that is not
    ruled out to the last. If there seem to be several optima, it is the whole range.
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
    """Return the places to examine, ascending: every value if there are few, else quantiles of the trials' places."""
    values = np.unique(places)
    return values if len(values) <= _MAX_VALUES else np.unique(np.quantile(places, np.linspace(0, 1, _NUM_CELLS + 1)))


def _find_first_possible(grid: Array, at_epochs: Sequence[tuple[int, Array, Array]]) -> tuple[float, Bound | None]:
    """Return the first place of the grid that is not ruled out, and the evidence that rules out the one before it."""
    last = None
    for place in grid[:-1]:
        right = [(epoch, places - place, losses, places >= place - 1e-12) for epoch, places, losses in at_epochs]
        bound = _find_exclusion([(epoch, distances[there], losses[there]) for epoch, distances, losses, there in right])
        if bound is None:
            return float(place), last
        last = bound
    return float(grid[-1]), last


def _find_exclusion(sides: Sequence[tuple[int, Array, Array]]) -> Bound | None:
    """Return the clearest trend that rules out a place, or None.

    Args:
        sides: for each epoch: the epoch, and of the trials to the right of the place, (N,) distances and (N,) losses.
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
    """Return the second smallest of the distinct distances."""
    return float(np.unique(distances)[:2].max())


def _has_sides(places: Array) -> bool:
    if len(places) < 2 * _MIN_SIDE_TRIALS:
        return False
    below = int((places < places.mean()).sum())
    return min(below, len(places) - below) >= _MIN_SIDE_TRIALS


def find_worse_options(record: SweepRecord, parameter: Parameter, shown: Sequence[ShownEffect]) -> list[WorseOption]:
    """Find the options of a choice with a shown effect that are shown to be worse than another option."""
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
    )  # the tests that compare the best option with each of the others
    worse: dict[int, WorseOption] = {}
    for score, first, second, bound in sorted(compared, key=lambda each: -each[0]):
        if score > least:
            worse.setdefault(first, WorseOption(first, second, bound))
    return [worse[index] for index in sorted(worse)]


# --- what makes little difference -------------------------------------------------------------------------------------


def find_small_effects(record: SweepRecord, shown: Sequence[ShownEffect]) -> list[SmallEffect]:
    """Find the parameters that are shown to make little difference, at the epoch with the most trials.

    Each pair of thirds of a range, or of options, is compared by two one-sided t-tests (Schuirmann 1987). Each third or
    option needs at least 8 trials, so a parameter whose alternatives were hardly tried is never called unimportant.
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
    """Return the largest `_compute_welch_bound` of any two groups; infinite if a group has too few trials."""
    groups = np.array([_assign_group(parameter, trial) for trial in trials])
    names = range(_count_groups(parameter))
    values = [losses[groups == name] for name in names]
    if len(values) < 2 or min(map(len, values)) < _MIN_GROUP_TRIALS:
        return math.inf
    return max(_compute_welch_bound(first, second, level) for first, second in itertools.combinations(values, 2))


def _compute_welch_bound(first: Array, second: Array, level: float) -> float:
    """Compute an upper bound of the absolute difference of two means, with confidence 1 - `level` (Welch 1947)."""
    parts = np.array([first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)])
    difference = abs(float(first.mean() - second.mean()))
    if parts.sum() == 0:
        return difference
    freedom = parts.sum() ** 2 / (parts**2 / np.array([len(first) - 1, len(second) - 1])).sum()
    return difference + float(stats.t.ppf(1 - level, freedom) * np.sqrt(parts.sum()))


def _count_groups(parameter: Parameter) -> int:
    return 3 if parameter.num_values is None or parameter.num_values > _MAX_VALUES else parameter.num_values


def _assign_group(parameter: Parameter, trial: TrialRecord) -> int:
    """Return the index of the option, of the value if there are few, or of the third of the range; -1 if absent."""
    if parameter.kind == "choice" or parameter.key not in trial.params:
        return _get_index(parameter, trial)
    place, num = parameter.to_place(trial.params[parameter.key]), _count_groups(parameter)
    return min(2, max(0, int(3 * place))) if num == 3 else round(place * (num - 1))


# --- terms ------------------------------------------------------------------------------------------------------------


class _LinearModel:
    """A linear model of the losses with all parameters, used to remove the effects of some of them.

    It is a ridge regression. Effects that are shown are removed completely, the others only in part.

    Args:
        parameters: all parameters.
        shown_keys: keys of the parameters whose effects are removed completely, because they are shown.
        at: trials and losses at an epoch.
        scaled: whether to model the normal scores of the losses, which limits the influence of outliers. Otherwise, the
            losses are modelled in the unit of the metric.

    Attributes:
        terms: key -> (N, T) columns of the parameter.
    """

    def __init__(
        self, parameters: Sequence[Parameter], shown_keys: Collection[str], at: _EpochValues, *, scaled: bool = True
    ) -> None:
        columns = {parameter.key: _make_terms(parameter, at.trials) for parameter in parameters}
        self.terms = {key: np.stack(each, axis=1) for key, each in columns.items() if each}
        self._values = _compute_normal_scores(at.losses) if scaled else at.losses
        self._parts: dict[str, Array] = {}
        self._owners = np.repeat(list(self.terms), [columns.shape[1] for columns in self.terms.values()])
        if self.terms:
            self._fit(shown_keys)

    def remove_other_effects(self, key: str) -> Array:
        """Return the (N,) values minus the effects of all parameters except this one."""
        parts = [part for other, part in self._parts.items() if other != key]
        return self._values - np.sum(parts, axis=0) if parts else self._values

    def compute_inflation(self, key: str, columns: Array) -> Array:
        """Compute how much larger sums with these weights are in pure noise after the other effects were removed.

        Removing the other effects also removes what they explain by chance, so this parameter explains a larger part of
        the rest.

        Args:
            key: the parameter.
            columns: (N, T) weights.

        Returns:
            (T,) factors, at least 1.
        """
        design, solver = self._design[:, self._owners != key], self._solver[self._owners != key]
        own = columns - solver.T @ (design.T @ columns)
        gram = design.T @ design
        trace = len(design) - 2 * float((design.T * solver).sum()) + float((gram * (solver @ solver.T)).sum())
        return np.maximum(1.0, np.linalg.norm(own, axis=0) / np.sqrt(max(trace / len(design), 1e-12)))

    def _fit(self, shown_keys: Collection[str]) -> None:
        design = np.hstack([*self.terms.values()])
        design = design - design.mean(axis=0)
        spread = design.std(axis=0)
        self._design = design = design / np.where(spread > 0, spread, 1.0)
        penalty = len(design) * np.where(np.isin(self._owners, list(shown_keys)), 1e-6, _RIDGE)
        self._solver = np.linalg.solve(design.T @ design + np.diag(penalty), design.T)
        factors = self._solver @ (self._values - self._values.mean())
        parts = {key: self._owners == key for key in self.terms}
        self._parts = {key: design[:, own] @ factors[own] for key, own in parts.items()}


def _get_index(parameter: Parameter, trial: TrialRecord) -> int:
    return parameter.find_option(trial.params[parameter.key]) if parameter.key in trial.params else -1


def _make_terms(parameter: Parameter, trials: Sequence[TrialRecord]) -> list[Array]:
    """Make (N,) columns: linear and quadratic for a range, or one for each option that enough trials have and lack."""
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
    """Make the (N, 1 or 2) columns of the mean and of whether a trial has the parameter."""
    has = np.array([[1.0, float(key in trial.params)] for trial in at.trials])
    return np.unique(has, axis=1)


def _compute_normal_scores(values: Array) -> Array:
    scores: Array = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))
    return scores
