"""Sweeps that divide a cluster between them."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from benchmarks.cluster_drill import Cluster, ClusterDrill
from handpose.sweep.audit.audit import audit
from handpose.sweep.execution import fair_share
from handpose.sweep.execution.fair_share import ClusterShare, Part, ShareKeeper, divide_fairly


@pytest.mark.parametrize(
    ("wanted", "weights", "parts"),
    [
        ({"a": 1.0}, {"a": 3.0}, {"a": 1.0}),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5}),
        ({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 0.75, "b": 0.25}),
        ({"a": 1.0, "b": 0.1}, {"a": 1.0, "b": 1.0}, {"a": 0.9, "b": 0.1}),
        ({"a": 1.0, "b": 0.3, "c": 0.1}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.6, "b": 0.3, "c": 0.1}),
        ({"a": 1.0, "b": 0.4, "c": 0.1}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.5, "b": 0.4, "c": 0.1}),
        ({"a": 0.2, "b": 0.1}, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5}),
        ({}, {}, {}),
    ],
)
def test_parts_by_hand(wanted, weights, parts):
    assert divide_fairly(wanted, weights) == pytest.approx(parts)


SWEEPS = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.0, 1.0), st.floats(0.1, 10.0)), min_size=1)


@given(sweeps=SWEEPS)
def test_the_whole_is_divided_and_whoever_has_too_little_has_as_much_for_its_weight_as_anybody(sweeps):
    """The definition of weighted max-min fairness."""
    wanted = {name: each[0] for name, each in sweeps.items()}
    weights = {name: each[1] for name, each in sweeps.items()}
    parts = divide_fairly(wanted, weights)
    assert sum(parts.values()) == pytest.approx(1.0)
    most = max(parts[name] / weights[name] for name in parts)
    for name in parts:
        assert parts[name] >= wanted[name] - 1e-9 or parts[name] / weights[name] == pytest.approx(most)


def test_slots_are_divided_without_a_rest_between_two_and_everyone_has_at_least_one():
    first, second = Part(0.5, True, 1), Part(0.5, False, 1)
    assert [(first.count_slots(num), second.count_slots(num)) for num in (0, 1, 2, 3, 4)] == [
        (0, 0),
        (1, 1),
        (1, 1),
        (2, 1),
        (2, 2),
    ]
    assert Part().count_slots(7) == 7
    assert Part(1 / 3, False, 2).count_slots(3) == 1


def test_a_sweep_that_ends_or_says_nothing_any_more_has_no_part():
    clock = SimpleNamespace(now=0.0)
    keeper = ShareKeeper(lambda: clock.now)
    assert keeper.update("b", 1.0, 1.0) == Part(1.0, True, 0)
    assert keeper.update("a", 1.0, 1.0) == Part(0.5, True, 1)
    assert keeper.update("b", 1.0, 1.0) == Part(0.5, False, 1)
    assert keeper.leave("a") == 1
    assert keeper.update("b", 1.0, 1.0) == Part(1.0, True, 0)
    keeper.update("c", 1.0, 1.0)
    clock.now = 61.0  # the process of c was killed
    assert keeper.update("b", 1.0, 1.0) == Part(1.0, True, 0)


class FakeKeeper:
    """The actor, whose answers wait until they are let through."""

    def __init__(self, monkeypatch):
        self.is_quick, self.is_dead, self.asked, self.left = True, False, [], 1
        self.update = SimpleNamespace(remote=self.ask)
        self.leave = SimpleNamespace(remote=lambda name: "left")
        self.killed, self.part = [], Part(0.5, False, 1)
        monkeypatch.setattr(fair_share.ray, "wait", lambda refs, timeout: (refs if self.is_quick else [], []))
        monkeypatch.setattr(fair_share.ray, "get", self.answer)
        monkeypatch.setattr(fair_share.ray, "kill", self.killed.append)

    def ask(self, name, weight, wanted):
        self.asked.append((weight, wanted))
        return "asked"

    def answer(self, ref, timeout=None):
        if self.is_dead:
            raise ActorDiedError
        return self.left if ref == "left" else self.part


@pytest.fixture
def keeper(monkeypatch):
    return FakeKeeper(monkeypatch)


def make_share(keeper, clock=lambda: 0.0):
    share = ClusterShare(2.0, find_keeper=lambda: keeper, clock=clock)
    share.num_slots = 8
    return share


def test_a_sweep_knows_its_part_before_it_starts_trials(keeper):
    share = make_share(keeper)
    share.join(6)
    assert share.part == Part(0.5, False, 1)
    assert keeper.asked == [(2.0, 0.75)]


def test_a_slow_answer_is_not_waited_for(keeper):
    clock = SimpleNamespace(now=1.0)
    share = make_share(keeper, lambda: clock.now)
    keeper.is_quick = False
    assert not share.refresh(80)
    clock.now = 20.0
    assert not share.refresh(80)
    assert share.part == Part()
    assert keeper.asked == [(2.0, 1.0)]
    keeper.is_quick = True
    assert share.refresh(80)
    assert not share.refresh(80)
    assert share.part == Part(0.5, False, 1)


def test_an_actor_that_is_lost_is_started_again_and_believed_only_when_it_knows_all_sweeps(keeper):
    clock = SimpleNamespace(now=1.0)
    share = make_share(keeper, lambda: clock.now)
    share.join(8)
    keeper.is_dead = True
    clock.now = 10.0
    share.refresh(8)
    share.refresh(8)
    assert share.part == Part(0.5, False, 1)
    keeper.is_dead, keeper.part = False, Part(1.0, True, 0)
    for clock.now, part in ((12.5, Part(0.5, False, 1)), (20.0, Part(1.0, True, 0))):
        share.join(8)
        assert share.part == part


def test_an_answer_that_never_comes_is_given_up(keeper):
    clock = SimpleNamespace(now=1.0)
    share = make_share(keeper, lambda: clock.now)
    keeper.is_quick = False
    for clock.now in (1.0, 20.0, 32.0):
        share.refresh(8)
    assert len(keeper.asked) == 2


def test_a_sweep_that_has_no_slot_wants_nothing(keeper):
    share = make_share(keeper)
    share.num_slots = 0
    share.join(8)
    assert keeper.asked == [(2.0, 0.0)]


def test_the_last_sweep_ends_the_actor(keeper):
    share = make_share(keeper)
    share.join(8)
    share.close()
    assert keeper.killed == []
    keeper.left = 0
    share = make_share(keeper)
    share.join(8)
    share.close()
    share.close()
    assert keeper.killed == [keeper]


@pytest.mark.slow
def test_two_sweeps_share_a_cluster_and_the_one_that_is_left_gets_all_of_it():
    with tempfile.TemporaryDirectory(prefix="hpd") as place:  # short: sockets lie in it
        cluster = Cluster(Path(place), cpus=4, epoch_s=0.5, network=None)
        try:
            for name in ("head", "node1"):
                cluster.start(name)
            long = ClusterDrill(cluster, Path(place) / "long", 44, 1, ["scheduler.grace_period=8", "ray.weight=1"])
            long.do("begun", 1, lambda: None)
            short = ClusterDrill(cluster, Path(place) / "short", 6, 1, ["scheduler.grace_period=8", "ray.weight=1"])
            short.finish()
            long.finish()
            told, other = long.log(), short.log()
            assert "another sweep uses the cluster: 2 of 4 trials at a time" in told
            assert "another sweep uses the cluster: 2 of 4 trials at a time" in other
            assert "no other sweep uses the cluster: 4 of 4 trials at a time" in told
            assert count_most_at_a_time(long.events()) == 4
            assert count_most_at_a_time(short.events()) == 2, other
            assert not audit(Path(place) / "long")
            assert not audit(Path(place) / "short")
        finally:
            cluster.stop()


def count_most_at_a_time(events):
    """Count the largest number of trials with a segment that has started and has not ended."""
    running, most = set(), 0
    for event in events:
        name = type(event).__name__
        if name == "SegmentStarted":
            running.add(event.trial)
        elif (name == "EpochReported" and event.decision != "continue") or name in ("SegmentFailed", "TrialEnded"):
            running.discard(event.trial)
        most = max(most, len(running))
    return most
