"""Estimate which parameters decide whether a trial is among the best: Optuna's PED-ANOVA, with its uncertainty.

PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255; for conditional parameters arXiv:2601.20800) compares where the best
trials lie with where all trials lie. A parameter therefore does not appear important only because the sampler looked
more closely at some of its values. The method needs no model of the metric, and supports trials that do not have every
parameter.
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
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.report.sweep_record import Importance, ParameterEffect
from handpose.search.distributions import fit_value
from handpose.search.space import Params

MIN_TRIALS = 20
"""Trials with a value at one epoch. With fewer, at most a handful are among the best, which shows nothing."""

_MIN_BEST, _BEST_FRACTION = 5, 0.1
_NUM_RESAMPLES = 20
_MAX_EPOCHS = 3


@dataclass(frozen=True)
class TrialDraws:
    """The values that were drawn for a trial.

    Attributes:
        params: key -> value, for all keys in `distributions`.
        distributions: key -> distribution that the value was drawn from.
    """

    params: Params
    distributions: Mapping[str, BaseDistribution]


def compute_importance(
    draws: Mapping[int, TrialDraws], values: Mapping[int, Mapping[int, float]], *, sign: float, seed: int = 0
) -> list[Importance]:
    """Compute the importance of every parameter that was drawn.

    It is computed from the values at up to three epochs: the lowest, a middle and the highest one that have at least
    MIN_TRIALS values.

    Args:
        draws: trial -> its draws.
        values: epoch -> trial -> finite value.
        sign: factor for the values, after which smaller is better.
        seed: seed of the resampling.
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
    # Optuna imports this module, and with it scikit-learn, on first use: small sweeps and other programs do without.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=num_best / len(trials))
    whole = _evaluate_importances(study, evaluator, losses)
    total = sum(whole.values()) or 1.0
    halves, shuffled = [], []
    for _ in range(_NUM_RESAMPLES):
        halves.append(_normalise_importances(_evaluate_importances(study, evaluator, _drop_half(losses, generator))))
        shuffled.append(_evaluate_importances(study, evaluator, generator.permutation(losses)))
    effects = []
    for key, value in whole.items():
        low, high = np.quantile([each.get(key, 0.0) for each in halves], (0.05, 0.95))
        largest_shuffled = max(each[key] for each in shuffled)
        effects.append(ParameterEffect(key, value / total, float(low), float(high), float(largest_shuffled / total)))
    return Importance(epoch, len(trials), num_best, sorted(effects, key=lambda effect: (-effect.share, effect.key)))


def _make_frozen_trial(trial: TrialDraws, loss: float) -> FrozenTrial:
    params: Params = {}
    for key, distribution in trial.distributions.items():
        with contextlib.suppress(ValueError):  # drawn by an earlier version, and now out of range
            params[key] = fit_value(trial.params[key], distribution)
    distributions = {key: trial.distributions[key] for key in params}
    return create_trial(state=TrialState.COMPLETE, value=float(loss), params=params, distributions=distributions)


def _drop_half(losses: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Set a random half of the losses to NaN.

    Halves drawn without replacement show the spread of the whole sample, without scaling (Shao & Tu 1995).
    """
    left_out = generator.permutation(len(losses))[: len(losses) // 2]
    kept = losses.copy()
    kept[left_out] = np.nan
    return kept


def _evaluate_importances(
    study: optuna.Study, evaluator: "optuna.importance.PedAnovaImportanceEvaluator", losses: NDArray[np.float64]
) -> dict[str, float]:
    """Return parameter -> importance for these losses; trials whose loss is NaN do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about branches with few trials, and that smaller is better
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: float(losses[trial.number]), normalize=False
        )


def _normalise_importances(importances: Mapping[str, float]) -> dict[str, float]:
    total = sum(importances.values())
    return {key: value / total if total > 0 else 0.0 for key, value in importances.items()}
