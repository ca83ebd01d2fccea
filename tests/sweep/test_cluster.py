"""Sweeps on real nodes, each a process of its own, that are killed under them."""

import tempfile
from pathlib import Path

import pytest

from benchmarks.cluster_drill import Cluster, Drill, figures
from handpose.sweep.audit import audit
from handpose.sweep.run import INTERRUPTED


@pytest.fixture
def drill():
    """A sweep of 16 trials on two nodes of one core: Ray may take 15 s to see that a node is gone."""
    place = tempfile.TemporaryDirectory(prefix="hpd")  # short: sockets lie in it, whose paths have 107 characters
    folder = Path(place.name)
    cluster = Cluster(folder, cpus=1, epoch_s=0.5, network=None)
    try:
        for name in ("head", "node1", "node2"):
            cluster.start(name)
        yield cluster, Drill(cluster, folder / "sweep", num_trials=16, num_workers=1)
    finally:
        cluster.stop()
        place.cleanup()


@pytest.mark.slow
def test_a_lost_node_costs_no_trial_and_no_try(drill):
    cluster, swept = drill
    swept.do("killed", 1, lambda: cluster.kill("node1"))
    swept.finish()
    found = figures(swept.events())
    assert found["trials"] == 16
    assert found["trials_given_up"] == found["values_wrong"] == 0
    assert not audit(cluster.folder / "sweep")
    assert "node node1 is gone: 1 trials at a time" in swept.log()


@pytest.mark.slow
def test_a_sweep_whose_head_is_lost_ends_and_can_go_on(drill):
    cluster, swept = drill
    swept.do("begun", 1, lambda: None)
    cluster.kill("head")
    assert swept.status() == INTERRUPTED
    assert "the head of the Ray cluster does not answer any more; to go on: python tune.py sweep.resume=" in swept.log()
