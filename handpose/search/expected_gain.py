"""How much further search is expected to improve the best trial, by the model of learning curves.

A further trial is a random configuration, a changed one of a good trial, or a paused trial that goes on. The model
gives a joint distribution of where all of them, and the best complete trial, end. A set of them is chosen greedily, so
that its best is expected to be as far ahead of the best complete trial as possible. The gain is by how much the trial
of this set with the best reported value is better, without the luck of the seeds.
"""

from collections.abc import Sequence

import numpy as np

from handpose.search.candidates import Candidate, CandidatePool
from handpose.search.curve_model import CurveModel
from handpose.search.curve_worth import CurveForecast, ObservedCurve, fit_model, list_decision_epochs

_NUM_RANDOM, _NUM_CHANGED, _NUM_GOOD = 200, 60, 5
_NUM_DRAWS = 512
"""Number of draws from the joint distribution."""
_LENGTH_FACTOR = 0.7
"""Factor for the fitted length scales. With the fitted ones, the model is overconfident far from the trials, above all
if it has chosen them itself (scheduler=freeze_thaw): a third of the searches of benchmarks/stopping.py would end too
early. For the same reason the model with its typical scales is used, too, and the larger of both gains counts."""
_MAX_TRIALS = 30
"""Largest number of further trials that are simulated; the best of more is hardly better."""


def estimate_gain(
    pool: CandidatePool,
    candidates: Sequence[Candidate | None],
    curves: Sequence[ObservedCurve],
    *,
    max_epochs: int,
    num_more: int,
    seed: int,
    folds: int = 1,
) -> float:
    """Estimate by how much the loss of the best trial falls with further trials.

    Args:
        pool: draws further configurations.
        candidates: the configuration of each trial that has a loss; None if it cannot be changed.
        curves: its losses. At least one trial is complete. A trial that has not ended may be trained further; none
            counts as running.
        max_epochs: epochs of a complete trial.
        num_more: number of further trials.
        seed: the seed of the configurations and of the draws.
        folds: number of folds that a complete trial is trained with.

    Returns:
        The expected difference, in units of the loss; at least 0.

    Raises:
        UserError: the search space draws no configuration.
        torch.linalg.LinAlgError: the losses are so different that no model describes them.
    """
    epochs = list_decision_epochs(max_epochs, folds=folds)
    fitted = CurveModel(pool.encoder.num_entries, max_epochs)
    fit_model(fitted, curves, epochs)
    fitted.shorten_lengths(_LENGTH_FACTOR)
    typical = CurveModel(pool.encoder.num_entries, max_epochs)
    rng = np.random.default_rng(seed)
    forecasts = [CurveForecast(model, curves, max_epochs, epochs) for model in (fitted, typical)]
    good = [each for place in forecasts[0].find_best_trials(_NUM_GOOD) if (each := candidates[place]) is not None]
    _, vectors = pool.draw(rng, num_random=_NUM_RANDOM, good=good, num_changed=_NUM_CHANGED)
    complete = [place for place, curve in enumerate(curves) if max_epochs in curve.losses]
    best = min(complete, key=lambda place: curves[place].losses[max_epochs])
    unfinished = [place for place, curve in enumerate(curves) if not curve.has_ended and place not in complete]
    options = np.concatenate([[curves[place].vector for place in (best, *unfinished)], vectors])
    best_loss, num = curves[best].losses[max_epochs], min(num_more, _MAX_TRIALS)
    return max(0.0, *(_simulate_gain(forecast, options, best_loss, num, rng) for forecast in forecasts))


def _simulate_gain(
    forecast: CurveForecast, options: np.ndarray, best_loss: float, num: int, rng: np.random.Generator
) -> float:
    """Return how much better the best reported of some options is, on average, than the first one.

    Args:
        forecast: where configurations end.
        options: the best trial, and what can be trained (n, d).
        best_loss: the loss that the best trial has reported.
        num: number of options that are trained.
        rng: draws where they end.
    """
    losses, reported = forecast.draw_ends(options, _NUM_DRAWS, rng)
    half = _NUM_DRAWS // 2  # one half of the draws decides what is trained, the other half what that gains
    trained = np.array([0, *(1 + place for place in _choose_set((losses[0] - losses[1:])[:, :half], num))])
    reported[0] = best_loss
    picked = trained[reported[trained].argmin(0)]
    gains = losses[0] - losses[picked, np.arange(_NUM_DRAWS)]
    return float(gains[half:].mean())


def _choose_set(gains: np.ndarray, num: int) -> list[int]:
    """Choose options, one by one, so that the largest gain among them is large on average.

    Args:
        gains: gain of each option in each draw (n, draws).
        num: largest number of options.
    """
    chosen: list[int] = []
    reached = np.zeros(gains.shape[1])
    for _ in range(min(num, len(gains))):
        together = np.maximum(gains, reached)
        best = int(together.mean(1).argmax())
        if (together[best] <= reached).all():
            break
        reached = together[best]
        chosen.append(best)
    return chosen
