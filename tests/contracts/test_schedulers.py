"""What every scheduler in configs/scheduler keeps to."""

import functools

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from handpose.errors import UserError
from handpose.schedulers.scheduler import SegmentStart
from handpose.search.space import load_space
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from tests.schedulers.test_schedulers import (
    PARAMS,
    compute_cost,
    drive_scheduler,
    list_completed,
    list_reports,
    replay_calls,
)

TWO = "sweep.second_objective=latency_ms"


@functools.cache
def configured(scheduler, *more):
    """Makes new schedulers as a sweep does."""
    config = scheduler.compose("sweep.max_epochs=9", "sweep.num_trials=8", *more)
    return bind_scheduler(scheduler.make(*more), instantiate(config.sweep), load_space("default"))


def list_seeds(scheduler):
    """Seeds of sweeps; few for a scheduler with a model, which takes long to decide."""
    return range(5) if configured(scheduler)().repeats_decisions else range(2)


def drive_all(scheduler, **how):
    """A new scheduler, and its calls in a sweep that trains nothing, with one objective and with two if it can."""
    for more in ((), (TWO,)):
        if more and not configured(scheduler)().supports_two_objectives:
            return
        made = configured(scheduler, *more)
        yield made, drive_scheduler(made(), costs=compute_cost if more else None, **how)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 9),
    gaps=st.sampled_from([0.0, 0.4]),
    failures=st.sampled_from([0, 0.1]),
)
def test_the_same_calls_get_the_same_answers(scheduler, seed, slots, gaps, failures):
    for fresh, calls in drive_all(scheduler, seed=seed, num_slots=slots, gaps=gaps, failures=failures):
        asked_twice = [call for call in calls for _ in range(1 + (call[0] == "choose_trial_to_resume"))]
        assert replay_calls(fresh(), calls) == calls
        assert replay_calls(fresh(), asked_twice) == asked_twice


@pytest.mark.parametrize("num_trials", [1, 2, 5, 20])
def test_every_sweep_ends_with_a_trial_trained_to_the_end(scheduler, num_trials):
    for seed in list_seeds(scheduler):
        for _, calls in drive_all(scheduler, seed=seed, num_trials=num_trials):
            assert list_completed(calls, 9)


def test_rungs_are_ascending_epochs_before_the_last(scheduler):
    rungs = configured(scheduler)().rungs
    assert list(rungs) == sorted({epoch for epoch in rungs if 1 <= epoch < 9})


def test_trials_pause_only_at_rungs_and_only_if_they_save_checkpoints_there(scheduler):
    for seed in list_seeds(scheduler):
        for fresh, calls in drive_all(scheduler, seed=seed):
            paused = {epoch for _, epoch, _, decision in list_reports(calls) if decision == "pause"}
            assert paused <= set(fresh().rungs)
            assert not paused or fresh().needs_checkpoints


def test_with_folds_a_trial_pauses_only_in_the_first_fold_or_at_the_end_of_one(scheduler):
    """And some trial is trained with all folds. A scheduler that changes parameters refuses folds."""
    folds = ("sweep.folds=3", "sweep.max_epochs=4")
    if configured(scheduler)().perturbs_params:
        with pytest.raises(UserError, match=r"sweep\.folds=3 trains the same configuration with every fold, but"):
            configured(scheduler, *folds)
        return
    for seed in list_seeds(scheduler):
        calls = drive_scheduler(configured(scheduler, *folds)(), seed=seed, max_epochs=12)
        paused = {epoch for _, epoch, _, decision in list_reports(calls) if decision == "pause"}
        assert all(epoch <= 4 or epoch % 4 == 0 for epoch in paused)
        assert list_completed(calls, 12)


def test_a_scheduler_that_says_so_selects_only_at_rungs(scheduler):
    for seed in list_seeds(scheduler):
        for fresh, calls in drive_all(scheduler, seed=seed, num_trials=20):
            if fresh().selects_only_at_rungs:
                elsewhere = {epoch for _, epoch, *_, decision in list_reports(calls) if decision != "continue"}
                assert elsewhere <= set(fresh().rungs)


def test_trials_that_were_complete_go_on_when_the_user_raises_the_epochs(scheduler):
    """And the scheduler has the rungs of one that had so many from the start."""
    for seed in list_seeds(scheduler):
        for fresh, calls in drive_all(scheduler, seed=seed, num_trials=8):
            raised = fresh()
            replay_calls(raised, calls)
            reports = list_reports(calls)
            complete = {trial: loss for trial, epoch, loss, _ in reports if epoch == 9}
            raised.on_max_epochs(27)
            decisions = {trial: raised.on_complete_trial(trial, 9, loss) for trial, loss in complete.items()}
            assert set(decisions.values()) <= {"continue", "pause", "stop"}
            assert not raised.rungs or max(raised.rungs) < 27
            paused = [trial for trial, decision in decisions.items() if decision == "pause"]
            going = [trial for trial, decision in decisions.items() if decision == "continue"]
            if not going and paused:
                start = raised.choose_trial_to_resume(can_start_trial=False)
                assert start is not None
                assert start.trial in paused


def test_a_scheduler_that_changes_parameters_says_so(scheduler):
    for seed in list_seeds(scheduler):
        for fresh, calls in drive_all(scheduler, seed=seed, num_trials=8):
            starts = [args[0] for method, args, *_ in calls if method == "on_trial_resume"]
            assert fresh().perturbs_params or all(start.params is None for start in starts)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_trial_that_the_user_keeps_or_resumes_after_its_end_reports_to_the_last_epoch(scheduler, is_kept):
    """What the sweep calls: a kept trial is resumed at once after a pause, and goes on after a stop."""
    for more in ((), (TWO,)):
        if more and not configured(scheduler)().supports_two_objectives:
            continue
        made = configured(scheduler, *more)()
        for trial in range(8):
            made.on_trial_start(trial, PARAMS)
            made.on_trial_cost(trial, 1.0 + trial)
        for epoch in range(1, 10):
            for trial in range(8):
                if trial == 7 and epoch == 2 and not is_kept:
                    made.on_trial_end(trial)
                    made.on_trial_reopen(trial)
                loss = 10.0 + trial - 0.1 * epoch
                if not made.repeats_decisions:
                    made.on_past_result(trial, epoch, loss, "continue")
                elif made.on_trial_result(trial, epoch, loss) == "pause":
                    made.on_trial_resume(SegmentStart(trial))
        assert made.choose_trial_to_resume(can_start_trial=False) is None
