"""An Optuna sampler that proposes the configuration whose training is worth most, by a model of learning curves."""

import heapq
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from handpose.plain_values import to_json_text
from handpose.search.candidates import Candidate, CandidatePool
from handpose.search.curve_model import CurveModel
from handpose.search.curve_worth import CurveForecast, ObservedCurve, Option, fit_model, list_decision_epochs
from handpose.search.encoding import interpolate, predict_seconds
from handpose.search.study import get_placed_params

_NUM_RANDOM, _NUM_CHANGED, _NUM_GOOD = 200, 60, 5
_PARAMETERS_PER_ROUND, _NUM_BEST = 6, 8
"""Number of parameters for each round in which the best candidates are changed. In the space `full`, which has 23,
three rounds need a third fewer slot-seconds than none, and eight are no better (benchmarks/search.py, 16 seeds). In
`default`, which has three, three rounds seemed to be a fifth slower (8 seeds, with another fit of the model)."""
_MAX_RISK = 0.5
"""Configurations that fail with a larger probability are not proposed, unless there are no others."""


class _StartedTrial(NamedTuple):
    candidate: Candidate
    vector: np.ndarray
    trial: FrozenTrial


class _RatedCandidate(NamedTuple):
    candidate: Candidate
    worth: float
    final_loss: float
    risk: float


_get_worth = operator.attrgetter("worth")


class CurveSampler(BaseSampler):
    """Proposes the configuration whose training is worth most (`handpose.search.curve_worth`).

    It learns from complete, stopped, paused and running trials. A trial that failed or was infeasible tells only that
    similar ones may be, too. The candidates are random configurations, changed ones of the trials that are expected to
    end best, and, in a few rounds, changed ones of the best candidates so far.

    Args:
        pool: draws the candidates from the search space.
        max_epochs: epochs of a complete trial.
        epoch_seconds: number of a trial -> seconds of an epoch, without starts, of the trials that have been timed.
        n_startup_trials: number of trials with a result before which it draws at random.
        seed: the seed of what is drawn.
        folds: number of folds that a complete trial is trained with.
    """

    def __init__(
        self,
        *,
        pool: CandidatePool,
        max_epochs: int,
        epoch_seconds: Mapping[int, float],
        n_startup_trials: int,
        seed: int | None = None,
        folds: int = 1,
    ) -> None:
        if not isinstance(n_startup_trials, int) or n_startup_trials < 2:
            raise ValueError(
                f"n_startup_trials={n_startup_trials} must be an integer of at least 2: a model needs differences"
            )
        self._pool, self._max_epochs, self._num_startup_trials = pool, max_epochs, n_startup_trials
        self._epoch_seconds, self._folds = epoch_seconds, folds
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._chosen: Candidate | None = None
        self._expected_loss = 0.0

    def explain_choice(self) -> str:
        """Return where the last proposal comes from, in a few words."""
        if self._chosen is None:
            return f"a random start-up trial of CurveSampler, which needs {self._num_startup_trials} results"
        return f"CurveSampler, which expects {self._expected_loss:.4g} at epoch {self._max_epochs}"

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Choose the configuration, and return its distributions.

        Raises:
            ValueError: the study has two objectives.
        """
        if len(study.directions) > 1:
            raise ValueError("CurveSampler has one objective only")
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        self._chosen = self._choose(others, sign)
        return {} if self._chosen is None else dict(self._chosen.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the draws of the chosen configuration."""
        return {} if self._chosen is None else {name: self._chosen.draws[name] for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw at random: a start-up trial, or a parameter that a point to try first leaves open."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _choose(self, trials: Sequence[FrozenTrial], sign: float) -> Candidate | None:
        started = [each for each in trials if each.params]
        candidates = [Candidate(each.params, each.distributions, get_placed_params(each)) for each in started]
        vectors = self._pool.encoder.encode([each.params for each in candidates])
        begun = [_StartedTrial(*each) for each in zip(candidates, vectors, started, strict=True)]
        usable = [each for each in begun if each.trial.state != TrialState.FAIL]
        curves = [
            ObservedCurve(each.vector, self._read_losses(each.trial, sign), each.trial.state == TrialState.RUNNING)
            for each in usable
        ]
        if sum(bool(curve.losses) for curve in curves) < self._num_startup_trials:
            return None
        epochs = list_decision_epochs(self._max_epochs, folds=self._folds)
        model = CurveModel(self._pool.encoder.num_entries, self._max_epochs)
        fit_model(model, curves, epochs)
        forecast = CurveForecast(model, curves, self._max_epochs, epochs)
        good = [usable[place].candidate for place in forecast.find_best_trials(_NUM_GOOD)]
        rate = partial(self._rate, forecast, begun, usable)
        rated = rate(*self._pool.draw(self._rng, num_random=_NUM_RANDOM, good=good, num_changed=_NUM_CHANGED))
        for _ in range(self._pool.num_parameters // _PARAMETERS_PER_ROUND):
            best = [each.candidate for each in heapq.nlargest(_NUM_BEST, rated, key=_get_worth)]
            rated += rate(*self._pool.draw(self._rng, num_random=0, good=best, num_changed=_NUM_CHANGED))
        tried = {to_json_text(each.candidate.params) for each in begun}
        new = [each for each in rated if to_json_text(each.candidate.params) not in tried]
        safe = [each for each in new if each.risk <= _MAX_RISK]
        chosen = max(safe or new or rated, key=_get_worth)
        self._expected_loss = sign * chosen.final_loss
        return chosen.candidate

    def _rate(
        self,
        forecast: CurveForecast,
        begun: Sequence[_StartedTrial],
        usable: Sequence[_StartedTrial],
        candidates: Sequence[Candidate],
        vectors: np.ndarray,
    ) -> list[_RatedCandidate]:
        """Rate candidates and their vectors (n, d); those that may fail are worth less."""
        seconds = self._predict_seconds(usable, vectors)
        options = [Option(vector, None, 0, epoch_s, 0.0) for vector, epoch_s in zip(vectors, seconds, strict=True)]
        rating, risk = forecast.rate(options), _predict_risk(begun, vectors)
        columns = (rating.worth * (1 - risk), rating.final_loss, risk)
        return list(map(_RatedCandidate, candidates, *(column.tolist() for column in columns)))

    def _read_losses(self, trial: FrozenTrial, sign: float) -> Mapping[int, float]:
        if not trial.intermediate_values and trial.state == TrialState.COMPLETE and trial.values:
            return {self._max_epochs: sign * trial.values[0]}
        return {epoch: sign * value for epoch, value in trial.intermediate_values.items()}

    def _predict_seconds(self, trials: Sequence[_StartedTrial], vectors: np.ndarray) -> np.ndarray:
        """Predict the seconds of an epoch of configurations (n,); all 1 if no trial has been timed."""
        timed = [each for each in trials if self._epoch_seconds.get(each.trial.number, 0.0) > 0]
        seconds = [self._epoch_seconds[each.trial.number] for each in timed]
        typical = float(np.exp(np.median(np.log(seconds)))) if timed else 1.0
        return predict_seconds([each.vector for each in timed], seconds, vectors, otherwise=typical)


def _predict_risk(trials: Sequence[_StartedTrial], vectors: np.ndarray) -> np.ndarray:
    """Predict the probability (n,) that configurations diverge, fail or are infeasible."""
    ended = [each for each in trials if each.trial.state != TrialState.RUNNING]
    failed = np.array([float(_has_failed(each.trial)) for each in ended])
    if not failed.any():
        return np.zeros(len(vectors))
    return np.clip(interpolate(np.array([each.vector for each in ended]), failed, vectors), 0.0, 1.0)


def _has_failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL or any(excess > 0 for excess in trial.constraints.values())
