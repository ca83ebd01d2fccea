"""Which paths of the Python interpreter, and of temporary folders, Ray can start processes from.

Ray (2.60) starts its processes through two parsers of command lines. The raylet splits the command of its workers by
rules of its own: it aborts at an apostrophe or a backslash. Then, wherever there is a runtime environment, a worker's
interpreter is put into `bash -c` unquoted (_private/runtime_env/context.py). The other characters of the shell work
when they are quoted, as was tried. Names of sockets, in the temporary folder, must be ASCII. Imports no Ray.
"""

import re
import shlex

from handpose.errors import UserError

_ABORTS_RAYLET = re.compile(r"['\\]")


def can_hold_sockets(folder: str) -> bool:
    """Whether Ray starts with a temporary folder of this name."""
    return folder.isascii() and not _ABORTS_RAYLET.search(folder)


def check_interpreter(executable: str) -> None:
    """Raise UserError where Ray cannot start processes with this Python because of its path."""
    if found := _ABORTS_RAYLET.search(executable):
        raise UserError(
            f"Ray cannot start {executable}: the path contains {found[0]}, which its command lines do not allow; move "
            "the virtual environment to a folder without that character"
        )


def worker_interpreter(executable: str) -> dict[str, str]:
    """The part of a runtime environment that lets workers start from a path with characters of the shell.

    It is empty where the path needs no quotes, so that each node of a cluster uses its own interpreter. Otherwise all
    nodes must have the interpreter at this path.
    """
    quoted = shlex.quote(executable)
    return {} if quoted == executable else {"py_executable": quoted}
