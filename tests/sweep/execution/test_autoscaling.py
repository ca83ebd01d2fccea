"""Nodes that an autoscaler starts for a sweep, and takes back."""

import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.cluster_drill import Cluster, ClusterDrill
from handpose.errors import UserError
from handpose.sweep.audit.audit import audit
from handpose.sweep.controller.slots import Slots
from handpose.sweep.execution import autoscaling
from handpose.sweep.execution.autoscaling import NodeRequests, wait_for_node
from handpose.sweep.record.settings import RaySettings
from tests.sweep.sweeps import make_settings

CLUSTER = RaySettings(address="auto", num_cpus=None, autoscale=True, node_timeout_s=60.0)


class FakeRay:
    """Ray's placement groups. Those in `placed` have got their place."""

    def __init__(self, monkeypatch):
        self.groups, self.placed, self.now = {}, set(), 0.0
        monkeypatch.setattr(autoscaling, "placement_group", self.make)
        monkeypatch.setattr(autoscaling, "remove_placement_group", self.groups.pop)
        monkeypatch.setattr(autoscaling, "placement_group_table", self.describe)

    def make(self, bundles):
        number = max(self.groups, default=0) + 1
        self.groups[number] = bundles
        return number

    def describe(self, number):
        return {"state": "CREATED" if number in self.placed else "PENDING"}

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def ray(monkeypatch):
    return FakeRay(monkeypatch)


def test_so_many_requests_wait_as_are_wanted_and_those_that_were_placed_are_removed(ray):
    requests = NodeRequests(Slots(0, 4, 0.5, 2), clock=ray.clock)
    requests.update(3)
    assert list(ray.groups.values()) == [[{"CPU": 4.0, "GPU": 0.5}] * 2] * 3
    requests.update(1)  # within the same second
    assert len(ray.groups) == 3
    ray.placed.add(2)
    ray.sleep(1)
    assert requests.update(3) == 3
    assert len(ray.groups) == 3
    assert 2 not in ray.groups
    ray.sleep(1)  # the new node may not be counted yet
    assert requests.update(1) == 3
    ray.sleep(4)
    assert requests.update(1) == len(ray.groups) == 1
    requests.close()
    assert not ray.groups


def test_there_are_never_very_many_requests(ray):
    assert NodeRequests(Slots(0, 1, 0.0), clock=ray.clock).update(33_000) == len(ray.groups) == 100


def wait(ray, sweep, nodes_at, **changes):
    """Wait with the nodes that a function of the time lists. Returns the lines that were printed."""
    lines = []
    cluster = RaySettings(address="auto", num_cpus=None, **{"autoscale": True, "node_timeout_s": 60.0, **changes})
    wait_for_node(
        sweep, cluster, list_nodes=lambda: nodes_at(ray.now), print_line=lines.append, sleep=ray.sleep, clock=ray.clock
    )
    return lines


def test_the_sweep_waits_for_the_first_node_that_is_large_enough(ray, tmp_path):
    sweep = make_settings(tmp_path, gpus_per_trial=1.0, cpus_per_trial=4)
    joins = lambda now: [{"CPU": 16}, *[{"CPU": 8, "GPU": 1}] * (now > 20)]  # noqa: E731
    assert wait(ray, sweep, joins) == [
        "the cluster has no node for a trial (4 CPU and 1 GPU): waiting for the autoscaler to start one"
    ]
    assert 20 < ray.now < 25
    assert not ray.groups
    assert wait(ray, sweep, joins) == []
    assert wait(ray, sweep, lambda now: [], autoscale=False) == []


def test_a_node_that_never_joins_is_an_error_after_a_while(ray, tmp_path):
    with pytest.raises(UserError, match=r"no node for a trial \(2 CPU for each of its 3 workers\) has joined .*=60 s"):
        wait(ray, make_settings(tmp_path, gpus_per_trial=0.0, cpus_per_trial=2, workers_per_trial=3), lambda now: [])
    assert not ray.groups


def test_whether_a_trial_needs_a_gpu_must_be_said_if_no_node_shows_it(ray, tmp_path):
    sweep = make_settings(tmp_path, gpus_per_trial=None)
    with pytest.raises(UserError, match=r"ray.autoscale=true: give sweep.gpus_per_trial=1, or 0"):
        wait(ray, sweep, lambda now: [{"CPU": 4}])
    assert wait(ray, sweep, lambda now: [{"CPU": 4, "GPU": 1}]) == []


@pytest.mark.slow
def test_nodes_are_started_for_the_trials_and_idle_ones_are_taken_back():
    """No node, two, then one for the last of three trials of 16 s, and none after the sweep."""
    with tempfile.TemporaryDirectory(prefix="hpd") as place:  # short: sockets lie in it
        cluster = Cluster(Path(place), cpus=1, epoch_s=2.0, network=None, max_autoscaled=2)
        overrides = ["ray.autoscale=true", "sweep.max_concurrent=2", "scheduler.grace_period=8"]
        try:
            cluster.start("head")
            assert cluster.count_nodes() == 0
            swept = ClusterDrill(cluster, Path(place) / "sweep", 3, 1, overrides)
            swept.finish()
            found = [
                swept.log().find(each)
                for each in (
                    "waiting for the autoscaler to start one",
                    "nodes for 1 more at a time are requested from the autoscaler",
                    "has joined: 2 trials at a time",
                    "no more nodes are requested from the autoscaler",
                    "is gone: 1 trials at a time",
                    "[3/3] trial 2 complete",
                )
            ]
            assert found == sorted(found), swept.log()
            assert found[0] >= 0, swept.log()
            assert not audit(Path(place) / "sweep")
            until = time.monotonic() + 60
            while cluster.count_nodes() and time.monotonic() < until:
                time.sleep(2)
            assert cluster.count_nodes() == 0
        finally:
            cluster.stop()
