"""The table of a sweep's trials, kept while it runs: what each was, how far it came, how it ended; and trials.csv.

One row a trial; its metrics are those of the last epoch it reported, so that value and epoch always belong together.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from handpose.files import write_atomically
from handpose.metrics.target import Mode, TargetMetric
from handpose.pareto import sort_into_fronts

TrialState = Literal["running", "waiting", "paused", "complete", "stopped", "diverged", "infeasible", "failed"]
"""waiting: to be tried again, or for the sweep to go on. paused: at a rung, to be promoted. complete: trained to the
last epoch. stopped: ended before, by the scheduler or a budget. diverged: its metric was not finite, or exploded.
infeasible: it costs more than the constraints allow, or its second objective cannot be told. failed: raised an
error."""

STATES: tuple[TrialState, ...] = (
    "running",
    "waiting",
    "paused",
    "complete",
    "stopped",
    "diverged",
    "infeasible",
    "failed",
)
_OVER_STATES = ("complete", "stopped", "diverged", "infeasible", "failed")


class CostObjective(NamedTuple):
    """What is optimised beside a sweep's metric. name: of a cost, as in `TrialRow.costs`. mode: min or max."""

    name: str
    mode: Mode


def make_second_objectives(name: str | None) -> tuple[CostObjective, ...]:
    """`TrialTable.objectives` of a sweep whose second objective is that cost; none for None."""
    return () if name is None else (CostObjective(name, "min"),)


@dataclass
class TrialRow:
    """One trial.

    params: configuration key -> value. metrics: of epoch `epochs`. seconds: in its slot. error: why it failed, in a
    line, with the traceback. command: the command line that trains it again, alone. costs: measured before it was
    trained, where something asks for them: num_parameters, latency_ms, memory_mb.
    """

    number: int
    params: Mapping[str, Any]
    state: TrialState = "running"
    epochs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    node: str = ""
    error: str = ""
    traceback: str = ""
    command: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.state in _OVER_STATES


@dataclass
class TrialTable:
    """The trials of one sweep.

    metric: what is optimised; mode: min or max. num_trials, max_epochs: as planned. num_slots: trials at a time.
    checkpoint_bytes: on the disk, of a budget. gpu_hours: that trials have held GPUs for, of a budget. objectives: what
    is optimised beside the metric; one, or none. end: how the last process left the sweep, as in `Closed.reason`; empty
    while it runs or after it was killed. elapsed_s: the sweep's own time then.
    """

    metric: str
    mode: Mode
    num_trials: int
    max_epochs: int
    num_slots: int = 1
    checkpoint_bytes: int = 0
    checkpoint_budget_bytes: float = math.inf
    gpu_hours: float = 0.0
    gpu_hours_budget: float = math.inf
    rows: dict[int, TrialRow] = field(default_factory=dict)
    objectives: tuple[CostObjective, ...] = ()
    end: Literal["", "finished", "spent", "interrupted", "halted"] = ""
    elapsed_s: float = 0.0

    @property
    def target(self) -> TargetMetric:
        """The metric with its direction."""
        return TargetMetric(self.metric, self.mode)

    def get_loss(self, row: TrialRow) -> float:
        """The row's metric as a loss, of which smaller is better."""
        return self.target.to_loss(self.get_value(row))

    def get_value(self, row: TrialRow) -> float:
        """The row's metric at its last epoch; NaN where it has none."""
        return row.metrics.get(self.metric, math.nan)

    def count_states(self) -> Counter[TrialState]:
        """How many trials are in each state."""
        return Counter(row.state for row in self.rows.values())

    def rank_trials(self) -> list[TrialRow]:
        """Trials that neither failed nor diverged, the most trained first and among equals the best.

        Values of different epochs are never compared. Ties go to the smaller number.
        """
        sound = [row for row in self.rows.values() if row.state not in ("failed", "diverged", "infeasible")]
        finite = [row for row in sound if math.isfinite(self.get_value(row))]
        return sorted(finite, key=lambda row: (-row.epochs, self.get_loss(row), row.number))

    def find_front(self) -> list[TrialRow]:
        """The trials of `ranked` that no other one dominates in metric and second objective, the best metric first.

        Only of those that were trained the longest; with one objective the best trial alone.
        """
        ranked = self.rank_trials()
        if not self.objectives:
            return ranked[:1]
        (other,) = self.objectives
        cost = TargetMetric(*other)
        measured = [row for row in ranked if math.isfinite(row.costs.get(other.name, math.nan))]
        longest = [row for row in measured if row.epochs == measured[0].epochs]
        front, *_ = sort_into_fronts(
            [(self.get_loss(row), cost.to_loss(row.costs[other.name])) for row in longest]
        ) or [[]]
        return [longest[index] for index in front]

    def write_csv(self, path: Path) -> None:
        """Write all rows, sorted by number. Atomic: a reader finds the old table or the new one."""
        rows = [self.rows[number] for number in sorted(self.rows)]
        columns = _list_columns(rows)
        with write_atomically(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(_make_cells(row, columns) for row in rows)


_FIRST_COLUMNS = ("number", "state", "epochs", "seconds")
_LAST_COLUMNS = ("node", "error", "command", "traceback")


def _list_columns(rows: Sequence[TrialRow]) -> list[str]:
    metrics = dict.fromkeys(name for row in rows for name in row.metrics)
    costs = dict.fromkeys(name for row in rows for name in row.costs)
    params = dict.fromkeys(key for row in rows for key in row.params)
    return [*_FIRST_COLUMNS, *metrics, *costs, *params, *_LAST_COLUMNS]


def _make_cells(row: TrialRow, columns: Sequence[str]) -> list[Any]:
    own = {name: getattr(row, name) for name in (*_FIRST_COLUMNS, *_LAST_COLUMNS)} | {"seconds": round(row.seconds, 2)}
    values = {**row.metrics, **row.costs, **row.params, **own}
    return [_format_cell(values[column]) if column in values else "" for column in columns]


def _format_cell(value: Any) -> Any:
    """Numbers so that they are read back exactly; null as a word, since an empty cell is a parameter not there."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return _escape_for_spreadsheet(value)
    return repr(value) if isinstance(value, float) else value


def _escape_for_spreadsheet(text: str) -> str:
    """Text as a cell of one line that is no formula: line ends are written \\n, and =, +, -, @ get a space before."""
    line = "\\n".join(text.splitlines())
    return f" {line}" if line.startswith(("=", "+", "-", "@", "\t")) else line


def shorten_names(keys: Iterable[str]) -> dict[str, str]:
    """The shortest ending of each dotted key that tells it from the others: model.decoder.depth -> depth."""
    keys = list(dict.fromkeys(keys))
    parts = {key: key.replace("/", ".").split(".") for key in keys}
    names: dict[str, str] = {}
    for key in keys:
        lengths = range(1, len(parts[key]) + 1)
        endings = (".".join(parts[key][-length:]) for length in lengths)
        taken = {".".join(parts[other][-length:]) for other in keys if other != key for length in lengths}
        names[key] = next((ending for ending in endings if ending not in taken), key)
    return names
