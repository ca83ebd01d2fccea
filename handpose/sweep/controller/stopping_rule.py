"""Decides when a sweep ends because further trials are not worth it (`sweep.stop_when`)."""

from collections.abc import Sequence

import torch

from handpose.metrics.target import TargetMetric
from handpose.search.candidates import Candidate, CandidatePool, make_candidate
from handpose.search.curve_worth import ObservedCurve
from handpose.search.expected_gain import estimate_gain
from handpose.search.searcher import TrialSnapshot
from handpose.search.space import Space
from handpose.sweep.record.settings import SweepSettings

_MIN_TRIALS_PER_PARAMETER, _MIN_COMPLETE = 10, 3
"""Numbers of trials with a value, for each searched parameter, and of complete ones, that an estimate needs."""
_FACTOR = 1.1
"""The gain is estimated again when there are this many times as many reports."""
_WINDOW = 1.2
"""The largest estimate counts of those since there were so many times fewer trials."""


class StoppingRule:
    """Estimates how much doubling the number of trials would improve the metric.

    Args:
        space: the search space.
        target: the metric.
        max_epochs: epochs of a complete trial.
        seed: the seed of the configurations that further trials may have.
        folds: number of folds that a complete trial is trained with.
    """

    def __init__(self, space: Space, *, target: TargetMetric, max_epochs: int, seed: int, folds: int = 1) -> None:
        self._space, self._target, self._max_epochs, self._seed = space, target, max_epochs, seed
        self._folds = folds
        self._pool = CandidatePool(space)
        self._candidates: dict[int, Candidate | None] = {}
        self._next_at = 0.0
        self._estimates: list[tuple[int, float]] = []

    @property
    def min_trials(self) -> int:
        """Number of trials with a value that an estimate needs."""
        return _MIN_TRIALS_PER_PARAMETER * self._pool.num_parameters

    def is_due(self, num_reports: int) -> bool:
        """Return whether there are enough new reports for another estimate."""
        return num_reports >= self._next_at

    def estimate_gain(self, trials: Sequence[TrialSnapshot]) -> float | None:
        """Estimate the gain: the largest of the last estimates, while the number of trials has grown by a fifth.

        Args:
            trials: all trials of the sweep.

        Returns:
            The expected improvement in units of the metric; None while there are too few trials, or none can be
            estimated.
        """
        self._next_at = _FACTOR * sum(len(trial.values) for trial in trials)
        losses = {trial.number: self._read_losses(trial) for trial in trials}
        usable = [trial for trial in trials if losses[trial.number]]
        num_complete = sum(self._max_epochs in losses[trial.number] for trial in usable)
        if len(usable) < self.min_trials or num_complete < _MIN_COMPLETE:
            return None
        candidates = [self._place(trial) for trial in usable]
        vectors = self._pool.encoder.encode([trial.params for trial in usable])
        curves = [
            ObservedCurve(vector, losses[trial.number], has_ended=trial.state not in ("running", "waiting", "paused"))
            for vector, trial in zip(vectors, usable, strict=True)
        ]
        try:
            gain = estimate_gain(
                self._pool,
                candidates,
                curves,
                max_epochs=self._max_epochs,
                folds=self._folds,
                num_more=len(trials),
                seed=self._seed + len(self._estimates),
            )
        except torch.linalg.LinAlgError:  # the losses are so different that no model describes them
            return None
        self._estimates.append((len(trials), gain))
        first = len(trials) / _WINDOW
        covers_window = any(num <= first for num, _ in self._estimates)
        return max(gain for num, gain in self._estimates if num >= first) if covers_window else None

    def _read_losses(self, trial: TrialSnapshot) -> dict[int, float]:
        if trial.state in ("diverged", "failed", "infeasible"):
            return {}
        return {epoch: self._target.to_loss(value) for epoch, value in trial.values.items()}

    def _place(self, trial: TrialSnapshot) -> Candidate | None:
        if trial.number not in self._candidates:
            self._candidates[trial.number] = make_candidate(self._space, trial.params)
        return self._candidates[trial.number]


def make_stopping_rule(sweep: SweepSettings, space: Space) -> StoppingRule:
    """Make the rule of a sweep. Whether it is used depends on `sweep.stop_when`."""
    epochs, folds = sweep.trial_epochs, sweep.folds
    return StoppingRule(space, target=sweep.target, max_epochs=epochs, seed=sweep.seed, folds=folds)
