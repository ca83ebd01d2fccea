"""Finalists and winner of a table, and best.yaml as train.py reads it."""

import math
from functools import partial

import pytest
import yaml

from handpose.config import compose
from handpose.errors import UserError
from handpose.report.trial_table import CostObjective, TrialRow, TrialTable
from handpose.sweep.record.provenance import collect_provenance, describe_differences, select_configuration
from handpose.sweep.selection.winner import NoWinnerError, select_finalists, select_winner, write_best, write_front
from tests.sweep.objectives import METRIC
from tests.sweep.sweeps import make_settings


def make_table(*trials, mode="min"):
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
    assert select_winner(make_table(*trials, mode=mode), folder=tmp_path).number == number


def test_without_a_winner_the_first_error_and_its_file_are_told(tmp_path):
    failed = make_table(("diverged", 2, math.nan), ("failed", 0, 0.0), ("failed", 0, 0.0))
    failed.rows[1].error = "RuntimeError: no memory"
    with pytest.raises(
        NoWinnerError, match=r"1 diverged, 2 failed.* trial 1 ended with: RuntimeError: no memory"
    ) as told:
        select_winner(failed, folder=tmp_path)
    assert str(tmp_path / "trials.csv") in str(told.value)


def test_without_trials_it_is_told(tmp_path):
    with pytest.raises(NoWinnerError, match="none was started"):
        select_winner(make_table(), folder=tmp_path)


def test_train_py_composes_the_winner_from_best_yaml(tmp_path):
    trials = make_table(("complete", 9, 5.0), ("complete", 9, 4.0))
    overrides = ["data=freihand", "data.root=with space", "model/decoder=effpose", "optimizer.lr=0.1"]
    write_best(
        tmp_path / "best.yaml",
        table=trials,
        row=trials.rows[1],
        overrides=lambda row: [item.replace("with space", "'with space'") for item in overrides],
        sweep=make_settings(tmp_path),
        origin={"data_fingerprint": "abc", "git": {"revision": None, "dirty": None}},
    )
    config = compose("train", [f"best={tmp_path / 'best.yaml'}"])
    assert config.optimizer.lr == 0.1
    assert config.model.decoder["_target_"].endswith("EffPose")
    assert config.data.root.endswith("/with space")
    content = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert content["metric"] == {"name": METRIC, "mode": "min", "value": 4.0}
    assert content["chosen_by"].endswith("one of 2: the best of them is too good on average")
    assert content["fidelity"] == {"epochs": 9, "max_epochs": 9}
    assert (content["trial"], content["data_fingerprint"]) == (1, "abc")


CONFIRMED = {
    "epochs": 9,
    "seeds": [1, 2],
    "candidates": [
        {"trial": 1, "label": "trial 1", "mean": 5.0, "low": 4.5, "high": 5.5, "values": {1: 4.9, 2: 5.1}},
        {"trial": None, "label": "default", "mean": 4.8, "low": 4.3, "high": 5.3, "values": {1: 4.7, 2: 4.9}},
    ],
    "winner": 1,
    "winner_trial": 0,
    "gain_over_default": None,
    "optimism": 0.1,
    "not_distinguishable_from": ["trial 1"],
    "not_compared": [],
    "unknown": {"gain_over_default": "the default configuration is the winner"},
}
for each, distinguishable in zip(CONFIRMED["candidates"], (False, None), strict=True):
    each["distinguishable"] = distinguishable


def write_best_yaml(folder, *, name="best.yaml", overrides=(), origin=None, confirmed=None, row=0):
    """Write one of a sweep of two trials; returns its file."""
    trials = make_table(("complete", 9, 5.0), ("complete", 9, 4.0))
    write_best(
        folder / name,
        table=trials,
        row=trials.rows[row],
        overrides=lambda row: list(overrides),
        sweep=make_settings(folder),
        origin=origin or {},
        confirmed=confirmed,
    )
    return folder / name


def test_the_confirmed_winner_counts_also_where_the_sweep_had_another(tmp_path):
    trials = make_table(("complete", 9, 5.0), ("complete", 9, 4.0))
    assert select_winner(trials, folder=tmp_path, confirmed=CONFIRMED).number == 0
    nobody = CONFIRMED | {"winner": None, "winner_trial": None}
    assert select_winner(trials, folder=tmp_path, confirmed=nobody).number == 1


def test_best_yaml_says_how_good_the_winner_is_and_who_would_do_as_well(tmp_path):
    content = yaml.safe_load(write_best_yaml(tmp_path, confirmed=CONFIRMED).read_text())
    of_seeds = {"mean": 4.8, "low": 4.3, "high": 5.3, "values": {1: 4.7, 2: 4.9}, "n": 2, "optimism": 0.1}
    assert content["metric"] == {"name": METRIC, "mode": "min", "value": 5.0} | of_seeds
    assert content["not_distinguishable_from"] == ["trial 1"]
    assert (content["seeds"], content["fidelity"]) == ([1, 2], {"epochs": 9, "max_epochs": 9})
    assert content["gain_over_default"] is None
    assert content["unknown"] == {"gain_over_default": "the default configuration is the winner"}


@pytest.mark.parametrize("confirmed", [None, CONFIRMED | {"winner": None, "winner_trial": None, "candidates": []}])
def test_best_yaml_of_a_winner_that_was_not_confirmed_says_that_nothing_is_known(tmp_path, confirmed):
    content = yaml.safe_load(write_best_yaml(tmp_path, confirmed=confirmed).read_text())
    for name in ("not_distinguishable_from", "gain_over_default"):
        assert content[name] is None
        assert "was not confirmed" in content["unknown"][name]


def test_a_point_of_the_front_is_not_said_to_be_chosen_by_its_mean(tmp_path):
    content = yaml.safe_load(write_best_yaml(tmp_path, confirmed=CONFIRMED, row=1).read_text())
    assert content["chosen_by"].startswith("its place on the Pareto front")
    assert content["metric"]["mean"] == 5.0
    assert content["not_distinguishable_from"] is None
    assert "only the winner" in content["unknown"]["not_distinguishable_from"]


def test_finalists_are_spread_over_the_front_of_two_objectives():
    made = make_table(*(("complete", 9, float(value)) for value in (1, 2, 3, 4, 5, 9)))
    made.objectives = (CostObjective("latency_ms", "min"),)
    for row, latency_ms in zip(made.rows.values(), (50, 40, 30, 20, 10, 60), strict=True):
        row.costs = {"latency_ms": float(latency_ms)}
    assert [row.number for row in select_finalists(made, 3)] == [0, 2, 4]
    assert [row.number for row in select_finalists(made, 9)] == [0, 1, 2, 3, 4]


def test_every_point_of_the_front_is_a_best_yaml_and_old_ones_go(tmp_path):
    made = make_table(*(("complete", 9, float(value)) for value in (1, 2, 3)))
    made.objectives = (CostObjective("latency_ms", "min"),)
    for row, latency_ms in zip(made.rows.values(), (30, 10, 20), strict=True):
        row.costs = {"latency_ms": float(latency_ms)}
    overrides = {0: ["optimizer.lr=0.5"], 1: ["optimizer.lr=0.25"]}
    write = partial(
        write_best, table=made, overrides=lambda row: overrides[row.number], sweep=make_settings(tmp_path), origin={}
    )
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "trial_00002.yaml").write_text("")
    write_front(tmp_path / "front", made, write)
    assert sorted(file.name for file in (tmp_path / "front").iterdir()) == ["trial_00000.yaml", "trial_00001.yaml"]
    assert compose("train", [f"best={tmp_path / 'front' / 'trial_00001.yaml'}"]).optimizer.lr == 0.25
    content = yaml.safe_load((tmp_path / "front" / "trial_00001.yaml").read_text())
    assert content["costs"] == {"latency_ms": 10.0}


def test_without_a_second_objective_there_is_no_front(tmp_path):
    write_front(tmp_path / "front", make_table(("complete", 9, 1.0)), lambda file, row: None)
    assert not (tmp_path / "front").exists()


WINNER = ["model/decoder=effpose", "optimizer.lr=0.1", "data.root=hands", "+optimizer.betas=[0.9,0.99]"]


def test_the_same_configuration_is_composed_elsewhere_and_nothing_is_said(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MP_DATA", "mine")
    file = write_best_yaml(tmp_path, overrides=WINNER, origin=collect_provenance(data="abc"))
    whole = select_configuration(compose("train", WINNER))
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setenv("MP_DATA", str(tmp_path / "elsewhere"))
    assert select_configuration(compose("train", [f"best={file}"])) == whole
    assert len(whole) > 60
    said = [sentence for sentence in describe_differences(file, data="abc") if "not committed" not in sentence]
    assert said == []


def test_a_file_of_an_earlier_version_without_folds_does_not_differ_by_them(tmp_path):
    file = write_best_yaml(tmp_path, overrides=WINNER, origin=collect_provenance(data="abc"))
    content = yaml.safe_load(file.read_text())
    assert content["configuration"].pop("folds.num") == 1
    assert content["configuration"].pop("folds.index") == 0
    file.write_text(yaml.safe_dump(content))
    assert not any("folds" in sentence for sentence in describe_differences(file, data="abc"))


def test_what_differs_is_a_sentence_each(tmp_path):
    origin = {
        "versions": {"torch": "1.0"},
        "git": {"revision": "1234", "dirty": True},
        "data_fingerprint": "abc",
    }
    file = write_best_yaml(tmp_path, overrides=WINNER, origin=origin)
    content = yaml.safe_load(file.read_text())
    content["configuration"]["heatmap.sigma"] = 0.123
    file.write_text(yaml.safe_dump(content))
    said = "\n".join(describe_differences(file, data="xyz"))
    for sentence in (
        "heatmap.sigma is 0.04, and was 0.123: configs/ differ",
        "and was 1.0\n",
        "and was 1234\n",
        "the project had changes that were not committed",
        "the data have the fingerprint xyz, and had abc",
    ):
        assert sentence in said


def test_a_key_that_is_no_more_is_refused_with_the_file(tmp_path):
    file = write_best_yaml(tmp_path, overrides=WINNER)
    file.write_text(yaml.safe_dump({"overrides": ["optimizer.momentun=0.9"]}))
    with pytest.raises(
        UserError, match=rf"best={file} does not fit this version of the project: .*no configuration key optimizer\.mom"
    ):
        compose("train", [f"best={file}"])
