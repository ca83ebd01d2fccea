"""Forecast the cost of a sweep: the measured cost of an epoch times the epochs that the scheduler lets trials train.

The number of epochs is found by simulating the sweep with trials that have nothing but a rank.
"""

import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from handpose.config import compose
from handpose.report.preflight import (
    PointRow,
    WorkEstimate,
    format_confirm_cost,
    format_retrain_cost,
    format_sweep_cost,
    format_total_cost,
    format_trial_cost,
)
from handpose.schedulers.scheduler import Fifo, Scheduler
from handpose.search.space import Params
from handpose.sweep.preflight.probe import ProbeResults
from handpose.sweep.record.settings import RetrainSettings, SweepSettings
from handpose.sweep.trainable.trial import TrialRecipe, add_param_overrides
from handpose.sweep.trainable.trial_cost import DataSize, TrialCost

_MAX_TRIALS = 5000
_MIN_REPORTS = 4000


class SweepForecast(NamedTuple):
    """Forecast of one sweep: means over several simulations.

    Attributes:
        epochs: epochs trained by all trials together.
        rounds: duration of the sweep in epochs, with all slots training side by side.
        segments: how often a trial starts or resumes, or begins another fold.
        most_paused: highest number of trials paused at a time, each with a checkpoint.
    """

    epochs: float
    rounds: float
    segments: float
    most_paused: float

    def scale(self, factor: float) -> "SweepForecast":
        """Return the forecast of a sweep with `factor` times as many trials."""
        return SweepForecast(*(factor * value for value in self))


def forecast_sweep(
    make_scheduler: Callable[[], Scheduler],
    *,
    num_trials: int,
    max_epochs: int,
    num_slots: int,
    validation_interval: int,
    params: Sequence[Params],
    folds: int = 1,
) -> SweepForecast:
    """Simulate a sweep in which every trial has a random rank and all trials train equally fast.

    A trial keeps its rank at all epochs. This favours schedulers that stop trials early: real learning curves cross,
    which makes early stopping less effective.

    Args:
        make_scheduler: returns a new scheduler.
        num_trials: number of trials. A sweep with very many trials is simulated with fewer, and the result is scaled.
        max_epochs: epochs of a trial that is not stopped early.
        num_slots: number of concurrent trials.
        validation_interval: epochs between validations.
        params: parameters of the trials, used in turn, for schedulers that change them.
        folds: number of folds that a complete trial is trained with.
    """
    rehearsed = min(num_trials, max(_MAX_TRIALS, num_slots))
    repeats = max(1, min(20, _MIN_REPORTS // (rehearsed * max_epochs)))
    rehearsals = []
    for seed in range(repeats):
        stage = _Rehearsal(
            _make_stand_in(make_scheduler()),
            rehearsed,
            max_epochs,
            validation_interval,
            params,
            random.Random(seed),
            folds,
        )
        rehearsals.append(stage.simulate(num_slots))
    return SweepForecast(*map(fmean, zip(*rehearsals, strict=True))).scale(num_trials / rehearsed)


def _make_stand_in(scheduler: Scheduler) -> Scheduler:
    """Return the scheduler that is simulated: one that judges whole curves names another one, since ranks have none."""
    make = getattr(scheduler, "make_stand_in", None)
    return scheduler if make is None else make()


class _Rehearsal:
    """One simulation: in each round free slots are filled as in a sweep, then each running trial trains one epoch."""

    def __init__(
        self,
        scheduler: Scheduler,
        num_trials: int,
        max_epochs: int,
        validation_interval: int,
        params: Sequence[Params],
        rng: random.Random,
        folds: int,
    ) -> None:
        self._fold_epochs = max_epochs // folds
        self._scheduler = scheduler
        self._losses = [rng.random() for _ in range(num_trials)]
        self._costs = [rng.random() for _ in range(num_trials)]
        self._max_epochs = max_epochs
        self._validates_every = validation_interval
        self._params = params
        self._epochs = [0] * num_trials
        self._saved = [0] * num_trials
        self._running: list[int] = []
        self._num_started = 0
        self._num_segments = 0
        self._num_paused = 0

    def simulate(self, num_slots: int) -> SweepForecast:
        trained, rounds, most_paused = 0, 0, 0
        worst = 4 * len(self._losses) * self._max_epochs  # guards against a scheduler that resumes trials for ever
        while trained < worst:
            while len(self._running) < num_slots and self._fill_slot():
                pass
            if not self._running:
                break
            trained += len(self._running)
            rounds += 1
            self._running = [trial for trial in self._running if self._train_epoch(trial)]
            most_paused = max(most_paused, self._num_paused)
        return SweepForecast(trained, rounds, self._num_segments, most_paused)

    def _fill_slot(self) -> bool:
        """Resume a trial, or start a new one; return False if there is neither."""
        can_begin = self._num_started < len(self._losses)
        start = self._scheduler.choose_trial_to_resume(can_start_trial=can_begin)
        if start is not None:
            source = start.trial if start.source is None else start.source
            self._epochs[start.trial] = self._saved[start.trial] = self._saved[source]
            self._scheduler.on_trial_resume(start)
            self._start_segment(start.trial)
            self._num_paused -= 1
        elif can_begin:
            self._scheduler.on_trial_start(self._num_started, dict(self._params[self._num_started % len(self._params)]))
            self._scheduler.on_trial_cost(self._num_started, self._costs[self._num_started])
            self._start_segment(self._num_started)
            self._num_started += 1
        return start is not None or can_begin

    def _start_segment(self, trial: int) -> None:
        self._running.append(trial)
        self._num_segments += 1

    def _train_epoch(self, trial: int) -> bool:
        """Train one epoch; return True if the trial keeps its slot."""
        epoch = self._epochs[trial] = self._epochs[trial] + 1
        if epoch in self._scheduler.rungs:
            self._saved[trial] = epoch
        goes_on = self._decide(trial, epoch)
        self._num_segments += goes_on and epoch % self._fold_epochs == 0
        return goes_on

    def _decide(self, trial: int, epoch: int) -> bool:
        if epoch % self._validates_every and epoch < self._max_epochs:
            return True
        decision = self._scheduler.on_trial_result(trial, epoch, self._losses[trial])
        if epoch < self._max_epochs and decision == "pause":
            self._num_paused += 1
        return epoch < self._max_epochs and decision == "continue"


class RetrainForecast(NamedTuple):
    """Forecast of retraining the winner.

    Attributes:
        epochs: number of epochs, of all seeds together.
        num_devices: devices that share each batch.
        wall_s: duration in seconds at the speed of the trials, if the devices share the work equally.
        start_s: the part of it before the first steps.
        num_seeds: number of seeds.
    """

    epochs: int
    num_devices: int
    wall_s: float
    start_s: float
    num_seeds: int = 1


def forecast_retraining(
    sweep: SweepSettings, recipe: TrialRecipe, probed: ProbeResults, data: DataSize, settings: RetrainSettings
) -> RetrainForecast:
    """Forecast the retraining of the winner with its full schedule for each seed, without the test of its checkpoints.

    The forecast is the mean over the typical points that were measured.

    Args:
        sweep: settings of the sweep.
        recipe: makes the overrides of a trial.
        probed: the measured points.
        data: size of the data of the default configuration.
        settings: what is retrained. If it is also trained on the validation split, it validates nothing.
    """
    found = [
        _forecast_point_retraining(
            sweep,
            compose("train", add_param_overrides(recipe.overrides, point.params)),
            cost,
            data,
            use_val=settings.use_val,
        )
        for point, cost in zip(probed.points, probed.costs, strict=True)
        if cost in probed.typical_costs
    ]
    num = settings.seeds
    return RetrainForecast(
        epochs=num * round(fmean(each.epochs for each in found)),
        num_devices=max(each.num_devices for each in found),
        wall_s=num * fmean(each.wall_s for each in found),
        start_s=num * fmean(each.start_s for each in found),
        num_seeds=num,
    )


def _forecast_point_retraining(
    sweep: SweepSettings, config: DictConfig, cost: TrialCost, data: DataSize, *, use_val: bool
) -> RetrainForecast:
    batch_size, epochs = config.data.batch_size, config.trainer.max_epochs
    given = config.trainer.devices
    most = sweep.retrain_devices or max(sweep.workers_per_trial, torch.cuda.device_count() if cost.gpu else 1)
    num_devices = max(number for number in range(1, most + 1) if batch_size % number == 0)
    if isinstance(given, int) and given > 0 and sweep.retrain_devices is None:
        num_devices = given
    num_images = data.num_train + (data.num_val if use_val else 0)
    epoch_s = cost.steps_per_epoch * cost.step_s * num_images / data.num_train
    if not use_val:
        epoch_s += cost.batches_per_validation * cost.validation_batch_s / config.trainer.check_val_every_n_epoch
    # The measured worker had only its part of the trial's batch.
    training_s = epochs * epoch_s * sweep.workers_per_trial / num_devices
    return RetrainForecast(epochs, num_devices, cost.start_s + training_s, cost.start_s)


def format_cost_lines(
    sweep: SweepSettings,
    probed: ProbeResults,
    make_scheduler: Callable[[], Scheduler],
    *,
    num_slots: int,
    retraining: RetrainForecast | None = None,
) -> list[str]:
    """Describe the cost of a trial, the sweep, the confirmation and the retraining in one line each, with a total.

    Args:
        sweep: settings of the sweep.
        probed: the measured points.
        make_scheduler: returns a new scheduler.
        num_slots: number of concurrent trials.
        retraining: forecast of the retraining; None if the winner is not retrained.
    """

    epochs = {"max_epochs": sweep.trial_epochs, "folds": sweep.folds}

    def work(rule: Callable[[], Scheduler], num_trials: int) -> WorkEstimate:
        return estimate_work(rule, probed, **epochs, num_trials=num_trials, num_slots=num_slots)

    expected = work(make_scheduler, sweep.num_trials)
    lines = [
        describe_trial_cost(probed),
        format_sweep_cost(
            num_trials=sweep.num_trials,
            num_slots=num_slots,
            whole=work(Fifo, sweep.num_trials),
            expected=expected,
            time_budget_s=sweep.time_budget_s,
        ),
    ]
    works = [_limit_to_budget(expected, sweep.time_budget_s)]
    if sweep.confirm.is_enabled:
        num_runs = (sweep.confirm.top_k + 1) * sweep.confirm.seeds  # finalists and the default configuration
        works.append(work(Fifo, num_runs))
        lines.append(format_confirm_cost(num_runs=num_runs, work=works[-1]))
    if retraining is not None:
        lines.append(
            format_retrain_cost(
                epochs=retraining.epochs,
                num_seeds=retraining.num_seeds,
                num_devices=retraining.num_devices,
                wall_s=retraining.wall_s,
            )
        )
    if len(works) > 1 or retraining is not None:
        lines.append(format_total_cost(works, retraining_s=0.0 if retraining is None else retraining.wall_s))
    return lines


def describe_trial_cost(probed: ProbeResults) -> str:
    """Describe in a line what a trial takes."""
    typical_s = fmean(cost.trial_s for cost in probed.typical_costs)
    return format_trial_cost(make_point_rows(probed), typical_s=typical_s, gpu=probed.costs[0].gpu)


def estimate_work(
    make_scheduler: Callable[[], Scheduler],
    probed: ProbeResults,
    *,
    num_trials: int,
    max_epochs: int,
    num_slots: int,
    folds: int = 1,
) -> WorkEstimate:
    """Estimate the work of trials from the measured points, without the start of the workers.

    Args:
        make_scheduler: returns a new scheduler.
        probed: the measured points.
        num_trials: number of trials.
        max_epochs: epochs of a trial that is not stopped early.
        num_slots: number of concurrent trials.
        folds: number of folds that a complete trial is trained with.
    """
    plan = forecast_sweep(
        make_scheduler,
        num_trials=num_trials,
        max_epochs=max_epochs,
        num_slots=num_slots,
        validation_interval=min(cost.validation_interval for cost in probed.costs),
        params=[point.params for point in probed.points],
        folds=folds,
    )
    return _compute_work(plan, probed, num_slots)


def _limit_to_budget(work: WorkEstimate, time_budget_s: float | None) -> WorkEstimate:
    """Return the part of the work that fits into the time budget."""
    if time_budget_s is None or time_budget_s >= work.wall_s:
        return work
    return WorkEstimate(work.slot_s * time_budget_s / work.wall_s, time_budget_s)


def _compute_work(plan: SweepForecast, probed: ProbeResults, num_slots: int) -> WorkEstimate:
    epoch_s = fmean(cost.epoch_s for cost in probed.typical_costs)
    start_s = fmean(cost.start_s for cost in probed.typical_costs)
    return WorkEstimate(
        slot_s=plan.epochs * epoch_s + plan.segments * start_s,
        wall_s=plan.rounds * epoch_s + plan.segments * start_s / num_slots,
    )


def make_point_rows(probed: ProbeResults) -> list[PointRow]:
    """Convert the measured points to rows of the report's table."""
    return [
        PointRow(
            label=point.label,
            params=point.params,
            num_parameters=cost.num_parameters,
            step_s=cost.step_s,
            trial_s=cost.trial_s,
            memory_mb=cost.memory_mb,
            process_mb=cost.process_mb,
            latency_ms=cost.latency_ms,
            checkpoint_mb=cost.checkpoint_mb,
        )
        for point, cost in zip(probed.points, probed.costs, strict=True)
    ]
