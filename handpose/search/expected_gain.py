"""How much further search is expected to improve the best trial, by the model of learning curves.

A further trial is a random configuration, a changed one of a good trial, or a paused trial that goes on. The model
gives a joint distribution of where all of them, and the best complete trial, end. Among sets of a given number of them,
that one is taken whose best is expected to be furthest ahead of the best complete trial.
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
"""Factor for the length scales. The most likely ones are too sure that there is nothing better elsewhere, above all if
the same model has chosen the trials: without the factor, more searches of benchmarks/stopping.py end too early."""
_MAX_TRIALS = 30
"""Largest number of further trials that are told apart; the best of more is hardly better."""


def estimate_gain(
    pool: CandidatePool,
    candidates: Sequence[Candidate],
    curves: Sequence[ObservedCurve],
    *,
    max_epochs: int,
    num_more: int,
    seed: int,
) -> float:
    """Estimate by how much the loss of the best trial falls with further trials.

    Args:
        pool: draws further configurations.
        candidates: the configuration of each trial that has a loss.
        curves: its losses. At least one trial is complete. A trial that has not ended may be trained further; none
            counts as running.
        max_epochs: epochs of a complete trial.
        num_more: number of further trials.
        seed: the seed of the configurations and of the draws.

    Returns:
        The expected difference, in units of the loss; at least 0.
    """
    epochs = list_decision_epochs(max_epochs)
    model = CurveModel(pool.encoder.num_entries, max_epochs)
    fit_model(model, curves, epochs)
    model.shorten_lengths(_LENGTH_FACTOR)
    forecast = CurveForecast(model, curves, max_epochs, epochs)
    rng = np.random.default_rng(seed)
    good = [candidates[place] for place in forecast.find_best_trials(_NUM_GOOD)]
    _, vectors = pool.draw(rng, num_random=_NUM_RANDOM, good=good, num_changed=_NUM_CHANGED)
    complete = [place for place, curve in enumerate(curves) if max_epochs in curve.losses]
    best = min(complete, key=lambda place: forecast.final_means[place])
    unfinished = [place for place, curve in enumerate(curves) if not curve.has_ended and place not in complete]
    started = [curves[place].vector for place in (best, *unfinished)]
    losses, reported = forecast.draw_ends(np.concatenate([started, vectors]), _NUM_DRAWS, rng)
    chosen = _choose_set((losses[0] - losses[1:])[:, : _NUM_DRAWS // 2], min(num_more, _MAX_TRIALS))
    reported[0] = curves[best].losses[max_epochs]
    picked = np.array([0, *(1 + place for place in chosen)])[reported[[0, *(1 + p for p in chosen)]].argmin(0)]
    return float((losses[0] - losses[picked, np.arange(_NUM_DRAWS)])[_NUM_DRAWS // 2 :].mean())


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
