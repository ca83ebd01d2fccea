"""Records what happens to the trials while a sweep runs: trials.csv, the logs and the terminal view."""

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from handpose.report.notify import Notifier
from handpose.report.sweep_record import StoryLine
from handpose.report.terminal import SweepView
from handpose.report.trial_table import TrialRow, TrialTable
from handpose.report.utilisation import EpochUtilisation, Utilisation, combine
from handpose.sweep.analysis.story import StoryEvents, tell_story
from handpose.sweep.driver.resume import write_later_spaces
from handpose.sweep.record.events import (
    EVENTS_FILE,
    CostsMeasured,
    EpochReported,
    Event,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    SweepClosed,
    SweepSteered,
    TrialEnded,
    TrialSteered,
    read_events,
)
from handpose.sweep.record.trial_segment import PICTURES_FOLDER, find_pictures
from handpose.sweep.record.utilisation_file import UTILISATION_FILE, append_utilisation
from handpose.sweep.storage.retention import CheckpointRetention

_CSV_EVERY_S = 1.0
_TICK_EVERY_S = 0.25


class TrialLog(Protocol):
    """A log of the curves and pictures of all trials, for example TensorBoard. Each row already includes the event."""

    def open_run(self, row: TrialRow) -> None:
        """A trial starts or resumes, possibly with changed parameters."""

    def log_costs(self, row: TrialRow, costs: Mapping[str, float]) -> None:
        """The costs of a trial were measured, before it is trained."""

    def log_epoch(self, row: TrialRow, pictures: Mapping[str, Path]) -> None:
        """Log the metrics of the row's epoch.

        Args:
            row: the trial.
            pictures: name -> JPEG file. The files are removed afterwards.
        """

    def log_utilisation(self, row: TrialRow, used: Utilisation) -> None:
        """Log what the trial has used from its last report to the row's epoch. Called before `log_epoch`."""

    def close_run(self, row: TrialRow, *, ended_s: float, story: Sequence[StoryLine]) -> None:
        """The trial no longer runs, and may be over.

        Args:
            row: the trial.
            ended_s: seconds since the Unix epoch.
            story: what has happened to the trial so far.
        """

    def close(self) -> None:
        """Close the log in this process. Another process may continue the trials later."""


class _SegmentTime(NamedTuple):
    """A running segment of a trial.

    Attributes:
        number: its number within the trial.
        reported_s: `TrialRow.seconds` at its last report, or at its start.
    """

    number: int
    reported_s: float


class Recorder:
    """Keeps trials.csv, utilisation.jsonl, the logs and the terminal view up to date with the events.

    Args:
        table: the table of trials; the controller updates it.
        folder: the folder of the sweep.
        retention: knows how many bytes of checkpoints are kept.
        refresh_times: updates the times in the rows of running trials.
        view: the terminal view.
        logs: receive the metrics and pictures.
        notifier: sends messages about new best trials and quarantined nodes; None: nothing is sent.
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
        notifier: Notifier | None = None,
    ) -> None:
        self._table = table
        self._folder = folder
        self._retention = retention
        self._refresh_times = refresh_times
        self._view = view
        self._logs = logs
        self._notifier = notifier
        self._stories = StoryEvents()
        self._utilisation: dict[int, Utilisation] = {}
        self._segments: dict[int, _SegmentTime] = {}
        self._shown_trials: set[tuple[int, int]] = set()
        self._spaces: list[SweepSteered] = []
        self._is_csv_outdated = True
        self._next_write = 0.0
        self._next_tick = 0.0

    def restore(self, events: Sequence[Event]) -> None:
        """Take in the events of earlier processes.

        The last one is logged again: after a crash it may be on the disk but not yet in the logs.
        """
        for event in events:
            self._stories.add(event)
        self._spaces = [event for event in events if isinstance(event, SweepSteered) and event.space is not None]
        self._write_spaces()
        last = events[-1] if events else None
        if isinstance(last, SweepSteered) and last.action == "epochs":
            self._log_more_epochs(last)
        if isinstance(last, EpochReported):
            row = self._table.rows[last.trial]
            self._log_epoch(row)
            if row.state != "waiting":
                self._close_run(row)
        for row in self._table.rows.values():
            if row.is_over:
                self._stories.forget(row.number)
        self._write_csv()

    def add_utilisation(self, trial: int, used: Utilisation) -> None:
        """Keep what a trial has used until its report is recorded as an event.

        A report of an epoch that was reported before is no event. What was used for it counts for the next one.
        """
        earlier = self._utilisation.get(trial)
        self._utilisation[trial] = used if earlier is None else combine([earlier, used])

    def on_event(self, event: Event, row: TrialRow | None, /) -> None:
        """Record an event.

        Args:
            event: what happened.
            row: the trial that the event is about; None: it is about no trial.
        """
        self._is_csv_outdated = True
        if isinstance(event, TrialSteered) and not self._stories.get(event.trial):
            self._restore_stories([event.trial])  # it was forgotten when the trial ended
        else:
            self._stories.add(event)
        if row is None:
            if isinstance(event, SweepClosed):
                self._close_logs()
            elif isinstance(event, SweepSteered) and event.space is not None:
                self._spaces.append(event)
                self._write_spaces()
            elif isinstance(event, SweepSteered) and event.action == "epochs":
                self._log_more_epochs(event)
            elif isinstance(event, NodeQuarantined):
                note = f"node {event.node} is quarantined: trials fail there and work on other nodes"
                self._view.show_note(note)
                if self._notifier is not None:
                    self._notifier.send("quarantined", note)
            return
        if isinstance(event, SegmentStarted):
            self._utilisation.pop(event.trial, None)
            self._segments[event.trial] = _SegmentTime(event.segment, row.seconds)
            for log in self._logs:
                log.open_run(row)
        elif isinstance(event, CostsMeasured):
            for log in self._logs:
                log.log_costs(row, event.costs)
        elif isinstance(event, EpochReported):
            self._record_utilisation(event, row)
            self._log_epoch(row)
        ends_segment = isinstance(event, (SegmentFailed, EpochReported))  # the latter in a paused sweep
        if row.state not in ("running", "waiting") or (row.state == "waiting" and ends_segment):
            self._close_run(row)
        if row.is_over or row.state == "paused" or isinstance(event, SegmentFailed):
            self._show_trial(event, row)
        if row.is_over and self._notifier is not None:
            self._notifier.on_trial_end(self._table, row)

    def refresh(self) -> None:
        """Bring the table, trials.csv and the view up to date. Call this several times a second."""
        if time.monotonic() >= self._next_tick:  # the call loops over all running trials
            self._refresh_times()
            self._next_tick = time.monotonic() + _TICK_EVERY_S
        self._table.checkpoint_bytes = self._retention.total_bytes
        if self._is_csv_outdated and time.monotonic() >= self._next_write:
            with contextlib.suppress(OSError):  # nothing is lost: trials.csv is written again from the table
                self._write_csv()
        self._view.refresh(self._table)

    def _write_spaces(self) -> None:
        with contextlib.suppress(OSError):  # the events contain them
            write_later_spaces(self._spaces, self._folder)

    def _show_trial(self, event: Event, row: TrialRow) -> None:
        """Show the state of a trial, but not again when a trial ends that was already shown at the same epoch."""
        if not isinstance(event, TrialEnded) or (row.number, row.epochs) not in self._shown_trials:
            self._view.show_trial_end(self._table, row)
        self._shown_trials.add((row.number, row.epochs))

    def _close_logs(self) -> None:
        for log in self._logs:
            log.close()
        with contextlib.suppress(OSError):  # there is no folder, or it holds pictures of an epoch never reported
            (self._folder / PICTURES_FOLDER).rmdir()
        self._write_csv()
        self._view.refresh(self._table, at_once=True)

    def _log_epoch(self, row: TrialRow) -> None:
        """Log an epoch. Whichever node drew its pictures, they are in the sweep's folder until they are in the log."""
        pictures = find_pictures(self._folder, row.number, row.epochs)
        for log in self._logs:
            log.log_epoch(row, pictures)
        for file in pictures.values():
            file.unlink(missing_ok=True)

    def _record_utilisation(self, event: EpochReported, row: TrialRow) -> None:
        """Record what a trial has used since its last report. Nothing depends on it, so it may fail."""
        used, segment = self._utilisation.pop(event.trial, None), self._segments.get(event.trial)
        if segment is None:
            return
        self._segments[event.trial] = segment._replace(reported_s=row.seconds)
        if used is None:
            return
        used = used.complete(row.seconds - segment.reported_s)
        with contextlib.suppress(OSError):
            append_utilisation(
                self._folder / UTILISATION_FILE, event.trial, EpochUtilisation(segment.number, event.epoch, used)
            )
        for log in self._logs:
            log.log_utilisation(row, used)

    def _close_run(self, row: TrialRow) -> None:
        story = tell_story(self._stories.get(row.number), self._table.metric)
        for log in self._logs:
            log.close_run(row, ended_s=time.time(), story=story)
        if row.is_over:
            self._stories.forget(row.number)
            self._segments.pop(row.number, None)

    def _log_more_epochs(self, event: SweepSteered) -> None:
        """Log what has become of the trials that were complete when the user raised the number of epochs."""
        states = ("waiting", "paused", "stopped")
        rows = [row for row in self._table.rows.values() if row.epochs == event.epochs_before and row.state in states]
        self._restore_stories([row.number for row in rows])
        for row in rows:
            for log in self._logs:
                log.open_run(row)
            self._close_run(row)

    def _restore_stories(self, trials: Collection[int]) -> None:
        """Read the stories of trials that had ended, with the event that has just been written."""
        stories = StoryEvents()
        for event in read_events(self._folder / EVENTS_FILE):
            stories.add(event)
        for trial in trials:
            self._stories.restore(trial, stories.get(trial))

    def _write_csv(self) -> None:
        began = time.monotonic()
        self._table.write_csv(self._folder / "trials.csv")
        self._is_csv_outdated = False
        # Writing takes at most one twentieth of the time, however long the table becomes.
        self._next_write = began + max(_CSV_EVERY_S, 20 * (time.monotonic() - began))
