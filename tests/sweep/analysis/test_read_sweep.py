"""A sweep read from its files, against the table that the sweep itself kept."""

import json
import math
import shutil

import pytest
import yaml

from benchmarks.report import make_sweep
from handpose.errors import UserError
from handpose.report.__main__ import main
from handpose.search.space import load_space
from handpose.sweep.analysis.read_sweep import _read_confirmation, read_sweep
from handpose.sweep.analysis.report import write_report

NUM_TRIALS = 60


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading") / "sweep"
    return folder, make_sweep(folder, num_trials=NUM_TRIALS, max_epochs=9)


@pytest.fixture(scope="module")
def record(swept):
    return read_sweep(swept[0])


@pytest.fixture(scope="module")
def written(swept):
    folder, _ = swept
    return write_report([folder], folder / "report.html", scientific="heatmap.sigma"), folder


def test_every_trial_is_read_as_the_sweep_had_it(swept, record):
    _, table = swept
    assert [trial.number for trial in record.trials] == sorted(table.rows)
    for trial in record.trials:
        row = table.rows[trial.number]
        assert (trial.state, trial.epochs, trial.params, trial.costs) == (
            row.state,
            row.epochs,
            row.params,
            row.costs,
        )
        assert trial.value == table.get_value(row) or (math.isnan(trial.value) and math.isnan(table.get_value(row)))
        assert trial.seconds == pytest.approx(row.seconds)
        assert not trial.reports or trial.reports[-1].epoch == row.epochs
        assert sum(each.ended_s - each.started_s for each in trial.segments) == pytest.approx(row.seconds)
    assert record.ranked == [row.number for row in table.rank_trials()]
    assert record.second_objective.front == [row.number for row in table.find_front()]
    assert {trial.state for trial in record.trials} >= {"complete", "stopped", "diverged", "infeasible"}
    assert record.end == "finished"


def test_a_conditional_space_is_read_from_the_study_and_never_run(swept):
    folder, _ = swept
    (space,) = (folder / "search_space").iterdir()
    kept = space.read_text()
    space.write_text("raise SystemExit('a report ran foreign code')")
    try:
        parameters = {each.key: each for each in read_sweep(folder).parameters}
    finally:
        space.write_text(kept)
    assert parameters["optimizer.lr"].log
    assert (parameters["optimizer.lr"].low, parameters["optimizer.lr"].high) == (2e-4, 1e-2)
    assert parameters["model.decoder.depth"].is_conditional
    assert parameters["model/decoder"].choices == ["pyramid", "effpose"]


def test_without_the_study_ranges_are_those_that_were_seen(swept):
    folder, table = swept
    journal = folder / "study" / "journal.log"
    aside = journal.rename(folder / "aside")
    try:
        rate = read_sweep(folder).find_parameter("optimizer.lr")
    finally:
        aside.rename(journal)
    assert not rate.is_declared
    assert rate.low == min(row.params["optimizer.lr"] for row in table.rows.values())


def test_the_confirmation_is_read_with_its_winner_and_its_gain(swept, record):
    folder, _ = swept
    confirmation = record.confirmation
    kept = yaml.safe_load((folder / "confirm" / "confirm.yaml").read_text())
    assert [each.label for each in confirmation.candidates] == [each["label"] for each in kept["candidates"]]
    assert confirmation.winner.mean.mean == kept["candidates"][kept["winner"]]["mean"]
    assert confirmation.gain.low == kept["gain_over_default"]["low"]


def test_a_sweep_that_runs_is_read_up_to_its_last_whole_line(tmp_path):
    folder = tmp_path / "running"
    table = make_sweep(folder, num_trials=12, max_epochs=9, is_over=False)
    with (folder / "events.jsonl").open("a") as log:
        log.write('{"event": "epoch_reported", "at": 1')
    record = read_sweep(folder)
    assert record.end == ""
    running = [trial.number for trial in record.trials if trial.state == "running"]
    assert running == [number for number, row in table.rows.items() if row.state == "running"]
    assert running
    write_report([folder], tmp_path / "report.html")


def test_a_folder_without_a_sweep_is_refused_in_a_sentence(tmp_path, capsys):
    with pytest.raises(UserError, match="has no sweep"):
        read_sweep(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path)])
    assert left.value.code == 2
    assert "has no sweep" in capsys.readouterr().err


def test_a_sweep_of_an_older_version_lacks_keys_and_is_read(swept, tmp_path):
    folder, _ = swept
    kept = yaml.safe_load((folder / "sweep.yaml").read_text())
    for key in ("second_objective", "confirm", "divergence_factor", "checkpoint_budget_gb"):
        del kept["config"]["sweep"][key]
    old = tmp_path / "old"
    old.mkdir()
    (old / "sweep.yaml").write_text(yaml.safe_dump(kept))
    (old / "events.jsonl").write_bytes((folder / "events.jsonl").read_bytes())
    record = read_sweep(old)
    assert len(record.trials) == NUM_TRIALS
    assert record.confirmation is None
    assert record.second_objective is None


def test_the_report_has_every_trial_and_stays_small(written):
    _, folder = written
    text = (folder / "report.html").read_text()
    assert all(f'id="trial-{number}"' in text for number in range(NUM_TRIALS))
    assert "Isolated: heatmap.sigma" in text
    assert "Pareto front" in text
    assert (folder / "report.html").stat().st_size < 6e6


def test_a_space_for_the_next_round_is_written_only_where_a_change_is_shown_to_be_right(written, swept, monkeypatch):
    result, folder = written
    assert result.next_spaces == []  # no decoder of this conditional space is shown to be worse
    assert not (folder / "next_space.yaml").exists()
    monkeypatch.setattr(
        "handpose.sweep.analysis.report.suggest_next_space", lambda record, shown: "optimizer.lr: interval(0.1, 0.2)\n"
    )
    result = write_report([folder], folder / "again.html")
    assert result.next_spaces == [folder / "next_space.yaml"]
    assert set(load_space(str(folder / "next_space.yaml")).parameters) == {"optimizer.lr"}
    monkeypatch.undo()
    write_report([folder], folder / "again.html")
    assert not (folder / "next_space.yaml").exists()  # what it rested on is gone


def test_the_command_line_compares_sweeps_and_prints_the_advice(swept, tmp_path, capsys):
    folder, _ = swept
    file = tmp_path / "both.html"
    assert main([str(folder), str(folder), "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert "advice      " in said
    assert f"report      {file}" in said
    assert "The sweeps side by side" in file.read_text()
    assert "sweep (1)\n" in said  # of one name, told apart


def test_a_key_that_is_not_searched_is_refused_before_anything_is_written(swept, tmp_path):
    folder, _ = swept
    with pytest.raises(UserError, match=r"report\.scientific=seed is not searched"):
        write_report([folder], tmp_path / "report.html", scientific="seed")
    assert not (tmp_path / "report.html").exists()


def test_hands_of_the_retraining_are_read(swept, tmp_path):
    folder, _ = swept
    place = folder / "retrain"
    (place / "hands").mkdir(parents=True)
    (place / "metrics.json").write_text(json.dumps({"metrics": {"test/pa_mpjpe_mm": 12.5}}))
    (place / "hands" / "worst_00.jpg").write_bytes(b"picture")
    listed = [{"file": "worst_00.jpg", "kind": "worst", "name": "00000001", "pa_mpjpe_mm": None}]
    (place / "hands" / "hands.json").write_text(json.dumps(listed))
    retrained = read_sweep(folder).retrained
    assert retrained.metrics == {"test/pa_mpjpe_mm": 12.5}
    assert retrained.hands[0].jpeg == b"picture"
    assert math.isnan(retrained.hands[0].error_mm)


def test_a_picture_outside_the_folder_of_hands_is_refused(swept, tmp_path):
    """It would be in the report, which its reader may pass on."""
    folder = tmp_path / "copy"
    shutil.copytree(swept[0], folder)
    place = folder / "retrain" / "hands"
    place.mkdir(parents=True, exist_ok=True)
    (place.parent / "metrics.json").write_text(json.dumps({"metrics": {}}))
    (tmp_path / "private").write_bytes(b"private")
    listed = [{"file": "../../../private", "kind": "worst", "name": "0", "pa_mpjpe_mm": 1.0}]
    (place / "hands.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"'\.\./\.\./\.\./private' is not the name of a file in .*/hands"):
        read_sweep(folder, with_importance=False)


@pytest.mark.parametrize("change", [{"trial": "3' onmouseover='x"}, {"values": [1, 2]}, {"mean": "much"}])
def test_a_confirmation_with_values_of_other_types_is_refused(swept, tmp_path, change):
    file = tmp_path / "confirm.yaml"
    content = yaml.safe_load((swept[0] / "confirm" / "confirm.yaml").read_text(encoding="utf-8"))
    content["candidates"][0] |= change
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"confirm\.yaml does not have the expected content"):
        _read_confirmation(file)
