"""Reads environment variables from a .env file, but not from a file that another user can have written.

The file is looked for in the working folder and in all folders above it. Some of these, such as /tmp or a shared
scratch disk, can be written by everyone. Only variables that this project documents are set: PYTHONPATH, LD_PRELOAD
or RAY_AUTH_MODE would let whoever wrote the file run programs as this user.
"""

import grp
import io
import os
import pwd
import stat
import sys
from pathlib import Path

from dotenv import dotenv_values

from handpose.errors import UserError, explain_file_error, join_lines
from handpose.utf8 import decode_utf8

DOTENV_VARIABLES = frozenset(
    {
        *("MP_DATA", "DIR_SCRATCH", "STUDY_URL", "NOTIFY_URLS"),
        *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
        *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
        *("HF_TOKEN", "HF_HUB_OFFLINE"),
        *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    }
)
"""The variables that a .env file can set; docs/training.md describes them."""


def load_dotenv_file() -> None:
    """Set the variables of the nearest trusted .env file. Variables that are already set keep their values.

    The file is in the working folder or above it. A file of another user (other than root) is passed over with a
    warning on stderr, and so are variables that are not in `DOTENV_VARIABLES`.

    Raises:
        UserError: the file cannot be read, or other users can write it.
    """
    _unset_empty_variables()
    here = Path.cwd()
    for path in (folder / ".env" for folder in (here, *here.parents)):
        if os.path.isfile(path) and (content := _read_if_trusted(path)) is not None:
            _set_variables(path, content)
            break
    _unset_empty_variables()


def _read_if_trusted(path: Path) -> bytes | None:
    """Return the content of a file; None, with a warning, if the file or the link to it belongs to another user."""
    try:
        if not (_is_foreign(path.lstat()) or _is_foreign(path.stat())):
            with path.open("rb") as file:
                state = os.fstat(file.fileno())  # another user may have exchanged the file by now
                if not _is_foreign(state):
                    _check_mode(state, path)
                    return file.read()
    except OSError as error:
        raise UserError(explain_file_error(error, path, verb="read")) from error
    print(
        f"warning: {path} is ignored because it belongs to another user; put your variables into a .env file of your "
        "own in the working folder",
        file=sys.stderr,
    )
    return None


def _check_mode(state: os.stat_result, path: Path) -> None:
    is_shared = state.st_mode & stat.S_IWGRP and not _is_private_group(state.st_gid)
    if is_shared or state.st_mode & stat.S_IWOTH:
        raise UserError(f"{path} can be written by other users, who could set your variables; run: chmod go-w {path}")


def _is_private_group(group: int) -> bool:
    """Return whether a group has only this user in it, as many systems give one to each user, with the umask 002."""
    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _is_foreign(state: os.stat_result) -> bool:
    return state.st_uid not in (os.getuid(), 0)


def _set_variables(path: Path, content: bytes) -> None:
    try:
        values = dotenv_values(stream=io.StringIO(decode_utf8(content, path)))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({join_lines(error)}); it must hold lines like MP_DATA=DIR") from error
    for name, value in values.items():
        if name in DOTENV_VARIABLES and value is not None:
            os.environ.setdefault(name, value)
    if ignored := sorted(values.keys() - DOTENV_VARIABLES):
        print(
            f"warning: {path} sets {', '.join(ignored)}, which this project does not read from such a file; set "
            "these in the shell if they are needed",
            file=sys.stderr,
        )


def _unset_empty_variables() -> None:
    """Unset folder variables that are empty: an empty path would put the results directly into the working folder."""
    for name in ("MP_DATA", "DIR_SCRATCH"):
        if os.environ.get(name) == "":
            del os.environ[name]
