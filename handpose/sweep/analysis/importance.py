"""Which parameters decide whether a trial is among the best: Optuna's PED-ANOVA, with how far it can be trusted.

PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255; for conditional parameters arXiv:2601.20800) compares where the best
trials lie with where all of them lie, so that a sampler which looks more closely at some places does not by that make a
parameter important. It needs no model of the values, and knows what a trial does not have.
"""

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.report.record import Effect, Importance
from handpose.search.distributions import fit_value
from handpose.search.space import Params

MIN_TRIALS = 20
"""Of one epoch. With fewer no more than a handful are among the best, which says nothing."""

_MIN_BEST, _BEST_FRACTION = 5, 0.1
_NUM_RESAMPLES = 20
_MAX_EPOCHS = 3


@dataclass(frozen=True)
class TrialDraws:
    """A trial's draws, by the keys that have a distribution."""

    params: Params
    distributions: Mapping[str, BaseDistribution]


def compute_importance(
    draws: Mapping[int, TrialDraws], values: Mapping[int, Mapping[int, float]], *, sign: float, seed: int = 0
) -> list[Importance]:
    """The importance of every parameter that was drawn, by the values of the lowest, a middle and the highest epoch
    that has LEAST_TRIALS of them.

    drawn: by trial. values: epoch -> trial -> finite value; sign: what makes smaller better.
    """
    enough = [epoch for epoch in sorted(values) if len(values[epoch].keys() & draws.keys()) >= MIN_TRIALS]
    chosen = sorted({enough[0], enough[len(enough) // 2], enough[-1]})[:_MAX_EPOCHS] if enough else []
    made = []
    for epoch in chosen:
        numbers = sorted(values[epoch].keys() & draws.keys())
        losses = sign * np.array([values[epoch][number] for number in numbers])
        made.append(
            _compute_epoch_importance(epoch, [draws[number] for number in numbers], losses, np.random.default_rng(seed))
        )
    return made


def _compute_epoch_importance(
    epoch: int, trials: Sequence[TrialDraws], losses: NDArray[np.float64], generator: np.random.Generator
) -> Importance:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials([_make_frozen_trial(trial, loss) for trial, loss in zip(trials, losses, strict=True)])
    num_best = max(_MIN_BEST, math.ceil(_BEST_FRACTION * len(trials)))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=num_best / len(trials))
    whole = _evaluate_importances(study, evaluator, losses)
    total = sum(whole.values()) or 1.0
    halves, shuffled = [], []
    for _ in range(_NUM_RESAMPLES):
        halves.append(_normalise_importances(_evaluate_importances(study, evaluator, _drop_half(losses, generator))))
        shuffled.append(_evaluate_importances(study, evaluator, generator.permutation(losses)))
    effects = []
    for key, value in whole.items():
        low, high = np.quantile([each.get(key, 0.0) for each in halves], (0.05, 0.95))
        chance = max(each[key] for each in shuffled)
        effects.append(Effect(key, value / total, float(low), float(high), float(chance / total)))
    return Importance(epoch, len(trials), num_best, sorted(effects, key=lambda effect: (-effect.share, effect.key)))


def _make_frozen_trial(trial: TrialDraws, loss: float) -> FrozenTrial:
    params: Params = {}
    for key, distribution in trial.distributions.items():
        with contextlib.suppress(ValueError):  # a value that an earlier version drew, and that is out of range now
            params[key] = fit_value(trial.params[key], distribution)
    distributions = {key: trial.distributions[key] for key in params}
    return create_trial(state=TrialState.COMPLETE, value=float(loss), params=params, distributions=distributions)


def _drop_half(losses: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Half of the trials, drawn without putting back (Shao & Tu 1995: the spread of the whole, unscaled)."""
    left_out = generator.permutation(len(losses))[: len(losses) // 2]
    kept = losses.copy()
    kept[left_out] = np.nan
    return kept


def _evaluate_importances(
    study: optuna.Study, evaluator: PedAnovaImportanceEvaluator, losses: NDArray[np.float64]
) -> dict[str, float]:
    """Parameter -> importance with these losses; trials without one do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of branches that few trials have, and that smaller is better
        return get_param_importances(
            study, evaluator=evaluator, target=lambda trial: float(losses[trial.number]), normalize=False
        )


def _normalise_importances(importances: Mapping[str, float]) -> dict[str, float]:
    total = sum(importances.values())
    return {key: value / total if total > 0 else 0.0 for key, value in importances.items()}
