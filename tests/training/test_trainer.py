"""The Trainer as a configuration wants it: loggers, and what the machine has not."""

import importlib.machinery
import operator
import re
import sys
import warnings
from unittest.mock import MagicMock

import pytest
import torch
from pytorch_lightning.trainer.connectors.data_connector import _parse_num_batches
from pytorch_lightning.trainer.setup import _determine_batch_limits
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from handpose.config import to_plain_values
from handpose.errors import UserError
from handpose.training.checkpoints import BestAndLastCheckpoint
from handpose.training.fit import fit
from handpose.training.trainer import (
    EpochLogger,
    check_trainer,
    count_limited_batches,
    explain_trainer_errors,
    make_training_trainer,
    suppress_library_output,
)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which is optional; what is asked of it is recorded."""
    package = MagicMock(run=None, __spec__=importlib.machinery.ModuleSpec("wandb", loader=None))
    package.sdk.lib.RunDisabled = package.wandb_run.Run = type("Run", (), {})
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("sdk", "sdk.lib", "wandb_run"):
        monkeypatch.setitem(sys.modules, f"wandb.{name}", operator.attrgetter(name)(package))
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", True)
    return package


def test_a_run_is_logged_to_wandb_with_its_configuration_metrics_and_pictures(wandb, configure, folders):
    config = configure("logger=wandb", "logger.project=hands", "logger.run_name=first", "pictures.every_n_steps=2")
    fit(config, folders, quiet=True)
    options = wandb.init.call_args.kwargs
    assert (options["project"], options["name"], options["dir"]) == ("hands", "first", str(folders.logs))
    assert options["config"] == to_plain_values(config)
    logged = {name for call in wandb.init.return_value.log.call_args_list for name in call.args[0]}
    assert {"val/pa_mpjpe_mm", "train/loss", "val_pictures/keypoints"} <= logged


@pytest.mark.parametrize(("metric", "mode"), [("val/pck_auc", "max"), ("val/rr_mpjpe_mm", "min")])
def test_the_best_checkpoint_follows_the_direction_of_its_metric(configure, folders, metric, mode):
    trainer = make_training_trainer(configure(f"checkpoints.metric={metric}"), folders, quiet=True)
    (saver,) = (callback for callback in trainer.callbacks if isinstance(callback, BestAndLastCheckpoint))
    assert saver.metric == (metric, mode)


def test_wandb_that_is_missing_is_a_sentence(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trainer(configure("logger=wandb"))


@pytest.mark.parametrize(("override", "kinds"), [("logger=tensorboard", [EpochLogger]), ("logger=none", [])])
def test_the_logger_is_the_one_asked_for(configure, folders, override, kinds):
    with suppress_library_output():
        trainer = make_training_trainer(configure(override), folders, quiet=True)
    assert [type(logger) for logger in trainer.loggers] == kinds


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "sentence"),
    [
        (0, ["trainer.accelerator=gpu"], "no GPU that torch can use"),
        (0, ["trainer.devices=2"], "trainer.devices=2, but this machine has no GPU"),
        (1, ["trainer.devices=2"], "trainer.devices=2, but this machine has 1 GPU$"),
        (2, ["trainer.devices=4", "trainer.accelerator=cuda"], "trainer.devices=4, but this machine has 2 GPUs"),
    ],
)
def test_more_gpus_than_there_are_is_a_sentence(configure, monkeypatch, num_gpus, overrides, sentence):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(UserError, match=sentence):
        check_trainer(configure(*overrides))


def test_a_quiet_run_shows_no_progress(configure, folders, capfd):
    with suppress_library_output():
        trainer = make_training_trainer(configure("logger=none"), folders, quiet=True)
    assert trainer.progress_bar_callback is None
    assert "ProgressBar" not in {type(callback).__name__ for callback in trainer.callbacks}
    assert capfd.readouterr() == ("", "")


def test_without_a_bar_and_a_validation_each_epoch_has_a_line_with_its_loss(configure, folders, capfd):
    fit(configure("train_on_val=true", "trainer.enable_progress_bar=false", "logger=none"), folders)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [re.sub(r"\d+\.\d+|\d+ s", "_", line) for line in lines] == [
        "epoch 1/2: loss _ (_)",
        "epoch 2/2: loss _ (_)",
    ]


def test_calm_keeps_back_only_what_a_user_can_do_nothing_with():
    with suppress_library_output():
        warnings.warn("The 'train_dataloader' does not have many workers", stacklevel=1)
        with pytest.warns(UserWarning, match="a disk is failing"):
            warnings.warn("a disk is failing", stacklevel=1)


@pytest.mark.parametrize("num_batches", [1, 3, 10])
@pytest.mark.parametrize("limit", [1, 2, 50, 0.34, 0.5, 1.0, 2.0])
def test_limits_are_counted_as_lightning_counts_them(configure, num_batches, limit):
    config = configure(f"trainer.limit_train_batches={limit}")
    try:
        counted = _parse_num_batches(RunningStage.TRAINING, num_batches, _determine_batch_limits(limit, ""))
    except MisconfigurationException:
        with pytest.raises(UserError, match=rf"trainer\.limit_train_batches={limit} leaves none of the {num_batches}"):
            count_limited_batches(config, "train", num_batches)
    else:
        assert count_limited_batches(config, "train", num_batches) == counted


def test_an_operation_that_is_not_deterministic_is_a_sentence(configure):
    """CPU kernels have no such operation; this is the message of torch 2.15 for one on a GPU."""
    message = "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, but you set it"
    with (
        pytest.raises(UserError, match=r"trainer\.deterministic=true: upsample_.*; trainer\.deterministic=warn only"),
        explain_trainer_errors(configure("+trainer.deterministic=true")),
    ):
        raise RuntimeError(message)


def test_an_error_that_no_argument_explains_is_raised_as_it_is(configure):
    with pytest.raises(RuntimeError, match="out of memory"), explain_trainer_errors(configure()):
        raise RuntimeError("out of memory")


def test_several_nodes_need_a_meeting_point(configure, monkeypatch):
    config = configure("+trainer.num_nodes=2", "trainer.accelerator=cpu")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_trainer(config)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT and NODE_RANK"):
        check_trainer(config)
