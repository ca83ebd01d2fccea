"""What keeps others out of Ray, whose ports and sockets give whoever reaches them a shell: a token, a private folder.

Ray 2.60 looks for the token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, and in ~/.ray/auth_token,
in this order. Left to itself, `ray.init()` writes that file with the mode of the umask, so that colleagues can often
read it, and `ray start` without a token begins an open cluster (ray/_private/authentication/).
Its folder gets the mode 0777 whatever the umask is (seen), so that it needs a private one around it.
Imports no Ray: a job has its token before Ray is started.
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
"""What Ray reads from the environment."""

NO_USAGE_STATS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
"""What keeps `ray start` from reporting: even switched off, it says so to Ray's makers (2.60, dashboard/modules/
usage_stats/usage_stats_head.py). Nothing listens on port 9."""

_MAX_SOCKET_PATH_BYTES = 107
"""Bytes of the path of a Unix socket (Linux, unix(7))."""
_LONGEST_SOCKET_SUFFIX = "/handpose-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Of the longest of Ray's sockets, below the folder for temporary files."""


def write_token(file: Path) -> None:
    """Make a token that only its owner can read, unless the file is there; nobody ever sees it half-written.

    The folder, where it is made here, is its owner's alone too. Raises OSError.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(32))  # 256 bits, as Ray's own
        try:
            os.link(part, file)
        except FileExistsError:  # another process was faster; one token is as good as another
            return
    finally:
        part.unlink()


def restrict_permissions(file: Path) -> None:
    """Take from all but its owner what they may do with a token, and say so; what another one owns is left alone."""
    found = file.stat()
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        file.chmod(0o600)
        print(
            f"{file} could be read by others, and no longer can; where somebody may have read it, remove it: the next "
            "sweep makes another one",
            file=sys.stderr,
        )


def ensure_token(environment: MutableMapping[str, str], *, home: Path | None) -> None:
    """See to it that the Ray which is about to start finds a token that is its owner's alone.

    environment: of this process and what it starts; home: of the user, None where it is not known. A user's own
    RAY_AUTH_TOKEN, and a mode that was chosen, are left as they are. Where no file can be written, the token is in the
    environment only.
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
    """A folder of this machine that only its owner can enter, for Ray's sockets and logs; it is removed at the end.

    It lies under TMPDIR, or under /tmp where that path is too long for sockets or has characters that Ray cannot take.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(place + _LONGEST_SOCKET_SUFFIX)) > _MAX_SOCKET_PATH_BYTES or not can_hold_sockets(place):
        place = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="handpose-", dir=place))
    try:
        yield folder / "ray"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
