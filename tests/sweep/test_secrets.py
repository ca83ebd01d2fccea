"""Secrets of the environment are in nothing that a sweep writes, nor in what others see of its processes."""

import contextlib
import gzip
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from handpose.config_files import REPOSITORY
from tests.builders import write_freihand
from tests.sweep.trainable.test_trial import SMALL

SECRETS = {
    "WANDB_API_KEY": "planted-wandb-0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-0123456789",
    "HTTPS_PROXY": "http://me:planted-proxy-0123456789@127.0.0.1:9",
    "STUDY_URL": "planted-study-0123456789",
}
PLANTED = b"planted-"


def finds(content: bytes) -> bool:
    """Whether a secret is in it, also where it is packed; what is half-written is looked at as it is."""
    if PLANTED in content:
        return True
    with contextlib.suppress(zipfile.BadZipFile, EOFError, gzip.BadGzipFile):
        if content.startswith(b"\x1f\x8b"):
            return finds(gzip.decompress(content))
        if content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                return any(finds(packed.read(name)) for name in packed.namelist())
    return False


def tells(folder: Path) -> set[str]:
    """Files of a folder that have a secret; those that go away meanwhile have none."""
    found = set()
    for place, _, names in os.walk(folder):  # it passes over folders that go away
        for file in (Path(place) / name for name in names):
            with contextlib.suppress(OSError):
                if file.is_file() and not file.is_symlink() and finds(file.read_bytes()):
                    found.add(str(file))
    return found


def told_by_processes() -> set[str]:
    """Argument lists that have one."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found |= {str(file)} if PLANTED in file.read_bytes() else set()
    return found


def test_the_search_finds_a_secret_wherever_it_is_packed(tmp_path):
    (tmp_path / "plain").write_bytes(b"a planted-b c")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(b"a planted-b c"))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("inner", b"a planted-b c")
    (tmp_path / "clean").write_bytes(b"nothing")
    assert {Path(file).name for file in tells(tmp_path)} == {"plain", "packed.gz", "packed.zip"}


@pytest.fixture
def short():
    """A folder for Ray's sockets, whose paths have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="hps", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_anything_that_a_sweep_writes(tmp_path, short):
    """Through confirmation, retraining and report, and while it runs: Ray's session and the lists of processes."""
    write_freihand(tmp_path / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    (tmp_path / "study").mkdir()
    url = f"sqlite:///{tmp_path / 'study' / 'study.db'}?uri=true&password={SECRETS['STUDY_URL']}"
    environment = os.environ | SECRETS | {"STUDY_URL": url, "TMPDIR": str(short), "DIR_SCRATCH": "outputs"}
    overrides = [*SMALL, "data.root=freihand", "sweep.name=hands", "sweep.num_trials=3", "sweep.max_epochs=2"]
    overrides += ["trainer.max_epochs=2", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0"]
    overrides += ["sweep.confirm.top_k=1", "sweep.confirm.seeds=2", "searcher.storage=${oc.env:STUDY_URL}"]
    command = [sys.executable, str(REPOSITORY / "tune.py"), *overrides]
    found, num_looks = set(), 0
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=told, stderr=told)
        while process.poll() is None:
            found |= tells(short) | told_by_processes()
            num_looks += any(short.glob("handpose-*/ray/session_*/logs"))
            time.sleep(0.5)  # the sweep needs the processor too
    assert process.returncode == 0, (tmp_path / "told").read_text()
    assert num_looks, "Ray's session was never seen"
    folder = tmp_path / "outputs" / "sweeps" / "hands"
    assert (folder / "report.html").is_file()
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["config"]["searcher"]["storage"] == "${oc.env:STUDY_URL}"
    assert list((tmp_path / "study").iterdir())
    assert found | tells(tmp_path / "outputs") | tells(short) == set()
    assert PLANTED not in (tmp_path / "told").read_bytes()
