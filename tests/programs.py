"""Runs programs one after another in a process that imports everything once: `python -m tests.programs COMMANDS`.

COMMANDS: a list in JSON, of the command line of each program: the path of its file, or `-m` and the name of its
module, then its arguments. The output of each program ends with a form feed.
"""

import json
import runpy
import sys
from functools import partial

from handpose.utf8 import use_utf8


def command_line(*commands: list[str]) -> list[str]:
    """Make the command line that runs these commands."""
    return [sys.executable, "-m", "tests.programs", json.dumps(commands)]


def main() -> None:
    for command in json.loads(sys.argv[1]):
        is_module = command[0] == "-m"
        sys.argv[:] = command[1:] if is_module else command
        run = partial(runpy.run_module, alter_sys=True) if is_module else runpy.run_path
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as left:
            if left.code:
                raise
        print("\f")


if __name__ == "__main__":
    use_utf8()
    main()
