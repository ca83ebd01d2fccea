"""Plans a sweep that has a budget: how many trials, epochs, finalists and seeds fit."""

import contextlib
import math
from dataclasses import replace
from typing import Any

from handpose.budget import AUTO_MINUTES, add_offset
from handpose.errors import UserError
from handpose.program import list_given_keys
from handpose.report.budget import format_budget_plan
from handpose.sweep.budget.planning import Amounts, BudgetPlan, Work, list_values, make_budget_plan
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.controller.slots import Slots
from handpose.sweep.driver.resume import SweepTask, change_task
from handpose.sweep.driver.run import run_preflight_alone
from handpose.sweep.plan import SweepPlan, build_plan
from handpose.sweep.preflight.budget_costs import estimate_costs
from handpose.sweep.preflight.checks import check_gpu_hours, list_allowed_epochs
from handpose.sweep.preflight.forecast import forecast_retraining
from handpose.sweep.preflight.probe import ProbeResults
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

    def run_preflight(slots: Slots) -> Slots:
        check_gpu_hours(plan.task.config.budget.gpu_hours, slots)  # the GPUs of a cluster are known only now
        return preflight.run(slots)

    slots = run_preflight_alone(sweep, plan.cluster, run_preflight, stack=stack)
    chosen = build_plan(change_task(plan.task, planner.values), data=plan.data, measured_slots=slots)
    decisions = clock.decisions
    decisions.planned_keys = list(planner.values)
    decisions.reserved_s, decisions.reserved_gpu_s = planner.reserve
    decisions.asked_trials = sweep.num_trials
    decisions.asked_top_k, decisions.asked_seeds = sweep.confirm.top_k, sweep.confirm.seeds
    return replace(chosen, clock=clock)


class _Planner:
    """Plans a sweep while its preflight runs.

    Args:
        plan: the plan of the sweep as configured.
        given: the configuration keys that the user has given.

    Attributes:
        values: configuration key -> planned value.
        reserve: what the trials leave for the confirmation and the retraining.
    """

    def __init__(self, plan: SweepPlan, *, given: list[str]) -> None:
        self.values: dict[str, Any] = {}
        self.reserve = Work(0.0, 0.0)
        self._plan = plan
        self._given = given

    def plan_budget(self, probed: ProbeResults, slots: Slots) -> tuple[SweepSettings, list[str]]:
        """Plan the sweep from the measured points and the slots.

        Returns:
            The planned settings, and lines that describe the plan.
        """
        plan, sweep, clock = self._plan, self._plan.sweep, self._plan.clock
        retraining = None
        if sweep.retrain:
            retraining = forecast_retraining(sweep, plan.recipe, probed, plan.data.size, plan.retrain_settings)
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
            remedy="give the job more time" if clock.deadline.is_end_of_job else "give a larger budget",
            num_points=plan.num_points,
            allowed_epochs=list_allowed_epochs(sweep, self._bind_scheduler, validation_intervals=intervals),
        )
        self._choose_values(chosen, has_gpus=bool(slots.gpus))
        self.reserve = chosen.confirmation + chosen.retraining + costs.fixed
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
            max_epochs=amounts.max_epochs * self._plan.sweep.folds,
            trials_s=chosen.trials.wall_s,
            num_finalists=amounts.top_k,
            num_seeds=amounts.seeds,
            confirmation_s=chosen.confirmation.wall_s,
            retrain_epochs=chosen.retrain_epochs,
            schedule_epochs=schedule_epochs,
            retraining_s=chosen.retraining.wall_s,
            asked=smaller,
        )
