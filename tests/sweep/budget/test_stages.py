"""What is planned again after the trials, from what they took."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from handpose.report.trial_table import TrialRow, TrialTable
from handpose.sweep.budget.clock import Decisions
from handpose.sweep.budget.planning import Work
from handpose.sweep.budget.stages import (
    REPORT_S,
    count_used_gpu_s,
    estimate_trial_epoch,
    find_retraining_end,
    plan_confirmation,
)
from handpose.sweep.record.settings import ConfirmSettings
from tests.sweep.objectives import METRIC
from tests.sweep.sweeps import make_settings


def make_table(*trials, gpu_hours=0.0, num_slots=2):
    """A table of trials, each of (epochs, seconds)."""
    table = TrialTable(METRIC, "min", num_trials=len(trials), max_epochs=4, num_slots=num_slots, gpu_hours=gpu_hours)
    for number, (epochs, seconds) in enumerate(trials):
        table.rows[number] = TrialRow(number, {"optimizer.lr": 0.1}, "stopped", epochs, seconds=seconds)
    return table


def make_clock(*, left_s, gpu_s=math.inf, seconds=None):
    decisions = Decisions(planned_keys=["sweep.num_trials"])
    return SimpleNamespace(
        deadline=SimpleNamespace(left_s=left_s),
        gpu_s=gpu_s,
        seconds=seconds or {},
        decisions=decisions,
        save=lambda: None,
    )


@pytest.fixture
def plan(tmp_path):
    """Plans the confirmation of trials whose epoch takes 10 s, in two slots; at most 3 finalists with 2 seeds."""

    def planned(clock, *, schedule_epochs=20, given=()):
        sweep = replace(make_settings(tmp_path), confirm=ConfirmSettings(top_k=3, seeds=2))
        return plan_confirmation(make_table((4, 40.0)), sweep, clock, schedule_epochs=schedule_epochs, given=given)

    return planned


def test_an_epoch_is_the_mean_over_the_trials_that_have_reported():
    assert estimate_trial_epoch(make_table((4, 40.0), (1, 30.0), (0, 5.0))) == Work(20.0, 0.0)
    assert estimate_trial_epoch(make_table((0, 5.0))) == Work(0.0, 0.0)


def test_gpu_seconds_are_those_of_all_stages():
    table = make_table((4, 3600.0), (4, 3600.0), gpu_hours=1.0)  # half a GPU each
    assert estimate_trial_epoch(table).gpu_s == pytest.approx(450.0)
    clock = make_clock(left_s=1.0, seconds={"confirmation": 100.0, "retraining": 50.0})
    assert count_used_gpu_s(table, clock, num_retrain_gpus=2) == pytest.approx(3600 + 2 * 0.5 * 100 + 2 * 50)


def test_with_enough_time_everything_is_confirmed(plan):
    budget = plan(make_clock(left_s=1000.0))  # 8 runs of 40 s in two slots, and 20 epochs of 10 s
    assert (budget.top_k, budget.seeds, budget.gpu_hours) == (3, 2, None)
    assert budget.time_s == pytest.approx((1000 - REPORT_S) / 2)


def test_the_retraining_keeps_most_of_a_short_time(plan):
    budget = plan(make_clock(left_s=206.0))  # 200 s, of which 0.7 are kept: 60 s for one round of runs
    assert (budget.top_k, budget.seeds) == (1, 1)


def test_without_time_nothing_is_confirmed(plan):
    budget = plan(make_clock(left_s=26.0))
    assert budget.top_k * budget.seeds == 0


def test_without_a_retraining_the_confirmation_may_take_all(plan):
    assert plan(make_clock(left_s=206.0), schedule_epochs=0).time_s == pytest.approx(200.0)


def test_a_resumed_confirmation_keeps_what_was_chosen(plan):
    clock = make_clock(left_s=1000.0)
    clock.decisions.top_k, clock.decisions.seeds = 1, 1
    assert plan(clock)[:2] == (1, 1)


def test_a_new_plan_keeps_at_least_what_has_been_confirmed(plan):
    clock = make_clock(left_s=26.0)
    clock.decisions.top_k, clock.decisions.seeds = 2, 1
    clock.decisions.reopen_confirmation()
    assert plan(clock)[:2] == (2, 1)


def test_a_confirmation_that_was_planned_smaller_grows_to_what_was_configured_if_it_fits(plan):
    clock = make_clock(left_s=100_000.0)
    clock.decisions.planned_keys = ["sweep.confirm.top_k", "sweep.confirm.seeds"]
    clock.decisions.asked_top_k, clock.decisions.asked_seeds = 5, 4
    assert plan(clock)[:2] == (5, 4)


def test_the_retraining_ends_before_the_report_and_within_the_gpu_hours():
    table = make_table((4, 3600.0), gpu_hours=1.0)
    by_time = find_retraining_end(table, make_clock(left_s=106.0), 2) - time.time()
    assert by_time == pytest.approx(100.0, abs=0.5)
    by_gpus = find_retraining_end(table, make_clock(left_s=1e6, gpu_s=3600.0 + 90.0), 2) - time.time()
    assert by_gpus == pytest.approx(45.0, abs=0.5)


def test_a_retraining_on_cores_uses_no_gpu_hours():
    table, spent = make_table((4, 3600.0), gpu_hours=1.0), {"retraining": 50.0}
    clock = make_clock(left_s=106.0, gpu_s=3600.0, seconds=spent)
    assert find_retraining_end(table, clock, 0) - time.time() == pytest.approx(100.0, abs=0.5)
    assert count_used_gpu_s(table, clock) == 3600


def test_an_end_in_many_years_is_no_end():
    assert find_retraining_end(make_table((4, 40.0)), make_clock(left_s=1e12), 1) == math.inf
    assert find_retraining_end(make_table((4, 40.0)), make_clock(left_s=math.inf, gpu_s=100.0), 0) == math.inf
