"""What keeps others out of Ray."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from handpose.sweep.execution.privacy import ensure_token, make_private_folder, write_token


def get_mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_its_owners_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        ensure_token({}, home=tmp_path)
    finally:
        os.umask(before)
    file = tmp_path / ".ray" / "auth_token"
    assert get_mode(file) == 0o600
    assert get_mode(file.parent) == 0o700
    assert len(bytes.fromhex(file.read_text())) == 32
    assert list(file.parent.iterdir()) == [file]


def test_a_token_that_is_there_is_kept(tmp_path):
    ensure_token({}, home=tmp_path)
    before = (tmp_path / ".ray" / "auth_token").read_text()
    ensure_token({}, home=tmp_path)
    write_token(tmp_path / ".ray" / "auth_token")
    assert (tmp_path / ".ray" / "auth_token").read_text() == before


def test_a_token_that_others_could_read_is_tightened_and_that_is_said(tmp_path, capsys):
    file = tmp_path / "token"
    file.write_text("a" * 64)
    file.chmod(0o644)
    ensure_token({"RAY_AUTH_TOKEN_PATH": str(file)}, home=tmp_path)
    assert get_mode(file) == 0o600
    told = capsys.readouterr().err
    assert str(file) in told
    assert "a" * 64 not in told
    ensure_token({"RAY_AUTH_TOKEN_PATH": str(file)}, home=tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("chosen", [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_MODE": "disabled"}])
def test_what_a_user_has_chosen_is_left_alone(tmp_path, chosen):
    environment = dict(chosen)
    ensure_token(environment, home=tmp_path)
    assert environment == chosen
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_to_write_to_the_token_is_in_the_environment(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {}
    ensure_token(environment, home=tmp_path / "file")
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


def test_rays_folder_is_within_a_private_one_and_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    with make_private_folder() as folder:
        assert get_mode(folder.parent) == 0o700
        sockets = folder / "session_2026-01-01_00-00-00_000000_4194304" / "sockets"
        assert len(str(sockets / "plasma_store")) <= 107
        folder.mkdir(mode=0o777)
    assert not folder.parent.exists()


@pytest.mark.slow
def test_the_folder_of_a_ray_that_runs_here_is_closed_to_others(ray_started):
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert get_mode(session.parents[1]) == 0o700


@pytest.mark.slow
def test_a_ray_that_was_started_with_our_token_lets_nobody_in_without_it(tmp_path):
    write_token(tmp_path / "token")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    ours["RAY_USAGE_STATS_ENABLED"] = "0"
    knock = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('let in', len(ray.nodes()))"

    def let_in(environment):
        command = [sys.executable, "-c", knock, address]
        return (
            "let in 1" in subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout
        )

    with make_private_folder() as folder:
        ray_program = str(Path(sys.executable).with_name("ray"))
        options = ["--port=0", f"--temp-dir={folder}", "--include-dashboard=false", "--num-cpus=1"]
        options += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        log = tmp_path / "log"
        with log.open("w") as out:
            head = subprocess.Popen([ray_program, "start", "--head", "--block", *options], env=ours, stdout=out)
        try:
            file = folder / "ray_current_cluster"
            while not (file.exists() and file.read_text()):
                assert head.poll() is None, log.read_text()
                time.sleep(0.1)
            address = file.read_text()
            assert let_in(ours)
            assert not let_in(clean | {"HOME": str(tmp_path)})
            assert not let_in(ours | {"RAY_AUTH_TOKEN": "another"})
        finally:
            head.terminate()
            head.wait(60)


def test_without_a_home_folder_the_token_is_in_the_environment_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment: dict[str, str] = {}
    ensure_token(environment, home=None)
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert list(tmp_path.iterdir()) == []
