"""A sweep in a folder whose path has characters that shells, URLs and glob patterns read."""

import shlex

import pytest

from handpose.config import compose, parse_override_value
from handpose.sweep.record.settings import format_resume_command
from tests.sweep.objectives import curve
from tests.sweep.sweeps import make_settings, run_small_sweep

NAMES = ["my thesis", "it's [1] & $HOME", "100% #1? größe", 'a;b "c" `d` (e) *', "back\\slash {x},y=z"]


@pytest.mark.slow
def test_a_sweep_runs_and_goes_on_in_any_folder(ray_started, tmp_path, write_space):
    name = " ".join(NAMES)
    settings = make_settings(tmp_path / name / "first", num_trials=1, max_epochs=1)
    assert run_small_sweep(settings, write_space("x: interval(0.0, 1.0)"), curve).end == "finished"
    assert run_small_sweep(settings, write_space("x: interval(0.0, 1.0)"), curve, resume=True).end == "finished"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_is_shown_names_the_same_folder_when_it_is_pasted_into_a_shell(tmp_path, name):
    folder = tmp_path / name
    *program, resumed = shlex.split(format_resume_command(folder))
    assert program == ["python", "tune.py"]
    assert parse_override_value(resumed) == str(folder)
    assert compose("tune", [resumed]).sweep.resume == str(folder)
