"""Where the Python interpreter and temporary folders may lie for Ray to start its processes."""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest
import ray

from handpose.config_files import REPOSITORY
from handpose.errors import UserError
from handpose.sweep.execution.interpreter import check_interpreter, find_worker_interpreter
from handpose.sweep.execution.privacy import make_private_folder
from handpose.sweep.execution.runtime import start_ray
from handpose.sweep.record.settings import RaySettings

_START = """
import sys, ray
from handpose.sweep.execution.runtime import start_ray
from handpose.sweep.record.settings import RaySettings
with start_ray(RaySettings(address=None, num_cpus=1)):
    print(ray.get(ray.remote(lambda: sys.executable).remote(), timeout=60))
"""


def make_interpreter(folder: Path) -> Path:
    """A virtual environment there that sees the packages of this one."""
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder / "bin" / "python"


def run(python: Path, code: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | more
    return subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_workers_start_where_the_shell_would_split_the_path_of_python_and_of_temporary_files(tmp_path):
    python = make_interpreter(tmp_path / 'my thesis [b] $HOME & ; (c) "d" `e` * größe' / ".venv")
    with tempfile.TemporaryDirectory(prefix="a b [c] $d&", dir="/tmp") as folder:  # short enough for sockets
        done = run(python, _START, TMPDIR=folder)
    assert done.stdout.strip() == str(python), done.stderr


@pytest.mark.parametrize(("name", "character"), [("it's", "'"), ("back\\slash", "\\")])
def test_a_path_that_ray_cannot_start_is_refused_in_a_sentence_before_ray_starts(monkeypatch, name, character):
    monkeypatch.setattr(sys, "executable", f"/{name}/.venv/bin/python")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    sentence = f"Ray cannot start {sys.executable}: the path contains {character}, "
    with pytest.raises(UserError, match=rf"^{re.escape(sentence)}.*move the virtual environment"):
        start_ray(RaySettings(address=None, num_cpus=1)).__enter__()


def test_an_ordinary_path_is_left_to_each_node():
    assert find_worker_interpreter("/usr/bin/python3.11") == {}
    check_interpreter("/home/me/my thesis/größe/.venv/bin/python")
    with pytest.raises(UserError, match="move the virtual environment"):
        check_interpreter("/home/me/it's/bin/python")


@pytest.mark.parametrize("name", ["it's", "back\\slash", "größe"])
def test_rays_temporary_files_do_not_go_where_ray_cannot_start(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tempfile.tempdir", f"/{name}")
    with make_private_folder() as folder:
        assert name not in str(folder)
