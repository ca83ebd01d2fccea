"""What a trial costs, held against closed forms, Lightning's own counts and files that were really written."""

import os
import random
import re
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import torch

from handpose.config import compose
from handpose.evaluation.onnx_graph import open_session
from handpose.sweep.trainable import cost_callback as cost_watch
from handpose.sweep.trainable import trial_cost
from handpose.sweep.trainable.cost_callback import CostMonitor
from handpose.sweep.trainable.trial_cost import (
    DataSize,
    ProbeFailure,
    TrialCostProbe,
    make_random_hands,
    measure_costs,
    measure_trial_cost,
)
from handpose.training.build import build_training
from handpose.training.fit import RunFolders, fit
from tests.builders import write_freihand
from tests.sweep.trainable.test_trial import SILENT, SMALL

SIZE = DataSize(image_size=64, num_train=18, num_val=6)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    root = write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)
    outputs = tmp_path_factory.mktemp("outputs")
    return [*SMALL, f"data.root={root}", f"paths.output={outputs}", "num_threads=1", "trainer.accelerator=cpu", *SILENT]


@pytest.fixture(scope="module")
def measure(overrides):
    """Measures the small configuration with more overrides."""

    def measured(*more, params=None, size=SIZE, num_steps=3, **how):
        return measure_trial_cost([*overrides, *more], params or {}, size, num_steps=num_steps, weights=False, **how)

    return measured


def test_the_memory_of_a_process_is_without_the_files_that_others_share(tmp_path, monkeypatch):
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = trial_cost._measure_process_mb()
    anonymous_kb = int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
    assert 0.99 * 1.024e-3 * anonymous_kb <= found < 1.024e-3 * peak_kb
    status = tmp_path / "status"
    status.write_text(f"VmRSS:\t {peak_kb} kB\nRssFile:\t  {peak_kb // 2} kB\n")
    assert trial_cost._measure_process_mb(status) == pytest.approx(1.024e-3 * peak_kb / 2, rel=0.05)


def test_processes_of_data_loaders_count(measure):
    alone, loaded = measure().process_mb, measure("data.num_workers=4").process_mb
    assert loaded == pytest.approx(alone + 2 * 4 * 100, rel=0.1)


class ToyModule(pl.LightningModule):
    """One weight of a million numbers, and next to nothing else."""

    def __init__(self, optimizer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1_000_000))
        self.make_optimizer = optimizer

    def forward(self, view):
        return view.image.mean() * self.weight.sum()

    def training_step(self, batch, batch_idx):
        return self(batch)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make_optimizer([self.weight])


class Loaders(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        hands = make_random_hands(1, 32)
        self.batch = hands._replace(image=hands.image.float())

    def train_dataloader(self):
        return torch.utils.data.DataLoader([self.batch] * 3, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([self.batch] * 2, batch_size=None)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:`isinstance")
@pytest.mark.parametrize(
    ("optimizer", "num_copies"),
    [
        (lambda weights: torch.optim.SGD(weights, lr=0.1, foreach=False), 2),  # weight, gradient
        (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, foreach=False), 3),  # and its mean
    ],
)
def test_memory_is_that_of_weights_gradients_and_optimizer(optimizer, num_copies):
    watch = CostMonitor(saves_checkpoint=False)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[watch], enable_model_summary=False, num_sanity_val_steps=0, **silent
    )
    trainer.fit(ToyModule(optimizer), datamodule=Loaders())
    assert watch.memory_mb == pytest.approx(4.0 * num_copies, rel=0.01)


@pytest.mark.slow
def test_memory_does_not_depend_on_what_ran_before(measure):
    small, _, again = measure("data.batch_size=4"), measure("data.batch_size=16"), measure("data.batch_size=4")
    assert again.memory_mb == pytest.approx(small.memory_mb, rel=1e-3)


@pytest.mark.slow
def test_memory_grows_with_the_batch_as_activations_do(measure):
    memory_mb = [measure(f"data.batch_size={size}").memory_mb for size in (4, 8, 16)]
    assert memory_mb[2] - memory_mb[1] == pytest.approx(2 * (memory_mb[1] - memory_mb[0]), rel=0.1)


@pytest.mark.parametrize(
    ("times_s", "num_timed"),
    [([0.004, 0.003, 0.002, 0.005], 50), ([0.2, 0.3, 0.1], 7), ([1 / 32], 16)],
)
def test_a_latency_is_the_least_of_as_many_as_there_is_time_for(monkeypatch, times_s, num_timed):
    class Network:
        device = torch.device("cpu")
        num_calls, now_s = 0, 0.0

        def __call__(self, view):
            assert view.image.shape[0] == 1
            self.num_calls += 1
            self.now_s += 9.0 if self.num_calls <= 2 else times_s[self.num_calls % len(times_s)]

    network = Network()
    monkeypatch.setattr(cost_watch, "_read_device_clock", lambda device: network.now_s)
    timed = list(cost_watch._time_forward_passes(network, make_random_hands(4, 32)))
    assert min(timed) == pytest.approx(min(times_s))
    assert len(timed) == num_timed == network.num_calls - 2  # but for the first two


class CountingCallback(pl.Callback):
    """What Lightning counts, and `costs` where it is asked for."""

    def __init__(self, *, measures, latency_of=None):
        self.measures = measures
        self.latency_of = latency_of
        self.costs = None

    def on_fit_start(self, trainer, pl_module):
        if self.measures:
            before = list_states(), {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.costs = measure_costs(pl_module, latency_of=self.latency_of)
            assert list_states() == before[0]
            assert all(torch.equal(value, before[1][name]) for name, value in pl_module.state_dict().items())
            assert all(parameter.grad is None for parameter in pl_module.parameters())

    def on_train_end(self, trainer, pl_module):
        self.num_batches = trainer.num_training_batches, trainer.num_val_batches[0]
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def list_states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_costs_change_nothing_of_the_training_that_follows(overrides, measure, tmp_path):
    more = ["trainer.max_epochs=2", "model.encoder.drop_path=0.3", "trainer.limit_train_batches=0.5"]  # draws at random
    config = compose("train", [*overrides, *more])
    told = [CountingCallback(measures=False), CountingCallback(measures=True)]
    results = [fit(config, RunFolders(*[tmp_path] * 3), callbacks=[each], quiet=True).metrics for each in told]
    assert results[0] == results[1]
    assert all(torch.equal(value, told[1].weights[name]) for name, value in told[0].weights.items())

    cost = measure(*more)
    assert told[0].num_batches == (cost.steps_per_epoch, cost.batches_per_validation) == (1, 1)
    assert told[1].costs["num_parameters"] == cost.num_parameters
    assert told[1].costs["memory_mb"] == pytest.approx(cost.memory_mb, rel=0.01)
    assert 0 < told[1].costs["latency_ms"] < 1000


@pytest.mark.slow
@pytest.mark.parametrize("latency_of", ["fp32", "int8"])
def test_the_latency_may_be_that_of_the_exported_file(overrides, measure, tmp_path, monkeypatch, latency_of):
    exported = []

    def time_file(files, images, *, limit_s):
        (file,) = files
        model = onnx.load(file)
        exported.append({node.op_type for node in model.graph.node})
        assert open_session(file).run(None, {"image": images[:1]})[0].shape == (1, 21, 2)
        return [[0.25, 0.125, 0.5]]

    monkeypatch.setattr("handpose.evaluation.onnx_precision._time_single_images", time_file)
    callback = CountingCallback(measures=True, latency_of=latency_of)
    config = compose("train", [*overrides, "trainer.max_epochs=1"])
    fit(config, RunFolders(*[tmp_path] * 3), callbacks=[callback], quiet=True)
    assert callback.costs["latency_ms"] == 125.0  # other work only adds to a time
    assert measure(latency_of=latency_of).latency_ms == 125.0
    assert [("QuantizeLinear" in kinds) for kinds in exported] == [latency_of == "int8"] * 2


def test_parameters_and_checkpoint_are_those_of_the_network_and_its_file(overrides, measure, tmp_path):
    on = [item for item in overrides if item != "checkpoints.enabled=false"]
    result = fit(compose("train", [*on, "trainer.max_epochs=1"]), RunFolders(*[tmp_path] * 3), quiet=True)
    cost = measure()
    assert cost.checkpoint_mb == pytest.approx(result.last_checkpoint.stat().st_size / 1e6, rel=0.01)
    adam = torch.load(result.last_checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    assert cost.num_parameters == sum(state["exp_avg"].numel() for state in adam.values())


def test_an_epoch_has_the_batches_of_the_loaders(overrides, measure):
    _, data = build_training(compose("train", overrides), pretrained=False, quiet=True)
    cost = measure()
    assert (cost.steps_per_epoch, cost.batches_per_validation) == (
        len(data.train_dataloader()),
        len(data.val_dataloader()),
    )


def test_a_trial_takes_its_epochs_and_validations(measure):
    cost = measure("trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2", "data.batch_size=6")
    cost = cost._replace(start_s=10.0, step_s=1.0, validation_batch_s=0.5)
    assert cost.trial_s == 10.0 + 4 * 3 * 1.0 + 2 * 1 * 0.5


@pytest.mark.slow
def test_configurations_that_train_alike_leave_the_same_trace(measure):
    assert measure("heatmap.sigma=0.02").trace != measure("heatmap.sigma=0.03").trace
    unread = [measure("loss=coordinate_mse", f"heatmap.sigma={sigma}").trace for sigma in (0.02, 0.03)]
    assert unread[0] == unread[1]


def test_a_parameter_that_the_sweep_sets_itself_is_told(measure):
    params = {"trainer.max_epochs": 9, "optimizer.lr": 0.002, "model/decoder": "pyramid", "data.batch_size": 8}
    overrides = ["trainer.max_epochs=2", "optimizer.lr=0.002", "model/decoder=pyramid"]
    assert measure(*overrides, params=params).ignored == ("trainer.max_epochs",)


@pytest.mark.parametrize(
    ("override", "kind", "reason"),
    [
        ("data.batch_size=19", "value", "data.batch_size=19 is more than the 18 images of the training split"),
        ("model.encoder.weights=/nowhere.pth", "value", "model.encoder.weights: there is no file /nowhere.pth"),
        ("model.encoder.name=mobilenet", "value", "model.encoder.name=mobilenet is not a timm model"),
        ("model.decoder.width=1000000000000", "memory", "RuntimeError: "),
    ],
)
def test_what_cannot_be_trained_is_an_answer(overrides, override, kind, reason):
    given = [item for item in overrides if item.partition("=")[0] != override.partition("=")[0]]
    refusal = TrialCostProbe().measure_cost([*given, override], {}, SIZE, num_steps=3, weights=False)
    assert isinstance(refusal, ProbeFailure)
    assert refusal.kind == kind
    assert refusal.reason.startswith(reason)


def test_nothing_is_left_in_the_working_folder(measure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure()
    assert os.listdir(tmp_path) == []
