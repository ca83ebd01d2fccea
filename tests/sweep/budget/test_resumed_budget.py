"""What a resumed sweep may still use of its budget. Its trials have used 100 s for 10 epochs of 10 s, one at a time."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from handpose.budget import BudgetSettings
from handpose.errors import UserError
from handpose.sweep import resumed_budget as module
from handpose.sweep.budget.clock import Decisions
from handpose.sweep.budget.stages import REPORT_S, get_asked_confirmation
from handpose.sweep.driver.resume import SweepTask
from handpose.sweep.record.events import (
    EVENTS_FILE,
    EpochReported,
    EventLog,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    TrialSuggested,
)
from handpose.sweep.record.settings import ConfirmSettings
from tests.sweep.objectives import METRIC
from tests.sweep.sweeps import make_settings

PLANNED = ("sweep.num_trials", "sweep.time_budget_s", "sweep.confirm.top_k", "sweep.confirm.seeds")


@dataclass(frozen=True)
class Plan:
    task: Any
    sweep: Any
    clock: Any
    schedule_epochs: int


def make_budget(minutes=None, hours=None, gpu_hours=None, finish_by=None):
    return BudgetSettings(minutes=minutes, hours=hours, gpu_hours=gpu_hours, finish_by=finish_by)


def write_events(folder, *, end, gpus):
    (folder / EVENTS_FILE).unlink(missing_ok=True)
    log = EventLog(folder / EVENTS_FILE)
    log.append(SweepOpened(0.0, 6, gpus))
    for number in range(5):
        log.append(TrialSuggested(20.0 * number, number, {"optimizer.lr": 0.1 + number}))
        log.append(SegmentStarted(20.0 * number, number, 1, 0, None, None, None, None))
        for epoch in (1, 2):
            at, decision = 20.0 * number + 10 * epoch, "continue" if epoch == 1 else "complete"
            log.append(EpochReported(at, number, epoch, {METRIC: 1.0}, "", 0, None, decision, ""))
    log.append(SweepClosed(100.0, end or "interrupted"))
    if end is None:
        log.append(SweepOpened(100.0, 6, gpus))
    log.close()


@pytest.fixture
def limit(tmp_path, monkeypatch):
    """Resumes a sweep with some seconds of the budget left; 60 s of the first plan are reserved.

    The user configured 12 trials and 2 finalists with 2 seeds; 6 trials, and 1 finalist with 1 seed, were planned.
    """

    def limited(
        *, left_s, end=None, overrides=(), planned=PLANNED, before=None, now=None, gpus=0.0, time_budget_s=90.0
    ):
        write_events(tmp_path, end=end, gpus=gpus)
        now = now or make_budget(minutes=5)
        monkeypatch.setattr(module, "list_task_overrides", lambda: list(overrides))
        monkeypatch.setattr(module, "read_recorded_budget", lambda folder: before or make_budget(minutes=5))
        monkeypatch.setattr(module, "instantiate_key", lambda config, key: now)
        sweep = replace(make_settings(tmp_path), num_trials=6, max_epochs=2, time_budget_s=time_budget_s)
        sweep = replace(sweep, confirm=ConfirmSettings(top_k=1, seeds=1))
        config = OmegaConf.create({"sweep": {"num_trials": 6, "time_budget_s": time_budget_s}})
        asked = {"asked_trials": 12, "asked_top_k": 2, "asked_seeds": 2} if planned else {}
        decisions = Decisions(planned_keys=list(planned), reserved_s=60.0, top_k=1, seeds=1, **asked)
        clock = SimpleNamespace(
            is_limited=now.is_limited,
            decisions=decisions,
            deadline=SimpleNamespace(left_s=left_s),
            gpu_s=math.inf if now.gpu_hours is None else 3600 * now.gpu_hours,
            describe_limit=now.describe,
            describe_removal=now.describe_removal,
        )
        task = SweepTask(config, ["sweep.num_trials=6"], [], {}, None)
        return module.limit_resumed_plan(Plan(task, sweep, clock, schedule_epochs=20))

    return limited


def test_the_trials_may_use_what_is_left_besides_the_reserve(limit):
    plan = limit(left_s=110.0)
    assert plan.sweep.time_budget_s == 100 + 50
    assert plan.sweep.num_trials == 6
    assert "sweep.time_budget_s=150.0" in plan.task.overrides
    assert plan.clock.decisions.top_k == 1


@pytest.mark.parametrize("end", ["finished", "spent"])
@pytest.mark.parametrize(
    ("overrides", "now"),
    [([], None), (["budget.minutes=5"], None), (["budget.minutes=3"], make_budget(minutes=3))],
    ids=["no budget given", "the same budget", "a smaller one"],
)
def test_trials_that_have_ended_are_not_continued_unless_the_budget_is_larger(limit, end, overrides, now):
    plan = limit(left_s=5.0, end=end, overrides=overrides, now=now)
    assert plan.sweep.time_budget_s == 90
    assert (plan.clock.decisions.top_k, plan.clock.decisions.seeds) == (1, 1)


def test_trials_that_go_on_with_another_stop_when_have_only_what_is_left(limit):
    """The first plan gave them 400 s, but the confirmation and the retraining have been done in that time."""
    plan = limit(left_s=5.0, end="spent", overrides=["sweep.stop_when=0.01"], time_budget_s=400.0)
    assert plan.sweep.time_budget_s == 100 + 1
    plan = limit(left_s=110.0, end="spent", overrides=["sweep.stop_when=null"], time_budget_s=400.0)
    assert plan.sweep.time_budget_s == 100 + 50


def test_a_larger_budget_gives_more_trials_and_keeps_time_for_what_was_configured(limit):
    plan = limit(left_s=1000.0, end="spent", overrides=["budget.minutes=20"], now=make_budget(minutes=20))
    reserve_s = 6 * 2 * 10 + 20 * 10 + REPORT_S  # 3 configurations with 2 seeds, of 2 epochs; 20 epochs; the report
    assert plan.sweep.time_budget_s == 100 + 1000 - reserve_s
    assert plan.sweep.num_trials == math.floor(5 * plan.sweep.time_budget_s / 100)  # at the pace so far
    decisions = plan.clock.decisions
    assert (decisions.top_k, decisions.least_top_k, decisions.least_seeds) == (None, 1, 1)
    assert decisions.reserved_s == reserve_s
    assert get_asked_confirmation(plan.sweep, decisions) == (2, 2)


def test_the_reserve_of_a_slightly_larger_budget_is_a_part_of_it(limit):
    plan = limit(left_s=100.0, end="spent", overrides=["budget.minutes=6"], now=make_budget(minutes=6))
    assert plan.sweep.time_budget_s == pytest.approx(100 + 30)


@pytest.mark.parametrize(
    "now", [make_budget(hours=1), make_budget(minutes=5, gpu_hours=3), make_budget(finish_by="2126-12-04T18:00")]
)
def test_a_budget_is_larger_if_any_of_its_limits_is(limit, now):
    before = make_budget(minutes=5, gpu_hours=2, finish_by="2026-12-04T18:00")
    plan = limit(left_s=1000.0, end="spent", overrides=["budget.x=1"], before=before, now=now)
    assert plan.clock.decisions.top_k is None


def test_a_sweep_that_was_started_without_a_budget_is_limited_too(limit):
    plan = limit(left_s=1000.0, planned=(), overrides=["budget.hours=1"], before=make_budget(), time_budget_s=None)
    assert plan.sweep.time_budget_s == 100 + 1000 - (2 * 2 * 10 + 20 * 10 + REPORT_S)
    assert plan.sweep.num_trials == 6


def test_a_smaller_limit_of_the_user_wins_and_a_larger_one_does_not(limit):
    planned = ("sweep.num_trials",)
    assert limit(left_s=1000.0, planned=planned, time_budget_s=120.0).sweep.time_budget_s == 120
    assert limit(left_s=1000.0, planned=planned, time_budget_s=7200.0).sweep.time_budget_s < 1100
    plan = limit(left_s=1000.0, overrides=["sweep.time_budget_s=120"], time_budget_s=120.0)
    assert plan.sweep.time_budget_s == 120
    assert "sweep.time_budget_s" not in plan.clock.decisions.planned_keys


def test_a_confirmation_that_is_given_is_planned_again(limit):
    decisions = limit(left_s=110.0, overrides=["sweep.confirm.seeds=5"]).clock.decisions
    assert (decisions.top_k, decisions.seeds) == (None, None)
    assert "sweep.confirm.seeds" not in decisions.planned_keys


def test_more_trials_than_the_budget_has_time_for_are_an_error_that_says_what_to_do(limit):
    with pytest.raises(
        UserError, match=r"^budget\.hours=1 has no time left for sweep\.num_trials=6; .*budget\.hours=null"
    ):
        limit(
            left_s=50.0,
            end="spent",
            overrides=["sweep.num_trials=6"],
            before=make_budget(hours=1),
            now=make_budget(hours=1),
        )


def test_more_trials_use_the_time_that_is_left(limit):
    plan = limit(left_s=110.0, end="finished", overrides=["sweep.num_trials=6"])
    assert plan.sweep.time_budget_s == 100 + 50


def test_a_number_of_trials_that_is_given_with_a_larger_budget_is_kept(limit):
    plan = limit(
        left_s=1000.0, end="spent", overrides=["budget.minutes=20", "sweep.num_trials=6"], now=make_budget(minutes=20)
    )
    assert plan.sweep.num_trials == 6
    assert plan.sweep.time_budget_s > 500


def test_without_a_budget_the_amounts_that_were_configured_apply(limit):
    plan = limit(left_s=math.inf, end="spent", overrides=["budget.minutes=null"], now=make_budget())
    assert (plan.sweep.time_budget_s, plan.sweep.num_trials) == (None, 12)
    assert plan.task.config.sweep.time_budget_s is None
    assert (plan.sweep.confirm.top_k, plan.sweep.confirm.seeds) == (2, 2)


def test_a_larger_budget_of_gpu_hours_is_left_to_the_trials_but_for_a_reserve(limit):
    before, now = make_budget(gpu_hours=0.1), make_budget(gpu_hours=1)
    plan = limit(left_s=math.inf, end="spent", overrides=["budget.gpu_hours=1"], before=before, now=now, gpus=1.0)
    reserve_s = 6 * 2 * 10 + 20 * 10
    assert plan.sweep.gpu_hours == pytest.approx(1 - reserve_s / 3600, abs=1e-3)
    assert plan.sweep.time_budget_s == 90  # there is no limit of time, so the value stays


def test_a_budget_that_is_larger_but_spent_already_reserves_nothing(limit):
    plan = limit(left_s=-50.0, end="spent", overrides=["budget.minutes=6"], now=make_budget(minutes=6))
    assert plan.clock.decisions.reserved_s == 0
    assert plan.sweep.time_budget_s > 0
