"""Trials of real networks, on a data set written on the fly: what is trained is what train.py trains."""

import math
import shlex
from pathlib import Path

import pytest
import pytorch_lightning as pl
from ray.tune.schedulers import FIFOScheduler

from handpose.config import compose
from handpose.errors import UserError
from handpose.sweep import trial
from handpose.sweep.run import run_sweep
from handpose.sweep.settings import RaySettings
from handpose.sweep.trial import (
    CHECKPOINT,
    TrainingObjective,
    TrialRecipe,
    TuneReport,
    training_overrides,
    with_params,
)
from handpose.training.fit import RunFolders, fit
from tests.builders import write_freihand
from tests.sweep.conftest import make_settings, random
from tests.sweep.objectives import METRIC

SMALL = [
    "data=freihand",
    "data.batch_size=8",
    "data.image_size=64",
    "data.source.val_fraction=0.25",
    "data.source.num_blocks=2",
    "model.decoder.depth=1",
    "trainer.enable_progress_bar=false",
]
SILENT = ["logger=none", "checkpoints.enabled=false"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    root = write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)
    return [*SMALL, f"data.root={root}", f"paths.output={tmp_path_factory.mktemp('outputs')}"]


@pytest.fixture
def train(overrides, tmp_path):
    """Fits the small configuration in this process; returns its metrics."""

    def fitted(*more, callbacks=(), resume_from=None):
        config = compose("train", [*overrides, "num_threads=1", *SILENT, *more])
        folders = RunFolders(tmp_path, tmp_path, tmp_path)
        return fit(config, folders, callbacks=callbacks, quiet=True, resume_from=resume_from).metrics

    return fitted


def test_each_trial_of_two_at_a_time_is_reproduced_alone_from_its_row(ray_started, overrides, write_space, tmp_path):
    recipe = TrialRecipe(overrides, [], max_epochs=2, num_threads=1)
    table = run_sweep(
        sweep=make_settings(tmp_path / "sweep", num_trials=3, max_epochs=2),
        cluster=RaySettings(address=None, num_cpus=2),
        space=write_space("optimizer.lr: tag(log, interval(1e-4, 1e-2))\nmodel.decoder.skips: choice(none, add)"),
        searcher=random(),
        scheduler=FIFOScheduler(),
        objective=TrainingObjective(recipe, METRIC, None),
        command=recipe.command,
        defaults={},
        description={},
    )
    assert [row.state for row in table.rows.values()] == ["complete"] * 3
    for row in table.rows.values():
        config = compose("train", [*shlex.split(row.command)[2:], *SILENT])
        metrics = fit(config, RunFolders(tmp_path, tmp_path, tmp_path), quiet=True).metrics
        assert {name: metrics[name] for name in row.metrics} == row.metrics


def test_a_commands_values_take_the_place_of_the_users():
    recipe = TrialRecipe(["model/decoder=effpose", "optimizer.lr=1", "seed=3"], [], max_epochs=4, num_threads=2)
    command = recipe.command({"model/decoder": "pyramid", "optimizer.lr": 0.002})
    assert shlex.split(command) == [
        "python",
        "train.py",
        "seed=3",
        "model/decoder=pyramid",
        "optimizer.lr=0.002",
        "trainer.max_epochs=4",
        "num_threads=2",
    ]


def test_overrides_of_the_sweep_are_not_for_train_py():
    kept = ["data=freihand", "optimizer.lr=1e-3", "+experiment=x", "sweeping=1"]
    gone = ["sweep.name=x", "scheduler=asha", "search_space=default", "ray.address=auto", "searcher.sampler.seed=1"]
    assert training_overrides([*gone, *kept, "++sweep.seed=2", "hydra.run.dir=."]) == kept


def test_params_replace_overrides_of_the_same_key():
    assert with_params(["a=1", "b=2"], {"a": 3, "c": [1, 2]}) == ["b=2", "a=3", "c=[1,2]"]


def test_a_metric_that_is_not_validated_is_told_with_those_that_are(train):
    with pytest.raises(UserError, match=r"sweep.metric=val/nothing is not validated; there are .*val/pa_mpjpe_mm"):
        train("trainer.max_epochs=1", callbacks=[TuneReport("val/nothing", None)])


def test_a_diverged_trial_ends_itself_after_the_report(train, monkeypatch):
    reports = []
    monkeypatch.setattr(
        trial, "report", lambda epoch, metrics, checkpoint=None: reports.append((epoch, metrics[METRIC]))
    )
    train("trainer.max_epochs=4", "optimizer.lr=1e30", "lr_schedule=constant", callbacks=[TuneReport(METRIC, None)])
    assert not math.isfinite(reports[-1][1])
    assert all(math.isfinite(value) for _, value in reports[:-1])
    assert len(reports) < 4


class Rates(pl.Callback):
    """Learning rate of every step."""

    def __init__(self):
        self.values = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def test_a_trial_goes_on_from_a_checkpoint_with_the_new_learning_rate(train, monkeypatch, tmp_path):
    def keep(epoch, metrics, checkpoint=None):
        if checkpoint is not None:
            (tmp_path / CHECKPOINT).write_bytes((Path(checkpoint.path) / CHECKPOINT).read_bytes())

    monkeypatch.setattr(trial, "report", keep)
    old, new = ["trainer.max_epochs=3", "optimizer.lr=1e-3"], ["trainer.max_epochs=3", "optimizer.lr=2e-4"]
    whole = train(*old, callbacks=[TuneReport(METRIC, 2)])  # leaves the checkpoint of epoch 2
    again = train(*old, resume_from=tmp_path / CHECKPOINT)
    assert again[METRIC] == whole[METRIC]
    fresh, gone_on = Rates(), Rates()
    train(*new, callbacks=[fresh])
    train(*new, callbacks=[gone_on], resume_from=tmp_path / CHECKPOINT)
    assert min(gone_on.values) > 0
    assert gone_on.values == pytest.approx({step: fresh.values[step] for step in gone_on.values})
