"""For which sweeps `budget.minutes=auto` is five minutes."""

import math
from datetime import datetime
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from handpose.errors import UserError
from handpose.sweep import budgeted_plan as module
from handpose.sweep.budget.planning import KEYS, Amounts, BudgetPlan, Work
from handpose.sweep.driver.resume import SweepTask
from tests.sweep.sweeps import make_settings


@pytest.fixture
def resolve(monkeypatch):
    def resolved(*given, data="synthetic", preflight="brief", **budget):
        monkeypatch.setattr(module, "list_given_keys", lambda: list(given))
        values = {"minutes": "auto", "hours": None, "gpu_hours": None, "finish_by": None} | budget
        config = OmegaConf.create({"budget": values, "sweep": {"preflight": preflight}})
        task = SweepTask(config, [], [], {"data": data}, None)
        return module.resolve_auto_budget(task).config.budget.minutes

    return resolved


def test_a_first_run_has_five_minutes(resolve):
    assert resolve() == 5
    assert resolve("sweep.name", "search_space") == 5


@pytest.mark.parametrize("key", ["sweep.num_trials", "sweep.max_epochs", "sweep.time_budget_s", "trainer.max_epochs"])
def test_who_says_how_much_to_train_has_no_budget(resolve, key):
    assert resolve(key) is None


def test_other_data_and_other_budgets_have_none(resolve):
    assert resolve(data="freihand") is None
    assert resolve(hours=8.0) is None
    assert resolve(finish_by="2026-12-04T18:00") is None


@pytest.mark.parametrize("preflight", ["only", "off"])
def test_a_run_that_is_not_planned_has_none(resolve, preflight):
    assert resolve(preflight=preflight) is None


def test_a_local_time_is_recorded_with_its_offset():
    config = OmegaConf.create({"budget": {"finish_by": "2030-05-06T07:08"}})
    task = module.resolve_finish_by(SweepTask(config, ["budget.finish_by=2030-05-06T07:08", "seed=1"], [], {}, None))
    local = datetime(2030, 5, 6, 7, 8).astimezone().isoformat()
    assert task.config.budget.finish_by == local
    assert task.overrides == ["seed=1", f"budget.finish_by={local}"]
    assert module.resolve_finish_by(task) is task


def test_a_number_of_minutes_is_kept(resolve):
    assert resolve("sweep.num_trials", minutes=3.0) == 3


def test_a_budget_without_the_preflight_is_an_error(tmp_path):
    clock = SimpleNamespace(describe_limit=lambda: "budget.minutes=5")
    plan = SimpleNamespace(sweep=make_settings(tmp_path, preflight="off"), clock=clock)
    with pytest.raises(UserError, match=r"^budget\.minutes=5 needs the preflight, .* leave out sweep\.preflight=off$"):
        module.plan_within_budget(plan, None)


@pytest.mark.parametrize(
    ("left", "limits"),
    [
        (Work(0.01, math.inf), {"sweep.time_budget_s": 0.1}),
        (Work(math.inf, 0.01), {"sweep.gpu_hours": 1e-4}),
        (Work(100.04, 7200.0), {"sweep.time_budget_s": 100.0, "sweep.gpu_hours": 2.0}),
    ],
)
def test_the_limits_of_the_trials_are_above_zero_and_finite(left, limits):
    planner = module._Planner(None, given=list(KEYS.values()))
    nothing = Work(0.0, 0.0)
    planner._choose_values(BudgetPlan(Amounts(1, 1, 0, 0), nothing, nothing, 0, nothing, left), has_gpus=True)
    assert planner.values == limits
