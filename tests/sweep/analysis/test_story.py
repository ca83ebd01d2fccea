"""The story of a trial, told from its events."""

import math

import pytest

from handpose.schedulers.reason import Reason
from handpose.sweep.analysis.story import StoryEvents, tell_story
from handpose.sweep.record.events import (
    CostsMeasured,
    EpochReported,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    TrialEnded,
    TrialSuggested,
    read_events,
)
from tests.sweep.objectives import METRIC
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_asha, make_settings

PASSES = Reason("rung", 12.0, 13.0, rank=1, num_compared=4)


def report(at, epoch, value, decision="continue", reason=None, *, node="", note="", trial=0):
    return EpochReported(at, trial, epoch, {METRIC: value}, node, 0, None, decision, note, reason)


def tell(*events, trial=0):
    stories = StoryEvents()
    for event in events:
        stories.add(event)
    return [(line.at_s, line.text) for line in tell_story(stories.get(trial), METRIC)]


BEGINNING = [
    SweepOpened(0.0, 3),
    TrialSuggested(1.0, 0, {"optimizer.lr": 0.001, "model.decoder.depth": 3}, "the default configuration"),
    SegmentStarted(1.0, 0, 1, 0),
]
TOLD_BEGINNING = [(1.0, "proposed: the default configuration"), (1.0, "parameters: lr 0.001, depth 3")]


def test_a_trial_that_is_stopped():
    stopped = Reason("rung", 11.0, 10.0, rank=3, num_compared=3)
    told = tell(
        *BEGINNING,
        report(2.0, 1, 12.0, reason=PASSES, node="gpu1"),
        report(3.0, 2, 11.5, node="gpu1"),
        report(4.0, 3, 11.0, "stop", stopped, node="gpu1"),
        SweepClosed(5.0, "finished"),
    )
    assert told == [
        *TOLD_BEGINNING,
        (1.0, "started on node gpu1"),
        (2.0, "rung at epoch 1: PA-MPJPE 12.00 mm, within the cutoff 13.00, rank 1 of 4; continues"),
        (4.0, "rung at epoch 3: PA-MPJPE 11.00 mm, worse than the cutoff 10.00, rank 3 of 3; stopped"),
    ]


def test_a_trial_that_fails_moves_to_another_node_and_completes():
    told = tell(
        *BEGINNING,
        report(2.0, 1, 12.0, node="gpu1"),
        SegmentFailed(3.0, 0, "killed", "out of memory", "", True, None, "gpu1", Reason("retries", 1, 2)),
        NodeQuarantined(3.0, "gpu1", [0, 2]),
        SegmentStarted(4.0, 0, 2, 1),
        report(5.0, 2, 11.0, "complete", Reason("max_epochs", cutoff=2), node="gpu2"),
    )
    assert told[3:] == [
        (
            3.0,
            "failure on node gpu1 (killed): out of memory; waits for a retry: "
            "failure 1 of the trial, and sweep.max_retries=2 allows a retry",
        ),
        (3.0, "node gpu1 is quarantined because of failures of the trials 0, 2"),
        (4.0, "resumed from epoch 1 on node gpu2"),
        (5.0, "epoch 2: PA-MPJPE 11.00 mm; complete: trained to sweep.max_epochs=2"),
    ]


def test_a_trial_that_is_interrupted_resumed_paused_promoted_and_never_promoted_again():
    pause = Reason("rung", 12.0, rank=2, num_compared=3, num_passing=1)
    promotion = Reason("rung", 12.0, rank=2, num_compared=6, num_passing=2)
    told = tell(
        *BEGINNING,
        SweepOpened(2.0, 3),
        SegmentStarted(2.0, 0, 2, 0),
        report(3.0, 1, 12.0, "pause", pause),
        SegmentStarted(4.0, 0, 3, 1, reason=promotion),
        SweepClosed(5.0, "spent", Reason("sweep.time_budget_s", 5.0, 5.0)),
        SweepOpened(5.0, 3),
        SegmentStarted(5.0, 0, 4, 1),
        report(6.0, 3, 11.0, "pause", Reason("rung", 11.0, rank=1, num_compared=1, num_passing=0)),
        TrialEnded(7.0, 0, "stopped", "", Reason("not_promoted")),
    )
    assert [text for _, text in told[2:]] == [
        "started",
        "waiting: the process that ran the sweep ended",
        "started again from scratch",
        "rung at epoch 1: PA-MPJPE 12.00 mm, rank 2 of 3, and the best one passes; paused",
        "resumed from epoch 1 (rung at epoch 1: PA-MPJPE 12.00 mm, rank 2 of 6, and the best 2 pass)",
        "waiting: sweep.time_budget_s=5 is spent",
        "resumed from epoch 1",
        "rung at epoch 3: PA-MPJPE 11.00 mm, rank 1 of 1, too few for one to pass; paused",
        "stopped: not promoted before the sweep ended",
    ]


def test_a_copy_names_its_source_and_what_changed():
    rank = Reason("population", 12.0, rank=4, num_compared=4, num_passing=3)
    params = {"optimizer.lr": 0.0008, "model.decoder.depth": 3}
    told = tell(
        *BEGINNING,
        report(2.0, 2, 12.0, "pause", rank),
        SegmentStarted(3.0, 0, 2, 4, source=2, params=params, reason=rank),
    )
    assert told[-1][1] == (
        "resumed as a copy of trial 2 from epoch 4 (epoch 2: PA-MPJPE 12.00 mm, rank 4 of 4 in the population, and the "
        "worst one copies a better trial), with optimizer.lr 0.001 -> 0.0008"
    )


def test_an_infeasible_trial():
    limit = Reason("cost_limit", 5.0, 4.5, subject="latency_ms")
    told = tell(*BEGINNING, CostsMeasured(2.0, 0, {"latency_ms": 5.0, "num_parameters": 2e6}, "infeasible", limit))
    assert [text for _, text in told[3:]] == [
        "costs: latency 5 ms, parameters 2 M",
        "infeasible: latency 5 ms, above the limit 4.5 (searcher.constraints.latency_ms)",
    ]


def test_a_running_trial_ends_with_its_newest_report():
    told = tell(*BEGINNING, *(report(2.0 + epoch, epoch, 20.0 - epoch, node="gpu1") for epoch in range(1, 9)))
    assert told[2:] == [(1.0, "started on node gpu1"), (10.0, "epoch 8: PA-MPJPE 12.00 mm; running")]


def test_of_a_rule_that_compares_every_epoch_only_the_last_comparison_is_told():
    def median(cutoff):
        return Reason("median", 12.0, cutoff, num_compared=5)

    told = tell(
        *BEGINNING,
        *(report(2.0 + epoch, epoch, 12.0, reason=median(20.0 - epoch)) for epoch in range(1, 6)),
        report(9.0, 6, 12.0, "stop", median(11.0)),
    )
    assert [text for _, text in told[3:]] == [
        "epoch 5: at best PA-MPJPE 12.00 mm, within 15.00, the median of the means of 4 other trials; continues",
        "epoch 6: at best PA-MPJPE 12.00 mm, worse than 11.00, the median of the means of 4 other trials; stopped",
    ]


def test_a_problem_that_ended_nothing_is_told_once():
    told = tell(*BEGINNING, *(report(2.0 + epoch, epoch, 12.0, note="no pictures") for epoch in range(1, 4)))
    assert [text for _, text in told].count("epoch 1: no pictures") == 1
    assert len(told) == 5  # with the line that it runs


def test_a_trial_of_an_earlier_version_has_a_story_without_reasons():
    told = tell(
        SweepOpened(0.0, 3, version=4),
        TrialSuggested(1.0, 0, {"optimizer.lr": 0.001}),
        SegmentStarted(1.0, 0, 1, 0),
        report(2.0, 1, math.nan, "diverged"),
    )
    assert [text for _, text in told] == [
        "proposed by the searcher",
        "parameters: lr 0.001",
        "started",
        "epoch 1: PA-MPJPE nan mm; diverged",
    ]


def test_the_events_of_a_story_are_few_and_those_of_other_trials_are_not_among_them():
    stories = StoryEvents()
    for event in [*BEGINNING, TrialSuggested(1.0, 1, {}), *(report(float(i), i, 1.0) for i in range(2, 100))]:
        stories.add(event)
    stories.add(NodeQuarantined(100.0, "gpu1", [7]))
    assert stories.list_trials() == [0, 1]
    assert [type(event) for event in stories.get(0)] == [TrialSuggested, SegmentStarted, EpochReported, EpochReported]
    stories.forget(0)
    assert stories.get(0) == ()


@pytest.mark.parametrize("mode", ["stop", "promote"])
def test_the_story_of_every_trial_of_a_sweep_ends_as_the_trial_ended(tmp_path, mode):
    swept = SimulatedSweep(
        make_settings(tmp_path / "sweep", num_trials=12),
        make_asha(4, mode=mode),
        lambda number, params, epoch: math.nan if (number, epoch) == (5, 2) else 10.0 + number % 5 - epoch / 9,
    ).run(kill_when=lambda num_reports: num_reports % 5 == 0)
    stories = StoryEvents()
    for event in read_events(swept.file):
        stories.add(event)
    for number, row in swept.controller.history.table.rows.items():
        last = tell_story(stories.get(number), METRIC)[-1].text
        assert row.state in last
        assert row.reason.split("; ")[-1] in last
