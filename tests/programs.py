"""Runs programs one after another in a process that imports everything once: `python -m tests.programs COMMANDS`.

COMMANDS: a list in JSON, of the command line of each program. What one has printed ends with a form feed.
"""

import json
import runpy
import sys

from handpose.utf8 import use_utf8


def command_line(*commands: list[str]) -> list[str]:
    """The command line that runs these."""
    return [sys.executable, "-m", "tests.programs", json.dumps(commands)]


def main() -> None:
    for command in json.loads(sys.argv[1]):
        sys.argv[:] = command
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as left:
            if left.code:
                raise
        print("\f")


if __name__ == "__main__":
    use_utf8()
    main()
