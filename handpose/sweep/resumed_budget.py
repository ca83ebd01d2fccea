"""What a resumed sweep may still use of its budget, which may have changed since it was interrupted or finished."""

import math
from dataclasses import replace
from typing import Any

from handpose.budget import BudgetSettings
from handpose.config import instantiate_key, override_key
from handpose.errors import UserError
from handpose.program import list_task_overrides
from handpose.report.trial_table import TrialTable
from handpose.sweep.budget.planning import KEYS, Work
from handpose.sweep.budget.stages import REPORT_S, estimate_slots, estimate_trial_epoch, get_asked_confirmation
from handpose.sweep.controller.history import rebuild_history
from handpose.sweep.driver.resume import change_task, read_recorded_budget
from handpose.sweep.plan import SweepPlan
from handpose.sweep.record.events import EVENTS_FILE, Event, SweepClosed, read_events
from handpose.sweep.record.settings import STOP_WHEN_KEY

_MAX_RESERVE = 0.7
"""Largest part of the time left that is kept for the confirmation and the retraining when a budget has changed."""

_TIME_KEY, _GPU_KEY = "sweep.time_budget_s", "sweep.gpu_hours"
_CONFIRM_KEYS = (KEYS["top_k"], KEYS["seeds"])


def limit_resumed_plan(plan: SweepPlan) -> SweepPlan:
    """Return the plan of a resumed sweep, whose trials may take what is left of its budget now.

    Trials that have finished, or have used up their part of the budget, are continued only if the budget has become
    larger, or if more trials or another `sweep.stop_when` are requested. With a larger budget there are more trials,
    and the confirmation is planned again; what has been confirmed already is kept. Without a budget, the amounts that
    the user configured apply.

    Raises:
        UserError: the user asks for more trials, and the budget has no time for them.
    """
    clock, events = plan.clock, read_events(plan.sweep.path / EVENTS_FILE)
    decisions = clock.decisions
    given = {override_key(item) for item in list_task_overrides()} | plan.task.steered.keys()
    decisions.planned_keys = [key for key in decisions.planned_keys if key not in given]
    is_larger = _is_larger(read_recorded_budget(plan.sweep.path), instantiate_key(plan.task.config, "budget"))
    if is_larger or given & set(_CONFIRM_KEYS):
        decisions.reopen_confirmation()
    if not events:
        return plan
    if not clock.is_limited:
        return _remove_limits(plan)
    wants_more = KEYS["num_trials"] in given
    last = events[-1]
    is_closed = isinstance(last, SweepClosed) and last.reason in ("finished", "spent")
    # With another sweep.stop_when, trials go on whose time the confirmation and the retraining may have used.
    if is_closed and not (is_larger or wants_more or STOP_WHEN_KEY in given):
        return plan
    return _limit_trials(plan, events, is_larger=is_larger, wants_more=wants_more)


def _limit_trials(plan: SweepPlan, events: list[Event], *, is_larger: bool, wants_more: bool) -> SweepPlan:
    clock, at = plan.clock, events[-1].at
    decisions, left = clock.decisions, Work(clock.deadline.left_s, clock.gpu_s)
    history = rebuild_history(plan.sweep, events)
    table = history.table
    table.gpu_hours = history.count_gpu_hours(at)
    reserve = Work(decisions.reserved_s, decisions.reserved_gpu_s)
    if is_larger or _TIME_KEY not in decisions.planned_keys:
        reserve = _estimate_reserve(plan, table, at=at, left=left) or reserve
        decisions.reserved_s, decisions.reserved_gpu_s = reserve
    if wants_more and left.wall_s <= reserve.wall_s:
        raise UserError(
            f"{clock.describe_limit()} has no time left for sweep.num_trials={plan.sweep.num_trials}; also give a "
            f"larger budget, which counts from the start of the sweep, or {clock.describe_removal()} for none"
        )
    values: dict[str, Any] = {}
    if math.isfinite(left.wall_s):
        limit_s = at + max(1.0, left.wall_s - reserve.wall_s)
        _choose_limit(plan, values, _TIME_KEY, round(limit_s, 1), plan.sweep.time_budget_s)
        if is_larger and KEYS["num_trials"] in decisions.planned_keys and at:
            num_more = math.floor(len(table.rows) * limit_s / at)  # at the pace so far
            values[KEYS["num_trials"]] = max(plan.sweep.num_trials, num_more)
    if math.isfinite(left.gpu_s) and table.gpu_hours:
        gpu_hours = max(table.gpu_hours, (left.gpu_s - reserve.gpu_s) / 3600, 1e-4)  # never rounded to 0
        _choose_limit(plan, values, _GPU_KEY, round(gpu_hours, 4), plan.sweep.gpu_hours)
    return _change_settings(plan, values)


def _choose_limit(plan: SweepPlan, values: dict[str, Any], key: str, limit: float, current: float | None) -> None:
    """Add the limit, unless the user has given a smaller one."""
    planned = plan.clock.decisions.planned_keys
    if key in planned or current is None or limit < current:
        values[key] = limit
        plan.clock.decisions.planned_keys = [*planned, *([] if key in planned else [key])]


def _estimate_reserve(plan: SweepPlan, table: TrialTable, *, at: float, left: Work) -> Work | None:
    """Estimate what the confirmation and the retraining need with the amounts that the user configured.

    None if no trial has reported yet.
    """
    sweep, epoch = plan.sweep, estimate_trial_epoch(table)
    if not epoch.wall_s:
        return None
    top_k, seeds = get_asked_confirmation(sweep, plan.clock.decisions)
    num_runs = (top_k + 1) * seeds if top_k else 0
    num_slots = max(1, estimate_slots(table, at))
    confirmation_s = math.ceil(num_runs / num_slots) * table.max_epochs * epoch.wall_s
    retraining = epoch.scale(sweep.workers_per_trial * plan.schedule_epochs)
    needed = Work(confirmation_s, num_runs * table.max_epochs * epoch.gpu_s) + retraining + Work(REPORT_S, 0.0)
    most = left.scale(_MAX_RESERVE)
    return Work(max(0.0, min(needed.wall_s, most.wall_s)), max(0.0, min(needed.gpu_s, most.gpu_s)))


def _remove_limits(plan: SweepPlan) -> SweepPlan:
    """Return the plan without the amounts that a budget, which has been removed since, had planned."""
    decisions = plan.clock.decisions
    values: dict[str, Any] = {key: None for key in (_TIME_KEY, _GPU_KEY) if key in decisions.planned_keys}
    if KEYS["num_trials"] in decisions.planned_keys and decisions.asked_trials is not None:
        values[KEYS["num_trials"]] = max(plan.sweep.num_trials, decisions.asked_trials)
    plan = _change_settings(plan, values)
    top_k, seeds = get_asked_confirmation(plan.sweep, decisions)
    return replace(plan, sweep=replace(plan.sweep, confirm=replace(plan.sweep.confirm, top_k=top_k, seeds=seeds)))


def _is_larger(before: BudgetSettings | None, now: BudgetSettings) -> bool:
    """Return whether a budget allows more than the recorded one, in time, in GPU-hours, or until a later moment."""
    return before is not None and any(
        new > old for new, old in zip(_list_limits(now), _list_limits(before), strict=True)
    )


def _list_limits(budget: BudgetSettings) -> tuple[float, float, float]:
    gpu_hours = math.inf if budget.gpu_hours is None else budget.gpu_hours
    return budget.limit_s, budget.parse_finish_by(), gpu_hours


def _change_settings(plan: SweepPlan, values: dict[str, Any]) -> SweepPlan:
    """Return the plan with other values of the sweep's settings; `values`: configuration key -> value."""
    settings = {key.removeprefix("sweep."): value for key, value in values.items()}
    return replace(plan, task=change_task(plan.task, values), sweep=replace(plan.sweep, **settings))
