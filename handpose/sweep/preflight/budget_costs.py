"""Estimates, from the points that the preflight has measured, what each part of a sweep takes, for its budget."""

from collections.abc import Callable
from dataclasses import replace

from handpose.schedulers.scheduler import Fifo, Scheduler
from handpose.sweep.budget.planning import Amounts, Costs, Work
from handpose.sweep.controller.slots import Slots
from handpose.sweep.preflight.forecast import RetrainForecast, estimate_work
from handpose.sweep.preflight.probe import ProbeResults
from handpose.sweep.record.settings import SweepSettings

_SIDE_BY_SIDE = 1.15
"""Slow-down of trials that run side by side on one machine, against the measured trial, which runs alone."""
_EXPERIMENT_S = 4.0
"""Seconds that Ray Tune takes to begin and to end an experiment."""
_TEST_S = 8.0
"""Seconds for the predictions of the test split, the summary and the report, without the network's own time."""


def estimate_costs(
    sweep: SweepSettings,
    probed: ProbeResults,
    slots: Slots,
    *,
    bind_scheduler: Callable[[SweepSettings], Callable[[], Scheduler]],
    retraining: RetrainForecast | None,
) -> Costs:
    """Estimate what the parts of a sweep take.

    Args:
        sweep: settings of the sweep.
        probed: the measured points.
        slots: slots that the trials will have.
        bind_scheduler: returns a function that makes schedulers for the given settings.
        retraining: forecast of the retraining; None if the winner is not retrained.
    """
    gpus, num_slots = slots.total_gpus, slots.num_slots
    slowdown = _SIDE_BY_SIDE if num_slots > 1 and not gpus else 1.0
    experiment_s = _EXPERIMENT_S + probed.worker_start_s * slowdown

    def estimate(make_scheduler: Callable[[], Scheduler], num_trials: int, max_epochs: int) -> Work:
        work = estimate_work(
            make_scheduler,
            probed,
            num_trials=num_trials,
            max_epochs=max_epochs * sweep.folds,
            num_slots=num_slots,
            folds=sweep.folds,
        )
        slot_s = work.slot_s * slowdown + probed.worker_start_s * num_slots
        return Work(experiment_s + work.wall_s * slowdown, slot_s * gpus)

    def estimate_trials(amounts: Amounts) -> Work:
        changed = replace(sweep, num_trials=amounts.num_trials, max_epochs=amounts.max_epochs)
        return estimate(bind_scheduler(changed), amounts.num_trials, amounts.max_epochs)

    def estimate_confirmation(amounts: Amounts) -> Work:
        num_runs = (amounts.top_k + 1) * amounts.seeds  # finalists and the default configuration
        return estimate(Fifo, num_runs, amounts.max_epochs)

    if retraining is None:
        return Costs(estimate_trials, estimate_confirmation, Work(0.0, 0.0), 0, Work(_TEST_S, 0.0))
    start_s = min(retraining.start_s, retraining.wall_s)
    epoch_s = (retraining.wall_s - start_s) / retraining.epochs
    num_gpus = retraining.num_devices if gpus else 0
    return Costs(
        estimate_trials,
        estimate_confirmation,
        Work(epoch_s, epoch_s * num_gpus),
        retraining.epochs,
        Work(start_s + _TEST_S, start_s * num_gpus),
    )
