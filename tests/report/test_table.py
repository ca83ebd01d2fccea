"""The table of trials: its order, and trials.csv as pandas reads it."""

import math

import pandas as pd
import pytest

from handpose.report.table import TrialRow, TrialTable, short_names

METRIC = "val/pa_mpjpe_mm"


@pytest.fixture
def table():
    made = TrialTable(METRIC, "min", num_trials=4, max_epochs=9)
    made.rows[2] = TrialRow(
        2, {"optimizer.lr": 0.1 + 0.2, "weights": None}, "complete", 9, {METRIC: 1 / 3}, 12.345, "node"
    )
    made.rows[0] = TrialRow(
        0, {"optimizer.lr": 1e-5, "skips": "none", "milestones": [1, 2]}, "stopped", 1, {METRIC: 9.0}
    )
    made.rows[1] = TrialRow(1, {"optimizer.lr": 1.0, "flag": True}, "diverged", 2, {METRIC: math.nan, "val/x": 1.0})
    made.rows[3] = TrialRow(
        3, {"optimizer.lr": 2.0}, "failed", error='ValueError: a "quoted", line', command="python train.py a=1"
    )
    return made


def test_trials_csv_reads_back_the_very_values(table, tmp_path):
    table.write_csv(tmp_path / "trials.csv")
    read = pd.read_csv(tmp_path / "trials.csv", keep_default_na=False, na_values=["", "nan"]).set_index("number")
    assert list(read.index) == [0, 1, 2, 3]
    assert read.loc[2, "optimizer.lr"] == 0.1 + 0.2
    assert read.loc[2, METRIC] == 1 / 3
    assert read.loc[2, "weights"] == "null"
    assert read.loc[0, "skips"] == "none"
    assert read.loc[0, "milestones"] == "[1, 2]"
    assert math.isnan(read.loc[1, METRIC])
    assert pd.isna(read.loc[0, "weights"])
    assert read.loc[3, "error"] == 'ValueError: a "quoted", line'
    assert read.loc[3, "command"] == "python train.py a=1"
    assert list(read["state"]) == ["stopped", "diverged", "complete", "failed"]


def test_columns_are_the_same_in_every_row_and_nothing_else_is_left(table, tmp_path):
    table.write_csv(tmp_path / "trials.csv")
    columns = list(pd.read_csv(tmp_path / "trials.csv").columns)
    assert columns[:4] == ["number", "state", "epochs", "seconds"]
    assert columns[-4:] == ["node", "error", "command", "traceback"]
    assert set(columns[4:-4]) == {METRIC, "val/x", "optimizer.lr", "weights", "skips", "milestones", "flag"}
    assert [file.name for file in tmp_path.iterdir()] == ["trials.csv"]


def test_an_empty_table_can_be_read(tmp_path):
    TrialTable(METRIC, "min", num_trials=1, max_epochs=1).write_csv(tmp_path / "trials.csv")
    assert pd.read_csv(tmp_path / "trials.csv").empty


def test_ranks_go_by_epochs_before_values_and_leave_out_what_came_to_nothing(table):
    assert [row.number for row in table.ranked()] == [2, 0]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["model.decoder.depth", "optimizer.lr"], ["depth", "lr"]),
        (["model.decoder.depth", "model.encoder.depth"], ["decoder.depth", "encoder.depth"]),
        (["model/decoder", "model.decoder.depth"], ["decoder", "depth"]),
        (["a.b", "b"], ["a.b", "b"]),
    ],
)
def test_short_names_tell_keys_apart(keys, names):
    assert list(short_names(keys).values()) == names
