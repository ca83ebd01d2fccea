"""Which trial has won, and what is kept of it: best.yaml."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handpose.report.table import TrialRow, TrialTable
from handpose.sweep.provenance import write_yaml
from handpose.sweep.settings import SweepSettings


class NoWinnerError(RuntimeError):
    """No trial of a sweep gave a finite value."""


def select_winner(table: TrialTable, *, folder: Path) -> TrialRow:
    """The best of the trials that were trained longest; values of different epochs are never compared.

    Of two epochs a trial's last one counts, not its best one: the minimum over an epoch's noise flatters whoever was
    measured most often. Raises NoWinnerError, with the first error and its file, when there is none.
    """
    ranked = table.ranked()
    if not ranked:
        raise NoWinnerError(_why_none(table, folder))
    return ranked[0]


def _why_none(table: TrialTable, folder: Path) -> str:
    counts = table.count()
    ends = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    failed = [row for row in table.rows.values() if row.state == "failed"]
    if not failed:
        return f"no trial gave a finite {table.metric} ({ends or 'none was started'})"
    first = min(failed, key=lambda row: row.number)
    said = f"trial {first.number} ended with: {first.error} (traceback: {folder / 'trials.csv'})"
    return f"no trial gave a finite {table.metric} ({ends}); {said}"


def write_best(
    path: Path,
    *,
    table: TrialTable,
    row: TrialRow,
    overrides: Sequence[str],
    sweep: SweepSettings,
    origin: Mapping[str, Any],
) -> None:
    """Write best.yaml, which `best=PATH` of train.py reads.

    overrides: the user's and the winner's, for train.py with its full schedule. origin: as `provenance` gives it.
    """
    content = {
        "overrides": list(overrides),
        "command": shlex.join(["python", "train.py", f"best={path}"]),
        "params": dict(row.params),
        "metric": {"name": table.metric, "mode": table.mode, "value": table.value(row)},
        "fidelity": {"epochs": row.epochs, "max_epochs": table.max_epochs},
        "trial": row.number,
        "sweep": {"name": sweep.name, "seed": sweep.seed, "num_trials": len(table.rows)},
        **origin,
    }
    write_yaml(path, content)
