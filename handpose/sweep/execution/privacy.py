"""Keeps other users out of Ray, by a token and a private folder: Ray's ports and sockets allow anyone to run commands.

Ray 2.60 looks for the token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, and in ~/.ray/auth_token, in
this order. By default, `ray.init()` writes that file with the mode of the umask, so other users can often read it, and
`ray start` without a token starts an open cluster (ray/_private/authentication/). Ray's folder gets mode 0777 whatever
the umask is (observed), so it needs a private folder around it. This module does not import Ray: a job has its token
before Ray is started.
"""

import contextlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from handpose.sweep.execution.interpreter import can_hold_sockets

AUTH_MODE_VARIABLE, TOKEN_VARIABLE, TOKEN_PATH_VARIABLE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Environment variables that Ray reads."""

NO_USAGE_STATS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
"""Environment variables that keep `ray start` from reporting usage.

Even when the reports are off, Ray tells its makers that they are off (2.60,
dashboard/modules/usage_stats/usage_stats_head.py). Nothing listens on port 9.
"""

_MAX_SOCKET_PATH_BYTES = 107
"""Maximum length of the path of a Unix socket, in bytes (Linux, unix(7))."""
_LONGEST_SOCKET_SUFFIX = "/handpose-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest path of a Ray socket, relative to the folder for temporary files."""


def write_token(file: Path) -> None:
    """Write a new token to a file that only its owner can read, unless the file exists.

    No other process ever sees a partial token. The folder, if it is created here, is accessible only to its owner too.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(32))  # 256 bits, like Ray's own tokens
        try:
            os.link(part, file)
        except FileExistsError:  # another process was faster; its token will do
            return
    finally:
        part.unlink()


def restrict_permissions(file: Path) -> None:
    """Make a token file accessible only to its owner, and print a warning if others had access.

    Files of other users stay as they are.
    """
    found = file.stat()
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        file.chmod(0o600)
        print(
            f"{file} could be read by other users; its permissions have been corrected. If somebody may have read it, "
            "remove it: the next sweep creates a new one",
            file=sys.stderr,
        )


def ensure_token(environment: MutableMapping[str, str], *, home: Path | None) -> None:
    """Make sure that the Ray that is about to start finds a token that only its owner can read.

    A RAY_AUTH_TOKEN or an authentication mode that the user has set stays as it is. If the file cannot be written, the
    token is only in the environment.

    Args:
        environment: the environment of this process and of those it starts.
        home: the user's home folder; None if it is unknown.
    """
    if environment.get(AUTH_MODE_VARIABLE, "token").lower() != "token" or environment.get(TOKEN_VARIABLE):
        return
    given = environment.get(TOKEN_PATH_VARIABLE)
    if not given and home is None:
        environment[TOKEN_VARIABLE] = secrets.token_hex(32)
        return
    file = Path(given) if given else (home or Path()) / ".ray" / "auth_token"
    try:
        if not file.exists() or (not given and not file.stat().st_size):
            file.unlink(missing_ok=True)
            write_token(file)
        restrict_permissions(file)
    except OSError:
        environment[TOKEN_VARIABLE] = secrets.token_hex(32)


@contextlib.contextmanager
def make_private_folder() -> Iterator[Path]:
    """Create a private folder on this machine for Ray's sockets and logs, and remove it at the end.

    Only its owner can enter it. It is in TMPDIR, or in /tmp if that path is too long for sockets or has characters that
    Ray does not accept.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(place + _LONGEST_SOCKET_SUFFIX)) > _MAX_SOCKET_PATH_BYTES or not can_hold_sockets(place):
        place = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="handpose-", dir=place))
    try:
        yield folder / "ray"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
