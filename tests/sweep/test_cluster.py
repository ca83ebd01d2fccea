"""Sweeps on real nodes, each a process of its own, that are killed under them."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.cluster_drill import Cluster, ClusterDrill, count_events
from handpose.config_files import REPOSITORY
from handpose.sweep.audit.audit import audit
from handpose.sweep.driver.shutdown import INTERRUPTED_STATUS
from handpose.training.checkpoints import read_checkpoint
from tests.builders import write_freihand
from tests.sweep.trainable.test_trial import SMALL


@pytest.fixture
def cluster():
    """A head and a node of one core."""
    place = tempfile.TemporaryDirectory(prefix="hpd")  # short: sockets lie in it, whose paths have 107 characters
    made = Cluster(Path(place.name), cpus=1, epoch_s=0.5, network=None)
    try:
        for name in ("head", "node1"):
            made.start(name)
        yield made
    finally:
        made.stop()
        place.cleanup()


@pytest.mark.slow
def test_a_lost_node_costs_no_trial_and_no_try_and_a_sweep_whose_head_is_lost_can_go_on(cluster):
    """Two sweeps on one cluster of two nodes of one core: Ray may take 15 s to see that a node is gone."""
    cluster.start("node2")
    swept = ClusterDrill(cluster, cluster.folder / "sweep", num_trials=16, num_workers=1)
    swept.do("killed", 1, lambda: cluster.kill("node1"))
    swept.finish()
    found = count_events(swept.events())
    assert found["trials"] == 16
    assert found["trials_given_up"] == found["values_wrong"] == 0
    assert not audit(cluster.folder / "sweep")
    assert "node node1 is gone: 1 trials at a time" in swept.log()

    another = ClusterDrill(cluster, cluster.folder / "another", num_trials=16, num_workers=1)
    another.do("begun", 1, lambda: None)
    cluster.kill("head")
    assert another.status() == INTERRUPTED_STATUS
    assert "the head of the Ray cluster no longer answers; to resume: python tune.py sweep.resume=" in another.log()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may hide a folder from a node")
def test_a_node_that_does_not_see_the_folder_costs_no_trial_and_lets_no_sweep_begin(cluster):
    shared = cluster.folder / "shared"
    shared.mkdir()
    swept = ClusterDrill(cluster, shared / "sweep", num_trials=24, num_workers=1)  # the next node may start slowly
    swept.do("begun", 1, lambda: None)
    cluster.start("blind", hidden=shared)
    swept.finish()
    found = count_events(swept.events())
    assert found["trials_given_up"] == found["values_wrong"] == 0
    assert found["nodes_quarantined"] == 1
    assert not audit(shared / "sweep")

    another = ClusterDrill(cluster, shared / "another", num_trials=12, num_workers=1)
    assert another.status() == 2
    assert f"error: node blind cannot access {shared}/another, the folder of the sweep" in another.log()
    assert not (shared / "another").exists()


@pytest.mark.slow
def test_a_winner_of_several_workers_is_retrained_on_as_many_nodes_and_goes_on_after_an_interrupt(cluster):
    """The head, where the driver is, has no cores to give."""
    cluster.start("node2")
    write_freihand(cluster.folder / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    overrides = [*SMALL, "data.root=freihand", "data.batch_size=6", "sweep.name=two", "sweep.num_trials=1"]
    overrides += ["sweep.max_epochs=1", "trainer.max_epochs=15", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0"]
    overrides += ["sweep.preflight=off", "sweep.confirm.seeds=0", "scheduler=fifo", "sweep.workers_per_trial=2"]
    overrides += ["trainer.enable_progress_bar=true"]
    log, sweep = cluster.folder / "tune.log", cluster.folder / "outputs" / "sweeps" / "two"
    last = sweep / "retrain" / "checkpoints" / "last.ckpt"

    def tune(*given):
        command = [sys.executable, str(REPOSITORY / "tune.py"), *given]
        with log.open("a") as out:
            return subprocess.Popen(command, cwd=cluster.folder, env=cluster.environment, stdout=out, stderr=out)

    process = tune(*overrides, f"ray.address={cluster.get_address}")
    while not last.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == INTERRUPTED_STATUS, log.read_text()
    epochs = read_checkpoint(last)["epoch"] + 1
    assert epochs < 15
    end = time.monotonic() + 60
    while (
        subprocess.run(
            ["pgrep", "-f", f"handpose.sweep.selection.retrain {sweep}"], stdout=subprocess.DEVNULL
        ).returncode
        == 0
    ):
        assert time.monotonic() < end, "a process of the retraining is left"
        time.sleep(0.5)
    assert tune(f"sweep.resume={sweep}").wait(400) == 0, log.read_text()
    assert "epoch 15/15: loss" in log.read_text()
    checkpoint = read_checkpoint(last)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (14, 15 * 3)  # 18 hands to train on, 6 a step
    assert checkpoint["config"]["data"]["batch_size"] == 3
    assert checkpoint["config"]["trainer"]["num_nodes"] == 2
    assert json.loads((sweep / "retrain" / "metrics.json").read_text())["metrics"]["test/pa_mpjpe_mm"] > 0
    with gzip.open(sweep / "retrain" / "test_preds.json.gz") as file:
        assert len(json.load(file)) == 6
    assert not (sweep / "retrain_1").exists()
