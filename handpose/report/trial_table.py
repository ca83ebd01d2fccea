"""The table of a sweep's trials, which is kept up to date while the sweep runs and written as trials.csv.

It has one row per trial. The metrics in a row are those of the last epoch that the trial reported, so value and epoch
always belong together.
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
"""State of a trial.

- running: it holds a slot.
- waiting: it waits for a retry, or for the sweep to be resumed.
- paused: it waits at a rung for its promotion.
- complete: it was trained to the last epoch.
- stopped: it ended before the last epoch without an error; `TrialRow.reason` says why.
- diverged: its metric was not finite, or became far worse than its best value.
- infeasible: a cost is above its limit, or the cost that is the second objective could not be measured.
- failed: it ended with an error.
"""

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
    """A cost that is optimised in addition to the metric of the sweep.

    Attributes:
        name: name of the cost, as in `TrialRow.costs`.
        mode: `min` or `max`.
    """

    name: str
    mode: Mode


def make_second_objectives(name: str | None) -> tuple[CostObjective, ...]:
    """Make `TrialTable.objectives` for a sweep that minimises this cost; empty if `name` is None."""
    return () if name is None else (CostObjective(name, "min"),)


@dataclass
class TrialRow:
    """The row of a trial.

    Attributes:
        number: number of the trial.
        params: configuration key -> value.
        state: whether the trial runs, or how it ended.
        epochs: the last epoch that it reported.
        metrics: metric -> value at that epoch.
        seconds: how long the trial has held a slot.
        node: name of the node of its last report or failure.
        error: why it failed, or a problem that did not end it, in one line.
        traceback: the full text of the error.
        command: the command line that trains this configuration alone.
        costs: cost (`num_parameters`, `latency_ms` or `memory_mb`) -> value, measured before training if the sweep
            needs it.
        reason: why it is in its state: the last decision about it, in one line.
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
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended and will not run again."""
        return self.state in _OVER_STATES


@dataclass
class TrialTable:
    """The trials of a sweep.

    Attributes:
        metric: the metric that is optimised.
        mode: `min` or `max`, the better direction of the metric.
        num_trials: planned number of trials.
        max_epochs: number of epochs of a complete trial.
        num_slots: number of trials that run at the same time.
        num_requested: number of further trials for which nodes are requested from an autoscaler.
        checkpoint_bytes: size of the checkpoints on disk.
        checkpoint_budget_bytes: upper limit of that size.
        gpu_hours: GPU-hours that the trials have used.
        gpu_hours_budget: upper limit of the GPU-hours.
        rows: number of the trial -> row.
        objectives: the second objective, or empty.
        end: why the sweep was closed, as in `SweepClosed.reason`; empty while it runs or after it was killed.
        elapsed_s: the sweep's own time when it was closed.
        expected_gain: what doubling the number of trials was expected to gain, if it was closed for that.
        changed_limits: name in the configuration group `sweep` -> value, of the limits that the user has changed since
            the sweep was last opened.
    """

    metric: str
    mode: Mode
    num_trials: int
    max_epochs: int
    num_slots: int = 1
    num_requested: int = 0
    checkpoint_bytes: int = 0
    checkpoint_budget_bytes: float = math.inf
    gpu_hours: float = 0.0
    gpu_hours_budget: float = math.inf
    rows: dict[int, TrialRow] = field(default_factory=dict)
    objectives: tuple[CostObjective, ...] = ()
    end: Literal["", "finished", "spent", "interrupted", "halted"] = ""
    elapsed_s: float = 0.0
    expected_gain: float | None = None
    changed_limits: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def target(self) -> TargetMetric:
        """The metric with its better direction."""
        return TargetMetric(self.metric, self.mode)

    def get_loss(self, row: TrialRow) -> float:
        """Return the value of the row's metric as a loss; a smaller loss is better."""
        return self.target.to_loss(self.get_value(row))

    def get_value(self, row: TrialRow) -> float:
        """Return the value of the row's metric at its last epoch; NaN if there is none."""
        return row.metrics.get(self.metric, math.nan)

    def count_states(self) -> Counter[TrialState]:
        """Count the trials in each state."""
        return Counter(row.state for row in self.rows.values())

    def rank_trials(self) -> list[TrialRow]:
        """Rank the trials with a finite value, without those that failed, diverged or were infeasible.

        Trials with more epochs come first, and among those with equally many, the better value. So values at different
        epochs are never compared. Ties are broken by the trial number.
        """
        sound = [row for row in self.rows.values() if row.state not in ("failed", "diverged", "infeasible")]
        finite = [row for row in sound if math.isfinite(self.get_value(row))]
        return sorted(finite, key=lambda row: (-row.epochs, self.get_loss(row), row.number))

    def find_front(self) -> list[TrialRow]:
        """Find the Pareto front of metric and second objective, among the trials with both values and the most epochs.

        Returns:
            The rows on the front, the best metric first. With one objective, only the best trial.
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
        """Write all rows, sorted by number. The file is replaced atomically."""
        rows = [self.rows[number] for number in sorted(self.rows)]
        columns = _list_columns(rows)
        with write_atomically(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(_make_cells(row, columns) for row in rows)


_FIRST_COLUMNS = ("number", "state", "epochs", "seconds")
_LAST_COLUMNS = ("node", "reason", "error", "command", "traceback")


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
    """Format a cell. Numbers are read back exactly. None is a word; a parameter the trial does not have is empty."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return _escape_for_spreadsheet(value)
    return repr(value) if isinstance(value, float) else value


def _escape_for_spreadsheet(text: str) -> str:
    """Replace line breaks by the two characters \\n, and prevent spreadsheets from reading the text as a formula."""
    line = "\\n".join(text.splitlines())
    return f" {line}" if line.startswith(("=", "+", "-", "@", "\t")) else line


def shorten_names(keys: Iterable[str]) -> dict[str, str]:
    """Shorten dotted keys to their shortest unique ending: `model.decoder.depth` -> `depth`.

    Returns:
        Key -> short name.
    """
    keys = list(dict.fromkeys(keys))
    parts = {key: key.replace("/", ".").split(".") for key in keys}
    names: dict[str, str] = {}
    for key in keys:
        lengths = range(1, len(parts[key]) + 1)
        endings = (".".join(parts[key][-length:]) for length in lengths)
        taken = {".".join(parts[other][-length:]) for other in keys if other != key for length in lengths}
        names[key] = next((ending for ending in endings if ending not in taken), key)
    return names
