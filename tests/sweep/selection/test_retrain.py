"""The retraining of a winner: once, gone on with where it was cut off, and never taken for that of another winner."""

import json
import math
import os
import signal
import threading
import time
from datetime import datetime
from types import SimpleNamespace

import pytest

from handpose.errors import UserError
from handpose.sweep.driver.shutdown import SweepInterruptedError
from handpose.sweep.selection import retrain as module
from handpose.sweep.selection.retrain import retrain_winner
from handpose.training.checkpoints import read_checkpoint
from handpose.yaml_files import write_yaml
from tests.builders import write_freihand


@pytest.fixture
def training_calls(monkeypatch):
    """Stands in for the training; keeps the configurations that were trained, and leaves what training leaves."""
    configs = []

    def train_and_test(config, folders):
        configs.append(config)
        (folders.predictions / "metrics.json").write_text(json.dumps({"metrics": {"test/x": float(len(configs))}}))
        return SimpleNamespace(training=None, test_metrics={"test/x": float(len(configs))})

    monkeypatch.setattr(module, "train_and_test", train_and_test)
    return configs


def write_winner(folder, lr):
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "best.yaml", {"overrides": [f"optimizer.lr={lr}"]})


def test_a_finished_retraining_is_not_done_again(training_calls, tmp_path):
    write_winner(tmp_path / "sweep", 0.001)
    assert retrain_winner(tmp_path / "sweep") == retrain_winner(tmp_path / "sweep") == {"test/x": 1.0}
    assert [config.optimizer.lr for config in training_calls] == [0.001]


def test_a_retraining_that_starts_says_what_is_trained_and_how_long_it_may_take(training_calls, tmp_path, capsys):
    folder = tmp_path / "sweep"
    folder.mkdir()
    content = {"overrides": ["trainer.max_epochs=30"], "params": {"optimizer.lr": 0.002}, "trial": 7}
    write_yaml(folder / "best.yaml", content)
    retrain_winner(folder, epoch_s=60.0)
    line = "retrain     trial 7 (lr 0.002): 30 epochs on 1 device, about 30 min at the speed of its trial\n"
    assert capsys.readouterr().out == line
    retrain_winner(folder, epoch_s=60.0)
    assert capsys.readouterr().out == ""


def test_a_retraining_that_resumes_says_after_which_epoch(training_calls, tmp_path, capsys, monkeypatch):
    write_winner(tmp_path / "sweep", 0.001)
    monkeypatch.setattr(module, "_count_trained_epochs", lambda checkpoints: 5)
    retrain_winner(tmp_path / "sweep", epoch_s=60.0)
    expected = (
        "retrain     the winner: continues after epoch 5 of 20 on 1 device, about 15 min at the speed of its trial"
    )
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize(("given_s", "weights"), [(600.0, None), (100.0, "checkpoints/trial_0007/epoch_0004.ckpt")])
def test_a_budget_ends_the_retraining_which_starts_from_its_trial_if_that_had_longer(
    training_calls, tmp_path, capsys, given_s, weights
):
    folder = tmp_path / "sweep"
    (folder / "checkpoints/trial_0007").mkdir(parents=True)
    for age, epoch in enumerate((4, 2)):
        file = folder / f"checkpoints/trial_0007/epoch_000{epoch}.ckpt"
        file.touch()
        os.utime(file, (100 - age, 100 - age))
    write_yaml(folder / "best.yaml", {"overrides": ["trainer.max_epochs=30"], "trial": 7})
    end = time.time() + given_s
    retrain_winner(folder, epoch_s=60.0, trial_epochs=4, find_end=lambda num_devices: end)
    (config,) = training_calls
    assert datetime.fromisoformat(config.budget.finish_by).timestamp() == pytest.approx(end, abs=1e-5)
    assert config.model.weights == (None if weights is None else str(folder / weights))
    assert config.trainer.max_epochs == 30
    out = capsys.readouterr().out
    assert ("; the budget gives it 9:59" if weights is None else "; the budget gives it 1:39") in out
    assert ("starts with the weights of the trial" in out) == (weights is not None)


def test_a_retraining_on_cores_uses_no_gpu_of_the_budget_and_may_have_no_end(training_calls, tmp_path, capsys):
    folder, asked = tmp_path / "sweep", []
    write_winner(folder, 0.001)

    def find_end(num_gpus):
        asked.append(num_gpus)
        return math.inf

    retrain_winner(folder, epoch_s=60.0, find_end=find_end)
    assert asked == [0]
    assert training_calls[0].budget.finish_by is None
    assert "the budget gives it" not in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "repeats", "num_trained"), [(9, False, 1), (9, True, 2), (20, True, 1)])
def test_a_shortened_retraining_is_done_again_when_there_is_more_time(
    training_calls, tmp_path, monkeypatch, epochs, repeats, num_trained
):
    folder = tmp_path / "sweep"
    write_winner(folder, 0.001)
    retrain_winner(folder)
    monkeypatch.setattr(
        module, "_count_trained_epochs", lambda checkpoints: epochs if checkpoints.parent.exists() else 0
    )
    assert retrain_winner(folder, repeats_shortened=repeats) == {"test/x": float(num_trained)}
    assert (folder / "retrain_1").exists() == (num_trained == 2)


def test_with_the_validation_split_it_is_another_retraining(training_calls, tmp_path):
    folder = tmp_path / "sweep"
    write_winner(folder, 0.001)
    retrain_winner(folder)
    assert retrain_winner(folder, use_val=True) == retrain_winner(folder, use_val=True) == {"test/x": 2.0}
    assert [config.train_on_val for config in training_calls] == [False, True]


def test_a_finished_retraining_is_not_put_aside_for_one_that_has_no_time(training_calls, tmp_path):
    folder = tmp_path / "sweep"
    write_winner(folder, 0.1)
    metrics = retrain_winner(folder)
    with pytest.raises(UserError, match=r"^the budget has no time left to retrain .*give a larger budget$"):
        retrain_winner(folder, use_val=True, find_end=lambda devices: time.time() + 5)
    assert retrain_winner(folder, find_end=lambda devices: time.time() + 5) == metrics
    assert not (folder / "retrain_1").exists()


def test_what_is_gone_on_with_without_a_best_checkpoint_is_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_checkpoint", lambda path: {"epoch": 8})
    overrides = module._make_resume_overrides(tmp_path, 9)
    assert f"model.checkpoint_path={tmp_path / 'last.ckpt'}" in overrides
    assert "test=true" in overrides


def test_another_winner_is_retrained_and_the_one_before_put_aside(training_calls, tmp_path):
    folder = tmp_path / "sweep"
    write_winner(folder, 0.001)
    retrain_winner(folder)
    write_winner(folder, 0.002)
    assert retrain_winner(folder) == {"test/x": 2.0}
    assert [config.optimizer.lr for config in training_calls] == [0.001, 0.002]
    assert json.loads((folder / "retrain_1" / "metrics.json").read_text())["metrics"] == {"test/x": 1.0}
    write_winner(folder, 0.003)
    retrain_winner(folder)
    assert (folder / "retrain_2").is_dir()


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(config, folders):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_and_test", interrupted)
    write_winner(tmp_path / "sweep", 0.001)
    with pytest.raises(SweepInterruptedError, match=r"to resume: python tune\.py sweep\.resume="):
        retrain_winner(tmp_path / "sweep")


def test_the_devices_divide_the_batch_of_the_trials():
    assert [module._find_divisor(most, 32) for most in (1, 2, 3, 5, 8, 64)] == [1, 2, 2, 4, 8, 32]


def test_all_gpus_are_used_unless_the_winner_or_the_machine_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 4)
    started = []

    def run_apart(folder, devices, changes):
        started.append(devices)
        raise UserError("stands in")

    monkeypatch.setattr(module, "_run_in_subprocess", run_apart)
    write_winner(tmp_path / "sweep", 0.001)
    with pytest.raises(UserError):
        retrain_winner(tmp_path / "sweep")
    with pytest.raises(UserError):
        retrain_winner(tmp_path / "sweep", devices=2)
    assert started == [4, 2]


def test_a_winner_that_names_its_devices_is_retrained_on_those(training_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 4)
    (tmp_path / "sweep").mkdir()
    for i, said in enumerate(["trainer.devices=1", "trainer.accelerator=cpu"]):
        write_yaml(tmp_path / "sweep" / "best.yaml", {"overrides": [said, f"seed={i}"]})
        retrain_winner(tmp_path / "sweep")
    assert [config.seed for config in training_calls] == [0, 1]


@pytest.fixture
def small_winner(tmp_path, monkeypatch):
    """A sweep's folder whose winner two processes can train in seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_freihand(tmp_path / "hands", num_poses=24, variants=1, num_test=6, size=64)
    winner = [
        "data=freihand",
        f"data.root={tmp_path / 'hands'}",
        f"paths.packed={tmp_path / 'packed'}",
        "data.batch_size=6",
        "data.image_size=64",
        "data.source.val_fraction=0.25",
        "data.source.num_blocks=2",
        "model.encoder.name=test_efficientnet",
        "model.encoder.pretrained=false",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=16",
        "num_threads=1",
    ]
    folder = tmp_path / "sweep"
    folder.mkdir()
    write_yaml(folder / "best.yaml", {"overrides": winner})
    return folder


@pytest.mark.slow
def test_two_devices_share_the_batches_and_go_on_after_an_interrupt(small_winner):
    last = small_winner / "retrain" / "checkpoints" / "last.ckpt"

    def interrupt():
        while not last.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SweepInterruptedError):
        retrain_winner(small_winner, devices=2)
    epochs = read_checkpoint(last)["epoch"] + 1
    assert epochs < 16
    metrics = retrain_winner(small_winner, devices=2)
    assert metrics["test/pa_mpjpe_mm"] > 0
    checkpoint = read_checkpoint(last)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (15, 16 * 3)  # 18 hands to train on, 6 a step
    assert checkpoint["config"]["data"]["batch_size"] == 3
    assert not (small_winner / "retrain_1").exists()
