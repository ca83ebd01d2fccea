"""The state of a sweep's trials, computed from its events: progress, waiting trials, retries and budgets.

Applying the same events in the same order gives the same state and the same decisions. This module starts nothing.
"""

import inspect
import math
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from handpose.errors import UserError
from handpose.plain_values import is_same
from handpose.report.reasons import format_close_reason, format_reason
from handpose.report.trial_table import TrialRow, TrialState, TrialTable, make_second_objectives
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Fifo, Scheduler, SchedulerDecision, SegmentStart
from handpose.search.epoch_timer import EpochTimer
from handpose.search.searcher import TrialSnapshot
from handpose.search.space import Params, Space
from handpose.sweep.controller.node_quarantine import NodeHealth
from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.record.events import (
    CostsMeasured,
    Decision,
    EpochReported,
    Event,
    FailureKind,
    NodeQuarantined,
    SegmentFailed,
    SegmentInterruptions,
    SegmentStarted,
    SpaceRecord,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialAction,
    TrialEnded,
    TrialSteered,
    TrialSuggested,
    get_kind,
)
from handpose.sweep.record.interventions import LIMITS
from handpose.sweep.record.settings import STOP_WHEN_KEY, SpentBudget, SweepSettings
from handpose.sweep.storage.checkpoint_files import CheckpointFiles, FolderFiles
from handpose.sweep.storage.retention import CheckpointNeed, CheckpointRetention

_NUM_FINALISTS = 3
_MAX_RAISE = 100
"""Largest factor by which the user raises the number of epochs at once: a typing error could not be taken back."""
_BLAMELESS_FAILURES: tuple[FailureKind, ...] = ("preempted", "lost", "unfit_worker")
_STATE_AFTER_DECISION: Mapping[Decision, TrialState] = {
    "continue": "running",
    "pause": "paused",
    "stop": "stopped",
    "complete": "complete",
    "diverged": "diverged",
    "infeasible": "infeasible",
}

_STATES_BEFORE_EVENT: Mapping[type, tuple[TrialState, ...]] = {
    SegmentStarted: ("waiting", "paused"),
    TrialEnded: ("running", "waiting", "paused"),
    TrialSteered: ("running", "waiting", "paused", "stopped", "failed"),
}
"""States in which a trial may be before an event. Before all other events of a trial it must be running."""


_STEERED_REASONS: Mapping[TrialAction, Reason] = {
    "stop": Reason("stopped_by_user"),
    "retry": Reason("retried_by_user"),
    "keep": Reason("kept_by_user"),
}


class AddedPoint(NamedTuple):
    """A configuration that the user has added and that has not been started yet.

    Attributes:
        intervention: id of the intervention that added it.
        params: configuration key -> value, as the user gave them.
    """

    intervention: str
    params: Params


class SearchChange(NamedTuple):
    """A command of the user that the searcher must follow.

    Attributes:
        num_trials: number of trials that had been proposed before.
        max_epochs: the number to which `sweep.max_epochs` was raised; None if the search space was changed.
        space: the new search space; None if `sweep.max_epochs` was raised.
    """

    num_trials: int
    max_epochs: int | None = None
    space: SpaceRecord | None = None


class ContinuedTrials(NamedTuple):
    """Complete trials that go on because the user has raised `sweep.max_epochs`.

    Attributes:
        trials: their numbers, in the order in which they were completed.
        decisions: what the scheduler decides about each of them.
    """

    trials: list[int]
    decisions: list[SchedulerDecision]


class ExplainedDecision(NamedTuple):
    """A decision after a report, and why it was made; None if the trial continues and was not compared."""

    decision: Decision
    reason: Reason | None


class _RepeatedDecision(NamedTuple):
    """A decision of the scheduler that was made again, with its reason, as it is made now and as the event has it."""

    ours: Any
    theirs: Any
    our_reason: Reason | None
    their_reason: Reason | None
    about: str


class RetryDecision(NamedTuple):
    """A decision after a failure.

    Attributes:
        retry: whether the trial is retried.
        gpus: GPUs that it holds then; None: as many as other trials.
        reason: why.
    """

    retry: bool
    gpus: float | None
    reason: Reason


def find_reason_difference(ours: Reason | None, theirs: Reason | None, about: str) -> str:
    """Explain how the reason in an event differs from the one found now; empty if it does not.

    Args:
        ours: the reason found now.
        theirs: the reason in the event.
        about: what the decision is about.
    """
    if ours == theirs or is_same(_to_values(ours), _to_values(theirs)):  # the second is right for NaN
        return ""
    return f"records the reason ({_format_fields(theirs)}) for {about}, but it is ({_format_fields(ours)})"


def _to_values(reason: Reason | None) -> dict[str, Any]:
    return {} if reason is None else {name: value for name, value in asdict(reason).items() if value is not None}


def _format_fields(reason: Reason | None) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in _to_values(reason).items()) or "none"


@dataclass
class TrialHistory:
    """The state of a trial in addition to its row in the table.

    Attributes:
        row: its row in the table.
        proposed: its parameters as the searcher proposed them.
        values: epoch -> value of the sweep's metric, for epochs trained with the proposed parameters.
        best_value: best value of the metric so far; NaN before the first report.
        num_segments: number of segments started so far.
        first_own_segment: the first segment whose weights the trial goes on with: 1, or in a population the last one
            that began with the weights of another trial.
        num_failures: number of failures that count towards `max_retries`.
        retry_at: when it may be retried, in seconds of the sweep's own time.
        gpus: GPUs that it holds; None: as many as other trials.
        segment_gpus: GPUs that its running or last segment holds.
        is_perturbed: whether population based training has changed its parameters.
        is_added: whether the user has added it; the searcher did not propose it.
        is_kept: whether the user keeps it: the scheduler neither stops nor pauses it.
        is_stopped_by_user: whether the user has stopped it.
        reopened_from: its state and its epoch when the user first resumed it after its end; None if that has not
            happened. The searcher has learnt from it up to there.
        timer: how long its epochs take.
    """

    row: TrialRow
    proposed: Params
    values: dict[int, float] = field(default_factory=dict)
    best_value: float = math.nan
    num_segments: int = 0
    first_own_segment: int = 1
    num_failures: int = 0
    retry_at: float = 0.0
    gpus: float | None = None
    segment_gpus: float = 0.0
    is_perturbed: bool = False
    is_added: bool = False
    is_kept: bool = False
    is_stopped_by_user: bool = False
    reopened_from: tuple[TrialState, int] | None = None
    timer: EpochTimer = field(default_factory=EpochTimer)
    _segment_started_at: float = 0.0
    _seconds_before_segment: float = 0.0

    def start_segment(self, at: float) -> None:
        """Start to count the time of a segment."""
        self._segment_started_at, self._seconds_before_segment = at, self.row.seconds
        self.timer.start_segment(at)

    def update_seconds(self, now: float) -> None:
        """Update the trial's total time with the time of the running segment."""
        self.row.seconds = self._seconds_before_segment + now - self._segment_started_at


def _to_study_state(trial: TrialHistory) -> TrialState:
    """Return the trial's state for the searcher.

    A complete trial whose parameters were perturbed counts as stopped, since the proposed parameters did not produce
    its result.
    """
    return "stopped" if trial.is_perturbed and trial.row.state == "complete" else trial.row.state


def snapshot_trial(trial: TrialHistory) -> TrialSnapshot:
    """Make the snapshot of a trial that the searcher receives."""
    return TrialSnapshot(
        trial.row.number,
        _to_study_state(trial),
        dict(trial.proposed),
        dict(trial.values),
        dict(trial.row.costs),
        trial.timer.typical_epoch_s,
        trial.is_added,
    )


def make_empty_table(settings: SweepSettings) -> TrialTable:
    """Make the table of a sweep before its first trial."""
    objectives = make_second_objectives(settings.second_objective)
    table = TrialTable(*settings.target, settings.num_trials, settings.trial_epochs, objectives=objectives)
    table.gpu_hours_budget = math.inf if settings.gpu_hours is None else settings.gpu_hours
    return table


def _asks_for_space(scheduler: Scheduler) -> bool:
    """Return whether a scheduler was given the search space, as `bind_scheduler` gives it to those that ask for it."""
    return "space" in inspect.signature(type(scheduler)).parameters


def rebuild_history(settings: SweepSettings, events: Iterable[Event]) -> "History":
    """Return the state of a sweep after its events. Past decisions are taken as recorded, and not made again."""
    history = History(settings, scheduler=Fifo(), table=make_empty_table(settings))
    for event in events:
        history.apply(event)
    return history


class History:
    """The state of all trials of a sweep. `apply` updates it with each event.

    Args:
        settings: settings of the sweep.
        scheduler: a new scheduler. It receives everything that happens.
        table: an empty table, to which the trials are added.
        files: where the checkpoints are; None: in the sweep's folder.
        command: returns the command line that trains given parameters again, and takes as a second argument the epochs
            of a complete trial if they have been raised.
        load_space: makes a search space to which the user has changed. None for a sweep that is only read, or that
            searches none: the space may be code, which readers never run.

    Attributes:
        trials: number -> state of each trial.
        num_trials: number of trials to run.
        num_reports: number of reports of all trials.
        at: time of the last event, in seconds of the sweep's own time.
        live: state -> numbers of the trials that are running, waiting or paused.
        retention: the checkpoints that are kept.
        gpus: GPUs that each trial holds, unless it has its own value.
        health: health of the nodes since the sweep was last opened.
        settings: the settings of the sweep, with the limits that the user has changed while it runs.
        search_changes: the commands of the user that the searcher must follow, in order.
        load_space: the function that makes a search space to which the user has changed; None if there is none.
        added: the configurations that the user has added and that have not been started yet, in order.
        interventions: ids of the interventions of the user that have been executed.
    """

    def __init__(
        self,
        settings: SweepSettings,
        *,
        scheduler: Scheduler,
        table: TrialTable,
        files: CheckpointFiles | None = None,
        command: Callable[..., str] = lambda params, max_epochs=0: "",
        load_space: Callable[[SpaceRecord], Space] | None = None,
    ) -> None:
        self.trials: dict[int, TrialHistory] = {}
        self.table = table
        self.num_trials = settings.num_trials
        self.num_reports = 0
        self.at = 0.0
        self.live: dict[TrialState, set[int]] = {"running": set(), "waiting": set(), "paused": set()}
        self.files = files or FolderFiles(settings.path)
        self.retention = CheckpointRetention(
            self.files,
            settings.checkpoint_budget_gb * 1e9,
            get_need=self._get_checkpoint_need,
            get_loss=lambda trial: self._target.to_loss(self.table.get_value(self.table.rows[trial])),
            is_running=lambda trial: self.table.rows[trial].state in ("running", "waiting"),
        )
        self.settings = settings
        self.search_changes: list[SearchChange] = []
        self.load_space = load_space
        self.added: list[AddedPoint] = []
        self.interventions: set[str] = set()
        self._initial_settings = settings
        self._scheduler = scheduler
        self.gpus = 0.0
        self.health = NodeHealth(settings.quarantine_after_failures)
        self._command = command
        self._finalists: list[tuple[float, int]] = []
        self._complete: list[int] = []
        self._interruptions = SegmentInterruptions()
        self._failed_before_any_report: set[int] = set()
        self._gpu_s = 0.0
        self._running_gpus = 0.0
        self._target = settings.target

    # --- decisions ----------------------------------------------------------------------------------------------------

    def decide_after_report(
        self, number: int, epoch: int, value: float, *, at: float, past: Decision | None = None
    ) -> ExplainedDecision:
        """Decide what happens to a trial after a report.

        Call this exactly once for each report, because the scheduler records the result.

        Args:
            number: number of the trial.
            epoch: number of epochs trained.
            value: value of the sweep's metric.
            at: time of the report, in seconds of the sweep's own time.
            past: the decision of a past report. A scheduler that does not repeat its decisions takes it as it is.
        """
        self._scheduler.now, self._scheduler.can_start_trial = at, self.can_start_trial
        if not math.isfinite(value):
            return ExplainedDecision("diverged", Reason("not_finite"))
        limit = self._find_divergence_limit(number)
        if limit is not None and (value > limit if self._target.mode == "min" else value < limit):
            return ExplainedDecision("diverged", Reason("divergence_factor", value=value, cutoff=limit))
        self._scheduler.reason = None
        decision = self._decide_by_scheduler(number, epoch, self._target.to_loss(value), past)
        if epoch >= self.settings.trial_epochs:
            rule = "max_epochs" if self.settings.folds == 1 else "all_folds"
            return ExplainedDecision("complete", Reason(rule, cutoff=self.settings.trial_epochs))
        return ExplainedDecision(decision, self._to_metric_units(self._scheduler.reason))

    def _decide_by_scheduler(self, number: int, epoch: int, loss: float, past: Decision | None) -> SchedulerDecision:
        is_kept = self.trials[number].is_kept
        if not self._repeats_decisions and (is_kept or past is not None):
            taken: SchedulerDecision = past if past in ("pause", "stop") and not is_kept else "continue"
            self._scheduler.on_past_result(number, epoch, loss, taken)
            return taken
        decision = self._scheduler.on_trial_result(number, epoch, loss)
        if not is_kept or decision == "continue":
            return decision
        self._scheduler.reason = Reason("kept_by_user", subject=decision)
        if decision == "pause":  # the trial goes on as one that is resumed at once
            self._scheduler.on_trial_resume(SegmentStart(number))
        return "continue"

    @property
    def _repeats_decisions(self) -> bool:
        return getattr(self._scheduler, "repeats_decisions", True)  # an extension need not derive from Fifo

    def _to_metric_units(self, reason: Reason | None) -> Reason | None:
        """Convert a scheduler's reason from losses to values of the metric, and NumPy's numbers to Python's."""
        if reason is None:
            return None
        value, cutoff = (
            None if loss is None else self._target.sign * float(loss) for loss in (reason.value, reason.cutoff)
        )
        rank, num_compared, num_passing = (
            None if count is None else int(count) for count in (reason.rank, reason.num_compared, reason.num_passing)
        )
        return Reason(reason.rule, value, cutoff, rank, num_compared, num_passing, reason.subject)

    def decide_more_epochs(self, max_epochs: int, with_checkpoint: Collection[int]) -> ContinuedTrials:
        """Decide about all complete trials when the user raises `sweep.max_epochs`.

        Call this exactly once for each time, because the scheduler changes.

        Args:
            max_epochs: the new number of epochs of a complete trial.
            with_checkpoint: complete trials that have a checkpoint. The others cannot go on.
        """
        scheduler, continued = self._scheduler, ContinuedTrials([], [])
        scheduler.on_max_epochs(max_epochs)
        for number in self._complete:
            row = self.trials[number].row
            loss = self._target.to_loss(row.metrics[self.settings.metric])
            decision = scheduler.on_complete_trial(number, row.epochs, loss)
            if number not in with_checkpoint:
                scheduler.on_trial_end(number)
                continue
            if self.trials[number].is_kept and decision != "continue":
                if decision == "pause":
                    scheduler.on_trial_resume(SegmentStart(number))
                decision = "continue"
            continued.trials.append(number)
            continued.decisions.append(decision)
        return continued

    def list_complete_trials(self) -> list[int]:
        """List the numbers of the complete trials, in the order in which they were completed."""
        return list(self._complete)

    @property
    def raised_epochs(self) -> list[int]:
        """The values to which the user has raised `sweep.max_epochs`, in order."""
        return [change.max_epochs for change in self.search_changes if change.max_epochs is not None]

    @property
    def spaces(self) -> list[SpaceRecord]:
        """The search spaces to which the user has changed, in order."""
        return [change.space for change in self.search_changes if change.space is not None]

    def count_spaces(self, number: int) -> int:
        """Return how many times the user had changed the search space when a trial was proposed."""
        place = number - next(iter(self.trials))
        return sum(change.space is not None and change.num_trials <= place for change in self.search_changes)

    @property
    def is_paused(self) -> bool:
        """Whether the user has paused the sweep."""
        return self._interruptions.is_sweep_paused

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs at which the scheduler compares trials."""
        return self._scheduler.rungs

    @property
    def needs_checkpoints(self) -> bool:
        """Whether trials may pause at the rungs."""
        return self._scheduler.needs_checkpoints

    def decide_retry(
        self, number: int, kind: FailureKind, *, node: str = "", halts: bool = False, quarantines: bool = False
    ) -> RetryDecision:
        """Decide whether a failed trial is retried.

        - Out of GPU memory on a fraction of a GPU: retried with twice the fraction, at most a whole GPU.
        - Preempted, lost, or sent to a worker process that was unfit for another trial: always retried.
        - Out of GPU memory without a larger fraction, or a mistake: the same failure would come again, so the trial is
          not retried. An exception is a mistake before the first report of any trial: it may be a bug that halts the
          sweep, and then the trial must be retried after the bug has been fixed.
        - All other failures: retried at most `max_retries` times.

        Failures for which the node may be to blame do not count for now; see `NodeHealth`.

        Args:
            number: number of the trial.
            kind: the kind of failure.
            node: name of the node; empty if it is unknown.
            halts: the failure halts the sweep. The trial is retried when the sweep is resumed.
            quarantines: the failure quarantines the node. The trial is retried on another one.
        """
        trial = self.trials[number]
        num_gpus = self.gpus if trial.gpus is None else trial.gpus
        if kind == "gpu_memory" and 0 < num_gpus < 1:
            more_gpus = min(1.0, 2 * num_gpus)
            return RetryDecision(True, more_gpus, Reason("gpu_share", value=more_gpus, cutoff=num_gpus))
        if kind in _BLAMELESS_FAILURES:
            return RetryDecision(True, trial.gpus, Reason("blameless"))
        if halts:
            return RetryDecision(True, trial.gpus, Reason("halt", value=self.settings.stop_after_failures))
        if quarantines:
            return RetryDecision(True, trial.gpus, Reason("quarantine"))
        comes_again = kind == "gpu_memory" or (kind == "user_error" and self.num_reports)
        max_retries = 0 if comes_again else self.settings.max_retries
        num_counted = trial.num_failures - self.health.count_excused_failures(number)
        if num_counted <= max_retries and self.health.is_excusable(node, number):
            return RetryDecision(True, trial.gpus, Reason("node"))
        if comes_again and num_counted >= max_retries:
            return RetryDecision(False, trial.gpus, Reason("same_failure"))
        reason = Reason("retries", value=num_counted + 1, cutoff=max_retries)
        return RetryDecision(num_counted < max_retries, trial.gpus, reason)

    def should_quarantine(self, number: int, kind: FailureKind, node: str, *, capacity: NodeCapacity) -> bool:
        """Return whether enough different trials have failed on the node, with this failure, to quarantine it."""
        return kind not in _BLAMELESS_FAILURES and self.health.should_quarantine(node, number, capacity=capacity)

    def should_halt(self, number: int, kind: FailureKind) -> bool:
        """Return whether to halt the sweep with this failure.

        This is so if no trial has ever reported and `stop_after_failures` different trials have failed, which points to
        a bug.
        """
        if self.num_reports or kind in _BLAMELESS_FAILURES:
            return False
        return len(self._failed_before_any_report | {number}) >= self.settings.stop_after_failures

    def choose_trial_to_resume(self) -> SegmentStart | None:
        """Ask the scheduler which paused trial to resume next; None if there is none."""
        return self._scheduler.choose_trial_to_resume(can_start_trial=self.can_start_trial)

    def explain_resume(self, start: SegmentStart) -> Reason | None:
        """Ask the scheduler why it resumes the trial that `choose_trial_to_resume` has just returned."""
        explain = getattr(self._scheduler, "explain_resume", None)  # an extension need not derive from Fifo
        return None if explain is None else self._to_metric_units(explain(start))

    @property
    def perturbs_params(self) -> bool:
        """Whether the scheduler changes the parameters of trials."""
        return self._scheduler.perturbs_params

    def find_refusal(self, event: TrialSteered | SweepSteered) -> str:
        """Explain why the user cannot intervene so in the present state of the sweep; empty if it is possible."""
        if isinstance(event, SweepSteered):
            return self._find_sweep_refusal(event)
        if event.trial not in self.trials:
            numbers = sorted(self.trials)
            has = f"its trials are {numbers[0]} to {numbers[-1]}" if numbers else "it has not started a trial yet"
            return f"the sweep has no trial {event.trial}; {has}"
        trial = self.trials[event.trial]
        state, name = trial.row.state, f"trial {event.trial}"
        if event.action == "stop":
            return f"{name} is {state}; only a trial that has not ended can be stopped" if trial.row.is_over else ""
        if event.action == "retry":
            if state == "failed" or trial.is_stopped_by_user:
                return ""
            hint = "; keep trains it to the end" if state == "stopped" else ""
            return f"{name} is {state}; only a trial that has failed, or that you have stopped, can be retried{hint}"
        if trial.is_kept and not trial.row.is_over:
            return f"{name} is kept already"
        if trial.row.is_over and state != "stopped":
            hint = "; use retry" if state == "failed" else ""
            return f"{name} is {state}; only a trial that has not ended, or was stopped, can be kept{hint}"
        return ""

    def _find_sweep_refusal(self, event: SweepSteered) -> str:
        if event.action in ("pause", "resume") and self.is_paused == (event.action == "pause"):
            return "the sweep is paused already" if self.is_paused else "the sweep is not paused"
        if event.action == "epochs":
            return self._find_epochs_refusal(event.limits.get("max_epochs"))
        if event.action == "space":
            return self._find_space_refusal(event)
        num_trials, num_begun = event.limits.get("num_trials"), len(self.trials) + len(self.added)
        if event.action == "trials" and num_trials is not None and num_trials < num_begun:
            return f"the sweep has {num_begun} trials already; give at least this number"
        return ""

    def _find_epochs_refusal(self, max_epochs: float | None) -> str:
        current = self.settings.max_epochs
        if self.settings.folds > 1:
            return (
                f"a trial of this sweep has {self.settings.folds} folds of {current} epochs (sweep.folds), each with "
                "its own learning-rate schedule, so that they cannot be trained longer; start a new sweep"
            )
        if max_epochs is None or max_epochs <= current:
            return f"a complete trial has {current} epochs; give more, since what is trained cannot be taken back"
        if max_epochs > _MAX_RAISE * current:
            return f"a complete trial has {current} epochs; at most {_MAX_RAISE} times as many can be given at once"
        if not hasattr(self._scheduler, "on_max_epochs"):  # an extension need not derive from Fifo
            return f"the scheduler {type(self._scheduler).__name__} cannot go on with more epochs"
        return ""

    def _find_space_refusal(self, event: SweepSteered) -> str:
        if event.space is None:
            return "it names no search space"
        if self.spaces and self.spaces[-1] == event.space:
            return "the sweep searches this space already"
        if self.added:
            return "a configuration that you have added has not started yet; give the command again when it has"
        if not hasattr(self._scheduler, "on_space") and _asks_for_space(self._scheduler):
            return f"the scheduler {type(self._scheduler).__name__} cannot go on with another search space"
        return ""

    def count_gpu_hours(self, now: float) -> float:
        """Return the GPU-hours used by all segments. Those of a killed process are counted up to its last event.

        Args:
            now: current time, in seconds of the sweep's own time.
        """
        return (self._gpu_s + self._running_gpus * (now - self.at)) / 3600

    @property
    def spent_budget(self) -> SpentBudget | None:
        """A budget that was spent at the last event; None if no budget was spent."""
        return self._find_spent_budget(self.at, self.table.expected_gain)

    @property
    def can_start_trial(self) -> bool:
        """Whether fewer trials than `num_trials` have been started."""
        return len(self.trials) < self.num_trials

    def explain_budget(self, now: float, expected_gain: float | None = None) -> Reason | None:
        """Return the budget that is spent: its key, the amount used, and as the cutoff the whole amount.

        Args:
            now: current time, in seconds of the sweep's own time.
            expected_gain: what doubling the number of trials is expected to gain; None: it is not known.
        """
        budget = self._find_spent_budget(now, expected_gain)
        return None if budget is None else Reason(budget.key, value=budget.used, cutoff=budget.amount)

    def _find_spent_budget(self, now: float, expected_gain: float | None) -> SpentBudget | None:
        return self.settings.find_spent_budget(
            elapsed_s=now, gpu_hours=self.count_gpu_hours(now), expected_gain=expected_gain
        )

    def find_trial_to_retry(self, now: float) -> int | None:
        """Return the waiting trial with the lowest number that may run now; None if there is none.

        Args:
            now: current time, in seconds of the sweep's own time.
        """
        return min((each for each in self.live["waiting"] if self.trials[each].retry_at <= now), default=None)

    def _find_divergence_limit(self, number: int) -> float | None:
        """Return the value beyond which the trial has diverged; None if there is no limit."""
        factor, best = self.settings.divergence_factor, self.trials[number].best_value
        if factor is None or not best > 0:  # no factor makes 0 or a negative value worse
            return None
        return factor * best if self._target.mode == "min" else best / factor

    def _get_checkpoint_need(self, number: int) -> CheckpointNeed:
        row = self.table.rows[number]
        if not row.is_over:
            return "resumable"
        return "finalist" if any(number == finalist for _, finalist in self._finalists) else "none"

    # --- events -------------------------------------------------------------------------------------------------------

    def replay(self, events: Iterable[Event]) -> None:
        """Check and apply past events.

        Raises:
            UserError: an event contradicts those before it, or this version of the project would decide differently.
        """
        for line, event in enumerate(events, start=1):
            self.check(event, line=line)
            self.apply(event)

    def check(self, event: Event, *, line: int) -> str:
        """Make the decision of a past event again and compare it.

        Call this before `apply`, because the scheduler records the result of a report.

        Args:
            event: the event.
            line: number of its line in the event log, for error messages.

        Returns:
            How the reason in the event differs from the one found now; empty if it does not differ. A sweep can still
            be resumed then, because nothing depends on a reason.

        Raises:
            UserError: the event contradicts those before it, or this version of the project decides differently.
        """
        place = f"{self.settings.path / 'events.jsonl'}: line {line}"
        impossible = self.find_contradiction(event)
        if impossible:
            raise UserError(f"{place} {impossible}; restore the file from a copy")
        again = self._decide_again(event)
        if again is None:
            return ""
        if again.ours != again.theirs:
            raise UserError(
                f"{place} records the decision {again.theirs!r} on {again.about}, but this version "
                f"of the project decides {again.ours!r}; resume with the revision that sweep.yaml names"
            )
        return find_reason_difference(again.our_reason, again.their_reason, again.about)

    def find_contradiction(self, event: Event) -> str:
        """Explain why an event cannot follow those before it; empty if it can."""
        if isinstance(event, (TrialSteered, SweepSteered)) and event.intervention in self.interventions:
            return f"executes the intervention {event.intervention} again"
        if isinstance(event, (TrialSuggested, SegmentStarted)) and self.is_paused:
            return f"starts trial {event.trial}, but the user has paused the sweep"
        if isinstance(event, TrialSuggested):
            return self._find_wrong_suggestion(event)
        if isinstance(event, SweepSteered):
            return self._find_wrong_intervention(event)
        if isinstance(event, (SweepOpened, NodeQuarantined, SweepClosed)):
            return ""
        if event.trial not in self.trials:
            return f"is about trial {event.trial}, which no line before it suggests"
        row, kind = self.table.rows[event.trial], get_kind(event)
        if row.state not in _STATES_BEFORE_EVENT.get(type(event), ("running",)):
            return f"has {kind!r} of trial {event.trial}, which is {row.state} at that point"
        if isinstance(event, TrialSteered):
            refusal = self.find_refusal(event)
            return f"has the intervention {event.action!r}, but {refusal}" if refusal else ""
        metric, second = self.settings.metric, self.settings.second_objective
        if isinstance(event, EpochReported) and event.epoch <= row.epochs:
            return f"reports epoch {event.epoch} of trial {event.trial}, which has already reported epoch {row.epochs}"
        if isinstance(event, EpochReported) and metric not in event.metrics:
            return f"reports epoch {event.epoch} of trial {event.trial} without {metric}"
        if isinstance(event, CostsMeasured) and second is not None and second not in event.costs:
            return f"has the costs of trial {event.trial} without {second}"
        return ""

    def _find_wrong_intervention(self, event: SweepSteered) -> str:
        said, max_epochs = f"has the intervention {event.action!r}", self.settings.max_epochs
        if refusal := self.find_refusal(event):
            return f"{said}, but {refusal}"
        if event.action == "epochs" and event.epochs_before != max_epochs:
            return f"{said} with {event.epochs_before} epochs before, but a complete trial had {max_epochs}"
        if (event.action == "space") != (event.space is not None):
            return f"{said} with the search space {event.space}"
        if len(event.decisions) != len(event.trials):
            return f"{said} with {len(event.decisions)} decisions about {len(event.trials)} trials"
        return ""

    def _find_wrong_suggestion(self, event: TrialSuggested) -> str:
        if event.trial in self.trials:
            return f"suggests trial {event.trial} again"
        if event.added_by and event.added_by not in [point.intervention for point in self.added]:
            return f"suggests trial {event.trial} for the intervention {event.added_by}, which is not waiting"
        return ""

    def _decide_again(self, event: Event) -> "_RepeatedDecision | None":
        """Repeat the decision of an event that the scheduler makes; None for any other event."""
        if isinstance(event, EpochReported):
            value = event.metrics[self.settings.metric]
            ours, reason = self.decide_after_report(event.trial, event.epoch, value, at=event.at, past=event.decision)
            if not self._repeats_decisions:
                reason = event.reason
            about = f"epoch {event.epoch} of trial {event.trial}"
            return _RepeatedDecision(ours, event.decision, reason, event.reason, about)
        if isinstance(event, SweepSteered) and event.action == "epochs":
            continued = self.decide_more_epochs(int(event.limits["max_epochs"] or 0), event.trials)
            recorded = ContinuedTrials(event.trials, list(event.decisions))
            return _RepeatedDecision(continued, recorded, None, None, "the complete trials, when epochs were raised")
        if not self._repeats_decisions:
            return None
        if isinstance(event, SegmentStarted) and self.table.rows[event.trial].state == "paused":
            promoted = self.choose_trial_to_resume()
            reason = None if promoted is None else self.explain_resume(promoted)
            theirs = SegmentStart(event.trial, event.source, event.params)
            return _RepeatedDecision(promoted, theirs, reason, event.reason, "the promotion of a trial")
        return None

    def apply(self, event: Event) -> None:
        """Update the state with an event."""
        if not isinstance(event, SweepOpened):  # nothing ran between the last event and an `opened` event
            self._gpu_s += self._running_gpus * (event.at - self.at)
        self.at = self._scheduler.now = event.at
        interruption = self._interruptions.add(event)
        match event:
            case SweepOpened():
                self._apply_opened(event)
            case TrialSuggested():
                row = TrialRow(event.trial, event.params, state="waiting", command=self._make_command(event.params))
                self.table.rows[event.trial] = row
                self.trials[event.trial] = TrialHistory(row, event.params, is_added=bool(event.added_by))
                self.added = [point for point in self.added if point.intervention != event.added_by]
                self.live["waiting"].add(event.trial)
                self._scheduler.on_trial_start(event.trial, event.params)
            case SegmentStarted():
                self._apply_started(event)
            case CostsMeasured():
                self._apply_measured(event)
            case EpochReported():
                self._apply_reported(event, interruption)
            case SegmentFailed():
                self._apply_failed(event)
            case NodeQuarantined():
                for number, times in self.health.quarantine(event.node).items():
                    trial = self.trials[number]
                    trial.num_failures, trial.retry_at = max(0, trial.num_failures - times), event.at
            case TrialEnded():
                self._apply_ended(event)
            case SweepClosed():
                self._apply_closed(event)
            case TrialSteered():
                self._apply_trial_steered(event)
            case SweepSteered():
                self._apply_sweep_steered(event)

    def _apply_opened(self, event: SweepOpened) -> None:
        """Start a process of the sweep: trials that ran when the previous one ended now wait to be resumed."""
        self.table.end, self.table.expected_gain, self.table.changed_limits = "", None, {}
        self._use_settings(replace(self._initial_settings, max_epochs=self.settings.max_epochs))
        self.num_trials, self.gpus = event.num_trials, event.gpus
        self.health.reset()
        for number in sorted(self.live["running"]):
            self._set_state(number, "waiting")
            self.table.rows[number].reason = "the process that ran the sweep ended"
        for trial in self.trials.values():
            trial.retry_at = 0.0

    def _apply_started(self, event: SegmentStarted) -> None:
        trial = self.trials[event.trial]
        reason = event.reason if event.reason is not None or not trial.is_kept else _STEERED_REASONS["keep"]
        trial.row.reason = self._format_reason(reason, "resume", trial.row.epochs)
        if trial.row.state == "paused":
            self._scheduler.on_trial_resume(SegmentStart(event.trial, event.source, event.params))
        on_segment_start = getattr(self._scheduler, "on_segment_start", None)  # an extension need not have it
        if on_segment_start is not None:
            on_segment_start(event.trial)
        if event.checkpoint is not None:
            self.retention.add(event.trial, event.checkpoint)
            trial.row.epochs, trial.first_own_segment = event.epoch, event.segment
        if event.params is not None and not is_same(event.params, trial.row.params):
            # Population based training: values from now on belong to other parameters than the searcher proposed.
            trial.row.params, trial.row.command, trial.is_perturbed = event.params, "", True
        trial.num_segments = event.segment
        trial.segment_gpus = self.gpus if event.gpus is None else event.gpus
        trial.start_segment(event.at)
        self._set_state(event.trial, "running")

    def _apply_measured(self, event: CostsMeasured) -> None:
        self.table.rows[event.trial].costs = event.costs
        self.trials[event.trial].update_seconds(event.at)
        if self.settings.second_objective is not None:
            self._scheduler.on_trial_cost(event.trial, event.costs[self.settings.second_objective])
        self.table.rows[event.trial].reason = self._format_reason(event.reason, event.decision)
        self._set_state(event.trial, _STATE_AFTER_DECISION[event.decision])

    def _apply_reported(self, event: EpochReported, interruption: str) -> None:
        trial = self.trials[event.trial]
        row, value = trial.row, event.metrics[self.settings.metric]
        row.epochs, row.metrics, row.node, row.error = event.epoch, event.metrics, event.node, event.note
        if event.reason is not None or event.decision != "continue":
            row.reason = self._format_reason(event.reason, event.decision, event.epoch)
        trial.update_seconds(event.at)
        trial.timer.report(event.epoch, event.at)
        self.num_reports += 1
        self.health.record_report(event.node)
        if not trial.is_perturbed:
            trial.values[event.epoch] = value
        if not self._target.to_loss(value) >= self._target.to_loss(trial.best_value):
            trial.best_value = value
        if event.checkpoint is not None:
            self.retention.add(event.trial, event.checkpoint)
        if event.decision == "complete":
            self._complete.append(event.trial)
            insort(self._finalists, (self._target.to_loss(value), event.trial))
            del self._finalists[_NUM_FINALISTS:]
        self._set_state(event.trial, _STATE_AFTER_DECISION[event.decision])
        if interruption:
            row.reason = self._format_reason(Reason(interruption, cutoff=self.settings.max_epochs), event.decision)
            self._set_state(event.trial, "waiting")

    def _apply_failed(self, event: SegmentFailed) -> None:
        trial = self.trials[event.trial]
        trial.update_seconds(event.at)
        has_same_gpus, trial.gpus = event.gpus == trial.gpus, event.gpus
        trial.row.error, trial.row.traceback = event.cause, event.traceback
        trial.row.reason = self._format_reason(event.reason, "retry" if event.retry else "no_retry")
        trial.row.node = event.node or trial.row.node
        if event.kind not in _BLAMELESS_FAILURES:
            self.health.record_failure(event.node, event.trial)
            if not self.num_reports:
                self._failed_before_any_report.add(event.trial)
            if has_same_gpus:
                trial.retry_at = event.at + self.settings.retry_delay_s * 2**trial.num_failures
                trial.num_failures += 1
        self._set_state(event.trial, "waiting" if event.retry else "failed")

    def _apply_ended(self, event: TrialEnded) -> None:
        trial = self.trials[event.trial]
        if trial.row.state == "running":
            trial.update_seconds(event.at)
        trial.row.error = event.cause
        ending = self._format_reason(event.reason, event.state)
        trial.row.reason = "; ".join(filter(None, [trial.row.reason, ending]))  # also why it was paused
        self._set_state(event.trial, event.state)
        self._scheduler.on_trial_end(event.trial)

    def _apply_closed(self, event: SweepClosed) -> None:
        self.table.end, self.table.elapsed_s = event.reason, event.at
        if event.budget is not None and event.budget.rule == STOP_WHEN_KEY:
            self.table.expected_gain = event.budget.value
        self.table.gpu_hours = self.count_gpu_hours(event.at)
        for number in sorted(self.live["running"]):
            self.trials[number].update_seconds(event.at)
            self._set_state(number, "waiting")
            self.table.rows[number].reason = format_close_reason(event.reason, event.budget)
        if event.reason != "halted":
            return
        self._failed_before_any_report.clear()  # the user has looked into it: all trials get their retries back
        for trial in self.trials.values():
            trial.num_failures = 0

    def _apply_trial_steered(self, event: TrialSteered) -> None:
        """Apply an intervention in a trial, and notify the scheduler of what it changes."""
        self.interventions.add(event.intervention)
        trial, number = self.trials[event.trial], event.trial
        state = trial.row.state
        trial.row.reason = self._format_reason(_STEERED_REASONS[event.action], event.action)
        trial.is_stopped_by_user = event.action == "stop"
        trial.is_kept = event.action == "keep" or (trial.is_kept and event.action == "retry")
        if event.action == "stop":
            if state == "running":
                trial.update_seconds(event.at)
            self._set_state(number, "stopped")
            self._scheduler.on_trial_end(number)
            return
        if event.action == "retry":
            trial.num_failures, trial.retry_at = 0, event.at
            self.health.forget_failures(number)
        if trial.row.is_over:
            self._reopen(trial)
        elif state == "paused":
            self._scheduler.on_trial_resume(SegmentStart(number))
            self._set_state(number, "waiting")

    def _reopen(self, trial: TrialHistory) -> None:
        """Let a trial that has ended wait to be resumed."""
        if trial.reopened_from is None:
            trial.reopened_from = (trial.row.state, trial.row.epochs)
        trial.row.error, trial.row.traceback = "", ""
        on_trial_reopen = getattr(self._scheduler, "on_trial_reopen", None)  # an extension need not have it
        if on_trial_reopen is not None:
            on_trial_reopen(trial.row.number)
        self._set_state(trial.row.number, "waiting")

    def _apply_sweep_steered(self, event: SweepSteered) -> None:
        self.interventions.add(event.intervention)
        if event.action == "epochs":
            self._apply_more_epochs(event)
        if event.space is not None:
            self._apply_space(event.space)
        if event.params is not None:
            self.added.append(AddedPoint(event.intervention, event.params))
        if "num_trials" in event.limits:
            self.num_trials = self.table.num_trials = int(event.limits["num_trials"] or 0)
        changed = {name: value for name, value in event.limits.items() if name in LIMITS}
        self.table.changed_limits = {**self.table.changed_limits, **changed}
        self._use_settings(self.settings.change_limits(event.limits))

    def _apply_more_epochs(self, event: SweepSteered) -> None:
        """Let complete trials go on, as the scheduler has decided, and end those that have no checkpoint."""
        max_epochs = int(event.limits["max_epochs"] or 0)
        self.search_changes.append(SearchChange(len(self.trials), max_epochs=max_epochs))
        self.table.max_epochs = max_epochs
        states: Mapping[str, TrialState] = {"continue": "waiting", "pause": "paused", "stop": "stopped"}
        decisions = dict(zip(event.trials, event.decisions, strict=True))
        for number in self._complete:
            decision, row = decisions.get(number), self.trials[number].row
            rule = "no_checkpoint" if decision is None else "epochs_raised"
            row.reason = self._format_reason(Reason(rule, cutoff=max_epochs), decision or "stop", row.epochs)
            self._set_state(number, "stopped" if decision is None else states[decision])
        self._complete.clear()
        self._finalists.clear()
        for trial in self.trials.values():
            trial.reopened_from = None  # the searcher starts again with what all trials have reported
            trial.row.command = "" if trial.is_perturbed else self._make_command(trial.row.params)

    def _apply_space(self, space: SpaceRecord) -> None:
        """Let trials be proposed from another search space."""
        self.search_changes.append(SearchChange(len(self.trials), space=space))
        on_space = getattr(self._scheduler, "on_space", None)
        if on_space is not None and self.load_space is not None:
            on_space(self.load_space(space))
        for trial in self.trials.values():
            trial.reopened_from = None  # the searcher starts again with what all trials have reported

    def _make_command(self, params: Mapping[str, Any]) -> str:
        return self._command(params, *self.raised_epochs[-1:])

    def _use_settings(self, settings: SweepSettings) -> None:
        self.settings = settings
        self.table.gpu_hours_budget = math.inf if settings.gpu_hours is None else settings.gpu_hours

    def _format_reason(self, reason: Reason | None, outcome: str, epoch: int = 0) -> str:
        return format_reason(reason, self.settings.metric, outcome=outcome, epoch=epoch)

    def _set_state(self, number: int, state: TrialState) -> None:
        row = self.trials[number].row
        if (row.state == "running") != (state == "running"):
            self._running_gpus += self.trials[number].segment_gpus * (1 if state == "running" else -1)
        if row.state in self.live:
            self.live[row.state].discard(number)
        if state in self.live:
            self.live[state].add(number)
        if state in ("diverged", "infeasible", "failed"):
            self._scheduler.on_trial_end(number)
        row.state = state
