"""tune.py as a user starts it, on a data set written on the fly."""

import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml

from handpose.config_files import REPOSITORY
from handpose.evaluation.ensemble import combine_split_predictions
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.submission import EXPECTED_ERRORS_FILE, read_course, read_expected_errors, read_official
from handpose.program import run_script
from handpose.sweep.analysis.read_sweep import read_combined_seeds
from handpose.sweep.audit.audit import audit
from tests.builders import write_freihand
from tests.report.test_tensorboard import hparams_tab
from tests.subprocesses import start_program, wait_for_end
from tests.sweep.trainable.test_trial import SMALL
from tune import exit_on_sweep_error

pytestmark = pytest.mark.slow

# One trial at a time, so that one worker imports the libraries and the sweep can be compared with one that was cut off.
SETTINGS = [
    *("sweep.num_trials=3", "sweep.max_epochs=4", "trainer.max_epochs=15", "sweep.max_concurrent=1"),
    "retrain.seeds=2",
    *("sweep.confirm.top_k=1", "sweep.confirm.seeds=2", "scheduler.mode=promote", "sweep.preflight=off"),
    *("trainer.accelerator=cpu", "sweep.gpus_per_trial=0"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts tune.py in a folder of its own, with a data set beside it."""
    folder = tmp_path_factory.mktemp("user")
    write_freihand(folder / "freihand", num_poses=24, variants=1, num_test=6, size=64)

    def started(*overrides):
        given = (*SMALL, "data.root=freihand", *SETTINGS, *overrides)
        return start_program(REPOSITORY / "tune.py", *given, cwd=folder)

    started.folder = folder
    return started


@pytest.fixture(scope="module")
def swept(start):
    status, out, err = wait_for_end(start("sweep.name=first"), timeout_s=300)
    assert status == 0, err
    return start.folder / "outputs" / "sweeps" / "first", out, err


def test_a_sweep_ends_in_a_winner_and_its_predictions_without_noise(swept):
    folder, out, err = swept
    lines = [line for line in err.splitlines() if not line.startswith("Packed ")]
    assert [line.partition(": loss ")[0] for line in lines] == [f"epoch {epoch}/15" for epoch in range(1, 16)] * 2
    best = yaml.safe_load((folder / "best.yaml").read_text())
    trials = pd.read_csv(folder / "trials.csv").set_index("number")
    assert len(trials) == 3
    assert best["metric"]["value"] == trials.loc[best["trial"], "val/pa_mpjpe_mm"]
    assert "data.root=freihand" in best["overrides"]
    assert len(read_course(folder / "retrain" / "test_preds.json.gz")) == 6
    assert np.isfinite(read_official(folder / "retrain" / "pred.zip")).all()
    places = [folder / "retrain" / name for name in ("", "seed_1", "combined")]
    *members, together = (
        SplitPredictions(read_course(each / "test_preds.json.gz"), read_expected_errors(each / EXPECTED_ERRORS_FILE))
        for each in places
    )
    assert not np.array_equal(members[0].xyz_m, members[1].xyz_m)
    expected = combine_split_predictions(members)
    assert together.xyz_m == pytest.approx(expected.xyz_m, abs=2e-7)
    assert together.error_m == pytest.approx(expected.error_m, abs=1e-5)
    assert "means of the seeds 0, 1, with a standard deviation of " in out
    assert "; the mean of the 2 networks: PA-MPJPE " in out
    assert f"winner      trial {best['trial']}" in out
    assert "confirmed   mean PA-MPJPE" in out
    assert "mean pose" in out


def test_a_sweep_says_what_it_was(swept):
    folder, _, _ = swept
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert sweep["config"]["sweep"]["num_trials"] == 3
    assert "sweep.name=first" in sweep["command_line"]
    assert sweep["versions"]["ray"]
    assert sweep["data_fingerprint"] == yaml.safe_load((folder / "best.yaml").read_text())["data_fingerprint"]


def test_tensorboard_shows_the_trials_with_the_retraining_beside_them(swept):
    _, groups = hparams_tab(swept[0])
    assert set(groups) == {f"tensorboard/trial_000{number}" for number in range(3)}


def test_a_mistake_is_one_sentence_and_status_2(swept, start, monkeypatch, capsys):
    monkeypatch.chdir(start.folder)
    monkeypatch.setattr(sys, "argv", ["tune.py", *SMALL, "data.root=freihand", "sweep.name=first"])
    with pytest.raises(SystemExit) as left:
        run_script("tune", exit_on_sweep_error)
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {swept[0]} already has a sweep; choose another sweep.name, or continue that sweep with "
        f"sweep.resume={swept[0]}\n"
    )


def test_a_sweep_that_was_terminated_killed_and_gone_on_with_is_whole(swept, start):
    """SIGTERM and SIGKILL in the sweep, Ctrl-C in both retrainings; with one trial at a time like one left alone."""
    sweeps = start.folder / "outputs" / "sweeps"
    events = sweeps / "cut" / "events.jsonl"

    process = start("sweep.name=cut")
    _wait_until(lambda: events.is_file() and '"epoch": 1, ' in events.read_text())
    process.send_signal(signal.SIGTERM)
    status, _, err = wait_for_end(process, timeout_s=120)
    go_on = f"python tune.py sweep.resume={sweeps / 'cut'}"
    assert (status, err.splitlines()[-1]) == (75, f"the sweep was interrupted; to resume: {go_on}")

    def resumed():
        return start_program(REPOSITORY / "tune.py", f"sweep.resume={sweeps / 'cut'}", cwd=start.folder)

    process, size = resumed(), events.stat().st_size
    _wait_until(lambda: events.stat().st_size > size + 1500)
    process.kill()
    process.communicate()

    for place in ("retrain", "retrain/seed_1"):
        process = resumed()
        _wait_until((sweeps / "cut" / place / "checkpoints" / "last.ckpt").is_file)
        process.send_signal(signal.SIGINT)
        status, _, err = wait_for_end(process, timeout_s=120)
        assert (status, err.splitlines()[-1]) == (75, f"the retraining was interrupted; to resume: {go_on}")

    status, _, err = wait_for_end(resumed(), timeout_s=300)
    assert status == 0, err
    assert not audit(sweeps / "cut")
    whole, cut = (pd.read_csv(sweeps / name / "trials.csv") for name in ("first", "cut"))
    pd.testing.assert_frame_equal(whole.drop(columns=["seconds", "node"]), cut.drop(columns=["seconds", "node"]))
    confirmed = [(sweeps / name / "confirm" / "confirm.yaml").read_text() for name in ("first", "cut")]
    assert confirmed[0] == confirmed[1]
    for place in ("retrain", "retrain/seed_1", "retrain/combined"):
        predictions = [read_course(sweeps / name / place / "test_preds.json.gz") for name in ("first", "cut")]
        assert np.array_equal(*predictions)
    combined = [read_combined_seeds(sweeps / name / "retrain") for name in ("first", "cut")]
    assert combined[0] == combined[1]


def test_a_trial_is_stopped_from_another_shell(start):
    folder = start.folder / "outputs" / "sweeps" / "steered"
    events = folder / "events.jsonl"
    process = start("sweep.name=steered", "sweep.confirm.seeds=0", "sweep.retrain=false")
    try:
        _wait_until(lambda: events.is_file() and '"epoch": 1, ' in events.read_text())
        command = [sys.executable, "-m", "handpose.sweep.control", str(folder), "stop", "0"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "accepted: trial 0 is stopped\n", "")
        status, out, err = wait_for_end(process, timeout_s=300)
    finally:
        process.kill()
    assert status == 0, err
    assert "stop 0: trial 0 is stopped" in out + err
    trials = pd.read_csv(folder / "trials.csv").set_index("number")
    assert trials.loc[0, "state"] == "stopped"
    assert "complete" in set(trials["state"])
    assert trials.loc[0, "reason"] == "stopped by the user"
    assert not audit(folder)


def _wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
