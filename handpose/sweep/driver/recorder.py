"""Writes down what happens to the trials while a sweep runs: trials.csv, logs and the view in the terminal."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from handpose.report.table import TrialRow, TrialTable
from handpose.report.terminal import SweepView
from handpose.sweep.record.events import Begun, Closed, Ended, Event, Failed, Measured, Reported, SetAside
from handpose.sweep.record.trial_segment import PICTURES_FOLDER, find_pictures
from handpose.sweep.storage.retention import CheckpointRetention

_CSV_EVERY_S = 1.0
_TICK_EVERY_S = 0.25


class TrialLog(Protocol):
    """Keeps curves and pictures of all trials, such as TensorBoard does. Rows are as the event has left them."""

    def open_run(self, row: TrialRow) -> None:
        """A trial begins, or goes on, maybe with other parameters."""

    def log_costs(self, row: TrialRow, costs: Mapping[str, float]) -> None:
        """What the trial costs, before it is trained."""

    def log_epoch(self, row: TrialRow, pictures: Mapping[str, Path]) -> None:
        """The metrics of the row's epoch. pictures: name -> JPEG file, which is removed afterwards."""

    def close_run(self, row: TrialRow, *, ended_s: float) -> None:
        """The trial does not run, and may be over. ended_s: time since the epoch."""

    def close(self) -> None:
        """Nothing more comes from this process; trials may go on in another."""


class Recorder:
    """Keeps trials.csv, the logs, and the view in the terminal, as events come.

    table: of the trials, kept by others. folder: of the sweep. shelf: of checkpoints. tick: lets rows of running trials
    show their time. view: shown while the sweep runs.
    """

    def __init__(
        self,
        table: TrialTable,
        *,
        folder: Path,
        retention: CheckpointRetention,
        refresh_times: Callable[[], None],
        view: SweepView,
        logs: Sequence[TrialLog],
    ) -> None:
        self._table = table
        self._folder = folder
        self._retention = retention
        self._refresh_times = refresh_times
        self._view = view
        self._logs = logs
        self._shown_trials: set[tuple[int, int]] = set()
        self._is_csv_outdated = True  # trials.csv, of the table
        self._next_write = 0.0
        self._next_tick = 0.0

    def log_last_event(self, last: Event | None) -> None:
        """After a crash: log the last event, which may have come to the disk alone."""
        if isinstance(last, Reported):
            row = self._table.rows[last.trial]
            self._log_epoch(row)
            if row.state != "waiting":
                self._close_run(row)
        self._write_csv()

    def on_event(self, event: Event, row: TrialRow | None, /) -> None:
        """Write an event down; row: of the trial that it is about."""
        self._is_csv_outdated = True
        if row is None:
            if isinstance(event, Closed):
                self._close_logs()
            elif isinstance(event, SetAside):
                self._view.note(f"node {event.node} is set aside: trials fail there, and work elsewhere")
            return
        if isinstance(event, Begun):
            for log in self._logs:
                log.open_run(row)
        elif isinstance(event, Measured):
            for log in self._logs:
                log.log_costs(row, event.costs)
        elif isinstance(event, Reported):
            self._log_epoch(row)
        if row.state not in ("running", "waiting") or (row.state == "waiting" and isinstance(event, Failed)):
            self._close_run(row)
        if row.is_over or row.state == "paused" or isinstance(event, Failed):
            self._show_trial(event, row)

    def refresh(self) -> None:
        """Bring the table, trials.csv and the view up to date; meant to be called several times a second."""
        if time.monotonic() >= self._next_tick:  # it looks at all trials that run
            self._refresh_times()
            self._next_tick = time.monotonic() + _TICK_EVERY_S
        self._table.checkpoint_bytes = self._retention.total_bytes
        if self._is_csv_outdated and time.monotonic() >= self._next_write:
            with contextlib.suppress(OSError):  # it is made of the events, and is written again
                self._write_csv()
        self._view.refresh(self._table)

    def _show_trial(self, event: Event, row: TrialRow) -> None:
        """Show how a trial stands; one that paused and is never promoted has been told already."""
        if not isinstance(event, Ended) or (row.number, row.epochs) not in self._shown_trials:
            self._view.show_trial_end(self._table, row)
        self._shown_trials.add((row.number, row.epochs))

    def _close_logs(self) -> None:
        for log in self._logs:
            log.close()
        with contextlib.suppress(OSError):  # there is none, or something in it that was never reported
            (self._folder / PICTURES_FOLDER).rmdir()
        self._write_csv()
        self._view.refresh(self._table, at_once=True)

    def _log_epoch(self, row: TrialRow) -> None:
        """Pictures lie in a shared folder, whichever node the trial ran on, until they are in the log."""
        pictures = find_pictures(self._folder, row.number, row.epochs)
        for log in self._logs:
            log.log_epoch(row, pictures)
        for file in pictures.values():
            file.unlink(missing_ok=True)

    def _close_run(self, row: TrialRow) -> None:
        for log in self._logs:
            log.close_run(row, ended_s=time.time())

    def _write_csv(self) -> None:
        began = time.monotonic()
        self._table.write_csv(self._folder / "trials.csv")
        self._is_csv_outdated = False
        # However long the table grows, writing it takes at most a twentieth of the time.
        self._next_write = began + max(_CSV_EVERY_S, 20 * (time.monotonic() - began))
