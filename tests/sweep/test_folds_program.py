"""tune.py with folds, killed in a later fold of a trial and resumed, up to the confirmation."""

import json
import re
import shlex
import subprocess
import sys
import time
from statistics import fmean

import pandas as pd
import pytest
import yaml

from handpose.config_files import REPOSITORY
from handpose.errors import UserError
from handpose.sweep.audit.audit import audit
from handpose.sweep.driver.resume import load_recorded_task
from tests.builders import write_freihand
from tests.subprocesses import start_program, wait_for_end
from tests.sweep.objectives import METRIC
from tests.sweep.trainable.test_trial import SMALL

pytestmark = pytest.mark.slow

FOLDS, EPOCHS = 2, 2
SETTINGS = [
    *(f"sweep.folds={FOLDS}", f"sweep.max_epochs={EPOCHS}", "sweep.num_trials=3", "trainer.max_epochs=2"),
    *("scheduler=fifo", "sweep.confirm.top_k=1", "sweep.confirm.seeds=2", "sweep.preflight=off"),
    *("trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "sweep.max_concurrent=1", "num_threads=1"),
    *("sweep.name=folds", "data.root=freihand"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the sweep was run: it was killed while its second trial was in its second fold."""
    place = tmp_path_factory.mktemp("user")
    write_freihand(place / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    folder = place / "outputs" / "sweeps" / "folds"
    process = start_program(REPOSITORY / "tune.py", *SMALL, *SETTINGS, cwd=place)
    deadline = time.monotonic() + 240
    while [row["epoch"] for row in list_reports(folder) if row["trial"] == 1][-1:] != [EPOCHS + 1]:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    status, _, err = wait_for_end(
        start_program(REPOSITORY / "tune.py", f"sweep.resume={folder}", cwd=place), timeout_s=300
    )
    assert status == 0, err
    return place


def list_reports(folder):
    """The reports in the events of a sweep; a line that is only half written is left out."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    events = (json.loads(line) for line in lines if line.endswith("\n"))
    return [event for event in events if event["event"] == "epoch_reported"]


def test_every_trial_is_trained_with_all_folds_and_the_sweep_is_whole(place):
    folder = place / "outputs" / "sweeps" / "folds"
    for trial in range(3):
        reports = {row["epoch"]: row for row in list_reports(folder) if row["trial"] == trial}
        assert sorted(reports) == [1, 2, 3, 4]
        assert reports[3]["metrics"] == reports[2]["metrics"]
    assert any(row["resumed_from"] >= EPOCHS for row in list_reports(folder) if row["trial"] == 1)
    assert set(pd.read_csv(folder / "trials.csv")["state"]) == {"complete"}
    assert not audit(folder)


def test_the_command_of_a_trial_that_was_resumed_gives_its_metric(place):
    row = pd.read_csv(place / "outputs" / "sweeps" / "folds" / "trials.csv").set_index("number").loc[1]
    command = shlex.split(row["command"])
    command = [sys.executable, str(REPOSITORY / command[1]), *command[2:], "logger=none"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    values = [float(value) for value in re.findall(r"^validation +PA-MPJPE ([\d.]+) mm", done.stdout, re.MULTILINE)]
    assert len(values) == FOLDS
    assert fmean(values) == pytest.approx(row[METRIC], abs=0.01)


def test_the_confirmation_uses_all_folds_and_the_retraining_the_split_of_the_data_set(place):
    folder = place / "outputs" / "sweeps" / "folds"
    confirmed = yaml.safe_load((folder / "confirm" / "confirm.yaml").read_text())
    assert (confirmed["epochs"], len(confirmed["seeds"])) == (FOLDS * EPOCHS, 2)
    assert {row["epoch"] for row in list_reports(folder / "confirm")} == {1, 2, 3, 4}
    retrained = yaml.safe_load((folder / "retrain" / "config.yaml").read_text())
    assert retrained["folds"] == {"num": 1, "index": 0}


def test_a_sweep_is_not_resumed_with_other_folds(place):
    folder = place / "outputs" / "sweeps" / "folds"
    with pytest.raises(UserError, match=r"sweep\.folds=3: a resumed sweep keeps its configuration"):
        load_recorded_task(folder, ["sweep.folds=3"])
