"""What is fair, counted by hand; and all sides, tiny, train beside a busy process."""

import importlib
import json
import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY

contention = importlib.import_module("benchmarks.contention")


@pytest.mark.parametrize(("cores", "busy", "share"), [(2, 0, 1), (2, 2, 0.5), (2, 6, 0.25), (8, 8, 0.5)])
def test_every_thread_has_the_same_part_of_the_cores(cores, busy, share):
    assert contention.compute_fair_share(cores=cores, busy=busy) == share


def test_rates_are_medians_beside_what_is_fair_for_an_idle_machine():
    rates = {
        0: {"spinning": [90, 100, 300], "train.py": [99, 99, 98]},
        2: {"spinning": [1, 2, 9], "train.py": [40, 50, 45]},
    }
    idle, busy = contention.summarise(rates, cores=2)
    assert idle["over_spinning"] == idle["of_fair_rate"] == {"spinning": 1.0, "train.py": 0.99}
    assert busy["images_per_s"] == {"spinning": 2, "train.py": 45}
    assert busy["of_fair_rate"] == {"spinning": 0.04, "train.py": 0.9}
    assert busy["over_spinning"]["train.py"] == 22.5


def test_a_side_has_variables_and_overrides():
    settings = ["GOMP_SPINCOUNT=10", "num_threads=1", "OMP_PLACES={0:1}=x"]
    variables = {"GOMP_SPINCOUNT": "10", "OMP_PLACES": "{0:1}=x"}
    assert contention.split_settings(settings) == (variables, ["num_threads=1"])


@pytest.mark.slow
def test_all_sides_are_measured_in_one_call(tmp_path):
    file = tmp_path / "contention.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "contention.py"), "--output", str(file)]
    command += ["--busy", "1", "--rounds", "1", "--seconds", "0.1", "--settle", "0.1"]
    command += ["--encoder", "lcnet_035", "--image-size", "64", "--batch-size", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=500)
    rows = json.loads(file.read_text())["rows"]
    assert [row["busy"] for row in rows] == [0, 1]
    assert all(row["images_per_s"].keys() == {"spinning", "train.py", "trial"} for row in rows)
    assert all(rate > 0 for row in rows for rate in row["images_per_s"].values())
