"""What fits into a budget, with costs for which it can be computed by hand."""

import itertools
import math

import pytest

from handpose.errors import UserError
from handpose.sweep.budget.planning import (
    MIN_TRIALS,
    RETRAIN_SHARE,
    SHORT_RETRAIN_SHARE,
    Amounts,
    Costs,
    Work,
    choose_confirmation,
    make_budget_plan,
)

ASKED = Amounts(num_trials=12, max_epochs=6, top_k=3, seeds=2)


def make_costs(*, epoch_s=1.0, gpus=0.0, fixed_s=0.0, num_retrain_epochs=20):
    """Costs of one slot without early stopping: every epoch takes the same time."""

    def cost(num_runs, max_epochs):
        seconds = num_runs * max_epochs * epoch_s
        return Work(seconds, seconds * gpus)

    return Costs(
        trials=lambda amounts: cost(amounts.num_trials, amounts.max_epochs),
        confirmation=lambda amounts: cost((amounts.top_k + 1) * amounts.seeds, amounts.max_epochs),
        retrain_epoch=Work(epoch_s, epoch_s * gpus),
        num_retrain_epochs=num_retrain_epochs,
        fixed=Work(fixed_s, 0.0),
    )


def plan(left_s, *, left_gpu_s=math.inf, asked=ASKED, given=(), num_points=None, allowed_epochs=None, **costs):
    return make_budget_plan(
        Work(left_s, left_gpu_s),
        asked,
        make_costs(**costs),
        given=given,
        described="budget.minutes=5",
        num_points=num_points,
        allowed_epochs=allowed_epochs,
    )


def test_what_fits_exactly_is_not_changed():
    # 12 x 6 epochs of trials, 8 x 6 of the confirmation, 20 of the retraining, and 10 s for the rest
    chosen = plan(72 + 48 + 20 + 10, fixed_s=10)
    assert chosen.amounts == ASKED
    assert chosen.retrain_epochs == 20
    assert chosen.trials_limit.wall_s == 72


def test_more_time_gives_more_trials():
    chosen = plan(72 + 48 + 20 + 6 * 100)
    assert chosen.amounts == ASKED._replace(num_trials=112)
    assert plan(10_000, num_points=50).amounts.num_trials == 50
    assert plan(10_000, given=["sweep.num_trials"]).amounts == ASKED


def test_finalists_become_fewer_first_then_seeds_then_trials_then_epochs():
    seen = []
    for left_s in range(140, 10, -1):
        amounts = plan(left_s).amounts
        if not seen or seen[-1] != amounts:
            seen.append(amounts)
    assert seen[:3] == [ASKED, Amounts(12, 6, 2, 2), Amounts(12, 6, 2, 1)]
    for before, after in itertools.pairwise(seen):
        assert all(now <= then for now, then in zip(after, before, strict=True))
    first_fewer_epochs = next(amounts for amounts in seen if amounts.max_epochs < 6)
    assert first_fewer_epochs.num_trials == MIN_TRIALS


@pytest.mark.parametrize("left_s", [40, 60, 90, 130, 200])
def test_the_plan_fits_and_the_retraining_has_its_share(left_s):
    chosen = plan(left_s, num_retrain_epochs=10**6)
    assert chosen.trials.wall_s + chosen.confirmation.wall_s + chosen.retraining.wall_s == pytest.approx(left_s)
    assert chosen.retraining.wall_s >= RETRAIN_SHARE * left_s


def test_eight_trials_are_kept_at_the_expense_of_the_retraining_down_to_its_smallest_share():
    # 8 x 2 epochs of trials and 2 x 2 of the confirmation
    chosen = plan(30.0)
    assert chosen.amounts == Amounts(num_trials=MIN_TRIALS, max_epochs=2, top_k=1, seeds=1)
    assert SHORT_RETRAIN_SHARE * 30 <= chosen.retraining.wall_s < RETRAIN_SHARE * 30
    assert plan(28.0).amounts.num_trials < MIN_TRIALS


def test_the_values_of_the_user_are_kept():
    chosen = plan(100, given=["sweep.num_trials", "sweep.confirm.top_k"])
    assert (chosen.amounts.num_trials, chosen.amounts.top_k) == (12, 3)
    assert chosen.amounts.max_epochs < 6


def test_values_of_the_user_that_do_not_fit_are_refused_with_the_time_that_they_need():
    asked = ASKED._replace(num_trials=40, max_epochs=10)
    given = ["sweep.num_trials", "sweep.max_epochs"]
    with pytest.raises(UserError, match=r"budget.minutes=5 leaves 300 s .* sweep.num_trials=40, sweep.max_epochs=10"):
        plan(300, asked=asked, given=given)
    with pytest.raises(UserError, match="at least about 401 s are needed"):  # without a confirmation
        plan(300, asked=asked, given=given)


def test_a_slow_machine_gets_a_plan_while_an_epoch_of_a_trial_and_of_the_retraining_fit():
    assert plan(3.0).amounts == Amounts(2, 1, 0, 0)
    assert plan(2.5).amounts == Amounts(1, 1, 0, 0)
    assert plan(2.0).retrain_epochs == 1
    assert plan(2.0).trials_limit.wall_s > 0


@pytest.mark.parametrize("left_s", [-100.0, 0.0, 1.5, 9.0, 11.9])
def test_what_does_not_fit_is_refused_with_the_time_that_the_smallest_plan_needs(left_s):
    with pytest.raises(
        UserError,
        match=r"for training, into which the smallest plan, 1 trial of 1 epoch and one epoch of the retraining, "
        r"does not fit: at least about 12 s are needed; give a larger budget$",
    ):
        plan(left_s, fixed_s=10)


def test_too_few_gpu_hours_are_refused_like_too_little_time():
    with pytest.raises(
        UserError, match=r"GPU-hours, into which the smallest plan.* does not fit: at least about 0.0011"
    ):
        plan(10_000, left_gpu_s=3.9, gpus=2)
    assert plan(10_000, left_gpu_s=4.0, gpus=2).trials_limit.gpu_s > 0


def test_every_planned_limit_is_above_zero():
    for tenths in range(20, 400):
        assert plan(tenths / 10, num_retrain_epochs=100).trials_limit.wall_s > 0


def test_a_confirmation_that_the_user_gives_is_kept_in_the_smallest_plan():
    assert plan(6.0, given=["sweep.confirm.seeds"]).amounts == Amounts(1, 1, 1, 2)
    with pytest.raises(UserError, match=r"sweep.confirm.seeds=2 does not fit: at least about 6 s"):
        plan(5.0, given=["sweep.confirm.seeds"])  # a trial, two configurations with two seeds, and an epoch


def test_values_of_the_user_that_make_the_plan_no_larger_are_not_blamed():
    with pytest.raises(UserError, match="the smallest plan"):
        plan(1.0, given=["sweep.confirm.top_k"], asked=ASKED._replace(top_k=0))


def test_only_epochs_that_the_scheduler_and_the_validation_allow_are_planned():
    for left_s in range(6, 140):
        assert plan(left_s, allowed_epochs=[2, 4, 6]).amounts.max_epochs in (2, 4, 6)
    assert plan(4.0, allowed_epochs=[3, 4, 5, 6]).amounts == Amounts(1, 3, 0, 0)
    with pytest.raises(UserError, match=r"at least about 4 s .* or options of the scheduler .* fewer than 3 epochs"):
        plan(3.5, allowed_epochs=[3, 4, 5, 6])


def test_no_more_trials_are_planned_than_the_space_has_points():
    asked = ASKED._replace(max_epochs=3)
    chosen = plan(4 * 3 + 8 * 3 + 20, asked=asked, num_points=4)  # 12 trials would not fit
    assert chosen.amounts == asked._replace(num_trials=4)
    assert chosen.retrain_epochs == 20


def test_gpu_hours_limit_like_time():
    # Two GPUs: 140 s of everything are 280 GPU-seconds.
    assert plan(10_000, left_gpu_s=280, gpus=2, given=["sweep.num_trials"]).amounts == ASKED
    chosen = plan(10_000, left_gpu_s=200, gpus=2)
    assert chosen.amounts != ASKED
    total = chosen.trials.gpu_s + chosen.confirmation.gpu_s + chosen.retraining.gpu_s
    assert total <= 200
    with pytest.raises(UserError, match=r"leaves 0.056 GPU-hours, into which sweep.num_trials=400 does not fit"):
        plan(10_000, left_gpu_s=200, gpus=2, asked=ASKED._replace(num_trials=400), given=["sweep.num_trials"])


@pytest.mark.parametrize(
    ("left_s", "chosen"),
    [
        (100, (3, 2)),  # 8 runs of 6 s in two slots take 24 s, and 70 s are kept for the retraining
        (70, (2, 2)),
        (40, (2, 1)),
        (22, (1, 1)),
        (10, (0, 0)),
    ],
)
def test_the_confirmation_is_planned_again_from_what_is_left(left_s, chosen):
    found = choose_confirmation(
        Work(left_s, math.inf), ASKED, run=Work(6, 0), num_slots=2, retraining=Work(500, 0), given=()
    )
    assert (found.top_k, found.seeds) == chosen


def test_a_confirmation_that_the_user_asks_for_is_kept():
    arguments = {"run": Work(6, 0), "num_slots": 2, "retraining": Work(500, 0)}
    found = choose_confirmation(Work(5, math.inf), ASKED, given=["sweep.confirm.top_k"], **arguments)
    assert found == ASKED
