"""What it is worth to train a trial further, judged by a model of learning curves.

The worth of an option (to continue a trial, to resume a paused one, or to start a new one) is its expected gain per
second. The gain is how much better its configuration ends than the goal, which is a little better than the best of all
other trials; it is 0 if it does not. What counts is where a configuration ends on average over seeds: otherwise similar
configurations would be started again and again, until a seed was lucky. The trial need not be trained to its end: after
a later report it may be abandoned, and then the rest of its cost is saved. So the worth is the largest, over the epochs
of the next decisions and over cutoffs for the value there, of

    E[gain if it passes the cutoff] / (cost until then + P(passes the cutoff) * cost of the rest)

That is how an option of a Pandora's box problem is ranked (Weitzman 1979), for a box that is opened in two steps.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from handpose.search.curve_model import CurveModel, CurvePoints, CurvePosterior

_MAX_POINTS = 300
"""Largest number of values from which the model predicts: its time grows with the third power of it."""
_MAX_FITTED = 150
"""Largest number of values to which its scales are fitted."""
_LEAST_FITTED = 5
"""Number of epochs of a trial to which they are fitted: fewer do not show how curves deviate from their prediction."""
_CUT = 1.5
"""Larger standardised losses are compressed by a logarithm, because it does not matter how bad a bad trial is."""
_MAX_LEAD = 5.0
"""Largest number of spreads by which a loss may be ahead of the median."""
_MARGIN = 0.1
"""How much better a configuration must end to count, as a fraction of the spread of the trials."""
_LOOK_AHEAD = (1, 2, 3)
"""Numbers of decisions ahead at which a trial may be abandoned."""
_LEAST_SECONDS = 1e-6
_NODES = np.linspace(-3.5, 3.5, 36)
_NODE_WEIGHTS = np.exp(-0.5 * _NODES**2) / math.sqrt(2 * math.pi) * (_NODES[1] - _NODES[0])


class ObservedCurve(NamedTuple):
    """The losses of a trial so far.

    Attributes:
        vector: its encoded configuration (d,).
        losses: epoch -> loss; smaller is better.
        is_running: whether it is being trained.
        has_ended: whether it will never be trained further. Unless it is complete, it is no goal for others.
    """

    vector: np.ndarray
    losses: Mapping[int, float]
    is_running: bool = False
    has_ended: bool = False


class Option(NamedTuple):
    """What a slot could train next.

    Attributes:
        vector: encoded configuration (d,).
        trial: index of its curve in the list of trials; None for a new trial.
        epochs: epochs it is trained already.
        epoch_s: seconds of an epoch.
        start_s: seconds until it trains.
    """

    vector: np.ndarray
    trial: int | None
    epochs: int
    epoch_s: float
    start_s: float


def list_decision_epochs(max_epochs: int, factor: float = 1.5, *, folds: int = 1) -> tuple[int, ...]:
    """List the epochs at which trials are judged: about evenly by their logarithms, and the last one.

    With folds, these are epochs of the first fold, and the ends of all folds: values change only there.

    Args:
        max_epochs: epochs of a complete trial, over all its folds.
        factor: ratio of one epoch to the one before it.
        folds: number of folds.
    """
    fold_epochs = max_epochs // folds
    epochs, epoch = {fold_epochs * fold for fold in range(1, folds + 1)}, 1.0
    while round(epoch) < fold_epochs:
        epochs.add(round(epoch))
        epoch = max(epoch * factor, epoch + 1)
    return tuple(sorted(epochs))


class CurveForecast:
    """Predicts where trials end, from all losses so far.

    Args:
        model: the model. Its scales are used as they are.
        curves: the trials. Running trials count as if they ended as predicted.
        max_epochs: epochs of a complete trial.
        epochs: the epochs at which trials are judged; the last is max_epochs.
    """

    def __init__(
        self, model: CurveModel, curves: Sequence[ObservedCurve], max_epochs: int, epochs: Sequence[int]
    ) -> None:
        self._model, self._curves, self._max_epochs = model, curves, max_epochs
        self._epochs = np.array(epochs)
        self._scaling = _Scaling.find(curves)
        self._posterior = self._condition()

    def _condition(self) -> CurvePosterior:
        points, losses = collect_points(self._curves, self._epochs, _MAX_POINTS, least=2)
        values = self._scaling.standardise(losses)
        posterior = self._model.condition(points, values)
        seen = [index for index, curve in enumerate(self._curves) if curve.losses]
        vectors = np.array([self._curves[index].vector for index in seen])
        ends = posterior.predict_configurations(vectors, self._max_epochs).mean
        self.final_means = dict(zip(seen, ends, strict=True))
        results = {index: end for index, end in self.final_means.items() if self._can_be_chosen(self._curves[index])}
        self._best = heapq.nsmallest(2, results, key=lambda index: results[index])
        self._best_results = [results[index] for index in self._best]
        running = [index for index, curve in enumerate(self._curves) if curve.is_running]
        if not running:
            return posterior
        believed = self._make_ends([self._curves[index].vector for index in running], running)
        together = CurvePoints(*(np.concatenate(pair) for pair in zip(points, believed, strict=True)))
        return self._model.condition(together, np.concatenate([values, posterior.predict(believed).mean]))

    def _can_be_chosen(self, curve: ObservedCurve) -> bool:
        return not curve.has_ended or self._max_epochs in curve.losses

    def find_best_trials(self, num: int) -> list[int]:
        """Return the indices of the trials that are expected to end best."""
        return sorted(self.final_means, key=lambda index: self.final_means[index])[:num]

    def predict_course(self, trial: int, epochs: np.ndarray) -> np.ndarray:
        """Predict the losses that a trial reports at epochs (n,).

        Args:
            trial: index of the trial.
            epochs: the epochs.

        Returns:
            The ends of the interval that has 90 % of the probability, and between them the median (3, n).
        """
        vector = self._curves[trial].vector
        points = CurvePoints(np.tile(vector, (len(epochs), 1)), epochs, np.full(len(epochs), trial))
        prediction = self._posterior.predict(points)
        deviation = np.sqrt(prediction.deviation**2 + self._model.noise**2)
        return self._scaling.restore(prediction.mean + np.array([[-1.645], [0.0], [1.645]]) * deviation)

    def draw_ends(self, vectors: np.ndarray, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw together where configurations (n, d) end.

        Returns:
            The expected losses, without the luck of a seed (n, num), and those that one trial of each reports (n, num).
        """
        means = self._posterior.draw_means(vectors, self._max_epochs, num, rng)
        reported = means + self._model.trial_deviation * rng.standard_normal(means.shape)
        return self._scaling.restore(means), self._scaling.restore(reported)

    def rate(self, options: Sequence[Option]) -> "Rating":
        """Compute the worth of options."""
        vectors = np.array([option.vector for option in options])
        trials = np.array(
            [len(self._curves) + i if each.trial is None else each.trial for i, each in enumerate(options)]
        )
        done, epoch_s, start_s = (
            np.array([getattr(option, name) for option in options]) for name in ("epochs", "epoch_s", "start_s")
        )
        epoch_s = np.maximum(epoch_s, _LEAST_SECONDS)
        end = self._posterior.predict_configurations(vectors, self._max_epochs)
        goal = np.array([self._find_goal(option.trial) for option in options])
        distance = (goal - end.mean) / end.deviation
        worth = _compute_gain(distance, end.deviation) / ((self._max_epochs - done) * epoch_s + start_s)
        for ahead in _LOOK_AHEAD:
            place = np.searchsorted(self._epochs, done, side="right") + ahead - 1
            (early,) = np.nonzero(place < len(self._epochs) - 1)
            if not len(early):
                break
            then = self._epochs[place[early]]
            soon = self._posterior.predict(CurvePoints(vectors[early], then, trials[early]))
            later = end.take(early)
            seen_deviation = np.sqrt(soon.deviation**2 + self._model.noise**2)
            correlation = self._posterior.compute_covariance(soon, later) / seen_deviation / later.deviation
            correlation = np.clip(correlation, -0.999, 0.999)[:, None]
            spread = np.sqrt(1 - correlation**2)  # of the end that the value then leaves, in deviations of the end
            gain = _compute_gain(
                (distance[early, None] - correlation * _NODES) / spread, spread * later.deviation[:, None]
            )
            passed = np.cumsum(_NODE_WEIGHTS)
            gained = np.cumsum(_NODE_WEIGHTS * gain, axis=1)
            first_s = ((then - done[early]) * epoch_s[early] + start_s[early])[:, None]
            rest_s = ((self._max_epochs - then) * epoch_s[early])[:, None]
            worth[early] = np.maximum(worth[early], (gained / (first_s + passed * rest_s)).max(1))
        return Rating(worth, ndtr(distance), self._scaling.restore(end.mean), self._scaling.restore(goal))

    def _find_goal(self, trial: int | None) -> float:
        """Return the standardised loss that counts as better than all other trials."""
        others = [value for index, value in zip(self._best, self._best_results, strict=True) if index != trial]
        return min(others, default=0.0) - _MARGIN

    def _make_ends(self, vectors: Sequence[np.ndarray], trials: Sequence[int]) -> CurvePoints:
        return CurvePoints(np.array(vectors), np.full(len(trials), self._max_epochs), np.array(trials, dtype=int))


def _compute_gain(distance: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Compute by how much a normal value is expected to be below a goal, counting 0 where it is above.

    Args:
        distance: how far the goal is above the mean of the value, in standard deviations.
        deviation: standard deviation of the value.
    """
    density = np.exp(-0.5 * distance**2) / math.sqrt(2 * math.pi)
    return deviation * (distance * ndtr(distance) + density)


class Rating(NamedTuple):
    """What options are worth.

    Attributes:
        worth: expected gain per second, in standardised losses (n,).
        probability: probability to end better than the goal, if trained to the end (n,).
        final_loss: expected loss at the end (n,).
        goal: the loss that is to be reached (n,).
    """

    worth: np.ndarray
    probability: np.ndarray
    final_loss: np.ndarray
    goal: np.ndarray


def fit_model(model: CurveModel, curves: Sequence[ObservedCurve], epochs: Sequence[int]) -> None:
    """Fit a model to the losses so far. Few values are enough: the best trials, and others evenly over all."""
    points, losses = collect_points(curves, np.array(epochs), _MAX_FITTED, least=_LEAST_FITTED)
    model.fit(points, _Scaling.find(curves).standardise(losses))


def collect_points(
    curves: Sequence[ObservedCurve], epochs: np.ndarray, limit: int, *, least: int
) -> tuple[CurvePoints, np.ndarray]:
    """Collect the losses at the epochs of decisions, and the newest of each trial.

    If there are too many, each trial has fewer epochs, evenly chosen and its newest among them; then trials are left
    out: half of those that stay are the best at their newest epoch, the others are spread over all.

    Args:
        curves: the trials.
        epochs: the epochs of decisions.
        limit: largest number of values.
        least: number of epochs that each trial keeps, if it has as many.
    """
    seen = [index for index, curve in enumerate(curves) if curve.losses]
    kept = {index: _list_kept_epochs(curves[index].losses, epochs) for index in seen}
    most = max(map(len, kept.values()), default=0)
    while sum(map(len, kept.values())) > limit and most > least:
        most -= 1
        kept = {index: _thin(epochs_of_trial, most) for index, epochs_of_trial in kept.items()}
    num = limit // least
    if sum(map(len, kept.values())) > limit:
        order = sorted(seen, key=lambda index: curves[index].losses[max(curves[index].losses)])
        others = sorted(order[num // 2 :])
        spread = [others[round(place)] for place in np.linspace(0, len(others) - 1, num - num // 2)]
        kept = {index: kept[index] for index in sorted({*order[: num // 2], *spread})}
    pairs = [(index, epoch) for index, epochs_of_trial in kept.items() for epoch in epochs_of_trial]
    losses = np.array([curves[index].losses[epoch] for index, epoch in pairs])
    vectors = np.array([curves[index].vector for index, _ in pairs])
    return CurvePoints(vectors, np.array([epoch for _, epoch in pairs]), np.array([i for i, _ in pairs])), losses


def _list_kept_epochs(losses: Mapping[int, float], epochs: np.ndarray) -> list[int]:
    return sorted({*(epoch for epoch in map(int, epochs) if epoch in losses), max(losses)})


def _thin(epochs: Sequence[int], num: int) -> list[int]:
    if len(epochs) <= num:
        return list(epochs)
    return [epochs[round(place)] for place in np.linspace(0, len(epochs) - 1, num)]


class _Scaling(NamedTuple):
    """Standardises losses: their logarithms, if all are above 0.

    Attributes:
        is_log: whether the logarithms are meant.
        center, spread: median and spread of the newest losses. The spread is their median absolute deviation, but large
            enough that the best is at most `_MAX_LEAD` spreads ahead of the median, if most trials are equally bad.
    """

    is_log: bool
    center: float
    spread: float

    @classmethod
    def find(cls, curves: Sequence[ObservedCurve]) -> "_Scaling":
        """Find the scaling for curves, at least one of which has a loss."""
        is_log = all(min(curve.losses.values()) > 0 for curve in curves if curve.losses)
        newest = np.array([curve.losses[max(curve.losses)] for curve in curves if curve.losses])
        newest = np.log(newest) if is_log else newest
        center = float(np.median(newest))
        least = max(1e-3 if is_log else max(1e-3 * abs(center), 1e-12), (center - float(newest.min())) / _MAX_LEAD)
        return cls(is_log, center, max(1.48 * float(np.median(np.abs(newest - center))), least))

    def standardise(self, losses: np.ndarray) -> np.ndarray:
        """Standardise losses (n,); those that are much worse than the median count little more."""
        values = ((np.log(losses) if self.is_log else losses) - self.center) / self.spread
        return np.where(values > _CUT, _CUT + np.log1p(np.maximum(values - _CUT, 0.0)), values)

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Undo it."""
        uncut = np.where(values > _CUT, _CUT + np.expm1(np.clip(values - _CUT, 0.0, 3.0)), values)
        scaled = self.center + uncut * self.spread
        return np.exp(scaled) if self.is_log else scaled
