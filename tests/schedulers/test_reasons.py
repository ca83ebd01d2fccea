"""The reasons that schedulers give: they are true, and no decision depends on them."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handpose.schedulers.median import MedianStopping
from handpose.schedulers.population import PopulationBased
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Fifo, SegmentStart
from handpose.search.space import load_space
from tests.schedulers.test_schedulers import PARAMS, compute_cost, drive_scheduler, make_asha

MAX_EPOCHS = 9


class Explained:
    """A scheduler that keeps the reason of each answer.

    Attributes:
        reports: (trial, epoch, loss, decision, reason) of each report.
        resumed: (start, reason) of each trial that was resumed.
    """

    def __init__(self, scheduler):
        self._scheduler, self.reports, self.resumed = scheduler, [], []

    def __getattr__(self, name):
        return getattr(self._scheduler, name)

    def on_trial_result(self, trial, epoch, loss):
        self._scheduler.reason = None
        decision = self._scheduler.on_trial_result(trial, epoch, loss)
        self.reports.append((trial, epoch, loss, decision, self._scheduler.reason))
        return decision

    def on_trial_resume(self, start):
        self.resumed.append((start, self._scheduler.explain_resume(start)))
        self._scheduler.on_trial_resume(start)


def drive(scheduler, seed, **options):
    explained = Explained(scheduler)
    drive_scheduler(explained, seed=seed, num_trials=15, max_epochs=MAX_EPOCHS, **options)
    return explained


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), coarse=st.booleans())
def test_a_stopped_trial_is_worse_than_its_cutoff_and_no_other_one(seed, coarse):
    losses = {}  # epoch -> those reported so far
    for trial, epoch, loss, decision, reason in drive(make_asha(max_epochs=MAX_EPOCHS), seed, coarse=coarse).reports:
        if epoch not in (1, 3):
            assert (decision, reason) == ("continue", None)
            continue
        before = losses.setdefault(epoch, [])
        assert (reason.rule, reason.value, reason.num_compared) == ("rung", loss, len(before) + 1)
        assert reason.rank == 1 + sum((other, number) < (loss, trial) for other, number in before)
        assert (reason.cutoff is None) == (not before)
        assert (decision == "stop") == (reason.cutoff is not None and loss > reason.cutoff)
        before.append((loss, trial))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_objectives=st.sampled_from([1, 2]))
def test_a_trial_that_passes_a_rung_is_among_the_best_and_another_one_is_not_or_waits_for_one(seed, num_objectives):
    scheduler = make_asha(mode="promote", max_epochs=MAX_EPOCHS, num_objectives=num_objectives)
    explained = drive(scheduler, seed, costs=compute_cost if num_objectives == 2 else None)
    compared = [report for report in explained.reports if report[1] in (1, 3)]
    assert compared
    for place, (_, epoch, loss, decision, reason) in enumerate(compared):
        num_reported = sum(other == epoch for _, other, *_ in compared[: place + 1])
        assert (reason.value, reason.num_compared, reason.num_passing) == (loss, num_reported, num_reported // 3)
        if decision == "continue":
            assert reason.rank <= reason.num_passing
    for _, reason in explained.resumed:
        assert reason.rule == "last_rung" or reason.rank <= reason.num_passing


def test_with_two_objectives_a_trial_stops_if_it_is_not_among_the_best():
    explained = drive(make_asha(max_epochs=MAX_EPOCHS, num_objectives=2), 3, costs=compute_cost)
    compared = [report for report in explained.reports if report[1] in (1, 3)]
    assert {decision for *_, decision, _ in compared} == {"continue", "stop"}
    for *_, decision, reason in compared:
        assert reason.rule == "pareto_rung"
        assert (decision == "stop") == (reason.rank is None)


def test_the_last_paused_trial_is_resumed_because_nothing_else_is_left():
    scheduler = make_asha(mode="promote", reduction_factor=4)
    for trial, loss in enumerate([0.5, 0.4]):
        scheduler.on_trial_start(trial, PARAMS)
        scheduler.on_trial_result(trial, 1, loss)
    start = scheduler.choose_trial_to_resume(can_start_trial=False)
    assert start == SegmentStart(1)
    expected = Reason("last_rung", value=0.4, rank=1, num_compared=2, num_passing=0)
    assert scheduler.explain_resume(start) == expected
    assert scheduler.explain_resume(start) == expected  # it changes nothing
    scheduler.on_trial_resume(start)


def test_the_median_rule_names_the_median_of_the_other_trials():
    scheduler = MedianStopping(grace_period=1, min_samples_required=2)
    seen = []
    for trial, loss in enumerate([3.0, 1.0, 4.0, 2.0, 9.0]):
        scheduler.on_trial_start(trial, PARAMS)
        scheduler.reason = None
        decision = scheduler.on_trial_result(trial, 1, loss)
        if len(seen) < 2:
            assert scheduler.reason is None
        else:
            cutoff = statistics.median(seen)
            assert scheduler.reason == Reason("median", value=loss, cutoff=cutoff, num_compared=len(seen) + 1)
            assert decision == ("stop" if loss > cutoff else "continue")
        seen.append(loss)


@pytest.fixture(scope="module")
def population():
    def make():
        return PopulationBased(
            space=load_space("default"),
            mutate=["optimizer.lr"],
            perturbation_interval=2,
            quantile_fraction=0.25,
            resample_probability=0.25,
            population_size=4,
            max_epochs=MAX_EPOCHS,
            seed=0,
        )

    return make


def test_a_trial_of_a_population_is_told_its_rank_or_that_another_one_has_its_turn(population):
    scheduler = population()
    for trial in range(4):
        scheduler.on_trial_start(trial, PARAMS)
    reasons = {}
    for trial, loss in {1: 0.1, 0: 0.05, 2: 0.9, 3: 0.3}.items():
        scheduler.reason = None
        scheduler.on_trial_result(trial, 2, loss)
        reasons[trial] = scheduler.reason
    assert reasons[2] == Reason("population", value=0.9, rank=3, num_compared=3, num_passing=2)
    assert reasons[3] == Reason("population", value=0.3, rank=3, num_compared=4, num_passing=3)
    start = scheduler.choose_trial_to_resume(can_start_trial=False)
    assert (start.trial, start.source) == (2, 0)
    assert scheduler.explain_resume(start) == Reason("population", value=0.9, rank=4, num_compared=4, num_passing=3)
    scheduler.reason = None
    assert scheduler.on_trial_result(1, 4, 0.1) == "pause"  # trial 2 waits at epoch 2
    assert scheduler.reason == Reason("turn")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_trial_that_copies_another_one_is_among_the_worst(population, seed):
    for start, reason in drive(population(), seed).resumed:
        assert (start.source is None) == (reason.rule == "turn")
        assert start.source is None or reason.rank > reason.num_passing


def test_fifo_gives_no_reasons():
    explained = drive(Fifo(), 0)
    assert {reason for *_, reason in explained.reports} == {None}
