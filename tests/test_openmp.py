"""How the threads of OpenMP wait, as GNU's OpenMP itself says when a program loads it with torch."""

import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from handpose import OPENMP_WAIT_VARIABLES
from handpose.config_files import REPOSITORY

OPENMP = next(iter(Path(PathFinder.find_spec("torch").submodule_search_locations[0], "lib").glob("libgomp*.so*")), None)
SLEEPING, SPINNING_3_MS, SPINNING_5_MIN = 0, 300_000, 30_000_000_000  # libgomp's own numbers
RUN_UNTIL_TORCH = f"""
import ctypes, os, runpy, sys
class LoadOpenMP:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            ctypes.CDLL({str(OPENMP)!r})
            os._exit(0)
sys.meta_path.insert(0, LoadOpenMP())
program = sys.argv.pop(1)
run = runpy.run_path if program.endswith(".py") else runpy.run_module
run(program, run_name="__main__")
"""

pytestmark = pytest.mark.skipif(OPENMP is None, reason="torch does not bring GNU's OpenMP here")


def find_spin_count(program, **variables):
    """How long threads spin, in a program that ends where it first imports torch."""
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP_WAIT_VARIABLES}
    environment = kept | {"PYTHONPATH": str(REPOSITORY), "OMP_DISPLAY_ENV": "verbose"} | variables
    done = subprocess.run(
        [sys.executable, "-c", RUN_UNTIL_TORCH, program], env=environment, capture_output=True, text=True, check=True
    )
    return int(re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[1])


@pytest.mark.parametrize(
    "program", ["train.py", "tune.py", "handpose.evaluation", "handpose.sweep.selection.retrain", "handpose.predict"]
)
def test_no_thread_spins_in_any_program(program):
    assert find_spin_count(str(REPOSITORY / program) if program.endswith(".py") else program) == SLEEPING


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, SPINNING_5_MIN),
        ({"GOMP_SPINCOUNT": "5000"}, 5000),
        ({"KMP_BLOCKTIME": "200"}, SPINNING_3_MS),
    ],
)
def test_a_setting_of_the_user_is_kept(variables, count):
    assert find_spin_count("handpose.predict", **variables) == count
