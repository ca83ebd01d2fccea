"""Command line `python -m handpose.report`: write a page about one sweep or several, even while they run."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from handpose.program import exit_on_user_error, make_parser
from handpose.sweep.analysis.report import REPORT_FILE, write_report
from handpose.sweep.storage.stored_sweep import open_sweep_for_reading
from handpose.urls import is_url
from handpose.utf8 import use_utf8

_DESCRIPTION = """\
Write the report of a sweep, or one report that compares several sweeps. The report is a single HTML file. The sweeps
may still be running.

  python -m handpose.report outputs/sweeps/NAME
  python -m handpose.report s3://bucket/folder/NAME
  python -m handpose.report outputs/sweeps/ONE outputs/sweeps/OTHER --output both.html
  python -m handpose.report outputs/sweeps/NAME --scientific model.decoder.depth
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Raises:
        SystemExit: with status 2, if an argument is wrong.
    """
    options = _parse_arguments(arguments)
    is_of_one_folder = len(options.places) == 1 and not is_url(options.places[0])
    file = options.output or (Path(options.places[0]) if is_of_one_folder else Path()) / REPORT_FILE
    with exit_on_user_error(), contextlib.ExitStack() as read:
        folders = [read.enter_context(open_sweep_for_reading(place)) for place in options.places]
        written = write_report(folders, file, scientific=options.scientific)
        own = {str(folder) for folder, place in zip(folders, options.places, strict=True) if not is_url(place)}
        print(written._replace(next_spaces=[file for file in written.next_spaces if str(file.parent) in own]).text)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("handpose.report", _DESCRIPTION)
    parser.add_argument("places", nargs="+", metavar="DIR", help="folder of a sweep, or its URL in an object store")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write; default: report.html in the folder of the sweep, or in the working folder",
    )
    parser.add_argument(
        "--scientific",
        metavar="KEY",
        help="searched key whose values are compared; all other searched keys are optimised for each value",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
