"""The crash drill itself, short: it finds nothing, and would say so."""

import json
import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY


@pytest.mark.slow
def test_a_short_drill_loses_nothing(tmp_path):
    """With freeze_thaw, which is not compared with a sweep without kills; tests/sweep/test_program.py compares ASHA."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "crash_drill.py"), "--driver-kills", "1"]
    command += ["--worker-kills", "1", "--modes", "freeze_thaw", "--output", str(tmp_path / "drill.json")]
    command += ["sweep.num_trials=4", "sweep.max_epochs=6", "trainer.max_epochs=1", "data.source.num_train=80"]
    command += ["data.source.num_eval=8", "data.source.num_blocks=4", "model.encoder.name=lcnet_035"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    totals = json.loads((tmp_path / "drill.json").read_text())["totals"]
    assert (totals["driver_kills"], totals["worker_kills"]) == (1, 1)
    assert totals["lost"] == totals["repeated"] == totals["wrong"] == 0
