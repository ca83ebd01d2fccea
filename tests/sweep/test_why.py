"""The command that tells the story of a trial."""

import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml

from handpose.config_files import REPOSITORY
from handpose.sweep.storage.folder_sync import FolderSync
from handpose.sweep.storage.object_store import ObjectStore
from handpose.sweep.why import main
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_asha, make_settings


def make_sweep(folder):
    """Run a part of a sweep: trial 0 is complete, trial 1 is stopped, and trial 2 is running."""
    settings = make_settings(folder, num_trials=4)
    folder.mkdir()
    config = {"sweep": asdict(settings), "search_space": "x"}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"config": config}), encoding="utf-8")
    swept = SimulatedSweep(settings, make_asha(4), lambda number, params, epoch: 10.0 + number - epoch, num_slots=1)
    for _ in range(5):
        swept.fill()
        swept.step()
    swept.fill()


def test_the_story_is_printed_while_the_sweep_runs(tmp_path, capsys):
    make_sweep(tmp_path / "first")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert main([str(tmp_path / "first"), "1"]) == 0
    assert capsys.readouterr().out == (
        f"trial 1 of {tmp_path}/first\n"
        "     0:04  proposed: FakeSearcher\n"
        "     0:04  parameters: lr 0.000253, depth 1\n"
        "     0:04  started\n"
        "     0:05  rung at epoch 1: PA-MPJPE 10.00 mm, worse than the cutoff 9.00, rank 2 of 2; stopped\n"
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("trial", "sentence"),
    [("9", "has no trial 9; its trials are 0 to 2"), ("-1", "has no trial -1; its trials are 0 to 2")],
)
def test_a_trial_that_does_not_exist_is_a_mistake(tmp_path, capsys, trial, sentence):
    make_sweep(tmp_path / "first")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "first"), trial])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_without_a_sweep_is_a_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "1"])
    assert "has no sweep: sweep.yaml is missing or incomplete" in capsys.readouterr().err


def test_a_sweep_in_a_store_is_read_there(tmp_path, capsys):
    make_sweep(tmp_path / "first")
    url = f"file://{tmp_path}/store/first"
    folder_sync = FolderSync(tmp_path / "first", ObjectStore(url))
    folder_sync.connect()
    folder_sync.finish(timeout_s=0.0)
    assert main([url, "1"]) == 0
    assert "worse than the cutoff 9.00, rank 2 of 2; stopped" in capsys.readouterr().out


def test_it_starts_without_the_libraries_that_take_long_to_import():
    heavy = ["torch", "ray", "optuna", "tensorboard", "pandas"]
    code = f"import sys, handpose.sweep.why; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
