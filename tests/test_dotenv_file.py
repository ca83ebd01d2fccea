"""The .env file: whose file is read, and what it can set."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from handpose import dotenv_file
from handpose.config_files import REPOSITORY
from handpose.dotenv_file import DOTENV_VARIABLES, load_dotenv_file
from handpose.errors import UserError


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The variables of this process without those that a .env file can set, in an empty working folder."""
    variables = {name: value for name, value in os.environ.items() if name not in DOTENV_VARIABLES}
    monkeypatch.setattr(os, "environ", variables)
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    before = os.umask(0o022)
    yield variables
    os.umask(before)


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")


@pytest.fixture
def give_away(monkeypatch):
    """Makes a file, or a link itself, look like that of another user."""
    foreign = set()
    is_foreign = dotenv_file._is_foreign
    monkeypatch.setattr(dotenv_file, "_is_foreign", lambda state: state.st_ino in foreign or is_foreign(state))
    return lambda file: foreign.add(file.lstat().st_ino)


def test_the_nearest_file_sets_what_is_not_set_yet(environment):
    write("../.env", "MP_DATA=/data\nSTUDY_URL=sqlite:////above\n")
    write("../../.env", "MP_DATA=/far\nDIR_SCRATCH=/far\n")
    environment["STUDY_URL"] = "sqlite:////mine"
    load_dotenv_file()
    assert (environment["MP_DATA"], environment["STUDY_URL"]) == ("/data", "sqlite:////mine")
    assert "DIR_SCRATCH" not in environment


def test_a_variable_that_would_run_other_code_is_not_set(environment, capsys):
    names = ["LD_PRELOAD", "MATPLOTLIBRC", "PATH", "PYTHONPATH", "RAY_AUTH_MODE", "RAY_ADDRESS", "SWEEP_ARGUMENTS"]
    before = dict(environment)
    write(".env", "".join(f"export {name}=evil\n" for name in names) + "WANDB_API_KEY=mine\n")
    load_dotenv_file()
    assert environment == before | {"WANDB_API_KEY": "mine"}
    warning = capsys.readouterr().err
    assert "evil" not in warning
    assert all(name in warning for name in names)
    assert "WANDB_API_KEY" not in warning


def test_a_file_of_another_user_is_passed_over(environment, give_away, capsys):
    write(".env", "MP_DATA=/theirs\nDIR_SCRATCH=/theirs\n")
    write("../.env", "MP_DATA=/mine\n")
    give_away(Path(".env"))
    load_dotenv_file()
    assert environment["MP_DATA"] == "/mine"
    assert "DIR_SCRATCH" not in environment
    assert f"{Path.cwd() / '.env'} is ignored because it belongs to another user" in capsys.readouterr().err


def test_a_link_of_another_user_to_a_file_of_this_user_is_passed_over(environment, give_away):
    write("../project.env", "DIR_SCRATCH=/elsewhere\n")
    Path(".env").symlink_to(Path("../project.env"))
    give_away(Path(".env"))
    load_dotenv_file()
    assert "DIR_SCRATCH" not in environment


def test_the_owner_of_a_file_is_compared_with_the_user(tmp_path, monkeypatch):
    state = tmp_path.stat()
    assert not dotenv_file._is_foreign(state)
    monkeypatch.setattr(os, "getuid", lambda: state.st_uid + 1)
    assert dotenv_file._is_foreign(state) == (state.st_uid != 0)  # root is trusted
    monkeypatch.undo()
    if os.getuid() == 0:
        os.chown(tmp_path, 4321, -1)
        assert dotenv_file._is_foreign(tmp_path.stat())


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(environment, mode, monkeypatch):
    monkeypatch.setattr(dotenv_file, "_is_private_group", lambda group: False)
    write(".env", "MP_DATA=/data\n")
    Path(".env").chmod(mode)
    with pytest.raises(UserError, match=rf"\.env can be written by other users.* chmod go-w {Path.cwd()}/\.env"):
        load_dotenv_file()
    assert "MP_DATA" not in environment


def test_a_file_that_the_group_of_this_user_alone_can_write_is_read(environment, monkeypatch):
    """With the umask 002, as on systems that give each user a group."""
    monkeypatch.setattr(dotenv_file, "_is_private_group", lambda group: group == os.getgid())
    write(".env", "MP_DATA=/data")
    Path(".env").chmod(0o664)
    load_dotenv_file()
    assert environment["MP_DATA"] == "/data"


@pytest.mark.parametrize(
    ("primary", "name", "members", "is_private"),
    [
        (7, "ann", [], True),
        (7, "ann", ["ann"], True),
        (7, "ann", ["bob"], False),
        (7, "staff", [], False),
        (8, "ann", [], False),
    ],
)
def test_a_group_is_private_if_it_is_the_users_own_and_nobody_else_is_in_it(
    primary, name, members, is_private, monkeypatch
):
    monkeypatch.setattr(dotenv_file.pwd, "getpwuid", lambda user: SimpleNamespace(pw_gid=primary, pw_name="ann"))
    monkeypatch.setattr(dotenv_file.grp, "getgrgid", lambda group: SimpleNamespace(gr_name=name, gr_mem=members))
    assert dotenv_file._is_private_group(7) == is_private


def test_a_folder_of_that_name_is_passed_over(environment):
    Path(".env").mkdir()
    write("../.env", "MP_DATA=/data\n")
    load_dotenv_file()
    assert environment["MP_DATA"] == "/data"


def test_the_documentation_lists_what_the_file_can_set():
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("## Folders and environment")[2].partition("\n## ")[0]
    listed = re.findall(r"`([A-Z][A-Z0-9_]+)`", section)
    assert set(listed) == DOTENV_VARIABLES
