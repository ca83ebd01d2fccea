"""Writes down what happens to the trials while a sweep runs: trials.csv, TensorBoard and the view in the terminal."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from handpose.report.table import TrialRow, TrialTable
from handpose.report.tensorboard import TrialLog
from handpose.report.terminal import SweepView
from handpose.sweep.events import Begun, Closed, Ended, Event, Failed, Reported
from handpose.sweep.retention import CheckpointShelf
from handpose.sweep.stretch import run_name

_CSV_EVERY_S = 1.0


class Recorder(tune.Callback):
    """Keeps trials.csv, a TensorBoard run a trial, and the view in the terminal, as events come.

    table: of the trials, kept by others. folder: of the sweep. shelf: of checkpoints. tick: lets rows of running trials
    show their time. view: shown while the sweep runs.
    """

    def __init__(
        self, table: TrialTable, *, folder: Path, shelf: CheckpointShelf, tick: Callable[[], None], view: SweepView
    ) -> None:
        self._table = table
        self._folder = folder
        self._shelf = shelf
        self._tick = tick
        self._view = view
        self._logs: dict[int, TrialLog] = {}
        self._told: set[tuple[int, int]] = set()
        self._is_behind = True  # trials.csv, of the table
        self._next_write = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with an experiment's settings; open files do not travel

    def catch_up(self, last: Event | None) -> None:
        """After a crash: log the last event, which may have come to the disk alone."""
        if isinstance(last, Reported):
            row = self._table.rows[last.trial]
            self._log(row).report(last.epoch, last.metrics)
            if row.state != "waiting":
                self._close_log(row)
        self._write()

    def happened(self, event: Event, row: TrialRow | None, /) -> None:
        """Write an event down; row: of the trial that it is about."""
        self._is_behind = True
        if row is None:
            if isinstance(event, Closed):
                self._close()
            return
        if isinstance(event, Begun):
            self._log(row)
        elif isinstance(event, Reported):
            self._log(row).report(event.epoch, event.metrics)
        if row.state not in ("running", "waiting") or (row.state == "waiting" and isinstance(event, Failed)):
            self._close_log(row)
        if row.is_over or row.state == "paused" or isinstance(event, Failed):
            self._tell(event, row)

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        """Called by Tune several times a second."""
        self._tick()
        self._table.checkpoint_bytes = self._shelf.total_bytes
        if self._is_behind and time.monotonic() >= self._next_write:
            with contextlib.suppress(OSError):  # it is made of the events, and is written again
                self._write()
        self._view.refresh(self._table)

    def _tell(self, event: Event, row: TrialRow) -> None:
        """Show how a trial stands; one that paused and is never promoted has been told already."""
        if not isinstance(event, Ended) or (row.number, row.epochs) not in self._told:
            self._view.ended(self._table, row)
        self._told.add((row.number, row.epochs))

    def _close(self) -> None:
        for number in list(self._logs):
            self._close_log(self._table.rows[number])
        self._write()
        self._view.refresh(self._table, at_once=True)

    def _log(self, row: TrialRow) -> TrialLog:
        if row.number not in self._logs:
            name = run_name(row.number)
            self._logs[row.number] = TrialLog(
                self._folder / "tensorboard" / name, name=name, params=row.params, started_s=time.time()
            )
        return self._logs[row.number]

    def _close_log(self, row: TrialRow) -> None:
        log = self._logs.pop(row.number, None)
        if row.is_over:
            log = log or self._log(row)
            self._logs.pop(row.number, None)
            log.close(failed=row.state in ("diverged", "failed"), ended_s=time.time())
        elif log is not None:
            log.pause()

    def _write(self) -> None:
        began = time.monotonic()
        self._table.write_csv(self._folder / "trials.csv")
        self._is_behind = False
        # However long the table grows, writing it takes at most a twentieth of the time.
        self._next_write = began + max(_CSV_EVERY_S, 20 * (time.monotonic() - began))
