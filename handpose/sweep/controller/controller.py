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
from handpose.schedulers.scheduler import Continuation
from handpose.search.searcher import EndState, Known, Searcher
from handpose.sweep.controller.history import History, TrialHistory
from handpose.sweep.controller.slots import Room
from handpose.sweep.record.events import (
    Asked,
    Begun,
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
    Saved,
    SetAside,
)
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.record.trial_segment import FOLDER, Stretch, run_name

NOTHING_REPORTED = "it came back without a report"
"""Why a trial failed that came back before its first report, without an error."""


class Failure(NamedTuple):
    """Why a stretch failed, and on which node. cause: in a line. traceback: all that is known."""

    kind: FailureKind
    cause: str
    traceback: str
    node: str = ""


class Listener(Protocol):
    """Is told of each event after it has been applied; row: of the trial that it is about."""

    def happened(self, event: Event, row: TrialRow | None, /) -> None: ...


class SweepState:
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
        self._room = Room()
        self._clock = clock
        self._listener: Listener | None = None
        self.last_event = log.events[-1] if log.events else None
        history.replay(log.events)
        self._base = history.at
        self._opened = clock()

    def open(self, *, num_slots: int, gpus: float = 0.0, listener: Listener | None = None) -> None:
        """Go on from here.

        num_slots: trials at a time. gpus: the share of each. listener: is told what happens from now on.
        """
        self._num_slots = num_slots
        num_points = self._searcher.num_points
        num_trials = self._settings.num_trials if num_points is None else min(self._settings.num_trials, num_points)
        self._happened(Opened(self.elapsed_s(), num_trials, gpus))
        self._searcher.align([known_of(trial) for trial in self.history.trials.values()])
        for number in self.history.live["waiting"]:
            self._adopt(number)
        self.history.shelf.settle()
        self._listener = listener

    def resize(self, num_slots: int, room: Room) -> None:
        """Nodes came or went: so many trials at a time from now on. room: that there is, also on nodes set aside."""
        self._num_slots, self._room = num_slots, room

    @property
    def has_slots(self) -> bool:
        """Whether the cluster has a slot, free or taken."""
        return self._num_slots > 0

    # --- what is next -------------------------------------------------------------------------------------------------

    def next(self) -> Stretch | None:
        """The stretch to run now, or None when all slots are taken or nothing can be run at the moment."""
        history = self.history
        if self.is_closed or len(history.live["running"]) >= self._num_slots:
            return None
        ready = history.ready(self.elapsed_s())
        if ready is not None:
            return self._begin(Continuation(ready))
        continuation = history.promoted()
        if continuation is not None:
            return self._begin(continuation)
        return self._begin(Continuation(self._ask())) if history.can_begin else None

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, and nothing will."""
        history = self.history
        if self.is_closed:
            return True
        if history.live["running"] or history.live["waiting"] or history.can_begin:
            return False
        return history.promoted() is None

    def elapsed_s(self) -> float:
        """The sweep's own time: of all processes that ran it, together."""
        return round(self._base + self._clock() - self._opened, 3)

    def gpu_hours(self) -> float:
        """That the sweep has used, of all processes that ran it, together."""
        return self.history.gpu_hours(self.elapsed_s())

    def usable(self, room: Room) -> set[str]:
        """The nodes that trials are sent to."""
        return self.history.health.usable(room)

    def avoided(self, number: int) -> tuple[str, ...]:
        """Nodes where the trial is not to run, for what has failed there."""
        return self.history.health.avoided(number, room=self._room)

    def fits_without(self, nodes: Collection[str]) -> bool:
        """Whether a trial fits onto other nodes than these."""
        return bool(self._room.without(nodes))

    def tick(self) -> None:
        """Let the table, and its rows of running trials, show the time."""
        now = self.elapsed_s()
        self.history.table.gpu_hours = self.history.gpu_hours(now)
        for number in self.history.live["running"]:
            self.history.trials[number].spend(now)

    def _ask(self) -> int:
        number = self._searcher.first_number + len(self.history.trials)
        params = self._searcher.ask(number)
        assert params is not None, "a grid has as many points as trials are asked for"
        self._happened(Asked(self.elapsed_s(), number, params))
        return number

    def _begin(self, continuation: Continuation) -> Stretch:
        number, source, params = continuation
        trial, shelf = self.history.trials[number], self.history.shelf
        self._adopt(number)
        taken = None if source is None else self._taken_over(number, source)
        held = [taken] if taken else list(shelf.of(number))
        epoch = held[-1].epoch if held else 0
        stretch = trial.num_stretches + 1
        self._happened(Begun(self.elapsed_s(), number, stretch, epoch, trial.gpus, source, taken, params))
        self._searcher.began(number)
        where = (self._settings.folder, trial.gpus, self._settings.stored_at)
        return Stretch(number, stretch, dict(trial.row.params), epoch, held, *where)

    def _adopt(self, number: int) -> None:
        """Take in what the last stretch saved and did not come to tell: it is told with the report of the next epoch.

        Of an epoch that was never reported there is none.
        """
        trial, shelf = self.history.trials[number], self.history.shelf
        known = max((checkpoint.epoch for checkpoint in shelf.of(number)), default=0)
        if known < trial.row.epochs:
            reported = range(known + 1, trial.row.epochs + 1)
            for checkpoint in self.history.files.left_by(number, trial.num_stretches, reported):
                shelf.put(number, checkpoint)

    def _taken_over(self, number: int, source: int) -> Saved | None:
        """The newest checkpoint of another trial, in a place of its own, since that trial goes on and tidies up."""
        history = self.history
        name = f"{FOLDER}/{run_name(number)}/stretch_{history.trials[number].num_stretches + 1}_of_{source}.ckpt"
        return history.files.taken_over(history.shelf.of(source), name)

    # --- what came back -----------------------------------------------------------------------------------------------

    def measured(self, number: int, costs: Mapping[str, float]) -> bool:
        """A trial has been built, and this is what it costs; returns whether it is to be trained."""
        trial = self.history.trials[number]
        if self._runs(trial) and not trial.row.costs:
            second, limits = self._settings.second_objective, self._searcher.constraints
            decision: Decision = "continue" if is_feasible(costs, limits, second) else "infeasible"
            self._happened(Measured(self.elapsed_s(), number, dict(costs), decision))
            self._searcher.measured(number, costs)
            self._settle(trial)
        return self._runs(trial)

    def reported(
        self,
        number: int,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        node: str = "",
        resumed_from: int = 0,
        checkpoint: Saved | None = None,
        note: str = "",
    ) -> bool:
        """A trial has been trained to that epoch; returns whether its stretch goes on.

        An epoch that was reported before, as after a retry, changes nothing.
        """
        trial = self.history.trials[number]
        if self._runs(trial) and epoch > trial.row.epochs:
            decision = self.history.decide(number, epoch, metrics[self._settings.metric])
            at = self.elapsed_s()
            self._happened(Reported(at, number, epoch, dict(metrics), node, resumed_from, checkpoint, decision, note))
            if epoch in trial.values:
                self._searcher.reported(number, epoch, trial.values[epoch])
            self._settle(trial)
            self.history.shelf.tidy(number)
        return self._runs(trial)

    def failed(self, number: int, failure: Failure) -> None:
        """A stretch of the trial failed: it is tried again, or given up, or its node is, or the sweep."""
        trial = self.history.trials[number]
        if not self._runs(trial):
            return
        kind, cause, traceback, node = failure
        halts = self.history.is_hopeless(number, kind)
        to_be_set_aside = self.history.is_to_be_set_aside(number, kind, node, room=self._room)
        retry, gpus = self.history.chance(number, kind, node=node)
        retry = retry or halts or to_be_set_aside
        event = Failed(self.elapsed_s(), number, kind, cause, traceback, retry=retry, gpus=gpus, node=node)
        self._happened(event)
        self._settle(trial)
        if to_be_set_aside:
            self._happened(SetAside(self.elapsed_s(), node))
        if halts:
            self.halted_by = event
            self.close("halted")

    def returned(self, number: int) -> None:
        """A stretch of the trial came back before the end, without a failure."""
        trial = self.history.trials[number]
        if self._runs(trial):
            self._end(trial, "" if trial.row.epochs else NOTHING_REPORTED)

    def close(self, reason: CloseReason) -> None:
        """Run no more. finished: paused trials are stopped; otherwise they wait for the sweep to go on."""
        if self.is_closed:
            return
        for trial in [trial for trial in self.history.trials.values() if not trial.row.is_over]:
            if reason == "finished":
                self._end(trial)
            else:
                self._searcher.waits(trial.row.number)
        self.is_closed = True
        self._happened(Closed(self.elapsed_s(), reason))

    def _runs(self, trial: TrialHistory) -> bool:
        return not self.is_closed and trial.row.state == "running"

    def _end(self, trial: TrialHistory, cause: str = "") -> None:
        self._happened(Ended(self.elapsed_s(), trial.row.number, "failed" if cause else "stopped", cause))
        self._settle(trial)

    def _settle(self, trial: TrialHistory) -> None:
        """Tell the study where the trial stands now."""
        if trial.row.is_over:
            self._searcher.ended(trial.row.number, cast(EndState, _earned(trial)))
        elif trial.row.state != "running":
            self._searcher.waits(trial.row.number)

    def _happened(self, event: Event) -> None:
        self._log.append(event)
        self.history.apply(event)
        if self._listener is not None:
            about = None if isinstance(event, (Opened, SetAside, Closed)) else self.history.trials[event.trial].row
            self._listener.happened(event, about)


def is_feasible(costs: Mapping[str, float], limits: Mapping[str, float], second_objective: str | None) -> bool:
    """Whether a trial may cost that, and can be told from others by its second objective."""
    within = all(costs[name] <= limits[name] for name in limits)
    return within and (second_objective is None or math.isfinite(costs[second_objective]))


def _earned(trial: TrialHistory) -> State:
    """The state for the study: what a trial reached with other parameters than were proposed, these did not earn."""
    return "stopped" if trial.is_perturbed and trial.row.state == "complete" else trial.row.state


def known_of(trial: TrialHistory) -> Known:
    """What the searcher is told of a trial when the sweep is opened."""
    return Known(trial.row.number, _earned(trial), dict(trial.proposed), dict(trial.values), dict(trial.row.costs))
