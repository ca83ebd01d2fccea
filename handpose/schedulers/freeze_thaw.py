"""The freeze-thaw scheduler: trains the trial whose training is worth most, by a model of learning curves."""

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from handpose.errors import UserError
from handpose.schedulers.asha import Asha
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Fifo, Scheduler, SchedulerDecision, SegmentStart
from handpose.search.candidates import Candidate, CandidatePool, make_candidate
from handpose.search.curve_model import CurveModel
from handpose.search.curve_worth import CurveForecast, ObservedCurve, Option, fit_model, list_decision_epochs
from handpose.search.encoding import predict_seconds
from handpose.search.epoch_timer import EpochTimer
from handpose.search.space import Params, Space

_MIN_TRIALS = 5
"""Number of trials with a result from which the model decides."""
_FIRST_EPOCHS = 3
"""Until then, trials pause at the first epoch of a decision from this one on."""
_STAY_FACTOR = 1.5
"""A trial pauses only if another one is worth this many times as much: the model is unsure what each is worth. With 3,
searches of the space `full` took a tenth longer (benchmarks/search.py, 10 seeds)."""
_REFIT_FACTOR = 1.25
"""The model is fitted again when there are this many times as many values."""
_MAX_PAUSED = 60
"""Number of paused trials that are compared, so that the time of a decision does not grow with all of them."""
_NUM_RANDOM, _NUM_CHANGED, _NUM_GOOD = 100, 30, 5


@dataclass
class _Trial:
    """What the scheduler knows of a trial.

    Attributes:
        params: its parameters.
        candidate: its configuration; None if its draws are not known.
        vector: its encoded configuration.
        losses: epoch -> loss.
        state: whether it trains, is frozen, or has ended.
        timer: how long its epochs take, in seconds of the sweep's own time.
    """

    params: Params
    candidate: Candidate | None
    vector: np.ndarray
    timer: EpochTimer = field(default_factory=EpochTimer)
    losses: dict[int, float] = field(default_factory=dict)
    state: Literal["running", "paused", "over"] = "running"


class _Comparison(NamedTuple):
    """Trials and new ones, compared by what a second of their training is worth.

    Attributes:
        numbers: the trials.
        worth: of each trial (n,), and then of each new one.
        probability: probability of each to end better than all others.
        final_loss: loss that each is expected to reach.
        goal: loss that counts as better than all others.
    """

    numbers: Sequence[int]
    worth: np.ndarray
    probability: np.ndarray
    final_loss: np.ndarray
    goal: np.ndarray

    def favour_current(self) -> "_Comparison":
        """Return what counts if the first trial trains: it is worth more than the model says."""
        worth = self.worth.copy()
        worth[0] *= _STAY_FACTOR
        return self._replace(worth=worth)

    def explain(self, place: int) -> Reason:
        """Return the place of an option, and the loss it is expected to reach."""
        rank = 1 + int((self.worth > self.worth[place]).sum())
        return Reason("worth", value=float(self.final_loss[place]), rank=rank, num_compared=len(self.worth))


class FreezeThaw(Fifo):
    """Scheduler that continues, freezes, thaws and begins trials by what a second of their training is worth.

    At the epochs of decisions, which lie closer together at the beginning, a model of learning curves predicts where
    every trial would end (freeze-thaw Bayesian optimisation, Swersky et al. 2014, arXiv:1406.3896). A trial freezes
    (pauses) if a frozen or new one is worth much more per second (`handpose.search.curve_worth`). It may be thawed
    (resumed) later. The new trials of this comparison are drawn by the scheduler; the searcher proposes the real ones.

    The decisions depend on rounding, which differs between processors. So a resumed sweep takes those that its events
    record.

    Args:
        space: the search space.
        max_epochs: epochs of a complete trial.
        folds: number of folds that a complete trial is trained with. In later folds, it decides at their ends.
        min_probability: once all trials have been started and one is complete, paused ones are resumed only while one
            of them ends better than all others with at least this probability.
        seed: the seed of the drawn new trials.

    Raises:
        UserError: a value is out of range.
    """

    needs_checkpoints = True
    supports_two_objectives = False
    selects_only_at_rungs = False
    repeats_decisions = False

    def __init__(
        self, *, space: Space | None, max_epochs: int, min_probability: float, seed: int, folds: int = 1
    ) -> None:
        if not 0 <= min_probability < 1:
            raise UserError(
                f"scheduler.min_probability={min_probability:g} must be at least 0 and below 1: it is a probability "
                "(configs/scheduler/freeze_thaw.yaml)"
            )
        if space is None:
            raise UserError("scheduler=freeze_thaw needs the search space of the sweep")
        self._space, self._min_probability, self._seed = space, min_probability, seed
        self._folds = folds
        self._set_max_epochs(max_epochs)
        self._pool = CandidatePool(space)
        self._trials: dict[int, _Trial] = {}
        self._model: CurveModel | None = None
        self._num_values, self._num_fitted = 0, 0
        self._fitted_curves: list[ObservedCurve] = []
        self._good: list[Candidate] = []
        self._new_vectors: np.ndarray | None = None
        self._num_changes = 0
        self._answer: tuple[int, bool, SegmentStart | None, Reason | None] = (-1, False, None, None)

    def _set_max_epochs(self, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self._epochs = list_decision_epochs(max_epochs, folds=self._folds)
        self.rungs = self._epochs[:-1]

    def make_stand_in(self) -> Scheduler:
        """Return a scheduler that lets trials train about as many epochs, to forecast costs: the model needs curves."""
        return Asha(
            mode="promote",
            grace_period=1,
            reduction_factor=3,
            brackets=1,
            max_epochs=self._max_epochs,
            seed=self._seed,
            folds=self._folds,
        )

    # --- events -------------------------------------------------------------------------------------------------------

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Record a new trial."""
        vector = self._pool.encoder.encode([params])[0]
        self._trials[trial] = _Trial(params, make_candidate(self._space, params), vector)
        self.on_segment_start(trial)
        self._choose_good()
        self._num_changes += 1

    def _choose_good(self) -> None:
        """Choose the trials that are changed to draw new ones, which are drawn again."""
        reported = [number for number, each in self._trials.items() if each.losses]
        best = heapq.nsmallest(_NUM_GOOD, reported, key=self._get_newest_loss)
        self._good = [each for number in best if (each := self._trials[number].candidate) is not None]
        self._new_vectors = None

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Decide at the epochs of decisions whether the trial continues."""
        self._record(trial, epoch, loss)
        decision: SchedulerDecision = "continue"
        if epoch in self.rungs:
            decision = self._decide(trial, epoch)
        self._record_decision(trial, epoch, decision)
        return decision

    def on_past_result(self, trial: int, epoch: int, loss: float, decision: SchedulerDecision) -> None:
        """Record a report and the decision that was made."""
        self._record(trial, epoch, loss)
        self._record_decision(trial, epoch, decision)

    def on_trial_resume(self, start: SegmentStart) -> None:
        """Record that a frozen trial is thawed."""
        self._trials[start.trial].state = "running"
        self.on_segment_start(start.trial)
        self._num_changes += 1

    def on_segment_start(self, trial: int) -> None:
        """Record when the segment begins, also after a retry."""
        self._trials[trial].timer.start_segment(self.now)

    def on_trial_end(self, trial: int) -> None:
        """Record that the trial has ended."""
        self._trials[trial].state = "over"
        self._num_changes += 1

    def on_trial_reopen(self, trial: int) -> None:
        """Record that the trial is trained again."""
        self._trials[trial].state = "running"
        self._num_changes += 1

    def on_max_epochs(self, max_epochs: int) -> None:
        """Predict the losses after the new number of epochs from now on, with a model that is fitted to all values."""
        self._set_max_epochs(max_epochs)
        self._model = None
        if self._has_model:
            self._choose_values_to_fit()
        self._num_changes += 1

    def on_space(self, space: Space) -> None:
        """Compare all trials as configurations of another search space from now on, with a new model."""
        self._space, self._pool = space, CandidatePool(space)
        vectors = self._pool.encoder.encode([trial.params for trial in self._trials.values()])
        for trial, vector in zip(self._trials.values(), vectors, strict=True):
            trial.candidate, trial.vector = make_candidate(space, trial.params), vector
        self._choose_good()
        self._model = None
        if self._has_model:
            self._choose_values_to_fit()
        self._num_changes += 1

    def on_complete_trial(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Freeze the trial. It is thawed if that is worth most."""
        self._trials[trial].state = "paused"
        self._num_changes += 1
        return "pause"

    def _record(self, number: int, epoch: int, loss: float) -> None:
        trial = self._trials[number]
        trial.timer.report(epoch, self.now)
        trial.losses[epoch] = loss
        self._num_values += epoch in self._epochs
        self._num_changes += 1
        if self._has_model and self._num_values >= _REFIT_FACTOR * self._num_fitted:
            self._choose_values_to_fit()

    def _choose_values_to_fit(self) -> None:
        """Choose what the next model is fitted to. A resumed sweep chooses at the same event, and so the same."""
        self._num_values = sum(epoch in self._epochs for each in self._trials.values() for epoch in each.losses)
        self._num_fitted, self._model = self._num_values, None
        self._fitted_curves = [ObservedCurve(each.vector, dict(each.losses)) for each in self._trials.values()]

    def _record_decision(self, trial: int, epoch: int, decision: SchedulerDecision) -> None:
        if decision == "pause":
            self._trials[trial].state = "paused"
        elif decision == "stop" or epoch >= self._max_epochs:
            self._trials[trial].state = "over"

    # --- decisions ----------------------------------------------------------------------------------------------------

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """Return the frozen trial that is worth most, unless a new one is worth more."""
        if self._answer[:2] != (self._num_changes, can_start_trial):
            self._answer = (self._num_changes, can_start_trial, *self._choose(can_start_trial))
        return self._answer[2]

    def explain_resume(self, start: SegmentStart) -> Reason | None:
        """Return the loss that the trial is expected to reach, and its place among the options."""
        return self._answer[3]

    def _decide(self, number: int, epoch: int) -> SchedulerDecision:
        can_start = self.can_start_trial
        if not self._has_model:
            return "pause" if epoch >= _FIRST_EPOCHS and can_start else "continue"
        compared = self._compare(self._list_paused(), with_new=can_start, current=number).favour_current()
        self.reason = compared.explain(0)
        return "continue" if compared.worth[0] >= compared.worth.max() else "pause"

    def _choose(self, can_start: bool) -> tuple[SegmentStart | None, Reason | None]:
        paused = self._list_paused()
        if not paused:
            return None, None
        is_running = any(trial.state == "running" for trial in self._trials.values())
        has_complete = any(self._max_epochs in trial.losses for trial in self._trials.values())
        if not self._has_model:
            if can_start:
                return None, None
            return SegmentStart(min(paused, key=self._get_newest_loss)), None
        compared = self._compare(paused, with_new=can_start)
        num = len(compared.numbers)
        best = int(np.argmax(compared.worth[:num]))
        if not can_start and has_complete:
            is_likely = compared.probability[:num] >= self._min_probability
            if not is_likely.any():
                return None, None
            best = int(np.argmax(np.where(is_likely, compared.worth[:num], -1.0)))
        if can_start:
            if compared.worth[best] < compared.worth[num:].max():
                return None, None
        elif not has_complete and not is_running:
            best = int(np.argmin(compared.final_loss))
        return SegmentStart(compared.numbers[best]), compared.explain(best)

    def _list_paused(self) -> list[int]:
        return [number for number, trial in self._trials.items() if trial.state == "paused"]

    @property
    def _has_model(self) -> bool:
        return sum(bool(trial.losses) for trial in self._trials.values()) >= _MIN_TRIALS

    def _get_newest_loss(self, number: int) -> float:
        losses = self._trials[number].losses
        return losses[max(losses)]

    def _compare(self, paused: Sequence[int], *, with_new: bool, current: int | None = None) -> _Comparison:
        """Compare trials, and new ones after them.

        Args:
            paused: the paused trials. Those that are expected to end best are compared.
            with_new: whether new trials can be started.
            current: a trial that trains, and so needs no start. It comes first.
        """
        forecast = self._forecast(current)
        places = {number: place for place, number in enumerate(self._trials)}
        numbers = heapq.nsmallest(_MAX_PAUSED, paused, key=lambda number: forecast.final_means[places[number]])
        if current is not None:
            numbers.insert(0, current)
        epoch_s, start_s = self._estimate_seconds()
        options = [
            Option(
                vector=trial.vector,
                trial=places[number],
                epochs=max(trial.losses),
                epoch_s=trial.timer.typical_epoch_s or epoch_s,
                start_s=0.0 if number == current else start_s,
            )
            for number in numbers
            for trial in [self._trials[number]]
        ]
        if with_new:
            vectors = self._draw_new()
            for vector, seconds in zip(vectors, self._predict_seconds(vectors, epoch_s), strict=True):
                options.append(Option(vector, None, 0, seconds, start_s))
        return _Comparison(numbers, *forecast.rate(options))

    def _forecast(self, current: int | None) -> CurveForecast:
        curves = [
            ObservedCurve(
                trial.vector,
                trial.losses,
                is_running=trial.state == "running" and number != current,
                has_ended=trial.state == "over",
            )
            for number, trial in self._trials.items()
        ]
        if self._model is None:
            self._model = CurveModel(self._pool.encoder.num_entries, self._max_epochs)
            fit_model(self._model, self._fitted_curves, self._epochs)
        return CurveForecast(self._model, curves, self._max_epochs, self._epochs)

    def _draw_new(self) -> np.ndarray:
        """Draw vectors of new trials; the same ones until a further trial has been started."""
        if self._new_vectors is None:
            rng = np.random.default_rng([self._seed, len(self._trials)])
            _, self._new_vectors = self._pool.draw(
                rng, num_random=_NUM_RANDOM, good=self._good, num_changed=_NUM_CHANGED
            )
        return self._new_vectors

    def _predict_seconds(self, vectors: np.ndarray, otherwise: float) -> np.ndarray:
        """Predict the seconds of an epoch of new trials, from those of similar ones."""
        timed = [(trial.vector, each) for trial in self._trials.values() if (each := trial.timer.typical_epoch_s)]
        seconds = [max(each, 1e-6) for _, each in timed]
        return predict_seconds([vector for vector, _ in timed], seconds, vectors, otherwise=otherwise)

    def _estimate_seconds(self) -> tuple[float, float]:
        """Estimate the seconds of an epoch and of a start; 1 and 0 before any trial has been timed."""
        timed = [trial.timer for trial in self._trials.values() if trial.timer.epoch_s]
        if not timed:
            return 1.0, 0.0
        starts = [first - statistics.median(timer.epoch_s) for timer in timed for first in timer.first_epoch_s]
        epoch_s = statistics.median(seconds for timer in timed for seconds in timer.epoch_s)
        return max(epoch_s, 1e-6), max(0.0, statistics.median(starts))
