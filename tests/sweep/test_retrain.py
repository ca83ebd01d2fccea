"""The retraining of a winner: once, gone on with where it was cut off, and never taken for that of another winner."""

import json
from types import SimpleNamespace

import pytest

from handpose.sweep import retrain as module
from handpose.sweep.provenance import write_yaml
from handpose.sweep.retrain import retrain
from handpose.sweep.run import SweepInterruptedError


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the training; keeps the configurations that were trained, and leaves what training leaves."""
    configs = []

    def train_and_test(config, folders):
        configs.append(config)
        (folders.predictions / "metrics.json").write_text(json.dumps({"metrics": {"test/x": float(len(configs))}}))
        return SimpleNamespace(training=None, test_metrics={"test/x": float(len(configs))})

    monkeypatch.setattr(module, "train_and_test", train_and_test)
    return configs


def choose(folder, lr):
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "best.yaml", {"overrides": [f"optimizer.lr={lr}"]})


def test_a_finished_retraining_is_not_done_again(trained, tmp_path):
    choose(tmp_path / "sweep", 0.001)
    assert retrain(tmp_path / "sweep") == retrain(tmp_path / "sweep") == {"test/x": 1.0}
    assert [config.optimizer.lr for config in trained] == [0.001]


def test_another_winner_is_retrained_and_the_one_before_put_aside(trained, tmp_path):
    folder = tmp_path / "sweep"
    choose(folder, 0.001)
    retrain(folder)
    choose(folder, 0.002)
    assert retrain(folder) == {"test/x": 2.0}
    assert [config.optimizer.lr for config in trained] == [0.001, 0.002]
    assert json.loads((folder / "retrain_1" / "metrics.json").read_text())["metrics"] == {"test/x": 1.0}
    choose(folder, 0.003)
    retrain(folder)
    assert (folder / "retrain_2").is_dir()


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(config, folders):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_and_test", interrupted)
    choose(tmp_path / "sweep", 0.001)
    with pytest.raises(SweepInterruptedError, match=r"to go on: python tune\.py sweep\.resume="):
        retrain(tmp_path / "sweep")
