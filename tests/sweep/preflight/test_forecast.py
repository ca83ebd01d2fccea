"""What a sweep will take, held against sums that can be done by hand."""

import math

import pytest

from handpose.schedulers.asha import Asha
from handpose.schedulers.freeze_thaw import FreezeThaw
from handpose.schedulers.scheduler import Fifo, SegmentStart
from handpose.sweep.preflight.forecast import forecast_sweep


def compute_forecast(make_scheduler, *, num_trials=12, max_epochs=6, num_slots=2, validation_interval=1):
    return forecast_sweep(
        make_scheduler,
        num_trials=num_trials,
        max_epochs=max_epochs,
        num_slots=num_slots,
        validation_interval=validation_interval,
        params=[{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}],
    )


@pytest.mark.parametrize(("num_trials", "num_slots"), [(12, 2), (12, 5), (3, 8), (1, 1)])
def test_without_early_stopping_every_epoch_is_trained(num_trials, num_slots):
    plan = compute_forecast(Fifo, num_trials=num_trials, num_slots=num_slots)
    assert plan.epochs == 6 * num_trials
    assert plan.rounds == 6 * math.ceil(num_trials / num_slots)
    assert plan.segments == num_trials
    assert plan.most_paused == 0


class Halving(Fifo):
    """Synchronous successive halving of eight trials (Jamieson and Talwalkar 2016): rungs 1, 2, 4, of 8 epochs."""

    rungs = (1, 2, 4)
    needs_checkpoints = True

    def __init__(self):
        self.waiting = []
        self.left = []

    def on_trial_result(self, trial, epoch, loss):
        if epoch == 8:
            return "continue"
        self.waiting.append((loss, trial))
        if len(self.waiting) == 8 // epoch:
            self.left = [number for _, number in sorted(self.waiting)[: 4 // epoch]]
            self.waiting = []
        return "pause"

    def choose_trial_to_resume(self, *, can_start_trial):
        return SegmentStart(self.left[0]) if self.left else None

    def on_trial_resume(self, start):
        self.left.remove(start.trial)


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_successive_halving_trains_the_sum_of_its_rungs(num_slots):
    class Exact(Halving):
        def on_trial_result(self, trial, epoch, loss):
            return super().on_trial_result(trial, epoch, loss) if epoch in (1, 2, 4) else "continue"

    plan = compute_forecast(Exact, num_trials=8, max_epochs=8, num_slots=num_slots)
    assert plan.epochs == 8 * 1 + 4 * 1 + 2 * 2 + 1 * 4
    assert plan.segments == 8 + 4 + 2 + 1
    assert plan.most_paused == 8


def test_only_validated_epochs_are_reported():
    heard = []

    class Hears(Fifo):
        def on_trial_result(self, trial, epoch, loss):
            heard.append(epoch)
            return "continue"

    compute_forecast(Hears, num_trials=1, max_epochs=7, validation_interval=3)
    assert set(heard) == {3, 6, 7}


def test_a_trial_that_takes_over_weights_goes_on_from_their_epoch():
    class Copies(Fifo):
        """Trial 1, after epoch 1, goes on from what trial 0 saved at epoch 3."""

        rungs = (1, 3)
        needs_checkpoints = True

        def __init__(self):
            self.waits = False

        def on_trial_result(self, trial, epoch, loss):
            self.waits = trial == 1 and epoch == 1
            return "pause" if self.waits else "continue"

        def choose_trial_to_resume(self, *, can_start_trial):
            return SegmentStart(1, 0, {"optimizer.lr": 0.3}) if self.waits else None

        def on_trial_resume(self, start):
            self.waits = False

    plan = compute_forecast(Copies, num_trials=2, max_epochs=5, num_slots=1)
    assert plan.epochs == 5 + 1 + 2
    assert plan.segments == 3


def test_a_rule_that_never_lets_go_is_left():
    class Endless(Fifo):
        rungs = (1,)

        def __init__(self):
            self.paused = []

        def on_trial_result(self, trial, epoch, loss):
            self.paused.append(trial)
            return "pause"

        def choose_trial_to_resume(self, *, can_start_trial):
            return SegmentStart(self.paused[0], 99) if self.paused else None

        def on_trial_resume(self, start):
            self.paused.pop(0)

    assert compute_forecast(Endless, num_trials=100, max_epochs=3).epochs < 10_000


def test_asha_saves_what_its_authors_say():
    """With a reduction factor of 3 and rungs 1, 3, 9 of 27 a trial costs at most four times the first rung's epoch,
    plus what asynchrony promotes too early (Li et al. 2018, section 3.2)."""

    def promote():
        return Asha(mode="promote", grace_period=1, reduction_factor=3, brackets=1, max_epochs=27, seed=0)

    plan = compute_forecast(promote, num_trials=270, max_epochs=27, num_slots=4)
    synchronous = 270 * 1 + 90 * 2 + 30 * 6 + 10 * 18
    assert synchronous <= plan.epochs <= 1.5 * synchronous


def test_with_two_objectives_as_many_are_promoted():
    def promote(num_objectives):
        rungs = {"grace_period": 1, "reduction_factor": 3, "brackets": 1, "max_epochs": 9}
        return lambda: Asha(mode="promote", seed=0, num_objectives=num_objectives, **rungs)

    one, two = (compute_forecast(promote(number), num_trials=60, max_epochs=9) for number in (1, 2))
    assert two.epochs == pytest.approx(one.epochs, rel=0.25)  # who is among the best changes more


def test_a_sweep_of_very_many_trials_is_forecast_at_once():
    plan = compute_forecast(Fifo, num_trials=1_000_000, max_epochs=10, num_slots=100)
    assert plan.epochs == 10_000_000
    assert plan.rounds == 100_000


def test_a_scheduler_that_judges_whole_curves_is_forecast_by_its_stand_in(write_space):
    space = write_space("optimizer.lr: interval(0.0, 1.0)")
    common = {"num_trials": 50, "max_epochs": 27, "num_slots": 4, "validation_interval": 1, "params": [{}]}
    found = forecast_sweep(lambda: FreezeThaw(space=space, max_epochs=27, min_probability=0.05, seed=0), **common)
    asha = {"grace_period": 1, "reduction_factor": 3, "brackets": 1, "max_epochs": 27, "seed": 0}
    assert found == forecast_sweep(lambda: Asha(mode="promote", **asha), **common)
