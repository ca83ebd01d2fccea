"""Checks from which paths of the Python interpreter and of temporary folders Ray can start processes.

Ray (2.60) passes the commands of its processes through two parsers. First, the raylet splits the command of its workers
by its own rules: it aborts at an apostrophe or a backslash. Then, if there is a runtime environment, the interpreter of
a worker is put into `bash -c` without quotes (_private/runtime_env/context.py). Tests showed that the other special
characters of the shell work if they are quoted. Socket names, which are in the temporary folder, must be ASCII. This
module does not import Ray.
"""

import re
import shlex

from handpose.errors import UserError

_UNSUPPORTED_CHARACTERS = re.compile(r"['\\]")


def can_hold_sockets(folder: str) -> bool:
    """Return whether Ray can start with this temporary folder."""
    return folder.isascii() and not _UNSUPPORTED_CHARACTERS.search(folder)


def check_interpreter(executable: str) -> None:
    """Raise UserError if Ray cannot start processes with this Python because of its path."""
    if found := _UNSUPPORTED_CHARACTERS.search(executable):
        raise UserError(
            f"Ray cannot start {executable}: the path contains {found[0]}, which its command lines do not allow; move "
            "the virtual environment to a folder without that character"
        )


def find_worker_interpreter(executable: str) -> dict[str, str]:
    """Return the part of a runtime environment that lets workers start from a path with special shell characters.

    It is empty if the path needs no quotes, so each node of a cluster uses its own interpreter. Otherwise all nodes
    must have the interpreter at this path.
    """
    quoted = shlex.quote(executable)
    return {} if quoted == executable else {"py_executable": quoted}
