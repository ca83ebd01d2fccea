"""Trials of two workers, which Ray Train starts: over cheap curves, and real ones beside those of one worker."""

import os
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import pytorch_lightning as pl
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo
from ray.util import placement_group_table

from handpose.config import compose
from handpose.config_files import REPOSITORY
from handpose.errors import UserError
from handpose.schedulers.scheduler import Fifo
from handpose.search.space import load_space
from handpose.sweep.execution import worker_group
from handpose.sweep.execution.group_trainer import set_gloo_interface
from handpose.sweep.execution.ray_internals import WorkerGroupStartupFailedError
from handpose.sweep.execution.tune_bridge import _classify_failure
from handpose.sweep.record.events import EpochReported, SegmentFailed, read_events
from handpose.sweep.record.utilisation_file import read_utilisation
from handpose.sweep.trainable.reporting import SINGLE_WORKER, WorkerContext, get_worker_context, set_worker_context
from handpose.sweep.trainable.trial_cost import split_batch
from handpose.training.fit import RunFolders, fit
from tests.sweep.objectives import METRIC, trains_in_step
from tests.sweep.sweeps import make_asha, make_settings, run_small_sweep


def write_space_file(folder, *depths):
    file = folder / "space.yaml"
    file.write_text(f"model.decoder.depth: choice({', '.join(map(str, depths))})\n")
    return load_space(str(file))


def run_group_sweep(folder, depths, scheduler, **changes):
    settings = make_settings(folder / "sweep", num_trials=len(depths), workers_per_trial=2, **changes)
    table = run_small_sweep(
        settings, write_space_file(folder, *depths), trains_in_step, sampler=None, scheduler=scheduler
    )
    return table, settings.path


def list_held_resources():
    """Placement groups that hold anything."""
    return [each for each in placement_group_table().values() if each["state"] != "REMOVED"]


@pytest.mark.slow
def test_the_first_worker_tells_and_none_goes_on_when_the_trial_is_stopped(ray_started, tmp_path):
    """ASHA keeps the first trial and stops the second after epoch 1, whose workers never begin epoch 2."""
    table, folder = run_group_sweep(tmp_path, (0, 1), make_asha(4))
    values = [(row.number, row.state, row.epochs, row.metrics[METRIC]) for row in table.rows.values()]
    assert values == [(0, "complete", 4, 0.25), (1, "stopped", 1, 2.0)]
    assert {file.name for file in folder.glob("trial_0001-*")} == {"trial_0001-0-1", "trial_0001-1-1"}
    reports = [event for event in read_events(folder / "events.jsonl") if isinstance(event, EpochReported)]
    assert [(event.trial, event.epoch) for event in reports] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1)]
    assert not list_held_resources()


@pytest.mark.slow
def test_a_dead_worker_is_a_try_and_what_one_raises_is_the_trials_end(ray_started, tmp_path):
    table, folder = run_group_sweep(tmp_path, (2, 3), lambda: Fifo(), max_retries=1)
    failures = [event for event in read_events(folder / "events.jsonl") if isinstance(event, SegmentFailed)]
    assert [(event.trial, event.kind) for event in failures] == [(0, "killed"), (1, "user_error")]
    assert failures[1].cause.endswith("model.decoder.depth=3 does not fit")
    assert [(row.state, row.epochs) for row in table.rows.values()] == [("complete", 4), ("failed", 1)]
    assert not list_held_resources()


class EpochMetrics(pl.Callback):
    """Keeps the metrics of every epoch."""

    def __init__(self):
        self.values = {}

    def on_validation_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.values[trainer.current_epoch + 1] = metrics


@pytest.mark.slow
def test_two_workers_give_the_metrics_of_one(tmp_path):
    """A sweep of one trial, in double precision: in single, rounding alone moves a training by per cents."""
    small = ["data=synthetic", "data.source.num_train=240", "data.source.num_eval=60", "data.batch_size=72"]
    small += ["data.image_size=64", "model.encoder.name=test_efficientnet", "model.decoder.depth=1"]
    small += ["trainer.precision=64-true", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "sweep.max_epochs=2"]
    small += ["sweep.num_trials=1", "sweep.confirm.seeds=0", "sweep.retrain=false", "scheduler=fifo"]
    small += ["searcher=random", "sweep.name=test", "sweep.preflight=off", "sweep.workers_per_trial=2"]
    small += ["searcher.constraints.num_parameters=1e9"]  # which each worker measures in passing
    command = [sys.executable, "tune.py", *small, f"paths.data={tmp_path}/data", f"paths.output={tmp_path}/out"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "sweeps" / "test"
    events = read_events(folder / "events.jsonl")
    two = {event.epoch: event.metrics for event in events if isinstance(event, EpochReported)}

    alone = shlex.split(pd.read_csv(folder / "trials.csv").loc[0, "command"])[2:]
    one = EpochMetrics()
    config = compose("train", [*alone, "logger=none", "checkpoints.enabled=false"])
    fit(config, RunFolders(tmp_path, tmp_path, tmp_path), quiet=True, callbacks=[one])
    assert config.data.batch_size == 72
    assert [each.epoch for each in read_utilisation(folder / "utilisation.jsonl")[0]] == [1, 2]  # of one worker only
    assert one.values.keys() == two.keys() == {1, 2}
    for epoch, metrics in two.items():
        assert metrics == pytest.approx({name: one.values[epoch][name] for name in metrics}, rel=0.01)


@pytest.mark.parametrize(
    ("address", "given", "used"),
    [("127.0.0.1", None, "lo"), ("203.0.113.7", None, None), ("127.0.0.1", "ib0", "ib0")],  # RFC 5737: nobody's
)
def test_workers_talk_over_the_network_by_which_ray_knows_their_node(address, given, used, monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    set_gloo_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == used


@pytest.mark.parametrize(
    ("node_id", "said", "kind"),
    [
        ("lost", "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer", "lost"),
        ("", "NCCL communicator was aborted on rank 0.", "killed"),
        ("lost", "The size of tensor a (3) must match the size of tensor b (4)", "error"),
    ],
)
def test_what_a_collective_raises_is_the_end_of_another_worker(node_id, said, kind, monkeypatch):
    monkeypatch.setattr(worker_group, "_find_lost_node", lambda channel: node_id)
    error = worker_group._make_worker_error(
        worker_group._WorkerFailure(RuntimeError(said), said, "its own"), channel=None
    )
    assert _classify_failure(error, said) == kind
    assert error.node_id == (node_id if kind != "error" else "its own")


TORN = WorkerGroupError("rank 1", {1: RayActorError(error_msg="gone")})
PREEMPTED = WorkerGroupError("rank 1", {1: RayActorError(error_msg="gone", preempted=True)})
DRAINED = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"drained": [1]}))


def test_a_worker_that_had_not_begun_is_lost_with_its_node(monkeypatch):
    monkeypatch.setattr(worker_group, "_find_lost_node", lambda channel: "")
    error = worker_group._make_group_error(ControllerError(WorkerGroupStartupFailedError("no start")), channel=None)
    assert _classify_failure(error, "RayActorError: The actor died because its node has died.\n...\nno start") == "lost"
    assert _classify_failure(error, "RayActorError: The actor died.\n...\nno start") == "killed"


@pytest.mark.parametrize(
    ("raised", "kind", "node_id"),
    [
        (TORN, "lost", "dead"),
        (PREEMPTED, "preempted", ""),
        (DRAINED, "preempted", "drained"),
        (ControllerError(WorkerGroupStartupFailedError("its node died")), "lost", "dead"),
        (ControllerError(ValueError("no such backend")), "error", ""),
    ],
    ids=["worker", "preempted worker", "drained node", "start", "user_error"],
)
def test_what_ray_train_ends_a_group_with_is_told(raised, kind, node_id, monkeypatch):
    monkeypatch.setattr(worker_group, "_find_lost_node", lambda channel: "dead")
    error = worker_group._make_group_error(raised, channel=None)
    assert _classify_failure(error, str(error)) == kind
    assert getattr(error, "node_id", "") == node_id


def test_what_cannot_be_sent_is_told_by_its_text():
    error = worker_group._make_worker_error(
        worker_group._WorkerFailure(None, "Traceback: a lambda was raised", "here"), channel=None
    )
    assert str(error) == "Traceback: a lambda was raised"


def test_a_process_is_alone_unless_it_has_joined_others():
    told = []
    assert get_worker_context() is SINGLE_WORKER
    with set_worker_context(WorkerContext(1, 2, told.append)):
        assert get_worker_context()[:2] == (1, 2)
    assert get_worker_context() is SINGLE_WORKER


def test_a_batch_is_shared_equally_or_that_is_said(config):
    assert split_batch(config("data.batch_size=12"), 3).data.batch_size == 4
    assert split_batch(config("data.batch_size=12"), 1).data.batch_size == 12
    with pytest.raises(
        UserError, match=r"^data.batch_size=12 cannot be shared equally among sweep.workers_per_trial=5"
    ):
        split_batch(config("data.batch_size=12"), 5)


@pytest.fixture
def config():
    return lambda *overrides: compose("train", list(overrides))
