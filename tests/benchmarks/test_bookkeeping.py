"""The cost of bookkeeping is measured on a sweep that is really kept."""

import json
import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY


@pytest.mark.slow
def test_a_short_measurement_restores_what_it_wrote(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bookkeeping.py"), "--trials", "300"]
    done = subprocess.run([*command, "--output", str(tmp_path / "b.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["trials"] for row in rows] == [3, 30, 300]
    assert rows[-1]["reports"] > 300
