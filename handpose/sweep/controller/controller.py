"""Controls a running sweep: chooses the next trial, and decides what follows from a report or a failure.

This module does not depend on Ray. Every change is an event (events.py). An event is first written, then applied
(history.py), and then passed to the searcher and to the listener. A killed sweep is therefore resumed with the same
rungs, searcher state, retries and budgets.

A trial is trained in segments. A segment starts from scratch or from the trial's newest checkpoint. It lasts until the
trial ends, pauses at a rung or fails, or until the sweep is interrupted.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from handpose.errors import UserError
from handpose.report.trial_table import TrialRow
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import SegmentStart
from handpose.search.searcher import Searcher
from handpose.search.space import Space
from handpose.sweep.controller.history import History, SearchChange, TrialHistory, snapshot_trial
from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.controller.steering import SteeringChecks, describe_steering, make_steering_event
from handpose.sweep.controller.stopping_rule import StoppingRule
from handpose.sweep.record.events import (
    CheckpointRecord,
    CloseReason,
    CostsMeasured,
    Decision,
    EpochReported,
    Event,
    EventLog,
    FailureKind,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialEnded,
    TrialSuggested,
)
from handpose.sweep.record.interventions import Intervention, InterventionAnswer
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, TrialSegment, make_run_name

NO_REPORT_CAUSE = "it ended without a report"
"""Cause recorded for a trial whose function returned without an error before its first report."""


class SegmentFailure(NamedTuple):
    """Why and where a segment of a trial failed.

    Attributes:
        kind: the kind of failure.
        cause: the error message in one line.
        traceback: the full text of the error.
        node: name of the node; empty if it is unknown.
    """

    kind: FailureKind
    cause: str
    traceback: str
    node: str = ""


class EventListener(Protocol):
    """Receives each event after it has been applied."""

    def on_event(self, event: Event, row: TrialRow | None, /) -> None:
        """Process an event. `row` is the trial of the event; None for an event of the whole sweep."""


class SweepController:
    """Makes the decisions of a sweep and records them as events.

    Args:
        settings: settings of the sweep.
        log: the event log. The events in it are checked and replayed.
        history: an empty history.
        searcher: proposes parameters and stores the study.
        make_stopping_rule: makes the rule that estimates whether further trials are worth it, from the settings, and
            from the search space (`space`) if the user has changed it. It is called when `sweep.stop_when` is first
            needed; None: the sweep does not ask.
        checks: checks of the user's commands that need the configuration of the sweep.
        clock: returns the time in seconds.

    Attributes:
        history: the state of all trials.
        halted_by: the failure at which the sweep gave up because no trial has worked; None if it has not.
        is_closed: whether the sweep has been closed. No more segments are started then.
        past_events: the events in the log when it was opened; none for a new sweep.

    Raises:
        UserError: the log contradicts itself, or contains decisions that this version of the project would not make.
    """

    def __init__(
        self,
        settings: SweepSettings,
        *,
        log: EventLog,
        history: History,
        searcher: Searcher,
        make_stopping_rule: Callable[..., StoppingRule] | None = None,
        checks: SteeringChecks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.history = history
        self.halted_by: SegmentFailed | None = None
        self.is_closed = False
        self._settings = settings
        self._log = log
        self._searcher = searcher
        self._make_stopping_rule = make_stopping_rule
        self._checks = checks or SteeringChecks()
        self._later_space: dict[str, Space] = {}
        self._stopping_rule: StoppingRule | None = None
        self._expected_gain: float | None = None
        self._num_slots = 0
        self._capacity = NodeCapacity()
        self._clock = clock
        self._listener: EventListener | None = None
        self.past_events: Sequence[Event] = log.events
        history.replay(log.events)
        for change in history.search_changes:
            self._tell_searcher(change)
        self._elapsed_before_s = history.at
        self._opened_at_s = clock()

    def open(self, *, num_slots: int, gpus: float = 0.0, listener: EventListener | None = None) -> None:
        """Start or resume the sweep.

        Args:
            num_slots: maximum number of trials that run at a time.
            gpus: GPUs that each trial holds.
            listener: receives the events from now on.
        """
        self._num_slots = num_slots
        num_points = self._searcher.num_points
        num_trials = self._settings.num_trials if num_points is None else min(self._settings.num_trials, num_points)
        self._record_event(SweepOpened(self.elapsed_s(), num_trials, gpus))
        self._restore_searcher()
        for number in self._list_trials_with_unreported_files():
            self._adopt_checkpoints(number)
        self.history.retention.reconcile()
        self._listener = listener

    def _restore_searcher(self) -> None:
        self._searcher.restore_trials([snapshot_trial(trial) for trial in self.history.trials.values()])

    def _tell_searcher(self, change: SearchChange) -> None:
        """Let the searcher follow a command of the user."""
        if change.max_epochs is not None:
            self._searcher.on_max_epochs(change.max_epochs)
        if change.space is not None:
            assert self.history.load_space is not None, "the command would have been refused"
            space = self.history.load_space(change.space)
            before = list(self.history.trials.values())[: change.num_trials]
            self._searcher.on_space(space, [snapshot_trial(trial) for trial in before])
            self._later_space = {"space": space}

    def resize(self, num_slots: int, capacity: NodeCapacity) -> None:
        """Update the cluster's size after nodes have joined or left.

        Args:
            num_slots: maximum number of trials that run at a time from now on.
            capacity: capacity of all nodes, including quarantined ones.
        """
        self._num_slots, self._capacity = num_slots, capacity

    @property
    def has_slots(self) -> bool:
        """Whether the cluster has at least one slot, free or in use."""
        return self._num_slots > 0

    def count_trials_without_slot(self) -> int:
        """Count the trials that could run in addition if the cluster had more slots."""
        return max(0, self.count_trials_to_run() - self._num_slots)

    @property
    def can_start_trials(self) -> bool:
        """Whether a slot is free for a trial that could run now."""
        num_running = len(self.history.live["running"])
        return num_running < self._num_slots and num_running < self.count_trials_to_run()  # the count may cost time

    def count_trials_to_run(self) -> int:
        """Count the trials that run or could start now, with any number of slots.

        Paused trials are counted if the scheduler would resume one of them now.
        """
        history = self.history
        if self.is_closed or history.is_paused:
            return len(history.live["running"])
        num_new = max(0, history.num_trials - len(history.trials)) if history.can_start_trial else 0
        num = len(history.live["running"]) + len(history.live["waiting"]) + num_new
        if history.live["paused"] and history.choose_trial_to_resume() is not None:
            num += len(history.live["paused"])
        return min(num, history.settings.max_concurrent or num)

    # --- next segment -------------------------------------------------------------------------------------------------

    def next_segment(self) -> TrialSegment | None:
        """Start the next segment.

        Interrupted trials and retries come first, then paused trials that the scheduler resumes, then new trials.

        Returns:
            The segment to run now; None if all slots are in use or nothing can run at the moment.
        """
        history = self.history
        num_slots = min(self._num_slots, history.settings.max_concurrent or self._num_slots)
        if self.is_closed or history.is_paused or len(history.live["running"]) >= num_slots:
            return None
        ready = history.find_trial_to_retry(self.elapsed_s())
        if ready is not None:
            return self._start_segment(SegmentStart(ready))
        start = history.choose_trial_to_resume()
        if start is not None:
            return self._start_segment(start, history.explain_resume(start))
        return self._start_segment(SegmentStart(self._suggest_trial())) if history.can_start_trial else None

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and nothing is left to run."""
        history = self.history
        if self.is_closed:
            return True
        if history.live["running"] or history.live["waiting"] or history.can_start_trial:
            return False
        return history.choose_trial_to_resume() is None

    def elapsed_s(self) -> float:
        """Return the sweep's own time in seconds, added up over all processes that have run it."""
        return round(self._elapsed_before_s + self._clock() - self._opened_at_s, 3)

    def count_gpu_hours(self) -> float:
        """Return the GPU-hours that the sweep has used, added up over all processes that have run it."""
        return self.history.count_gpu_hours(self.elapsed_s())

    def find_usable_nodes(self, capacity: NodeCapacity) -> set[str]:
        """Return the names of the nodes on which trials may run."""
        return self.history.health.find_usable_nodes(capacity)

    def find_nodes_to_avoid(self, number: int) -> tuple[str, ...]:
        """Return the names of nodes on which the trial should not run because of earlier failures."""
        return self.history.health.find_nodes_to_avoid(number, capacity=self._capacity)

    def can_place_without(self, nodes: Collection[str]) -> bool:
        """Return whether a trial fits on the nodes other than these."""
        return bool(self._capacity.find_nodes_without(nodes))

    def refresh_times(self) -> None:
        """Update the GPU-hours in the table, and the time of running trials in their rows."""
        now = self.elapsed_s()
        self.history.table.gpu_hours = self.history.count_gpu_hours(now)
        for number in self.history.live["running"]:
            self.history.trials[number].update_seconds(now)

    def _suggest_trial(self) -> int:
        number = self._searcher.first_number + len(self.history.trials)
        added = self.history.added[0] if self.history.added else None
        params = None if added is None else self._searcher.suggest_point(number, added.params)
        if params is None:  # nothing was added, or the number has been proposed before a crash
            params, added = self._searcher.suggest(number), None
        assert params is not None, "a grid has one point for each trial"
        origin = self._searcher.explain_suggestion(number)
        added_by = "" if added is None else added.intervention
        self._record_event(TrialSuggested(self.elapsed_s(), number, params, origin, added_by))
        return number

    def _start_segment(self, start: SegmentStart, reason: Reason | None = None) -> TrialSegment:
        number, source, params = start
        trial, retention = self.history.trials[number], self.history.retention
        self._adopt_checkpoints(number)
        taken = None if source is None else self._copy_source_checkpoint(number, source)
        held = [taken] if taken else list(retention.list_checkpoints(number))
        epoch = held[-1].epoch if held else 0
        segment = trial.num_segments + 1
        self._record_event(
            SegmentStarted(self.elapsed_s(), number, segment, epoch, trial.gpus, source, taken, params, reason)
        )
        where = (self._settings.folder, trial.gpus, self._settings.storage_url)
        made = TrialSegment(number, segment, dict(trial.row.params), epoch, held, *where)
        if self.history.raised_epochs:
            history = self.history
            made = made._replace(
                max_epochs=history.settings.max_epochs, rungs=history.rungs, may_pause=history.needs_checkpoints
            )
        return made

    def _list_trials_with_unreported_files(self) -> list[int]:
        """List the trials with checkpoints that no event names.

        Trials that have ended are among them: the user may retry or keep one, which then resumes from such a checkpoint
        if the same process still runs, and must do so if another one has taken over.
        """
        history = self.history
        named = {each.file for number in history.trials for each in history.retention.list_checkpoints(number)}
        names = {name.split("/")[1] for name in history.files.list_names() - named}
        return [number for number in history.trials if make_run_name(number) in names]

    def _adopt_checkpoints(self, number: int) -> None:
        """Adopt checkpoints that the trial has saved but could not report.

        A checkpoint is reported together with the next epoch, so it can be lost if the segment ends before. Only
        checkpoints of epochs that have been reported are adopted. No event records an adoption, but a resumed sweep
        adopts them again, from all segments since the trial began or copied another one.
        """
        trial, retention = self.history.trials[number], self.history.retention
        newest_epoch = max((checkpoint.epoch for checkpoint in retention.list_checkpoints(number)), default=0)
        if newest_epoch < trial.row.epochs:
            reported = range(newest_epoch + 1, trial.row.epochs + 1)
            found: dict[int, CheckpointRecord] = {}
            for segment in range(trial.first_own_segment, trial.num_segments + 1):
                unreported = self.history.files.find_unreported(number, segment, reported)
                found |= {checkpoint.epoch: checkpoint for checkpoint in unreported}
            if found:  # only the newest, so that retention keeps the newest one that an event names
                retention.add(number, found[max(found)])

    def _copy_source_checkpoint(self, number: int, source: int) -> CheckpointRecord | None:
        """Copy the newest checkpoint of another trial, because that trial trains on and removes its old checkpoints."""
        history = self.history
        segment = history.trials[number].num_segments + 1
        name = f"{CHECKPOINTS_FOLDER}/{make_run_name(number)}/segment_{segment}_of_{source}.ckpt"
        return history.files.copy_newest(history.retention.list_checkpoints(source), name)

    # --- results and failures -----------------------------------------------------------------------------------------

    def process_costs(self, number: int, costs: Mapping[str, float]) -> bool:
        """Process the costs of a trial, measured before its training.

        Args:
            number: number of the trial.
            costs: name -> cost.

        Returns:
            Whether the trial should be trained.
        """
        trial = self.history.trials[number]
        if self._is_running(trial) and not trial.row.costs:
            violation = find_violation(costs, self._searcher.constraints, self._settings.second_objective)
            decision: Decision = "continue" if violation is None else "infeasible"
            self._record_event(CostsMeasured(self.elapsed_s(), number, dict(costs), decision, violation))
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
        """Process the report of an epoch. An epoch that was reported before, as after a retry, changes nothing.

        Args:
            number: number of the trial.
            epoch: number of epochs trained.
            metrics: name -> value of the validation metrics.
            node: name of the node on which the trial runs.
            resumed_from: epoch of the checkpoint from which the segment was resumed; 0 if it started from scratch.
            checkpoint: a checkpoint that has been saved since the last report.
            note: a problem that did not end the trial.

        Returns:
            Whether the segment should train on.
        """
        trial = self.history.trials[number]
        if self._is_running(trial) and epoch > trial.row.epochs:
            at = self.elapsed_s()
            decision, reason = self.history.decide_after_report(number, epoch, metrics[self._settings.metric], at=at)
            self._record_event(
                EpochReported(at, number, epoch, dict(metrics), node, resumed_from, checkpoint, decision, note, reason)
            )
            self.history.retention.enforce_budget(number)
        return self._is_running(trial)

    def process_failure(self, number: int, failure: SegmentFailure) -> None:
        """Process the failure of a segment.

        The trial is retried or fails for good. The failure may also quarantine the node or halt the sweep.
        """
        trial = self.history.trials[number]
        if not self._is_running(trial):
            return
        kind, cause, traceback, node = failure
        halts = self.history.should_halt(number, kind)
        quarantines = self.history.should_quarantine(number, kind, node, capacity=self._capacity)
        retry, gpus, reason = self.history.decide_retry(number, kind, node=node, halts=halts, quarantines=quarantines)
        event = SegmentFailed(
            self.elapsed_s(), number, kind, cause, traceback, retry=retry, gpus=gpus, node=node, reason=reason
        )
        self._record_event(event)
        if quarantines:
            self._record_event(NodeQuarantined(self.elapsed_s(), node, self.history.health.list_failed_trials(node)))
        if halts:
            self.halted_by = event
            self.close("halted")

    def process_return(self, number: int) -> None:
        """Process the return of a segment. If the trial is not over, it has returned early and ends here."""
        trial = self.history.trials[number]
        if self._is_running(trial):
            self._end_trial(trial, Reason("returned"), "" if trial.row.epochs else NO_REPORT_CAUSE)

    def close(self, reason: CloseReason) -> None:
        """Close the sweep: start no more segments.

        Args:
            reason: why. With `finished`, trials that are not over are stopped. With any other reason, they wait until
                the sweep is resumed.
        """
        if self.is_closed:
            return
        left = [trial for trial in self.history.trials.values() if not trial.row.is_over]
        if reason == "finished":
            for trial in left:
                self._end_trial(trial, Reason("not_promoted"))
        self.is_closed = True
        at = self.elapsed_s()
        budget = self.history.explain_budget(at, self._expected_gain) if reason == "spent" else None
        self._record_event(SweepClosed(at, reason, budget))
        for trial in left:
            if not trial.row.is_over:
                self._searcher.on_trial_update(snapshot_trial(trial))

    def steer(self, given: Intervention) -> InterventionAnswer:
        """Execute an intervention of the user, unless it is refused. Each one must be given once."""
        try:
            event = make_steering_event(
                given,
                at=self.elapsed_s(),
                history=self.history,
                searcher=self._searcher,
                checks=self._checks,
            )
        except UserError as refusal:
            return InterventionAnswer(False, str(refusal))
        self._record_event(event)
        if event.action in ("epochs", "space"):
            self._tell_searcher(self.history.search_changes[-1])
            self._restore_searcher()
            self._stopping_rule = None
        return InterventionAnswer(True, describe_steering(event, self.history))

    def is_current(self, segment: TrialSegment) -> bool:
        """Return whether a segment is the newest one of its trial: a trial that was stopped may have been retried."""
        return self.history.trials[segment.trial].num_segments == segment.segment_number

    def is_abandoned(self, segment: TrialSegment) -> bool:
        """Return whether a worker trains a segment in vain, because the trial does not run any more."""
        is_running = self.history.trials[segment.trial].row.state == "running"
        return not (self.is_closed or (self.is_current(segment) and is_running))

    def is_budget_spent(self) -> bool:
        """Return whether a budget is used up, or further trials are expected to gain less than `sweep.stop_when`."""
        if self.is_closed or self.history.explain_budget(self.elapsed_s(), self._expected_gain) is not None:
            return True
        needs_rule = self.history.settings.stop_when is not None
        if needs_rule and self._stopping_rule is None and self._make_stopping_rule is not None:
            self._stopping_rule = self._make_stopping_rule(self.history.settings, **self._later_space)
        rule = self._stopping_rule if needs_rule else None
        if rule is not None and rule.is_due(self.history.num_reports):
            snapshots = [snapshot_trial(trial) for trial in self.history.trials.values()]
            self._expected_gain = rule.estimate_gain(snapshots)
        return self.history.explain_budget(self.elapsed_s(), self._expected_gain) is not None

    def _is_running(self, trial: TrialHistory) -> bool:
        return not self.is_closed and trial.row.state == "running"

    def _end_trial(self, trial: TrialHistory, reason: Reason, cause: str = "") -> None:
        state: Literal["stopped", "failed"] = "failed" if cause else "stopped"
        self._record_event(TrialEnded(self.elapsed_s(), trial.row.number, state, cause, reason))

    def _record_event(self, event: Event) -> None:
        self._log.append(event)
        self.history.apply(event)
        trial = (
            None
            if isinstance(event, (SweepOpened, NodeQuarantined, SweepClosed, SweepSteered))
            else self.history.trials[event.trial]
        )
        if trial is not None and not isinstance(event, TrialSuggested):
            self._searcher.on_trial_update(snapshot_trial(trial))
        if self._listener is not None:
            self._listener.on_event(event, None if trial is None else trial.row)


def find_violation(
    costs: Mapping[str, float], limits: Mapping[str, float], second_objective: str | None
) -> Reason | None:
    """Return the first constraint that a trial's costs violate; None if the trial is feasible.

    A trial whose second objective is not finite is infeasible, too. In the reason, the value of a cost that is not
    finite is None.

    Args:
        costs: name -> cost of the trial.
        limits: name -> largest allowed cost.
        second_objective: name of the cost that is also minimised; None if there is none.
    """
    violated = {name: limit for name, limit in limits.items() if not costs[name] <= limit}
    if second_objective is not None and not math.isfinite(costs[second_objective]):
        violated.setdefault(second_objective, math.nan)
    for name, limit in violated.items():
        value, cutoff = (number if math.isfinite(number) else None for number in (costs[name], limit))
        return Reason("cost_limit", value=value, cutoff=cutoff, subject=name)
    return None
