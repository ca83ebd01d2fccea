"""What a resumed sweep may still use of its budget."""

import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from handpose.errors import UserError
from handpose.sweep import budgeted_plan as module
from handpose.sweep.budget.clock import Decisions
from handpose.sweep.driver.resume import SweepTask
from handpose.sweep.record.events import EVENTS_FILE, EventLog, SweepClosed, SweepOpened
from tests.sweep.sweeps import make_settings


@dataclass(frozen=True)
class Plan:
    task: Any
    sweep: Any
    clock: Any


@pytest.fixture
def limit(tmp_path, monkeypatch):
    """Resumes a sweep whose trials have used 100 s, with some seconds of the budget left and 60 s reserved."""

    def limited(
        *, left_s, end=None, overrides=(), planned=("sweep.num_trials", "sweep.time_budget_s"), is_limited=True
    ):
        log = EventLog(tmp_path / EVENTS_FILE)
        log.append(SweepOpened(0.0, 6) if end is None else SweepClosed(100.0, end))
        if end is None:
            log.append(SweepOpened(100.0, 6))
        log.close()
        monkeypatch.setattr(module, "list_task_overrides", lambda: list(overrides))
        sweep = replace(make_settings(tmp_path), num_trials=6, time_budget_s=90.0)
        config = OmegaConf.create({"sweep": {"num_trials": 6, "time_budget_s": 90.0}})
        decisions = Decisions(planned_keys=list(planned), reserved_s=60.0, top_k=1, seeds=1)
        clock = SimpleNamespace(
            is_limited=is_limited,
            decisions=decisions,
            deadline=SimpleNamespace(at=time.time() + left_s, left_s=left_s),
            describe_limit=lambda: "budget.minutes=5",
        )
        task = SweepTask(config, ["sweep.num_trials=6"], [], {}, None)
        return module.limit_resumed_plan(Plan(task, sweep, clock))

    return limited


def test_the_trials_may_use_what_is_left_besides_the_reserve(limit):
    plan = limit(left_s=110.0)
    assert plan.sweep.time_budget_s == 100 + 50
    assert plan.sweep.num_trials == 6
    assert "sweep.time_budget_s=150.0" in plan.task.overrides
    assert plan.clock.decisions.top_k == 1


@pytest.mark.parametrize("end", ["finished", "spent"])
def test_trials_that_have_ended_are_not_continued(limit, end):
    assert limit(left_s=110.0, end=end).sweep.time_budget_s == 90


def test_a_larger_budget_gives_more_trials_at_the_pace_so_far_and_another_confirmation(limit):
    plan = limit(left_s=260.0, end="spent", overrides=["budget.minutes=10"])
    assert plan.sweep.time_budget_s == 300
    assert plan.sweep.num_trials == 18
    assert plan.task.config.sweep.num_trials == 18
    assert plan.clock.decisions.top_k is None


def test_more_trials_than_the_budget_has_time_for_are_an_error_that_says_what_to_do(limit):
    with pytest.raises(UserError, match=r"^budget\.minutes=5 has no time left for sweep\.num_trials=6; also"):
        limit(left_s=50.0, end="spent", overrides=["sweep.num_trials=6"])


def test_more_trials_use_the_time_that_is_left(limit):
    plan = limit(left_s=110.0, end="finished", overrides=["sweep.num_trials=6"])
    assert plan.sweep.time_budget_s == 100 + 50


def test_a_number_of_trials_that_is_given_with_a_larger_budget_is_kept(limit):
    plan = limit(left_s=260.0, end="spent", overrides=["budget.minutes=10", "sweep.num_trials=6"])
    assert (plan.sweep.num_trials, plan.sweep.time_budget_s) == (6, 300)


def test_without_a_budget_the_planned_time_limit_no_longer_applies(limit):
    plan = limit(left_s=1.0, end="spent", overrides=["budget.minutes=null", "sweep.num_trials=6"], is_limited=False)
    assert plan.sweep.time_budget_s is None
    assert plan.task.config.sweep.time_budget_s is None


def test_the_number_of_trials_that_the_user_gave_is_kept(limit):
    plan = limit(left_s=260.0, end="spent", overrides=["budget.minutes=10"], planned=["sweep.time_budget_s"])
    assert plan.sweep.num_trials == 6
