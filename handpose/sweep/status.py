"""Print the progress of a sweep, for a person or for another program.

    python -m handpose.sweep.status outputs/sweeps/NAME --json

It reads the files of the sweep and changes nothing.
"""

from collections.abc import Sequence

from handpose.files import to_json
from handpose.program import exit_on_user_error, make_parser
from handpose.sweep.analysis.status import print_status, summarise_status
from handpose.sweep.storage.stored_sweep import open_sweep_for_reading
from handpose.utf8 import use_utf8

_DESCRIPTION = """\
Print the progress of a sweep, which may be running, stopped or in an object store: as `python tune.py
sweep.status=DIR` does, or as JSON.

  python -m handpose.sweep.status outputs/sweeps/NAME
  python -m handpose.sweep.status outputs/sweeps/NAME --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Raises:
        SystemExit: with status 2, if an argument is wrong.
    """
    parser = make_parser("handpose.sweep.status", _DESCRIPTION)
    parser.add_argument("place", metavar="DIR", help="folder of the sweep, or its URL in an object store")
    parser.add_argument("--json", action="store_true", help="print JSON, whose fields docs/report.md describes")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        if not options.json:
            print_status(options.place)
            return 0
        with open_sweep_for_reading(options.place) as folder:
            print(to_json(summarise_status(folder), indent=1))
    return 0


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
