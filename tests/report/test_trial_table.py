"""The table of trials: its order, and trials.csv as pandas reads it."""

import math

import optuna
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.report.trial_table import TrialRow, TrialTable, make_second_objectives, shorten_names

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
    assert columns[-5:] == ["node", "reason", "error", "command", "traceback"]
    assert set(columns[4:-5]) == {METRIC, "val/x", "optimizer.lr", "weights", "skips", "milestones", "flag"}
    assert [file.name for file in tmp_path.iterdir()] == ["trials.csv"]


@pytest.mark.parametrize(
    "error", ["=HYPERLINK(0)", "+1", "-x", "@sum", "\t=1", "two\nlines\r\nand\rmore", 'a "b", c; d']
)
def test_no_text_is_a_formula_or_a_row_of_its_own_for_a_spreadsheet(tmp_path, error):
    made = TrialTable(METRIC, "min", num_trials=1, max_epochs=9)
    made.rows[0] = TrialRow(
        0, {"word": error, "list": ["=1"], "loss.weight": -0.5}, "failed", error=error, traceback=error
    )
    made.write_csv(tmp_path / "trials.csv")
    content = (tmp_path / "trials.csv").read_text(encoding="utf-8")
    assert len(content.splitlines()) == 2
    row = pd.read_csv(tmp_path / "trials.csv", dtype=str).loc[0]
    assert row["loss.weight"] == "-0.5"
    for column in ("error", "traceback", "word"):
        assert row[column][0] not in "=+-@\t\r"
        assert row[column].strip().replace("\\n", "\n") == "\n".join(error.splitlines()).strip()


def test_an_empty_table_can_be_read(tmp_path):
    TrialTable(METRIC, "min", num_trials=1, max_epochs=1).write_csv(tmp_path / "trials.csv")
    assert pd.read_csv(tmp_path / "trials.csv").empty


def test_costs_stand_beside_the_metrics(table, tmp_path):
    table.rows[0].costs = {"latency_ms": 3.25, "num_parameters": 1e6, "memory_mb": math.nan}
    table.write_csv(tmp_path / "trials.csv")
    read = pd.read_csv(tmp_path / "trials.csv").set_index("number")
    assert (read.loc[0, "latency_ms"], read.loc[0, "num_parameters"]) == (3.25, 1e6)
    assert math.isnan(read.loc[0, "memory_mb"])
    assert read.loc[1:, "latency_ms"].isna().all()


def make_two_objective_table(mode, *points, epochs=9):
    made = TrialTable(METRIC, mode, num_trials=9, max_epochs=9, objectives=make_second_objectives("latency_ms"))
    for number, (value, latency_ms) in enumerate(points):
        costs = {} if latency_ms is None else {"latency_ms": latency_ms}
        made.rows[number] = TrialRow(number, {}, "complete", epochs, {METRIC: value}, costs=costs)
    return made


@given(
    mode=st.sampled_from(["min", "max"]),
    points=st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=20),
)
def test_the_front_is_optunas(mode, points):
    study = optuna.create_study(directions=[f"{mode}imize", "minimize"])
    study.add_trials([optuna.trial.create_trial(values=point) for point in points])
    front = make_two_objective_table(mode, *points).find_front()
    assert sorted(row.number for row in front) == sorted(trial.number for trial in study.best_trials)
    sign = 1 if mode == "min" else -1
    assert [sign * row.metrics[METRIC] for row in front] == sorted(sign * row.metrics[METRIC] for row in front)


def test_on_the_front_are_only_those_that_were_trained_the_longest_and_measured_and_came_to_something():
    made = make_two_objective_table(
        "min", (5.0, 5.0), (1.0, 1.0), (4.0, 6.0), (math.nan, 1.0), (1.0, None), (2.0, math.nan), (3.0, 3.0)
    )
    made.rows[1].epochs = 8
    made.rows[6].state = "diverged"
    assert [row.number for row in made.find_front()] == [2, 0]


def test_with_one_objective_the_front_is_the_best_trial(table):
    assert [row.number for row in table.find_front()] == [2]
    assert TrialTable(METRIC, "min", num_trials=1, max_epochs=1).find_front() == []
    assert make_two_objective_table("min").find_front() == []


def test_ranks_go_by_epochs_before_values_and_leave_out_what_came_to_nothing(table):
    assert [row.number for row in table.rank_trials()] == [2, 0]


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
    assert list(shorten_names(keys).values()) == names
