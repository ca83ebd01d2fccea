"""What the terminal says of a budget."""

from handpose.report.budget import format_budget_plan, format_budget_use

PLAN = {
    "limit": "budget.minutes=5",
    "used_s": 40.0,
    "num_trials": 8,
    "max_epochs": 3,
    "trials_s": 80.0,
    "num_finalists": 1,
    "num_seeds": 2,
    "confirmation_s": 40.0,
    "retrain_epochs": 7.9,
    "schedule_epochs": 20,
    "retraining_s": 120.0,
    "asked": {},
}


def test_the_plan_names_all_parts():
    assert format_budget_plan(**PLAN) == (
        "the budget  budget.minutes=5, of which 40 s are used: up to 8 trials of at most 3 epochs in 80 s, "
        "1 finalist confirmed with 2 seeds in 40 s, 7 of 20 epochs of the retraining in 2 min"
    )


def test_what_is_smaller_than_configured_is_named_with_its_configured_value():
    _, line = format_budget_plan(**PLAN | {"asked": {"sweep.num_trials": 12, "sweep.max_epochs": 6}}).splitlines()
    assert line.strip() == (
        "reduced to fit; configured are sweep.num_trials=12, sweep.max_epochs=6, which need a larger budget"
    )


def test_a_retraining_that_fits_has_all_its_epochs():
    assert "all 20 epochs of the retraining" in format_budget_plan(**PLAN | {"retrain_epochs": 20.0})


def test_what_is_not_done_is_not_named():
    line = format_budget_plan(**PLAN | {"num_seeds": 0, "schedule_epochs": 0})
    assert "confirmed" not in line
    assert "retraining" not in line


def test_the_time_of_each_part_adds_up_to_the_whole():
    seconds = {"preparation": 41.2, "trials": 89.0, "confirmation": 0.1, "retraining": 115.0}
    assert format_budget_use(seconds, limit="budget.minutes=5") == (
        "time        4:05 of budget.minutes=5: preparation 0:41, trials 1:29, retraining 1:55"
    )
