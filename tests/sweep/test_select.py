"""The winner of a table, and best.yaml as train.py reads it."""

import math

import pytest
import yaml

from handpose.config import compose
from handpose.report.table import TrialRow, TrialTable
from handpose.sweep.select import NoWinnerError, select_winner, write_best
from tests.sweep.conftest import make_settings
from tests.sweep.objectives import METRIC


def table(*trials, mode="min"):
    """Of (state, epochs, value)."""
    made = TrialTable(METRIC, mode, num_trials=len(trials), max_epochs=9)
    for number, (state, epochs, value) in enumerate(trials):
        metrics = {METRIC: value} if epochs else {}
        made.rows[number] = TrialRow(number, {"optimizer.lr": 0.1 * number}, state, epochs, metrics, error="")
    return made


@pytest.mark.parametrize(
    ("trials", "mode", "number"),
    [
        ([("stopped", 1, 1.0), ("complete", 9, 5.0), ("complete", 9, 4.0)], "min", 2),
        ([("stopped", 3, 1.0), ("stopped", 1, 0.5), ("stopped", 3, 2.0)], "min", 0),
        ([("complete", 9, 1.0), ("complete", 9, 3.0), ("stopped", 3, 9.0)], "max", 1),
        ([("diverged", 9, math.nan), ("complete", 9, 30.0)], "min", 1),
        ([("failed", 9, 1.0), ("stopped", 3, 30.0)], "min", 1),
        ([("complete", 9, 2.0), ("complete", 9, 2.0)], "min", 0),
        ([("failed", 0, 0.0), ("waiting", 2, 3.0)], "min", 1),
    ],
)
def test_the_best_of_those_trained_longest_wins(trials, mode, number, tmp_path):
    assert select_winner(table(*trials, mode=mode), folder=tmp_path).number == number


def test_without_a_winner_the_first_error_and_its_file_are_told(tmp_path):
    failed = table(("diverged", 2, math.nan), ("failed", 0, 0.0), ("failed", 0, 0.0))
    failed.rows[1].error = "RuntimeError: no memory"
    with pytest.raises(
        NoWinnerError, match=r"1 diverged, 2 failed.* trial 1 ended with: RuntimeError: no memory"
    ) as told:
        select_winner(failed, folder=tmp_path)
    assert str(tmp_path / "trials.csv") in str(told.value)


def test_without_trials_it_is_told(tmp_path):
    with pytest.raises(NoWinnerError, match="none was started"):
        select_winner(table(), folder=tmp_path)


def test_train_py_composes_the_winner_from_best_yaml(tmp_path):
    trials = table(("complete", 9, 5.0), ("complete", 9, 4.0))
    overrides = ["data=freihand", "data.root=with space", "model/decoder=effpose", "optimizer.lr=0.1"]
    write_best(
        tmp_path / "best.yaml",
        table=trials,
        row=trials.rows[1],
        overrides=[item.replace("with space", "'with space'") for item in overrides],
        sweep=make_settings(tmp_path),
        origin={"data_fingerprint": "abc", "git": {"revision": None, "dirty": None}},
    )
    config = compose("train", [f"best={tmp_path / 'best.yaml'}"])
    assert config.optimizer.lr == 0.1
    assert config.model.decoder["_target_"].endswith("EffPose")
    assert config.data.root.endswith("/with space")
    content = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert content["metric"] == {"name": METRIC, "mode": "min", "value": 4.0}
    assert content["fidelity"] == {"epochs": 9, "max_epochs": 9}
    assert (content["trial"], content["data_fingerprint"]) == (1, "abc")
