"""A sweep while it runs: which trial is next, what becomes of a report, what a failure costs. Nothing here knows Ray.

Every change is an event (events.py): written first, then applied (history.py), then told to the searcher and to those
who listen. So a sweep that was killed goes on with the rungs, the searcher, the retries and the budgets that it had.

A trial is trained in stretches: from its beginning or from its newest checkpoint, until it ends, pauses at a rung,
fails, or the sweep is interrupted.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol, cast

from handpose.report.table import State, TrialRow
from handpose.schedulers.scheduler import SegmentStart
from handpose.search.searcher import EndState, Searcher, TrialSnapshot
from handpose.sweep.controller.history import History, TrialHistory
from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.record.events import (
    Asked,
    Begun,
    CheckpointRecord,
    Closed,
    CloseReason,
    Decision,
    Ended,
    Event,
    EventLog,
    Failed,
    FailureKind,
    Measured,
    Opened,
    Reported,
    SetAside,
)
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, TrialSegment, make_run_name

NO_REPORT_CAUSE = "it came back without a report"
"""Why a trial failed that came back before its first report, without an error."""


class SegmentFailure(NamedTuple):
    """Why a stretch failed, and on which node. cause: in a line. traceback: all that is known."""

    kind: FailureKind
    cause: str
    traceback: str
    node: str = ""


class EventListener(Protocol):
    """Is told of each event after it has been applied; row: of the trial that it is about."""

    def on_event(self, event: Event, row: TrialRow | None, /) -> None: ...


class SweepController:
    """Runs a sweep's history on.

    log: of its events; those in it are checked and applied. history: empty. searcher: proposes, and keeps the study.
    clock: in seconds. Raises UserError where the log was decided by other rules.

    `halted_by` is the failure that the sweep gave up for, since no trial works.
    """

    def __init__(
        self,
        settings: SweepSettings,
        *,
        log: EventLog,
        history: History,
        searcher: Searcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.history = history
        self.halted_by: Failed | None = None
        self.is_closed = False
        self._settings = settings
        self._log = log
        self._searcher = searcher
        self._num_slots = 0
        self._capacity = NodeCapacity()
        self._clock = clock
        self._listener: EventListener | None = None
        self.last_event = log.events[-1] if log.events else None
        history.replay(log.events)
        self._elapsed_before_s = history.at
        self._opened_at_s = clock()

    def open(self, *, num_slots: int, gpus: float = 0.0, listener: EventListener | None = None) -> None:
        """Go on from here.

        num_slots: trials at a time. gpus: the share of each. listener: is told what happens from now on.
        """
        self._num_slots = num_slots
        num_points = self._searcher.num_points
        num_trials = self._settings.num_trials if num_points is None else min(self._settings.num_trials, num_points)
        self._record_event(Opened(self.elapsed_s(), num_trials, gpus))
        self._searcher.restore_trials([snapshot_trial(trial) for trial in self.history.trials.values()])
        for number in self.history.live["waiting"]:
            self._adopt_checkpoints(number)
        self.history.retention.reconcile()
        self._listener = listener

    def resize(self, num_slots: int, capacity: NodeCapacity) -> None:
        """Nodes came or went: so many trials at a time from now on. room: that there is, also on nodes set aside."""
        self._num_slots, self._capacity = num_slots, capacity

    @property
    def has_slots(self) -> bool:
        """Whether the cluster has a slot, free or taken."""
        return self._num_slots > 0

    # --- what is next -------------------------------------------------------------------------------------------------

    def next_segment(self) -> TrialSegment | None:
        """The stretch to run now, or None when all slots are taken or nothing can be run at the moment."""
        history = self.history
        if self.is_closed or len(history.live["running"]) >= self._num_slots:
            return None
        ready = history.find_trial_to_retry(self.elapsed_s())
        if ready is not None:
            return self._start_segment(SegmentStart(ready))
        start = history.choose_trial_to_resume()
        if start is not None:
            return self._start_segment(start)
        return self._start_segment(SegmentStart(self._suggest_trial())) if history.can_start_trial else None

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, and nothing will."""
        history = self.history
        if self.is_closed:
            return True
        if history.live["running"] or history.live["waiting"] or history.can_start_trial:
            return False
        return history.choose_trial_to_resume() is None

    def elapsed_s(self) -> float:
        """The sweep's own time: of all processes that ran it, together."""
        return round(self._elapsed_before_s + self._clock() - self._opened_at_s, 3)

    def count_gpu_hours(self) -> float:
        """That the sweep has used, of all processes that ran it, together."""
        return self.history.count_gpu_hours(self.elapsed_s())

    def find_usable_nodes(self, capacity: NodeCapacity) -> set[str]:
        """The nodes that trials are sent to."""
        return self.history.health.find_usable_nodes(capacity)

    def find_nodes_to_avoid(self, number: int) -> tuple[str, ...]:
        """Nodes where the trial is not to run, for what has failed there."""
        return self.history.health.find_nodes_to_avoid(number, capacity=self._capacity)

    def can_place_without(self, nodes: Collection[str]) -> bool:
        """Whether a trial fits onto other nodes than these."""
        return bool(self._capacity.find_nodes_without(nodes))

    def refresh_times(self) -> None:
        """Let the table, and its rows of running trials, show the time."""
        now = self.elapsed_s()
        self.history.table.gpu_hours = self.history.count_gpu_hours(now)
        for number in self.history.live["running"]:
            self.history.trials[number].update_seconds(now)

    def _suggest_trial(self) -> int:
        number = self._searcher.first_number + len(self.history.trials)
        params = self._searcher.suggest(number)
        assert params is not None, "a grid has as many points as trials are asked for"
        self._record_event(Asked(self.elapsed_s(), number, params))
        return number

    def _start_segment(self, start: SegmentStart) -> TrialSegment:
        number, source, params = start
        trial, retention = self.history.trials[number], self.history.retention
        self._adopt_checkpoints(number)
        taken = None if source is None else self._copy_source_checkpoint(number, source)
        held = [taken] if taken else list(retention.list_checkpoints(number))
        epoch = held[-1].epoch if held else 0
        segment = trial.num_segments + 1
        self._record_event(Begun(self.elapsed_s(), number, segment, epoch, trial.gpus, source, taken, params))
        self._searcher.on_segment_start(number)
        where = (self._settings.folder, trial.gpus, self._settings.storage_url)
        return TrialSegment(number, segment, dict(trial.row.params), epoch, held, *where)

    def _adopt_checkpoints(self, number: int) -> None:
        """Take in what the last stretch saved and did not come to tell: it is told with the report of the next epoch.

        Of an epoch that was never reported there is none.
        """
        trial, retention = self.history.trials[number], self.history.retention
        known = max((checkpoint.epoch for checkpoint in retention.list_checkpoints(number)), default=0)
        if known < trial.row.epochs:
            reported = range(known + 1, trial.row.epochs + 1)
            for checkpoint in self.history.files.find_unreported(number, trial.num_segments, reported):
                retention.add(number, checkpoint)

    def _copy_source_checkpoint(self, number: int, source: int) -> CheckpointRecord | None:
        """The newest checkpoint of another trial, in a place of its own, since that trial goes on and tidies up."""
        history = self.history
        segment = history.trials[number].num_segments + 1
        name = f"{CHECKPOINTS_FOLDER}/{make_run_name(number)}/stretch_{segment}_of_{source}.ckpt"
        return history.files.copy_newest(history.retention.list_checkpoints(source), name)

    # --- what came back -----------------------------------------------------------------------------------------------

    def process_costs(self, number: int, costs: Mapping[str, float]) -> bool:
        """A trial has been built, and this is what it costs; returns whether it is to be trained."""
        trial = self.history.trials[number]
        if self._is_running(trial) and not trial.row.costs:
            second, limits = self._settings.second_objective, self._searcher.constraints
            decision: Decision = "continue" if is_feasible(costs, limits, second) else "infeasible"
            self._record_event(Measured(self.elapsed_s(), number, dict(costs), decision))
            self._searcher.on_trial_cost(number, costs)
            self._update_searcher(trial)
        return self._is_running(trial)

    def process_report(
        self,
        number: int,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        node: str = "",
        resumed_from: int = 0,
        checkpoint: CheckpointRecord | None = None,
        note: str = "",
    ) -> bool:
        """A trial has been trained to that epoch; returns whether its stretch goes on.

        An epoch that was reported before, as after a retry, changes nothing.
        """
        trial = self.history.trials[number]
        if self._is_running(trial) and epoch > trial.row.epochs:
            decision = self.history.decide_after_report(number, epoch, metrics[self._settings.metric])
            at = self.elapsed_s()
            self._record_event(
                Reported(at, number, epoch, dict(metrics), node, resumed_from, checkpoint, decision, note)
            )
            if epoch in trial.values:
                self._searcher.on_trial_result(number, epoch, trial.values[epoch])
            self._update_searcher(trial)
            self.history.retention.enforce_budget(number)
        return self._is_running(trial)

    def process_failure(self, number: int, failure: SegmentFailure) -> None:
        """A stretch of the trial failed: it is tried again, or given up, or its node is, or the sweep."""
        trial = self.history.trials[number]
        if not self._is_running(trial):
            return
        kind, cause, traceback, node = failure
        halts = self.history.should_halt(number, kind)
        to_be_set_aside = self.history.should_quarantine(number, kind, node, capacity=self._capacity)
        retry, gpus = self.history.decide_retry(number, kind, node=node)
        retry = retry or halts or to_be_set_aside
        event = Failed(self.elapsed_s(), number, kind, cause, traceback, retry=retry, gpus=gpus, node=node)
        self._record_event(event)
        self._update_searcher(trial)
        if to_be_set_aside:
            self._record_event(SetAside(self.elapsed_s(), node))
        if halts:
            self.halted_by = event
            self.close("halted")

    def process_return(self, number: int) -> None:
        """A stretch of the trial came back before the end, without a failure."""
        trial = self.history.trials[number]
        if self._is_running(trial):
            self._end_trial(trial, "" if trial.row.epochs else NO_REPORT_CAUSE)

    def close(self, reason: CloseReason) -> None:
        """Run no more. finished: paused trials are stopped; otherwise they wait for the sweep to go on."""
        if self.is_closed:
            return
        for trial in [trial for trial in self.history.trials.values() if not trial.row.is_over]:
            if reason == "finished":
                self._end_trial(trial)
            else:
                self._searcher.on_trial_wait(trial.row.number)
        self.is_closed = True
        self._record_event(Closed(self.elapsed_s(), reason))

    def _is_running(self, trial: TrialHistory) -> bool:
        return not self.is_closed and trial.row.state == "running"

    def _end_trial(self, trial: TrialHistory, cause: str = "") -> None:
        self._record_event(Ended(self.elapsed_s(), trial.row.number, "failed" if cause else "stopped", cause))
        self._update_searcher(trial)

    def _update_searcher(self, trial: TrialHistory) -> None:
        """Tell the study where the trial stands now."""
        if trial.row.is_over:
            self._searcher.on_trial_end(trial.row.number, cast(EndState, _to_study_state(trial)))
        elif trial.row.state != "running":
            self._searcher.on_trial_wait(trial.row.number)

    def _record_event(self, event: Event) -> None:
        self._log.append(event)
        self.history.apply(event)
        if self._listener is not None:
            about = None if isinstance(event, (Opened, SetAside, Closed)) else self.history.trials[event.trial].row
            self._listener.on_event(event, about)


def is_feasible(costs: Mapping[str, float], limits: Mapping[str, float], second_objective: str | None) -> bool:
    """Whether a trial may cost that, and can be told from others by its second objective."""
    within = all(costs[name] <= limits[name] for name in limits)
    return within and (second_objective is None or math.isfinite(costs[second_objective]))


def _to_study_state(trial: TrialHistory) -> State:
    """The state for the study: what a trial reached with other parameters than were proposed, these did not earn."""
    return "stopped" if trial.is_perturbed and trial.row.state == "complete" else trial.row.state


def snapshot_trial(trial: TrialHistory) -> TrialSnapshot:
    """What the searcher is told of a trial when the sweep is opened."""
    return TrialSnapshot(
        trial.row.number, _to_study_state(trial), dict(trial.proposed), dict(trial.values), dict(trial.row.costs)
    )
