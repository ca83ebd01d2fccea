"""`python -m handpose.report`: one page about a sweep, or several side by side, also while they run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from handpose.config import told
from handpose.sweep.reporting import REPORT, write_report

_DESCRIPTION = """\
Write one self-contained HTML page about a sweep, or about several with a comparison, also while they run.

  python -m handpose.report outputs/sweeps/NAME
  python -m handpose.report outputs/sweeps/ONE outputs/sweeps/OTHER --output both.html
  python -m handpose.report outputs/sweeps/NAME --scientific model.decoder.depth
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, or leaves with 2 after a mistake."""
    options = _options(arguments)
    file = options.output or (options.folders[0] / REPORT if len(options.folders) == 1 else Path("report.html"))
    with told():
        print(write_report(options.folders, file, scientific=options.scientific).text)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m handpose.report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of a sweep")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the one folder, or here")
    parser.add_argument("--scientific", metavar="KEY", help="a searched key to compare the values of, others optimised")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
