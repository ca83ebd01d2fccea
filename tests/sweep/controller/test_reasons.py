"""Each decision of a sweep has its reason in its event, and in the row of its trial."""

import math
from dataclasses import replace

import numpy as np
import pytest

from handpose.schedulers.asha import Asha
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.controller.controller import SegmentFailure, find_violation
from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.record.events import (
    CostsMeasured,
    EpochReported,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    SweepClosed,
    TrialEnded,
    read_events,
)
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_asha, make_settings


@pytest.fixture
def simulate(tmp_path):
    """Makes a simulated sweep of 6 trials of 4 epochs, whose losses are the epochs' and the trials' numbers."""

    def make(scheduler=Fifo, loss=lambda number, params, epoch: 10.0 + number - epoch, num_slots=1, **changes):
        settings = make_settings(tmp_path / "sweep", **changes)
        return SimulatedSweep(settings, scheduler, loss, num_slots=num_slots)

    return make


def list_events(swept, kind):
    return [event for event in read_events(swept.file) if isinstance(event, kind)]


def get_row(swept, number):
    return swept.controller.history.table.rows[number]


def test_a_stop_and_a_completion_have_their_reasons(simulate):
    swept = simulate(make_asha(4)).run()
    reports = list_events(swept, EpochReported)
    assert [event.reason for event in reports if event.trial == 0] == [
        Reason("rung", value=9.0, rank=1, num_compared=1),
        Reason("rung", value=8.0, rank=1, num_compared=1),
        None,
        Reason("max_epochs", cutoff=4),
    ]
    stopped = next(event for event in reports if event.trial == 1)
    assert stopped.reason == Reason("rung", value=10.0, cutoff=9.0, rank=2, num_compared=2)
    assert get_row(swept, 0).reason == "trained to sweep.max_epochs=4"
    sentence = "rung at epoch 1: PA-MPJPE 10.00 mm, worse than the cutoff 9.00, rank 2 of 2"
    assert get_row(swept, 1).reason == sentence


def test_a_metric_to_maximise_has_its_own_values_and_not_losses(simulate):
    swept = simulate(make_asha(4), mode="max").run()
    first, second = (next(event for event in list_events(swept, EpochReported) if event.trial == n) for n in (0, 1))
    assert (first.decision, first.reason.value) == ("continue", 9.0)
    assert second.reason == Reason("rung", value=10.0, cutoff=9.0, rank=1, num_compared=2)
    assert second.decision == "continue"


def test_a_promotion_and_a_trial_that_was_never_promoted_have_their_reasons(simulate):
    swept = simulate(make_asha(4, mode="promote"), loss=lambda number, params, epoch: 10.0 + number).run()
    promoted = [event.reason for event in list_events(swept, SegmentStarted) if event.segment == 2]
    assert promoted
    assert all(reason.rank <= reason.num_passing or reason.rule == "last_rung" for reason in promoted)
    assert {event.reason for event in list_events(swept, SegmentStarted) if event.segment == 1} == {None}
    ended = list_events(swept, TrialEnded)
    assert {event.reason for event in ended} == {Reason("not_promoted")}
    row = get_row(swept, ended[0].trial)
    assert row.reason.startswith("rung at epoch ")
    assert row.reason.endswith("; not promoted before the sweep ended")


@pytest.mark.parametrize(
    ("mode", "values", "reason"),
    [
        ("min", [4.0, 41.0], Reason("divergence_factor", value=41.0, cutoff=40.0)),
        ("max", [4.0, 0.3], Reason("divergence_factor", value=0.3, cutoff=0.4)),
        ("min", [4.0, math.nan], Reason("not_finite")),
    ],
)
def test_a_divergence_names_its_rule(simulate, mode, values, reason):
    swept = simulate(loss=lambda number, params, epoch: values[epoch - 1], mode=mode, num_trials=1)
    swept.fill()
    swept.step()
    swept.step()
    assert list_events(swept, EpochReported)[-1].reason == reason
    assert get_row(swept, 0).state == "diverged"


@pytest.mark.parametrize(
    ("costs", "second", "reason"),
    [
        ({"latency_ms": 4.0, "memory_mb": 9.0}, None, None),
        ({"latency_ms": 5.0, "memory_mb": 90.0}, None, Reason("cost_limit", 5.0, 4.5, subject="latency_ms")),
        ({"latency_ms": 4.0, "memory_mb": 90.0}, None, Reason("cost_limit", 90.0, 10.0, subject="memory_mb")),
        ({"latency_ms": math.nan, "memory_mb": 9.0}, None, Reason("cost_limit", None, 4.5, subject="latency_ms")),
        (
            {"latency_ms": 4.0, "memory_mb": 9.0, "num_parameters": math.inf},
            "num_parameters",
            Reason("cost_limit", subject="num_parameters"),
        ),
    ],
)
def test_an_infeasible_trial_names_the_first_limit_that_it_violates(costs, second, reason):
    assert find_violation(costs, {"latency_ms": 4.5, "memory_mb": 10.0}, second) == reason


def test_costs_above_a_limit_are_in_the_event_and_in_the_row(simulate):
    swept = simulate(num_trials=1)
    swept.proposer.constraints = {"latency_ms": 4.5}
    swept.controller.next_segment()
    assert not swept.controller.process_costs(0, {"latency_ms": 5.0})
    (event,) = list_events(swept, CostsMeasured)
    assert event.reason == Reason("cost_limit", 5.0, 4.5, subject="latency_ms")
    assert get_row(swept, 0).reason == "latency 5 ms, above the limit 4.5 (searcher.constraints.latency_ms)"


def fail(swept, kind, number=0, node=""):
    swept.controller.process_failure(number, SegmentFailure(kind, "it broke", "it broke", node))
    return list_events(swept, SegmentFailed)[-1]


def test_failures_count_up_to_the_retries(simulate):
    swept = simulate(num_trials=1, max_retries=1)
    swept.fill()
    event = fail(swept, "preempted")
    assert (event.retry, event.reason) == (True, Reason("blameless"))
    swept.fill()
    swept.step()
    event = fail(swept, "killed")
    assert (event.retry, event.reason) == (True, Reason("retries", value=1, cutoff=1))
    swept.fill()
    assert get_row(swept, 0).reason == ""
    event = fail(swept, "killed")
    assert (event.retry, event.reason) == (False, Reason("retries", value=2, cutoff=1))
    assert get_row(swept, 0).reason == "failure 2 of the trial, and sweep.max_retries=1 allows no further retry"


def test_a_mistake_after_the_first_report_would_come_again(simulate):
    swept = simulate(num_trials=1)
    swept.fill()
    swept.step()
    event = fail(swept, "user_error")
    assert (event.retry, event.reason) == (False, Reason("same_failure"))


def test_a_trial_without_memory_gets_more_of_a_gpu(simulate):
    swept = simulate(num_trials=1)
    swept.controller.history.gpus = 0.25
    swept.fill()
    event = fail(swept, "gpu_memory")
    assert (event.retry, event.gpus, event.reason) == (True, 0.5, Reason("gpu_share", value=0.5, cutoff=0.25))


def test_the_last_failure_before_a_sweep_is_halted_says_so(simulate):
    swept = simulate(num_slots=2, stop_after_failures=2)
    swept.fill()
    fail(swept, "error", 0)
    event = fail(swept, "error", 1)
    assert (event.retry, event.reason) == (True, Reason("halt", value=2))
    assert list_events(swept, SweepClosed) == [SweepClosed(0.0, "halted")]


def test_a_quarantine_names_the_trials_that_failed_on_the_node(simulate):
    swept = simulate(num_slots=3, quarantine_after_failures=2)
    swept.fill()
    swept.controller.resize(3, NodeCapacity({"good": 1, "bad": 1}))
    swept.controller.process_report(2, 1, {swept.settings.metric: 1.0}, node="good")
    assert fail(swept, "error", 0, "bad").reason == Reason("node")
    assert fail(swept, "error", 1, "bad").reason == Reason("quarantine")
    (event,) = list_events(swept, NodeQuarantined)
    assert (event.node, event.trials) == ("bad", [0, 1])


def test_a_spent_budget_is_in_the_event_that_closes_the_sweep(simulate):
    swept = simulate(time_budget_s=2.0)
    swept.fill()
    swept.step()
    swept.step()
    swept.controller.close("spent")
    (event,) = list_events(swept, SweepClosed)
    assert event.budget == Reason("sweep.time_budget_s", value=2.0, cutoff=2.0)
    assert get_row(swept, 0).reason == "sweep.time_budget_s=2 is spent"


def test_a_trial_whose_process_was_killed_says_so_until_it_is_resumed(simulate):
    swept = simulate(num_trials=1)
    swept.fill()
    swept.step()
    swept.kill()
    swept.start()
    assert get_row(swept, 0).reason == "the process that ran the sweep ended"
    swept.fill()
    assert get_row(swept, 0).reason == ""


# --- schedulers of users ----------------------------------------------------------------------------------------------


class StopsAtOne(Fifo):
    """A scheduler as those before reasons existed."""

    def on_trial_result(self, trial, epoch, loss):
        return "stop" if trial == 1 else "continue"


class NoBaseClass:
    """A scheduler that has the methods of the protocol and no other ones."""

    rungs = ()
    needs_checkpoints, supports_two_objectives, perturbs_params, selects_only_at_rungs = False, True, False, True

    def on_trial_start(self, trial, params):
        pass

    def on_trial_cost(self, trial, cost):
        pass

    def on_trial_result(self, trial, epoch, loss):
        return "stop" if trial == 1 else "continue"

    def choose_trial_to_resume(self, *, can_start_trial):
        return None

    def on_trial_resume(self, start):
        pass

    def on_trial_end(self, trial):
        pass


@pytest.mark.parametrize("scheduler", [StopsAtOne, NoBaseClass])
def test_a_scheduler_that_gives_no_reasons_works_as_before(simulate, scheduler):
    swept = simulate(scheduler, num_trials=2).run()
    stopped = next(event for event in list_events(swept, EpochReported) if event.trial == 1)
    assert (stopped.decision, stopped.reason, get_row(swept, 1).reason) == ("stop", None, "")


class Explains(Fifo):
    """A scheduler that gives a reason with NumPy's numbers, and does not take it back."""

    def on_trial_result(self, trial, epoch, loss):
        if epoch == 1:
            self.reason = Reason("is odd", value=np.float32(0.5), rank=np.int64(trial + 1))
        return "continue"


def test_a_scheduler_of_a_user_gives_a_reason_for_one_report_only(simulate):
    swept = simulate(Explains, num_trials=1, mode="max").run()
    first, *others, last = [event.reason for event in list_events(swept, EpochReported)]
    assert first == Reason("is odd", value=-0.5, rank=1)  # a scheduler gives losses
    assert [*others, last] == [None, None, Reason("max_epochs", cutoff=4)]


class WithOtherReasons(Asha):
    """ASHA of a version that gives other reasons."""

    def on_trial_result(self, trial, epoch, loss):
        decision = super().on_trial_result(trial, epoch, loss)
        self.reason = self.reason and replace(self.reason, rule="other")
        return decision


def test_a_sweep_is_resumed_although_another_version_gives_other_reasons(simulate):
    swept = simulate(make_asha(4))
    swept.fill()
    swept.step()
    swept.kill()
    swept.make_scheduler = lambda: WithOtherReasons(
        mode="stop", grace_period=1, reduction_factor=2, brackets=1, max_epochs=4, seed=0
    )
    swept.start()
    swept.run()
    assert [event.reason.rule for event in list_events(swept, EpochReported)[:2]] == ["rung", "other"]
