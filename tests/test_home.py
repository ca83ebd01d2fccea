"""Programs leave nothing in the home folder, where libraries keep the identifiers that their telemetry sends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from ray._common.usage import usage_lib

from handpose.config_files import REPOSITORY
from handpose.sweep.execution.privacy import NO_USAGE_STATS
from tests.builders import SMALL, write_images
from tests.programs import command_line

TINY = [
    *SMALL,
    "model.decoder.depth=1",
    "model.encoder.pretrained=false",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "num_threads=1",
]
OF_RAY = {".ray", ".ray/auth_token"}
"""The token of our own, see docs/security.md."""


@pytest.fixture
def home(tmp_path):
    """An empty home folder."""
    return tmp_path / "home"


def environment(home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    kept["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # for Matplotlib's list of fonts, which takes it seconds to make
    return kept | {"HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def make_offline_command() -> list[str]:
    """What starts a command without a network, where that is allowed."""
    has_programs = shutil.which("unshare") and shutil.which("ip")
    if has_programs and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        return ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    return []


def list_files(home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in home.rglob("*")}


def list_files_after(home: Path, command: list[str], *, cwd: Path) -> set[str]:
    """What stands in a home folder after a program."""
    done = subprocess.run(
        [*make_offline_command(), *command],
        cwd=cwd,
        env=environment(home),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return list_files(home)


@pytest.mark.slow
def test_importing_onnxruntime_leaves_nothing(home, tmp_path):
    assert list_files_after(home, [sys.executable, "-c", "import handpose.export"], cwd=tmp_path) == set()


@pytest.mark.slow
def test_programs_leave_nothing(home, tmp_path, freihand, checkpoint):
    write_images(tmp_path / "pictures", 2, size=64)
    data = [*TINY, f"data.root={freihand}"]
    trained = ["--checkpoint", str(checkpoint)]
    package = REPOSITORY / "handpose"
    programs = command_line(
        [str(REPOSITORY / "train.py"), *data],
        [str(package / "predict.py"), "pictures", *trained],
        [str(package / "evaluation" / "__main__.py"), *trained, "--split", "val"],
        [str(package / "export.py"), *trained, "--output", "hand.onnx", "--images", "pictures"],
    )
    assert list_files_after(home, programs, cwd=tmp_path) == set()
    assert (tmp_path / "hand.onnx").is_file()


def test_a_node_that_is_started_for_a_job_reports_no_usage(monkeypatch):
    for name, value in NO_USAGE_STATS.items():
        monkeypatch.setenv(name, value)
    assert not usage_lib.usage_stats_enabled()
    assert usage_lib._usage_stats_report_url().startswith("http://127.0.0.1:")
