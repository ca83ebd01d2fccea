"""The freeze-thaw scheduler on curves that follow a law; tests/contracts has what all schedulers keep."""

import numpy as np
import pytest

from handpose.errors import UserError
from handpose.schedulers.freeze_thaw import FreezeThaw
from handpose.schedulers.scheduler import SegmentStart

MAX_EPOCHS = 9
SPACE = "x: interval(0.0, 1.0)"


def compute_loss(x, epoch):
    return (10 + 20 * (x - 0.3) ** 2) * (1 + 1 / epoch)


@pytest.fixture
def make_scheduler(write_space):
    space = write_space(SPACE)

    def make(**changes):
        values = {"space": space, "max_epochs": MAX_EPOCHS, "min_probability": 0.05, "seed": 0}
        return FreezeThaw(**values | changes)

    return make


def train(scheduler, trial, x, *, until=MAX_EPOCHS, since=0, epoch_s=1.0, start_s=2.0):
    """Report the epochs until the scheduler pauses the trial; returns the last epoch and decision."""
    scheduler.now += start_s
    for epoch in range(since + 1, until + 1):
        scheduler.now += epoch_s
        decision = scheduler.on_trial_result(trial, epoch, compute_loss(x, epoch))
        if decision != "continue":
            return epoch, decision
    return until, "continue"


def begin(scheduler, trial, x, **how):
    scheduler.on_trial_start(trial, {"x": x})
    return train(scheduler, trial, x, **how)


def begin_spread(scheduler):
    """Begin five trials, which the model needs, far from the optimum. They pause after epoch 3 or before."""
    for trial, x in enumerate([0.9, 0.7, 0.05, 0.8, 0.95]):
        begin(scheduler, trial, x, until=3)


def test_the_first_trials_pause_after_three_epochs_and_bad_ones_earlier_then(make_scheduler):
    scheduler = make_scheduler()
    assert [begin(scheduler, trial, x) for trial, x in enumerate([0.9, 0.7, 0.05, 0.8])] == [(3, "pause")] * 4
    begin(scheduler, 4, 0.4)
    epoch, decision = begin(scheduler, 5, 0.95)
    assert (decision, epoch < 3) == ("pause", True)


def test_a_trial_that_is_best_is_trained_to_its_end(make_scheduler):
    scheduler = make_scheduler()
    begin_spread(scheduler)
    assert begin(scheduler, 5, 0.3) == (MAX_EPOCHS, "continue")


def test_the_best_frozen_trial_is_thawed_and_a_hopeless_one_is_not(make_scheduler):
    scheduler = make_scheduler()
    begin_spread(scheduler)
    scheduler.on_trial_start(5, {"x": 0.35})
    scheduler.on_trial_end(5)
    start = scheduler.choose_trial_to_resume(can_start_trial=False)
    assert start == SegmentStart(2)  # 0.05 is the nearest to 0.3
    reason = scheduler.explain_resume(start)
    assert (reason.rule, reason.rank, reason.num_compared) == ("worth", 1, 5)
    assert reason.value == pytest.approx(compute_loss(0.05, MAX_EPOCHS), rel=0.2)
    scheduler.on_trial_resume(start)
    assert train(scheduler, 2, 0.05, since=3) == (MAX_EPOCHS, "continue")
    assert scheduler.choose_trial_to_resume(can_start_trial=False) is None  # the others are much worse


def test_without_a_chance_that_is_wanted_more_trials_are_thawed(make_scheduler):
    scheduler = make_scheduler(min_probability=0.0)
    begin_spread(scheduler)
    thawed = []
    while (start := scheduler.choose_trial_to_resume(can_start_trial=False)) is not None and len(thawed) < 40:
        scheduler.on_trial_resume(start)
        trial = scheduler._trials[start.trial]
        train(scheduler, start.trial, trial.candidate.params["x"], since=max(trial.losses))
        thawed.append(start.trial)
    assert set(thawed) == set(range(5))
    assert all(MAX_EPOCHS in trial.losses for trial in scheduler._trials.values())


def test_seconds_are_learned_from_the_times_of_reports(make_scheduler):
    scheduler = make_scheduler()
    for trial, (x, epoch_s) in enumerate([(0.9, 4.0), (0.8, 4.0), (0.1, 1.0), (0.2, 1.0), (0.3, 1.0)]):
        begin(scheduler, trial, x, until=3, epoch_s=epoch_s, start_s=5.0)
    epoch_s, start_s = scheduler._estimate_seconds()
    assert (epoch_s, start_s) == (1.0, pytest.approx(5.0))
    slow, fast = scheduler._predict_seconds(np.array([[0.85], [0.15]]), epoch_s)
    assert slow == pytest.approx(4.0, rel=0.15)
    assert fast == pytest.approx(1.0, rel=0.15)


def test_past_decisions_are_taken_as_they_are(make_scheduler):
    scheduler, resumed = make_scheduler(), make_scheduler()
    begin_spread(scheduler)
    for trial, each in scheduler._trials.items():
        resumed.on_trial_start(trial, each.candidate.params)
        for epoch, loss in each.losses.items():
            resumed.on_past_result(trial, epoch, loss, "pause" if epoch == 3 else "continue")
    assert resumed.choose_trial_to_resume(can_start_trial=False) == scheduler.choose_trial_to_resume(
        can_start_trial=False
    )


def test_the_least_probability_is_checked(make_scheduler):
    with pytest.raises(UserError, match=r"scheduler.min_probability=1 must be at least 0 and below 1"):
        make_scheduler(min_probability=1.0)


def test_a_trial_that_diverged_sets_no_goal(make_scheduler):
    """It was by far the best."""
    scheduler = make_scheduler()
    begin_spread(scheduler)
    begin(scheduler, 5, 0.3, until=4)
    scheduler.on_trial_end(5)
    assert begin(scheduler, 6, 0.4) == (MAX_EPOCHS, "continue")


def test_without_new_trials_the_best_one_goes_on(make_scheduler):
    scheduler = make_scheduler()
    scheduler.can_start_trial = False
    assert begin(scheduler, 0, 0.9) == (MAX_EPOCHS, "continue")  # there is nothing else


def test_the_time_until_a_retry_is_no_time_of_training(make_scheduler):
    scheduler = make_scheduler()
    begin(scheduler, 0, 0.5, until=3)
    scheduler.now += 3600
    scheduler.on_segment_start(0)
    train(scheduler, 0, 0.5, since=3, until=5)
    timer = scheduler._trials[0].timer
    assert (timer.epoch_s, timer.first_epoch_s) == ([1.0, 1.0], [3.0, 3.0])  # with the two seconds of a start


def test_in_another_space_all_trials_are_encoded_anew(make_scheduler, write_space):
    """As by a scheduler that had this space from the start."""
    wider = write_space("x: interval(-1.0, 1.0)\ny: choice(1, 2)\n")
    changed, fresh = make_scheduler(), make_scheduler(space=wider)
    for scheduler in (changed, fresh):
        begin_spread(scheduler)
    before = [trial.vector.tolist() for trial in changed._trials.values()]
    changed.on_space(wider)
    for scheduler in (changed, fresh):
        scheduler.on_trial_start(5, {"x": -0.5, "y": 2})
        scheduler.on_trial_end(5)
    vectors = [trial.vector.tolist() for trial in changed._trials.values()]
    assert vectors == [trial.vector.tolist() for trial in fresh._trials.values()]
    assert vectors[:5] != before
    assert [trial.candidate for trial in changed._trials.values()] == [
        trial.candidate for trial in fresh._trials.values()
    ]
    assert changed.choose_trial_to_resume(can_start_trial=False) == fresh.choose_trial_to_resume(can_start_trial=False)


def test_a_resumed_sweep_draws_the_same_new_trials_in_another_space(make_scheduler, write_space):
    wider = write_space("x: interval(-1.0, 1.0)\n")
    schedulers = make_scheduler(), make_scheduler()
    for scheduler, looks in zip(schedulers, (True, False), strict=True):
        begin_spread(scheduler)
        if looks:
            scheduler.choose_trial_to_resume(can_start_trial=True)
        scheduler.on_space(wider)
    whole, resumed = schedulers
    assert whole.choose_trial_to_resume(can_start_trial=True) == resumed.choose_trial_to_resume(can_start_trial=True)
    assert whole._draw_new().tolist() == resumed._draw_new().tolist()
    assert whole._draw_new().min() >= 0
