"""The growing sweep is really kept, every sampler can be asked, and a stub runs under Ray on both sides."""

import importlib
import json
import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY

scale = importlib.import_module("benchmarks.scale")


def test_a_sweep_grows_to_its_size_and_is_restored():
    row = scale.run_driver(12)
    assert row["trials"] == 12
    assert row["reports"] > 12
    assert row["restored_ms_a_trial"] == pytest.approx(row["restored_s"] * 1e3 / 12)


def test_every_sampler_is_asked():
    row = scale.measure_proposals_ms(8)
    assert set(row) == {"trials", *scale.SAMPLERS}
    assert min(row.values()) > 0


def test_a_trial_costs_what_passed_between_beginnings_of_the_second_half():
    row = scale._summarise_moments(5, (0.0, 0.0), [(1, 1), (50, 9), (60, 10), (62, 11), (64, 12)])
    assert (row["wall_ms"], row["cpu_ms"]) == (2000, 1000)


@pytest.mark.slow
def test_stubs_run_under_ray_on_both_sides(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "scale.py"), "--parts", "ray", "--ray-sizes", "3"]
    command += ["--plain-sizes", "2", "--repeats", "1", "--output", str(tmp_path / "s.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["parts"]["ray"]
    assert [(row["side"], row["trials"]) for row in rows] == [("ours", 3), ("plain", 2)]
