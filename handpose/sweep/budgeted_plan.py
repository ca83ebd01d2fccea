"""Plans a sweep that has a budget: how many trials, epochs, finalists and seeds fit."""

import contextlib
import math
from dataclasses import replace
from typing import Any

from handpose.budget import AUTO_MINUTES, add_offset
from handpose.config import override_key
from handpose.errors import UserError
from handpose.program import list_given_keys, list_task_overrides
from handpose.report.budget import format_budget_plan
from handpose.sweep.budget.planning import Amounts, BudgetPlan, Work, list_values, make_budget_plan
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.controller.slots import Slots
from handpose.sweep.driver.resume import SweepTask, change_task
from handpose.sweep.driver.run import run_preflight_alone
from handpose.sweep.plan import SweepPlan, build_plan
from handpose.sweep.preflight.budget_costs import estimate_costs
from handpose.sweep.preflight.checks import list_allowed_epochs
from handpose.sweep.preflight.forecast import forecast_retraining
from handpose.sweep.preflight.probe import ProbeResults
from handpose.sweep.record.events import EVENTS_FILE, SweepClosed, read_events
from handpose.sweep.record.settings import SweepSettings

_PREFLIGHT_SHARE = 0.1
"""Part of the time left in which a brief preflight may start to try further points."""

_AUTO_UNLESS_GIVEN = ("sweep.num_trials", "sweep.max_epochs", "sweep.time_budget_s", "sweep.gpu_hours", "trainer.")
"""With one of these keys on the command line, the user has said how much to train."""


def resolve_auto_budget(task: SweepTask) -> SweepTask:
    """Return a new sweep's task with the value that `budget.minutes=auto` stands for.

    It is 5 for synthetic hands if the user has not said how much to train, so that a first run takes five minutes. It
    is no limit otherwise, and if there is no brief preflight, from which a sweep is planned.
    """
    budget = task.config.budget
    if budget.minutes != "auto":
        return task
    has_other = any(budget[name] is not None for name in ("hours", "gpu_hours", "finish_by"))
    has_said = any(key.startswith(_AUTO_UNLESS_GIVEN) for key in list_given_keys())
    can_plan = task.config.sweep.preflight == "brief"  # `only` measures as long as it takes, and `off` measures nothing
    is_first_run = task.choices.get("data") == "synthetic" and can_plan and not has_other and not has_said
    return change_task(task, {"budget.minutes": AUTO_MINUTES if is_first_run else None})


def resolve_finish_by(task: SweepTask) -> SweepTask:
    """Return the task with the offset from UTC in `budget.finish_by`: the sweep may be resumed in another time zone."""
    finish_by = task.config.budget.finish_by
    if finish_by is None or add_offset(finish_by) == finish_by:
        return task
    return change_task(task, {"budget.finish_by": add_offset(finish_by)})


def plan_within_budget(plan: SweepPlan, stack: contextlib.ExitStack) -> SweepPlan:
    """Run the preflight of a new sweep, and choose amounts of work that fit into its budget.

    Args:
        plan: the plan of the sweep as configured.
        stack: keeps Ray running for the sweep until it is closed.

    Returns:
        The plan with these amounts. Its preflight has been run.

    Raises:
        UserError: the preflight is off, or what the user asks for does not fit.
    """
    sweep, clock = plan.sweep, plan.clock
    if sweep.preflight == "off":
        raise UserError(
            f"{clock.describe_limit()} needs the preflight, which measures what fits; leave out sweep.preflight=off"
        )
    planner = _Planner(plan, given=list_given_keys())
    preflight = plan.make_preflight(plan.trial_function)
    brief_s = min(preflight.brief_s, _PREFLIGHT_SHARE * clock.deadline.left_s)
    preflight = replace(preflight, brief_s=brief_s, plan_budget=planner.plan_budget)
    slots = run_preflight_alone(sweep, plan.cluster, preflight.run, stack=stack)
    chosen = build_plan(change_task(plan.task, planner.values), data=plan.data, measured_slots=slots)
    clock.decisions.planned_keys = list(planner.values)
    clock.decisions.reserved_s = planner.reserved_s
    return replace(chosen, clock=clock)


def limit_resumed_plan(plan: SweepPlan) -> SweepPlan:
    """Return the plan of a resumed sweep, whose trials may take what is left of its budget now.

    If the trials have used up their part of the budget, they are not continued, unless the budget has become larger.
    Then there are more of them, and what is confirmed is planned again. Without a budget, the limits of the trials that
    were planned no longer apply.

    Raises:
        UserError: the user asks for more trials, and the budget has no time for them.
    """
    clock, events = plan.clock, read_events(plan.sweep.path / EVENTS_FILE)
    planned, given = clock.decisions.planned_keys, [override_key(item) for item in list_task_overrides()]
    if not planned or not events:
        return plan
    if not clock.is_limited:
        limits = ("sweep.time_budget_s", "sweep.gpu_hours")
        return _change_settings(plan, {key: None for key in limits if key in planned and key not in given})
    is_larger, wants_more = any(key.startswith("budget.") for key in given), "sweep.num_trials" in given
    is_closed = isinstance(events[-1], SweepClosed) and events[-1].reason in ("finished", "spent")
    if is_closed and not is_larger and not wants_more:
        return plan
    left_s = clock.deadline.left_s - clock.decisions.reserved_s
    if wants_more and left_s <= 0:
        raise UserError(
            f"{clock.describe_limit()} has no time left for sweep.num_trials={plan.sweep.num_trials}; also give a "
            "larger budget, which counts from the start of the sweep, or budget.minutes=null for none"
        )
    limit_s = events[-1].at + max(1.0, left_s)
    values: dict[str, Any] = {"sweep.time_budget_s": round(limit_s, 1)}
    if is_larger:
        clock.decisions.top_k = clock.decisions.seeds = None  # as many as fit now
        if "sweep.num_trials" in planned and not wants_more and events[-1].at:
            num_more = math.floor(plan.sweep.num_trials * limit_s / events[-1].at)  # at the pace so far
            values["sweep.num_trials"] = max(plan.sweep.num_trials, num_more)
    return _change_settings(plan, values)


def _change_settings(plan: SweepPlan, values: dict[str, Any]) -> SweepPlan:
    """Return the plan with other values of the sweep's settings; `values`: configuration key -> value."""
    settings = {key.removeprefix("sweep."): value for key, value in values.items()}
    return replace(plan, task=change_task(plan.task, values), sweep=replace(plan.sweep, **settings))


class _Planner:
    """Plans a sweep while its preflight runs.

    Args:
        plan: the plan of the sweep as configured.
        given: the configuration keys that the user has given.

    Attributes:
        values: configuration key -> planned value.
        reserved_s: seconds that the trials leave for the confirmation and the retraining.
    """

    def __init__(self, plan: SweepPlan, *, given: list[str]) -> None:
        self.values: dict[str, Any] = {}
        self.reserved_s = 0.0
        self._plan = plan
        self._given = given

    def plan_budget(self, probed: ProbeResults, slots: Slots) -> tuple[SweepSettings, list[str]]:
        """Plan the sweep from the measured points and the slots.

        Returns:
            The planned settings, and lines that describe the plan.
        """
        plan, sweep, clock = self._plan, self._plan.sweep, self._plan.clock
        use_val = plan.task.config.retrain.use_val
        retraining = None
        if sweep.retrain:
            retraining = forecast_retraining(sweep, plan.recipe, probed, plan.data.size, use_val=use_val)
        costs = estimate_costs(sweep, probed, slots, bind_scheduler=self._bind_scheduler, retraining=retraining)
        num_trials = sweep.num_trials if plan.num_points is None else min(sweep.num_trials, plan.num_points)
        asked = Amounts(num_trials, sweep.max_epochs, sweep.confirm.top_k, sweep.confirm.seeds)
        intervals = [cost.validation_interval for cost in probed.costs]
        chosen = make_budget_plan(
            Work(clock.deadline.left_s, clock.gpu_s),
            asked,
            costs,
            given=self._given,
            described=clock.describe_limit(),
            num_points=plan.num_points,
            allowed_epochs=list_allowed_epochs(sweep, self._bind_scheduler, validation_intervals=intervals),
        )
        self._choose_values(chosen, has_gpus=bool(slots.gpus))
        self.reserved_s = chosen.confirmation.wall_s + chosen.retraining.wall_s + costs.fixed.wall_s
        amounts = chosen.amounts
        planned = replace(
            sweep,
            num_trials=amounts.num_trials,
            max_epochs=amounts.max_epochs,
            confirm=replace(sweep.confirm, top_k=amounts.top_k, seeds=amounts.seeds),
        )
        return planned, [self._describe(chosen, asked, schedule_epochs=costs.num_retrain_epochs)]

    def _bind_scheduler(self, sweep: SweepSettings) -> Any:
        plan = self._plan
        return bind_scheduler(plan.scheduler_class, sweep, plan.task.space)

    def _choose_values(self, chosen: BudgetPlan, *, has_gpus: bool) -> None:
        planned: dict[str, Any] = list_values(chosen.amounts)
        if math.isfinite(chosen.trials_limit.wall_s):
            planned["sweep.time_budget_s"] = max(0.1, round(chosen.trials_limit.wall_s, 1))  # never rounded to 0
        if has_gpus and math.isfinite(chosen.trials_limit.gpu_s):
            planned["sweep.gpu_hours"] = max(1e-4, round(chosen.trials_limit.gpu_s / 3600, 4))
        self.values = {key: value for key, value in planned.items() if key not in self._given}

    def _describe(self, chosen: BudgetPlan, asked: Amounts, *, schedule_epochs: int) -> str:
        amounts, clock = chosen.amounts, self._plan.clock
        now = list_values(amounts)
        smaller = {key: before for key, before in list_values(asked).items() if now[key] < before}
        return format_budget_plan(
            limit=clock.describe_limit(),
            used_s=clock.count_used_s(),
            num_trials=amounts.num_trials,
            max_epochs=amounts.max_epochs,
            trials_s=chosen.trials.wall_s,
            num_finalists=amounts.top_k,
            num_seeds=amounts.seeds,
            confirmation_s=chosen.confirmation.wall_s,
            retrain_epochs=chosen.retrain_epochs,
            schedule_epochs=schedule_epochs,
            retraining_s=chosen.retraining.wall_s,
            asked=smaller,
        )
