"""Plans the rest of a sweep again after its trials, from what they really took."""

import math
import statistics
import time
from collections.abc import Collection
from typing import NamedTuple

from handpose.report.trial_table import TrialTable
from handpose.sweep.budget.clock import BudgetClock, Decisions
from handpose.sweep.budget.planning import KEYS, Amounts, Work, choose_confirmation
from handpose.sweep.record.settings import SweepSettings

REPORT_S = 6.0
"""Seconds for the summary and the report after the retraining."""

_TEN_YEARS_S = 10 * 365 * 86400.0
_CONFIRMATION_LIMIT = 0.5
"""Largest part of the time left that the confirmation may take, if it turns out to be slower than planned."""


class ConfirmationBudget(NamedTuple):
    """What a confirmation may take.

    Attributes:
        top_k: number of finalists.
        seeds: number of seeds.
        time_s: seconds from now on.
        gpu_hours: GPU-hours from now on; None: no limit.
    """

    top_k: int
    seeds: int
    time_s: float
    gpu_hours: float | None


def estimate_trial_epoch(table: TrialTable) -> Work:
    """Estimate what an epoch of a trial takes, with its share of the start of the trial.

    Args:
        table: the trials. If none of them has reported, nothing is known, and the estimate is 0.
    """
    paces_s = [row.seconds / row.epochs for row in table.rows.values() if row.epochs]
    epoch_s = statistics.fmean(paces_s) if paces_s else 0.0
    return Work(epoch_s, epoch_s * _compute_gpus_per_trial(table))


def _compute_gpus_per_trial(table: TrialTable) -> float:
    total_s = sum(row.seconds for row in table.rows.values())
    return 3600.0 * table.gpu_hours / total_s if total_s else 0.0


def count_used_gpu_s(table: TrialTable, clock: BudgetClock, *, num_retrain_gpus: int = 0) -> float:
    """Estimate the GPU-seconds that a sweep has used so far.

    Args:
        table: the trials.
        clock: the times of the stages.
        num_retrain_gpus: GPUs of the retraining.
    """
    return (
        3600.0 * table.gpu_hours
        + table.num_slots * _compute_gpus_per_trial(table) * clock.seconds.get("confirmation", 0.0)
        + num_retrain_gpus * clock.seconds.get("retraining", 0.0)
    )


def plan_confirmation(
    table: TrialTable, sweep: SweepSettings, clock: BudgetClock, *, schedule_epochs: int, given: Collection[str]
) -> ConfirmationBudget:
    """Choose how many finalists and seeds fit, and what the confirmation may take.

    A resumed confirmation keeps what was chosen. A new choice keeps at least what was confirmed before.

    Args:
        table: the trials.
        sweep: settings of the sweep.
        clock: what is left of the budget. The choice is recorded in it.
        schedule_epochs: epochs of the retraining without a budget; 0: the winner is not retrained.
        given: configuration keys that the user has given.
    """
    left = Work(clock.deadline.left_s - REPORT_S, clock.gpu_s - count_used_gpu_s(table, clock))
    epoch = estimate_trial_epoch(table)
    decided = clock.decisions
    if decided.top_k is None or decided.seeds is None:
        asked = Amounts(sweep.num_trials, sweep.max_epochs, *get_asked_confirmation(sweep, decided))
        chosen = choose_confirmation(
            left,
            asked,
            run=epoch.scale(sweep.trial_epochs),
            num_slots=max(table.num_slots, estimate_slots(table, clock.seconds.get("trials", math.inf))),
            retraining=epoch.scale(sweep.workers_per_trial * schedule_epochs),
            given=given,
        )
        decided.top_k = chosen.top_k if KEYS["top_k"] in given else max(chosen.top_k, decided.least_top_k)
        decided.seeds = chosen.seeds if KEYS["seeds"] in given else max(chosen.seeds, decided.least_seeds)
        clock.save()
    limit = left.scale(_CONFIRMATION_LIMIT) if schedule_epochs else left
    is_gpu_limited = math.isfinite(limit.gpu_s)
    return ConfirmationBudget(
        decided.top_k, decided.seeds, max(0.0, limit.wall_s), max(0.0, limit.gpu_s) / 3600 if is_gpu_limited else None
    )


def get_asked_confirmation(sweep: SweepSettings, decisions: Decisions) -> tuple[int, int]:
    """Return the numbers of finalists and seeds that the user configured, of which a plan may have made fewer.

    Args:
        sweep: settings of the sweep.
        decisions: what has been planned.
    """
    planned, confirm = decisions.planned_keys, sweep.confirm
    top_k = decisions.asked_top_k if KEYS["top_k"] in planned else None
    seeds = decisions.asked_seeds if KEYS["seeds"] in planned else None
    return confirm.top_k if top_k is None else top_k, confirm.seeds if seeds is None else seeds


def estimate_slots(table: TrialTable, elapsed_s: float) -> int:
    """Estimate how many trials ran at a time. A sweep that has been read from its files does not know its slots.

    Args:
        table: the trials.
        elapsed_s: seconds that the sweep took for them.
    """
    return round(sum(row.seconds for row in table.rows.values()) / max(elapsed_s, 1.0))


def find_retraining_end(table: TrialTable, clock: BudgetClock, num_gpus: int) -> float:
    """Return when the retraining has to be finished, in seconds since the epoch; infinity if it has years.

    Args:
        table: the trials.
        clock: what is left of the budget.
        num_gpus: number of GPUs of the retraining; 0 if it runs on CPU cores, which use no GPU-hours.
    """
    left_s = clock.deadline.left_s - REPORT_S
    if num_gpus:
        gpu_s = clock.gpu_s - count_used_gpu_s(table, clock, num_retrain_gpus=num_gpus)
        left_s = min(left_s, gpu_s / num_gpus)
    return time.time() + max(0.0, left_s) if left_s < _TEN_YEARS_S else math.inf
