"""A model of learning curves: what each configuration reaches at each epoch, with its uncertainty.

It is a Gaussian process over configurations and epochs, as in freeze-thaw Bayesian optimisation (Swersky et al. 2014,
arXiv:1406.3896). The loss of trial i with configuration x after epoch t is

    m(t) + f(x) + g(x, t) + h_i + c_i(t) + noise

where m is the mean course of all trials, f and g are smooth functions of the configuration, and h_i and c_i are the
deviations of this trial from what its configuration predicts. Epochs are compared by their logarithms, because curves
change most at their beginning.

It is a model of our own, because Optuna's Gaussian process (optuna._gp, not public) knows no epochs, and the packages
that have such a model (GPyTorch, Syne Tune, ifBO) bring many dependencies or download weights.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_JITTER = 1e-6
_NUM_STEPS = 25


class CurvePoints(NamedTuple):
    """Points of learning curves, seen or to be predicted.

    Attributes:
        vectors: encoded configurations (n, d).
        epochs: epochs (n,), at least 1.
        trials: numbers of the trials (n,). A number without values is a trial that has not begun.
    """

    vectors: np.ndarray
    epochs: np.ndarray
    trials: np.ndarray

    def take(self, chosen: np.ndarray) -> "CurvePoints":
        """Return the points at these indices."""
        return CurvePoints(self.vectors[chosen], self.epochs[chosen], self.trials[chosen])


class _Inputs(NamedTuple):
    vectors: Tensor
    times: Tensor
    trials: Tensor


class _Scales(NamedTuple):
    """Parameters of the covariance, each above 0.

    Attributes:
        lengths: length scales of the vectors' entries (d,).
        level, course: standard deviations of f and g.
        course_time: length scale of g over the logarithm of the epoch, in units of that of the last epoch.
        trial_level, trial_course, trial_time: the same of h and c.
        noise: standard deviation of the noise.
        mean_level, mean_slope: standard deviations of m's level and slope.
    """

    lengths: Tensor
    level: Tensor
    course: Tensor
    course_time: Tensor
    trial_level: Tensor
    trial_course: Tensor
    trial_time: Tensor
    noise: Tensor
    mean_level: Tensor
    mean_slope: Tensor


_TYPICAL = (0.7, 0.5, 0.6, 0.2, 0.2, 0.5, 0.1, 1.0, 1.0)
"""Most likely values of the scales after `lengths`, for losses with a standard deviation of about 1."""
_SPREADS = (1.0, 1.0, 0.5, 1.0, 1.0, 0.5, 1.0, 0.5, 0.5)
"""Standard deviations of their logarithms."""


class CurveModel:
    """Predicts learning curves from those seen so far.

    Args:
        num_entries: length of the vectors.
        max_epochs: epochs of a complete trial.
    """

    def __init__(self, num_entries: int, max_epochs: int) -> None:
        self._num_entries = num_entries
        self._log_epochs = math.log(max(max_epochs, 2))
        # The length scales grow with the square root of the dimension, as the distances do (Hvarfner et al. 2024,
        # arXiv:2402.02229).
        length = math.log(0.5 * math.sqrt(max(num_entries, 1)))
        typical = [length] * num_entries + [math.log(scale) for scale in _TYPICAL]
        self._typical = torch.tensor(typical, dtype=torch.float64)
        self._spreads = torch.tensor([1.0] * num_entries + list(_SPREADS), dtype=torch.float64)
        self._log_scales = self._typical.clone()

    def fit(self, points: CurvePoints, losses: np.ndarray) -> None:
        """Fit the scales of the process to values: their most likely values, given broad priors.

        Args:
            points: where the values were seen.
            losses: the values (n,), standardised.
        """
        inputs, values = self._make_inputs(points), torch.from_numpy(losses)
        logs = self._typical.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([logs], max_iter=_NUM_STEPS, line_search_fn="strong_wolfe")
        best = (math.inf, self._typical)

        def compute_loss() -> Tensor:
            nonlocal best
            optimizer.zero_grad()
            loss = self._compute_negative_log_posterior(logs, inputs, values)
            loss.backward()
            if loss.item() < best[0]:
                best = (loss.item(), logs.detach().clone())
            return loss

        optimizer.step(compute_loss)
        self._log_scales = best[1]

    def shorten_lengths(self, factor: float) -> None:
        """Multiply the length scales of the configurations by a factor. Below 1, predictions are less certain."""
        self._log_scales = self._log_scales.clone()
        self._log_scales[: self._num_entries] += math.log(factor)

    def condition(self, points: CurvePoints, losses: np.ndarray) -> "CurvePosterior":
        """Return what the model predicts from these values.

        Args:
            points: where they were seen.
            losses: the values (n,), standardised.
        """
        return CurvePosterior(self, points, losses)

    @property
    def noise(self) -> float:
        """Standard deviation of a value around its curve."""
        return float(self._split(self._log_scales).noise)

    @property
    def trial_deviation(self) -> float:
        """Standard deviation of a trial's value around what its configuration reaches."""
        scales = self._split(self._log_scales)
        return math.sqrt(scales.trial_level**2 + scales.trial_course**2 + scales.noise**2)

    def _compute_negative_log_posterior(self, logs: Tensor, inputs: _Inputs, values: Tensor) -> Tensor:
        belief = 0.5 * (((logs - self._typical) / self._spreads) ** 2).sum()
        scales = self._split(logs)
        covariance = _compute_covariance(scales, inputs, inputs)
        factor, failed = torch.linalg.cholesky_ex(covariance + _make_noise(scales, len(values)))
        if failed:  # the line search went too far
            return belief + 1e10
        weights = torch.cholesky_solve(values[:, None], factor)[:, 0]
        return belief + 0.5 * values @ weights + factor.diagonal().log().sum()

    def _split(self, logs: Tensor) -> _Scales:
        values = logs.exp()
        return _Scales(values[: self._num_entries], *values[self._num_entries :])

    def _make_inputs(self, points: CurvePoints) -> _Inputs:
        times = np.log(points.epochs) / self._log_epochs
        return _Inputs(
            *(torch.from_numpy(np.ascontiguousarray(each)) for each in (points.vectors, times, points.trials))
        )


class CurvePosterior:
    """Predictions of a model that knows some values.

    Args:
        model: the model.
        points: where the values were seen.
        losses: the values (n,), standardised.
    """

    def __init__(self, model: CurveModel, points: CurvePoints, losses: np.ndarray) -> None:
        self._model, self._scales = model, model._split(model._log_scales)
        self._seen = model._make_inputs(points)
        covariance = _compute_covariance(self._scales, self._seen, self._seen)
        self._factor = torch.linalg.cholesky(covariance + _make_noise(self._scales, len(losses)))
        self._weights = torch.cholesky_solve(torch.from_numpy(losses)[:, None], self._factor)[:, 0]

    def predict(self, points: CurvePoints) -> "CurvePrediction":
        """Predict the values at points (n,), without their noise."""
        inputs = self._model._make_inputs(points)
        cross = _compute_covariance(self._scales, self._seen, inputs)
        whitened = torch.linalg.solve_triangular(self._factor, cross, upper=False)
        before = _compute_shared(self._scales, inputs.times, inputs.times) + self._compute_trial_variance()
        variance = before - (whitened**2).sum(0)
        mean = (cross.T @ self._weights).numpy()
        return CurvePrediction(inputs, mean, variance.clamp_min(1e-10).sqrt().numpy(), whitened)

    def predict_configurations(self, vectors: np.ndarray, epoch: int) -> "CurvePrediction":
        """Predict what configurations (n, d) reach at an epoch, without the deviations of single trials."""
        prediction = self.predict(self._make_new_trials(vectors, epoch))
        variance = prediction.deviation**2 - self._compute_trial_variance()
        return prediction._replace(deviation=np.sqrt(np.maximum(variance, 1e-10)))

    def compute_covariance(self, of_trials: "CurvePrediction", of_configurations: "CurvePrediction") -> np.ndarray:
        """Return the covariances (n,) of what n trials report at one epoch, and their configurations reach at another.

        Args:
            of_trials: from `predict`.
            of_configurations: from `predict_configurations`, of the same configurations.
        """
        before = _compute_shared(self._scales, of_trials.inputs.times, of_configurations.inputs.times)
        return (before - (of_trials.whitened * of_configurations.whitened).sum(0)).numpy()

    def draw_means(self, vectors: np.ndarray, epoch: int, num: int, rng: np.random.Generator) -> np.ndarray:
        """Draw together what configurations (n, d) reach at an epoch, without the deviations of single trials.

        Returns:
            The draws (n, num).
        """
        prediction = self.predict(self._make_new_trials(vectors, epoch))
        covariance = _compute_covariance(self._scales, prediction.inputs, prediction.inputs)
        covariance = covariance - prediction.whitened.T @ prediction.whitened
        jitter = 1e-5 * float(covariance.diagonal().max())
        eye = torch.eye(len(covariance), dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance + (jitter - self._compute_trial_variance()) * eye)
        normal = torch.from_numpy(rng.standard_normal((len(covariance), num)))
        return prediction.mean[:, None] + (factor @ normal).numpy()

    def _make_new_trials(self, vectors: np.ndarray, epoch: int) -> CurvePoints:
        return CurvePoints(vectors, np.full(len(vectors), epoch), -1 - np.arange(len(vectors)))

    def _compute_trial_variance(self) -> float:
        """Return the variance of a trial around what its configuration reaches, before it has a value."""
        return float(self._scales.trial_level**2 + self._scales.trial_course**2)


class CurvePrediction(NamedTuple):
    """Predicted values.

    Attributes:
        inputs: where they are.
        mean: their means (n,).
        deviation: their standard deviations (n,).
        whitened: for `CurvePosterior.compute_covariance`.
    """

    inputs: _Inputs
    mean: np.ndarray
    deviation: np.ndarray
    whitened: Tensor

    def take(self, chosen: np.ndarray) -> "CurvePrediction":
        """Return the predictions at these indices."""
        places = torch.from_numpy(chosen)
        inputs = _Inputs(*(each[places] for each in self.inputs))
        return CurvePrediction(inputs, self.mean[chosen], self.deviation[chosen], self.whitened[:, places])


def _compute_covariance(scales: _Scales, first: _Inputs, second: _Inputs) -> Tensor:
    """Return the covariances (n, m) of the curves at two lists of points, without the noise."""
    one, two = first.vectors / scales.lengths, second.vectors / scales.lengths
    squares = (one * one).sum(1)[:, None] + (two * two).sum(1)[None] - 2 * one @ two.T
    scaled = torch.sqrt(5 * squares.clamp_min(1e-12))
    similarity = (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)  # Matérn 5/2
    squared_times = (first.times[:, None] - second.times[None]) ** 2
    shared = scales.level**2 + scales.course**2 * torch.exp(-0.5 * squared_times / scales.course_time**2)
    own = scales.trial_level**2 + scales.trial_course**2 * torch.exp(-0.5 * squared_times / scales.trial_time**2)
    same = first.trials[:, None] == second.trials[None]
    mean = scales.mean_level**2 + scales.mean_slope**2 * first.times[:, None] * second.times[None]
    return similarity * shared + same * own + mean


def _compute_shared(scales: _Scales, first: Tensor, second: Tensor) -> Tensor:
    """Return the covariances (n,) of n configurations at two times each."""
    shared = scales.level**2 + scales.course**2 * torch.exp(-0.5 * (first - second) ** 2 / scales.course_time**2)
    return shared + scales.mean_level**2 + scales.mean_slope**2 * first * second


def _make_noise(scales: _Scales, num: int) -> Tensor:
    return (scales.noise**2 + _JITTER) * torch.eye(num, dtype=torch.float64)
