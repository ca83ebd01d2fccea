"""How a sweep stands, told by another process while it runs, when it has ended, and when there is none."""

import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict

import pytest
import yaml
from rich.console import Console

from handpose.errors import UserError
from handpose.report.tensorboard import TensorBoardSweepLog
from handpose.report.trial_table import TrialRow
from handpose.report.utilisation import PHASES, EpochUtilisation, Utilisation
from handpose.sweep.analysis.status import print_status, render_status
from handpose.sweep.record.utilisation_file import UTILISATION_FILE, append_utilisation
from handpose.sweep.status import main
from tests.sweep.objectives import METRIC
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_asha, make_settings


def compute_loss(trial, params, epoch):
    return math.nan if trial == 1 and epoch == 2 else 10.0 + trial + 4 / epoch


@pytest.fixture
def started_sweep(tmp_path):
    """A sweep of six trials that has just begun."""
    settings = make_settings(tmp_path / "sweep", num_trials=6, max_epochs=4)
    simulation = SimulatedSweep(settings, make_asha(4), compute_loss)
    write_sweep(settings)
    return simulation


def write_sweep(settings):
    config = {"sweep": {**asdict(settings), "_target_": "x"}, "search_space": "spaces/small.yaml"}
    (settings.path / "sweep.yaml").write_text(yaml.safe_dump({"config": config}))


def render_status_text(simulation, width=100):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_status(simulation.settings.path, width=width), crop=False)
    text = capture.get()
    assert max(len(line) for line in text.splitlines() if not line.startswith("python tune.py ")) <= width
    return text.replace("\N{NO-BREAK SPACE}", " ")


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_running_sweep_is_shown_as_its_table_has_it_and_nothing_is_touched(started_sweep):
    started_sweep.fill()
    for _ in range(4):
        started_sweep.step()
        started_sweep.fill()
    with started_sweep.file.open("ab") as file:
        file.write(b'{"event": "repor')  # half a line, which is being written
    before = snapshot(started_sweep.settings.path)
    text = render_status_text(started_sweep)
    assert snapshot(started_sweep.settings.path) == before
    table = started_sweep.controller.history.table
    for state, number in table.count_states().items():
        assert f"{number} {state}" in text
    best = table.rank_trials()[0]
    assert f"best  PA-MPJPE {table.get_value(best):.2f} mm  trial {best.number} at epoch {best.epochs}/4" in text
    assert text.startswith("sweep test  ·  small")
    assert (
        f"if its process has ended, resume with:\npython tune.py sweep.resume={started_sweep.settings.path}\n" in text
    )


def test_a_finished_sweep_says_so_and_what_came_after_it(started_sweep):
    started_sweep.run()
    assert "6/6 trials" in render_status_text(started_sweep)
    assert render_status_text(started_sweep).splitlines()[-1] == "finished"
    retraining = started_sweep.settings.path / "retrain"
    retraining.mkdir()
    (retraining / "config.yaml").write_text("trainer: {max_epochs: 30}")
    assert render_status_text(started_sweep).splitlines()[-1] == "retraining  epoch 0/30"
    log = TensorBoardSweepLog(retraining, run_name=lambda number: "tensorboard")
    for epoch in (1, 2):
        log.log_epoch(TrialRow(0, {}, epochs=epoch, metrics={METRIC: 20.0 / epoch}), {})
    log.close()
    assert render_status_text(started_sweep).splitlines()[-1] == "retraining  epoch 2/30, validation PA-MPJPE 10.00 mm"
    (retraining / "metrics.json").write_text(json.dumps({"metrics": {"test/pa_mpjpe_mm": 9.5}}))
    assert render_status_text(started_sweep).splitlines()[-1] == "retrained   test PA-MPJPE 9.50 mm"


def test_a_confirmation_is_shown_below_its_sweep(started_sweep):
    started_sweep.run()
    settings = make_settings(
        started_sweep.settings.path / "confirm", num_trials=2, max_epochs=4, resume=str(started_sweep.settings.path)
    )
    confirming = SimulatedSweep(settings, make_asha(4), compute_loss)
    confirming.fill()
    confirming.step()
    text = render_status_text(started_sweep)
    assert "confirmation of test" in text
    assert "0/2 trials" in text.partition("confirmation of test")[2]
    (settings.path / "confirm.yaml").write_text(
        yaml.safe_dump({"metric": METRIC, "winner": 0, "candidates": [{"label": "trial 3", "mean": 12.345}]})
    )
    assert (
        render_status_text(started_sweep).splitlines()[-1] == "confirmed   trial 3: mean PA-MPJPE 12.35 mm, no interval"
    )


def test_an_interrupted_sweep_is_told_with_the_command_that_goes_on(started_sweep):
    started_sweep.fill()
    started_sweep.step()
    started_sweep.controller.close("interrupted")
    assert render_status_text(started_sweep).endswith(
        f"interrupted; to resume:\npython tune.py sweep.resume={started_sweep.settings.path}\n"
    )


def test_a_spent_budget_is_told_with_a_command_that_gives_a_larger_one(started_sweep):
    file = started_sweep.settings.path / "sweep.yaml"
    record = yaml.safe_load(file.read_text())
    record["config"]["sweep"]["time_budget_s"] = 1.0
    file.write_text(yaml.safe_dump(record))
    started_sweep.fill()
    started_sweep.step()
    started_sweep.controller.close("spent")
    go_on = (
        f"python tune.py sweep.resume={started_sweep.settings.path} sweep.time_budget_s={2 * started_sweep.clock.now:g}"
    )
    assert render_status_text(started_sweep).endswith(
        f"sweep.time_budget_s=1 is spent; to resume with a larger one:\n{go_on}\n"
    )


def test_a_folder_without_a_sweep_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no sweep: there is no sweep.yaml"):
        print_status(tmp_path)


# --- for other programs -----------------------------------------------------------------------------------------------


def read_summary(simulation, capsys):
    assert main([str(simulation.settings.path), "--json"]) == 0

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_a_program_reads_the_same_as_json(started_sweep, capsys):
    started_sweep.fill()
    for _ in range(8):
        started_sweep.step()
        started_sweep.fill()
    found = read_summary(started_sweep, capsys)
    rows = started_sweep.controller.history.table.rows
    assert (found["format"], found["state"], found["metric"], found["mode"]) == (1, "running", METRIC, "min")
    assert (found["num_trials"], found["max_epochs"]) == (6, 4)
    assert {trial["number"]: (trial["state"], trial["epochs"]) for trial in found["trials"]} == {
        number: (row.state, row.epochs) for number, row in rows.items()
    }
    assert found["counts"] == dict(Counter(row.state for row in rows.values()))
    (best,) = [trial for trial in found["trials"] if trial["number"] == found["best"]]
    assert best["metrics"][METRIC] == rows[found["best"]].metrics[METRIC]
    (diverged,) = [trial for trial in found["trials"] if trial["state"] == "diverged"]
    assert diverged["metrics"][METRIC] is None
    assert diverged["reason"] == rows[diverged["number"]].reason != ""
    assert found["confirmed"] is found["retrained"] is None


def test_a_program_reads_what_slowed_the_trials_down(started_sweep, capsys):
    started_sweep.fill()
    started_sweep.step()
    assert read_summary(started_sweep, capsys)["utilisation"] is None
    seconds = dict.fromkeys(PHASES, 0.0) | {"data": 3.0, "training": 1.0}
    used = EpochUtilisation(1, 1, Utilisation(seconds, memory_mb=500.0))
    append_utilisation(started_sweep.settings.path / UTILISATION_FILE, 1, used)
    found = read_summary(started_sweep, capsys)
    named = {key: found["utilisation"][key] for key in ("verdict", "phase", "share", "memory_mb", "gpu_percent")}
    assert named == {
        "verdict": "starved by data",
        "phase": "data",
        "share": 0.75,
        "memory_mb": 500.0,
        "gpu_percent": None,
    }
    assert found["utilisation"]["seconds"] == seconds
    by_number = {trial["number"]: trial["utilisation"] for trial in found["trials"]}
    assert by_number[0] is None
    assert by_number[1] == found["utilisation"]


def test_it_says_how_the_sweep_ended_and_what_came_after_it(started_sweep, capsys):
    started_sweep.run()
    folder = started_sweep.settings.path
    (folder / "confirm").mkdir()
    (folder / "confirm" / "confirm.yaml").write_text(yaml.safe_dump({"winner": 0, "metric": METRIC}))
    (folder / "retrain").mkdir()
    (folder / "retrain" / "metrics.json").write_text(json.dumps({"metrics": {"test/pa_mpjpe_mm": 9.5}}))
    later = time.time() + 5
    stages = []
    for name in ("", "best.yaml", "report.html"):
        if name:
            (folder / name).write_text("")
            os.utime(folder / name, (later, later))
        found = read_summary(started_sweep, capsys)
        stages.append(found["stage"])
    assert stages == ["confirmation", "retraining", "done"]
    assert (found["state"], found["silent_s"], found["left_s"]) == ("finished", 0, 0)
    assert found["confirmed"] == {"winner": 0, "metric": METRIC}
    assert found["retrained"] == {"test/pa_mpjpe_mm": 9.5}
    assert found["ended_by"] is None
    started_sweep.start()  # resumed: what came after the earlier end does not count any more
    found = read_summary(started_sweep, capsys)
    assert (found["state"], found["stage"], found["confirmed"], found["retrained"]) == ("running", "trials", None, None)


def test_a_sweep_that_has_not_started_a_trial_is_summarised_too(started_sweep, capsys):
    found = read_summary(started_sweep, capsys)
    assert (found["best"], found["left_s"], found["trials"]) == (None, None, [])


def test_without_json_it_prints_what_tune_py_prints(started_sweep, capsys):
    print_status(str(started_sweep.settings.path))
    expected = capsys.readouterr().out
    assert main([str(started_sweep.settings.path)]) == 0
    assert capsys.readouterr().out == expected


def test_a_place_without_a_sweep_is_one_sentence_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path), "--json"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
