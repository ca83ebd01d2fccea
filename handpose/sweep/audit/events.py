"""Audits the events of a sweep: repeats every decision from the events before it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from handpose.errors import UserError
from handpose.formats import get_former_checkpoint_name, upgrade_checkpoint_name
from handpose.report.trial_table import TrialRow, TrialTable
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Scheduler
from handpose.search.space import Params, Space
from handpose.sweep.controller.controller import NO_REPORT_CAUSE, find_violation
from handpose.sweep.controller.history import History, find_reason_difference, make_empty_table
from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.record.events import (
    EVENTS_FILE,
    FORMAT_WITH_REASONS,
    CheckpointRecord,
    CloseReason,
    CostsMeasured,
    EpochReported,
    Event,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    SpaceRecord,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialEnded,
    TrialSteered,
    TrialSuggested,
    scan_event_lines,
)
from handpose.sweep.record.interventions import BUDGET_LIMITS
from handpose.sweep.record.settings import STOP_WHEN_KEY, SweepSettings
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, make_run_name
from handpose.sweep.storage.checkpoint_files import FolderFiles
from handpose.sweep.storage.retention import describe_checkpoint

FINAL_REASONS: tuple[CloseReason, ...] = ("finished", "spent")
"""Reasons for closing a sweep after which a winner is selected."""

_ALLOWED_LIMITS: Mapping[str, tuple[str, ...]] = {
    "add": ("num_trials",),
    "trials": ("num_trials",),
    "epochs": ("max_epochs",),
    "space": ("num_trials",),
    "slots": ("max_concurrent",),
    "budget": BUDGET_LIMITS,
}
"""Intervention -> names of the limits that it may change."""

_FORMAT_WITH_SPENT = 3
"""First format of the events in which a sweep with a spent budget is not closed as `finished`.

From this format on, `opened` never has more trials than a finite space has points.
"""


@dataclass(frozen=True)
class AuditFinding:
    """A problem in the files of a sweep: a sentence that names the file and the place in it."""

    text: str


class Lost(AuditFinding):
    """Something is missing."""


class Repeated(AuditFinding):
    """Something is there twice."""


class Wrong(AuditFinding):
    """Something contradicts something else."""


class Expectations(NamedTuple):
    """What other files than the events say about a sweep.

    Attributes:
        num_trials: number of trials that the last process was to run; None if unknown.
        num_points: highest number of trials that the searcher can propose; None if there is no limit.
        first_number: number of the sweep's first trial.
        limits: cost -> upper limit.
        params: returns the parameters that were proposed for a trial; None if unknown.
        validation_interval: epochs between validations.
        is_resuming: whether sweep.yaml is newer than the events. A resume writes sweep.yaml first, so the budgets in it
            may belong to a process that has not opened the sweep yet.
    """

    num_trials: int | None
    num_points: int | None
    first_number: int
    limits: Mapping[str, float]
    params: Callable[[int], Params | None]
    validation_interval: int
    is_resuming: bool = False


class ReadOnlyCheckpointFiles(FolderFiles):
    """The checkpoint files of a sweep during a replay of its events: no file is removed from the disk."""

    def remove(self, name: str) -> None:
        """Keep the file; only CheckpointRetention forgets it."""


@dataclass
class ReplayResult:
    """The state that the events of a sweep lead to.

    Attributes:
        history: the history after all events.
        events: (line number, event) of the events that do not contradict the ones before.
        rows: trial -> (index in `events`, the trial's row after that event), for all events that change the row.
        suggested_params: trial -> parameters as proposed by the searcher.
        final_tables: copies of the table from each time the trials came to an end.
        adopted_trials: trials that resumed from a checkpoint that no event mentions.
        findings: findings about the events.
    """

    history: History
    events: list[tuple[int, Event]] = field(default_factory=list)
    rows: dict[int, list[tuple[int, TrialRow]]] = field(default_factory=dict)
    suggested_params: dict[int, Params] = field(default_factory=dict)
    final_tables: list[TrialTable] = field(default_factory=list)
    adopted_trials: set[int] = field(default_factory=set)
    findings: list[AuditFinding] = field(default_factory=list)

    def get_row(self, trial: int, index: int) -> TrialRow:
        """Return the row of a trial after the event with this index in `events`. The trial must exist by then."""
        return next(row for at, row in reversed(self.rows[trial]) if at <= index)

    @property
    def is_closed(self) -> bool:
        """Whether the last process closed the sweep."""
        return bool(self.events) and isinstance(self.events[-1][1], SweepClosed)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to run."""
        return self._close_reason == "finished"

    @property
    def is_ended(self) -> bool:
        """Whether nothing is left to run or a budget is spent, so that the steps after the trials follow."""
        return self._close_reason in FINAL_REASONS

    @property
    def _close_reason(self) -> str:
        """Reason for which the last process closed the sweep; empty if it did not."""
        last = self.events[-1][1] if self.events else None
        return last.reason if isinstance(last, SweepClosed) else ""

    @property
    def num_processes(self) -> int:
        """Number of processes that have run the sweep."""
        return sum(isinstance(event, SweepOpened) for _, event in self.events)


def replay_events(
    settings: SweepSettings,
    expected: Expectations,
    *,
    scheduler: Scheduler,
    command: Callable[..., str] = lambda params, max_epochs=0: "",
    load_space: Callable[[SpaceRecord], Space] | None = None,
    label: str = "",
) -> ReplayResult:
    """Apply the events of a sweep, and check each of them.

    Lines that cannot be read, and events that contradict the ones before, become findings and are skipped.

    Args:
        settings: settings of the sweep.
        expected: what other files say about the sweep.
        scheduler: a new scheduler, which repeats the decisions.
        command: returns the command line that trains parameters.
        load_space: makes a search space to which the user has changed, for the scheduler.
        label: prefix of file names in findings.
    """
    folder, table = settings.path, make_empty_table(settings)
    files = ReadOnlyCheckpointFiles(folder)
    history = History(settings, scheduler=scheduler, table=table, files=files, command=command, load_space=load_space)
    replayed = ReplayResult(history)
    if not (folder / EVENTS_FILE).is_file():
        if folder.is_dir():
            replayed.findings.append(Lost(f"{label}{EVENTS_FILE} is missing"))
        return replayed
    readable: list[tuple[int, Event]] = []
    for line in scan_event_lines((folder / EVENTS_FILE).read_bytes()):
        if line.event is not None:
            readable.append((line.number, line.event))
        else:
            problem = line.problem or "is incomplete: it has no line break"
            replayed.findings.append(Wrong(f"{label}{EVENTS_FILE}: line {line.number} {problem}"))
    checks = _EventChecker(replayed, settings, expected, f"{label}{EVENTS_FILE}")
    closing = _find_closing_events(readable)
    last_opened = max((place for place, (_, event) in enumerate(readable) if isinstance(event, SweepOpened)), default=0)
    for place, (number, event) in enumerate(readable):
        following = [each for _, each in readable[place + 1 : place + 3]]
        checks.check_event(number, event, following, is_closing=place in closing, is_last_process=place >= last_opened)
    checks.check_end()
    return replayed


def _find_closing_events(events: Sequence[tuple[int, Event]]) -> set[int]:
    """Return the indices of `TrialEnded` events that close a finished sweep.

    Between such an event and the final `SweepClosed` there are only further `TrialEnded` events.
    """
    found: set[int] = set()
    is_closing = False
    for place in range(len(events) - 1, -1, -1):
        event = events[place][1]
        is_closing = event == SweepClosed(event.at, "finished") or (is_closing and isinstance(event, TrialEnded))
        if is_closing and isinstance(event, TrialEnded):
            found.add(place)
    return found


class _EventChecker:
    """Checks the events in order, and applies each one to the history."""

    def __init__(self, replayed: ReplayResult, settings: SweepSettings, expected: Expectations, label: str) -> None:
        self._replayed = replayed
        self._history = replayed.history
        self._settings = settings
        self._expected = expected
        self._folder = settings.path
        self._label = label
        self._last: Event | None = None
        self._last_begun: dict[int, SegmentStarted] = {}
        self._fold_ends: dict[int, dict[int, Mapping[str, float]]] = {}  # trial -> fold, from 1 -> metrics
        self._nodes: dict[int, str] = {}
        self._newest_checkpoint_epochs: dict[int, int] = {}  # trial -> epoch of the newest checkpoint it reported
        self._line = 0
        self._version = 1
        self._has_current_budgets = True  # whether the event's process had the budgets of sweep.yaml

    def _add(self, kind: type[AuditFinding], text: str) -> None:
        self._replayed.findings.append(kind(f"{self._label}: line {self._line} {text}"))

    def _require(self, is_right: bool, text: str, kind: type[AuditFinding] = Wrong) -> None:
        """Add a finding if a condition of the current event does not hold."""
        if not is_right:
            self._add(kind, text)

    def check_event(
        self, line: int, event: Event, following: Sequence[Event], *, is_closing: bool, is_last_process: bool
    ) -> None:
        """Check the next event, and apply it.

        Args:
            line: its line number.
            event: the event.
            following: up to two events after it.
            is_closing: whether it is one of the `TrialEnded` events that close a finished sweep.
            is_last_process: whether the last process wrote it.
        """
        self._line = line
        self._has_current_budgets = is_last_process and not self._expected.is_resuming
        self._check_order(event)
        if impossible := self._history.find_contradiction(event):
            self._add(Wrong, impossible)
            return
        match event:
            case SweepOpened():
                self._check_opened(event)
            case TrialSuggested():
                self._check_suggested(event)
            case SegmentStarted():
                self._check_started(event)
            case CostsMeasured():
                self._check_measured(event)
            case EpochReported():
                self._check_reported(event)
            case SegmentFailed():
                self._check_failed(event, following)
            case NodeQuarantined():
                has_failed = isinstance(self._last, SegmentFailed) and self._last.node == event.node
                self._require(
                    has_failed, f"quarantines node {event.node}, but the event before is no failure on this node"
                )
                failed, said = self._history.health.list_failed_trials(event.node), f"quarantines node {event.node}"
                is_same = event.trials == failed or self._version < FORMAT_WITH_REASONS
                self._require(is_same, f"{said} because of the trials {event.trials}, but {failed} failed there")
            case TrialEnded():
                self._check_ended(event, is_last=not following, is_closing=is_closing)
            case SweepClosed():
                self._check_closed(event)
            case TrialSteered() | SweepSteered():
                self._check_steered(event)
        self._check_and_apply(line, event)
        self._record_result(event)
        self._last = event

    def check_end(self) -> None:
        """Check the replay after the last event."""
        if self._last is None:
            self._replayed.findings.append(Lost(f"{self._label} contains no events"))

    def _check_and_apply(self, line: int, event: Event) -> None:
        """Repeat the decision of an event and apply the event as recorded, even if the decision differs."""
        history = self._history
        try:
            other_reason = history.check(event, line=line)
            self._require(not other_reason or self._version < FORMAT_WITH_REASONS, other_reason)
        except UserError as error:
            self._add(Wrong, str(error).partition(f"line {line} ")[2].partition(";")[0])
        except (KeyError, ValueError, AssertionError) as error:  # from a scheduler that wrong earlier events confused
            self._add(Wrong, f"cannot be checked against the events before it ({type(error).__name__}: {error})")
        try:
            history.apply(event)
        except (KeyError, ValueError, AssertionError) as error:
            self._add(Wrong, f"cannot follow the events before it ({type(error).__name__}: {error})")

    def _record_result(self, event: Event) -> None:
        replayed, history = self._replayed, self._history
        replayed.events.append((self._line, event))
        if isinstance(event, EpochReported):
            history.retention.enforce_budget(event.trial)
        if isinstance(event, SweepOpened):
            for number in history.trials:
                history.retention.enforce_budget(number)
        if isinstance(event, TrialSuggested):
            replayed.suggested_params[event.trial] = dict(event.params)
        if isinstance(event, SweepClosed) and event.reason in FINAL_REASONS:
            table = copy(history.table)
            table.rows = deepcopy(history.table.rows)
            replayed.final_tables.append(table)
        if isinstance(event, SweepSteered) and event.action != "epochs":
            return  # it changes no row
        of_sweep = (SweepOpened, NodeQuarantined, SweepClosed, SweepSteered)
        changed = history.trials if isinstance(event, of_sweep) else (event.trial,)
        for number in changed:
            after = copy(history.trials[number].row)
            rows = replayed.rows.setdefault(number, [])
            if not rows or rows[-1][1] != after:
                rows.append((len(replayed.events) - 1, after))

    # --- the order of events ------------------------------------------------------------------------------------------

    def _check_order(self, event: Event) -> None:
        last, before = self._last, self._history.at
        name = f"has the time {event.at} s"
        self._require(event.at >= before, f"{name}, which is earlier than the time of the line before, {before} s")
        self._require(event.at >= 0, f"{name}, but the time of an event is never negative")
        if isinstance(event, SweepOpened):
            return
        if last is None:
            self._add(Lost, "is the first event, but the first event of a sweep must be 'sweep_opened'")
        if isinstance(last, TrialSuggested) and not (isinstance(event, SegmentStarted) and event.trial == last.trial):
            said = f"is between 'trial_suggested' and 'segment_started' of trial {last.trial}"
            self._add(Wrong, f"{said}, which must follow each other directly")
        if isinstance(last, SweepClosed):
            self._add(Wrong, "follows 'sweep_closed', after which only 'sweep_opened' is possible")

    def _check_opened(self, event: SweepOpened) -> None:
        settings, self._version = self._settings, event.version
        num_trials, num_points = self._expected.num_trials, self._get_num_points()
        possible = {num_trials} if self._has_current_budgets and num_trials is not None else {event.num_trials}
        if num_points is not None:
            capped = {min(each, num_points) for each in possible}
            possible = capped if event.version >= _FORMAT_WITH_SPENT else possible | capped
        elif self._history.spaces and event.num_trials <= max(possible):  # limited by the points of a later space
            possible = possible | {event.num_trials}
        said = f"opens the sweep with {event.num_trials} trials"
        self._require(event.num_trials in possible, f"{said}, but the configuration has {min(possible)}")
        self._require(event != self._last, "repeats the 'sweep_opened' event of the line before", Repeated)
        self._require(event.num_trials >= 1, f"{said}, but a sweep has at least 1 trial")
        gpus_per_trial, workers = settings.gpus_per_trial, settings.workers_per_trial
        if gpus_per_trial == "auto":
            is_possible = event.gpus >= 0
        else:
            is_possible = event.gpus in ((0, workers) if gpus_per_trial is None else (gpus_per_trial * workers,))
        self._require(is_possible, f"gives each trial {event.gpus} GPUs, but the configuration has {gpus_per_trial}")

    def _get_num_points(self) -> int | None:
        """Return the number of points of the first search space; None if it is unlimited or another one is searched."""
        return None if self._history.spaces else self._expected.num_points

    def _check_suggested(self, event: TrialSuggested) -> None:
        history = self._history
        number, name = self._expected.first_number + len(history.trials), f"suggests trial {event.trial}"
        self._require(event.trial == number, f"{name}, but the next trial is {number}", Lost)
        self._require(history.can_start_trial, f"{name}, but the sweep has only {history.num_trials} trials")
        due = history.added[0].intervention if history.added else ""
        if event.added_by != due and not (event.added_by == "" and isinstance(self._last, SweepOpened)):
            self._add(Wrong, f"{name}, but the configuration that intervention {due} added comes next")
        self._check_no_retry_is_due("suggests a new trial")
        promoted = history.choose_trial_to_resume()
        if promoted is not None:
            self._add(Wrong, f"suggests a new trial, but trial {promoted.trial} must be promoted first")
        params = self._expected.params(event.trial)
        if params is not None and (differences := list(find_differences(dict(event.params), params))):
            said = "; ".join(f"{place} is {ours} instead of {theirs}" for place, ours, theirs in differences)
            self._add(Wrong, f"{name} with other parameters than the study has: {said}")

    def _check_reason(self, ours: Reason | None, theirs: Reason | None, about: str) -> None:
        """Compare the reason in an event with the one found now. Earlier formats have no reasons."""
        difference = find_reason_difference(ours, theirs, about)
        self._require(not difference or self._version < FORMAT_WITH_REASONS, difference)

    def _check_no_retry_is_due(self, what: str, *, than: int | None = None) -> None:
        """Report a trial whose retry was due at the time of the previous event, and should have started first.

        Args:
            what: start of the finding's sentence.
            than: report only trials with a smaller number than this.
        """
        ready = self._history.find_trial_to_retry(self._history.at)
        if ready is not None and (than is None or ready < than):
            self._add(Wrong, f"{what}, but trial {ready} must be retried first")

    def _check_started(self, event: SegmentStarted) -> None:
        trial, name = self._history.trials[event.trial], f"starts trial {event.trial}"
        if trial.row.state == "paused":
            self._check_no_retry_is_due(f"promotes trial {event.trial}")
        elif not (isinstance(self._last, TrialSuggested) and self._last.trial == event.trial):
            self._check_no_retry_is_due(name, than=event.trial)
            is_due = trial.retry_at <= event.at
            self._require(is_due, f"{name} at {event.at} s, but its retry is due at {trial.retry_at} s")
        segment = trial.num_segments + 1
        self._require(
            event.segment == segment, f"{name} with segment {event.segment}, but its next segment is {segment}"
        )
        self._require(event.gpus == trial.gpus, f"{name} with gpus={event.gpus}, but it was assigned gpus={trial.gpus}")
        is_own = (event.source, event.params, event.checkpoint) == (None, None, None)
        said = f"{name} from another trial, although trial {event.trial} was not paused"
        self._require(is_own or trial.row.state == "paused", said)
        if event.checkpoint is not None:
            self._check_source_checkpoint(event, event.checkpoint)
        else:
            self._check_own_checkpoint(event)
        self._last_begun[event.trial] = event
        self._nodes.pop(event.trial, None)

    def _check_own_checkpoint(self, event: SegmentStarted) -> None:
        """Check that a trial resumes from its newest checkpoint.

        If its process was killed, this may be a checkpoint that no event mentions; it is then adopted.
        """
        retention, row = self._history.retention, self._history.table.rows[event.trial]
        newest = max((each.epoch for each in retention.list_checkpoints(event.trial)), default=0)
        if event.epoch == newest:
            return
        if not newest < event.epoch <= row.epochs:
            known = f"its newest checkpoint is from epoch {newest}" if newest else "it has no checkpoint"
            said = f"starts trial {event.trial} at epoch {event.epoch}, but {known}"
            self._add(Repeated if event.epoch < newest else Wrong, said)
            return
        self._replayed.adopted_trials.add(event.trial)
        name = format_checkpoint_name(event.trial, event.epoch, event.segment - 1)
        former_name = get_former_checkpoint_name(name)
        if (self._folder / former_name).is_file():
            name = former_name
        checkpoint = CheckpointRecord(name, event.epoch, 0, 0)
        if (self._folder / name).is_file():
            checkpoint = describe_checkpoint(self._folder / name, folder=self._folder, epoch=event.epoch)
        retention.add(event.trial, checkpoint)

    def _check_source_checkpoint(self, event: SegmentStarted, checkpoint: CheckpointRecord) -> None:
        file = f"{CHECKPOINTS_FOLDER}/{make_run_name(event.trial)}/segment_{event.segment}_of_{event.source}.ckpt"
        name = f"starts trial {event.trial}"
        is_named_so = upgrade_checkpoint_name(checkpoint.file) == file
        self._require(is_named_so, f"{name} from {checkpoint.file}, but the file must be {file}")
        is_same_epoch = checkpoint.epoch == event.epoch
        self._require(is_same_epoch, f"{name} at epoch {event.epoch} from a checkpoint of epoch {checkpoint.epoch}")
        theirs = self._history.retention.list_checkpoints(event.source) if event.source in self._history.trials else []
        is_theirs = any(replace(each, file=checkpoint.file) == checkpoint for each in theirs)
        is_theirs = is_theirs or event.source in self._replayed.adopted_trials
        self._require(is_theirs, f"{name} from a checkpoint that trial {event.source} does not have")

    # --- decisions ----------------------------------------------------------------------------------------------------

    def _check_measured(self, event: CostsMeasured) -> None:
        trial = self._history.trials[event.trial]
        self._require(not trial.row.costs, f"repeats the costs of trial {event.trial}", Repeated)
        if missing := set(self._expected.limits) - set(event.costs):
            self._add(Lost, f"lacks constrained costs of trial {event.trial}: {', '.join(sorted(missing))}")
            return
        violation = find_violation(event.costs, self._expected.limits, self._settings.second_objective)
        decision = "continue" if violation is None else "infeasible"
        said = (
            f"records the decision {event.decision!r} on the costs of trial {event.trial}, but they give {decision!r}"
        )
        self._require(event.decision == decision, said)
        self._check_reason(violation, event.reason, f"the costs of trial {event.trial}")

    def _check_reported(self, event: EpochReported) -> None:
        trial, begun = self._history.trials[event.trial], self._last_begun[event.trial]
        every, before = self._expected.validation_interval, trial.row.epochs
        following, name = (before // every + 1) * every, f"reports epoch {event.epoch} of trial {event.trial}"
        said = f"{name} after epoch {before}, but the report of epoch {following} is missing"
        self._require(event.epoch <= following, said, Lost)
        settings = self._replayed.history.settings
        said = f"{name}, but sweep.max_epochs is {settings.max_epochs}"
        said += f" and sweep.folds is {settings.folds}" if settings.folds > 1 else ""
        self._require(event.epoch <= settings.trial_epochs, said)
        self._check_fold(event, settings)
        if event.resumed_from != begun.epoch:
            kind = Repeated if event.resumed_from < begun.epoch else Wrong
            said = f"reports that trial {event.trial} resumed from epoch {event.resumed_from}"
            self._add(kind, f"{said}, but its segment started at epoch {begun.epoch}")
        node = self._nodes.setdefault(event.trial, event.node)
        said = f"reports trial {event.trial} from node {event.node}, but its segment runs on node {node}"
        self._require(event.node == node, said)
        if event.checkpoint is not None:
            self._check_reported_checkpoint(event, event.checkpoint, trial.num_segments)

    def _check_fold(self, event: EpochReported, settings: SweepSettings) -> None:
        """Check that the metrics after the first fold change only at the ends of folds.

        They are the mean over the folds trained so far. Metrics that are not finite end the trial, and are reported as
        they are.
        """
        if settings.folds == 1:
            return
        fold, place = divmod(event.epoch, settings.max_epochs)
        ends = self._fold_ends.setdefault(event.trial, {})
        if place == 0:
            ends[fold] = event.metrics
        elif fold in ends and math.isfinite(event.metrics.get(settings.metric, math.nan)):
            said = (
                f"reports other metrics at epoch {event.epoch} of trial {event.trial} than at the end of fold {fold}, "
                f"epoch {fold * settings.max_epochs}"
            )
            self._require(event.metrics == ends[fold], said)

    def _check_reported_checkpoint(
        self, event: EpochReported, checkpoint: CheckpointRecord, segment_number: int
    ) -> None:
        names = [format_checkpoint_name(event.trial, checkpoint.epoch, each) for each in range(segment_number, 0, -1)]
        name = upgrade_checkpoint_name(checkpoint.file)
        if self._settings.storage is not None:
            name = name.replace(f".{checkpoint.checksum:08x}.ckpt", ".ckpt")
        said = f"names {checkpoint.file} as the checkpoint of trial {event.trial}, but the file must be {names[0]}"
        self._require(name in names, said)
        newest = max(self._newest_checkpoint_epochs.get(event.trial, 0), self._last_begun[event.trial].epoch)
        said = f"has a checkpoint of trial {event.trial} from epoch {checkpoint.epoch}"
        is_newer = checkpoint.epoch > newest
        self._require(is_newer, f"{said}, but the checkpoint before is from epoch {newest}", Repeated)
        is_reached = checkpoint.epoch <= event.epoch
        self._require(is_reached, f"{said}, but the trial has trained only {event.epoch} epochs")
        self._newest_checkpoint_epochs[event.trial] = max(newest, checkpoint.epoch)

    def _check_failed(self, event: SegmentFailed, following: Sequence[Event]) -> None:
        history = self._history
        node = self._nodes.get(event.trial, event.node)
        said = f"records a failure of trial {event.trial} on node {event.node}, but its segment runs on node {node}"
        self._require(event.node in ("", node), said)
        is_quarantined = (
            bool(following) and isinstance(following[0], NodeQuarantined) and following[0].node == event.node
        )
        halts = history.should_halt(event.trial, event.kind)
        retry, gpus, reason = history.decide_retry(
            event.trial, event.kind, node=event.node, halts=halts, quarantines=is_quarantined
        )
        said = f"assigns gpus={event.gpus} to trial {event.trial}, but this failure gives it gpus={gpus}"
        self._require(event.gpus == gpus, said)
        if is_quarantined:
            nodes = {each.node for _, each in self._replayed.events if isinstance(each, (EpochReported, SegmentFailed))}
            capacity = NodeCapacity(dict.fromkeys(nodes, 1))  # of any trial on any node
            is_due = history.should_quarantine(event.trial, event.kind, event.node, capacity=capacity)
            said = f"records a failure of trial {event.trial} on node {event.node}"
            self._require(is_due, f"{said}, after which the node is quarantined too early")
        if self._replayed.num_processes > 1:  # a resume may have changed the settings of retries
            return
        verb, required = ("retries", "no retry") if event.retry else ("does not retry", "a retry")
        said = f"{verb} trial {event.trial} after the failure {event.kind!r}, but the settings require {required}"
        self._require(event.retry == retry, said)
        self._check_reason(reason, event.reason, f"the failure of trial {event.trial}")
        rest = following[is_quarantined:]
        if rest and halts != (rest[0] == SweepClosed(rest[0].at, "halted")):
            problem = "must be halted, but is not" if halts else "is halted, but must not be"
            self._add(Wrong, f"records a failure of trial {event.trial}, after which the sweep {problem}")

    def _check_steered(self, event: TrialSteered | SweepSteered) -> None:
        """Check the limits that an intervention sets. Whether it was possible, the history has checked."""
        if isinstance(event, TrialSteered):
            return
        history, said = self._history, f"has the intervention {event.action!r} with {dict(event.limits)}"
        allowed = _ALLOWED_LIMITS.get(event.action, ())
        self._require(
            set(event.limits) <= set(allowed), f"{said}, which may change only {', '.join(allowed) or 'nothing'}"
        )
        is_added = event.action == "add"
        self._require(is_added == (event.params is not None), f"{said} and the configuration {event.params}")
        num_trials = event.limits.get("num_trials")
        num_points = None if event.action == "space" else self._get_num_points()
        if num_trials is not None and num_points is not None:
            self._require(num_trials <= num_points, f"{said}, but the space has only {num_points} configurations")
        if is_added:
            wanted = max(history.num_trials, len(history.trials) + len(history.added) + 1)
            is_right = (num_trials or history.num_trials) == wanted
            self._require(is_right, f"{said}, but the sweep then has {wanted} trials")

    def _check_ended(self, event: TrialEnded, *, is_last: bool, is_closing: bool) -> None:
        row = self._history.table.rows[event.trial]
        causes = {""} if is_closing or is_last else set()
        if row.state == "running":
            causes.add("" if row.epochs else NO_REPORT_CAUSE)
        if event.cause not in causes or event.state != ("failed" if event.cause else "stopped"):
            said = f"ends trial {event.trial} with the state {event.state!r} and the cause {event.cause!r}"
            self._add(Wrong, f"{said}, but a trial that is {row.state} cannot end this way here")
        possible = [Reason("not_promoted")] if is_closing or is_last else []
        if row.state == "running":
            possible.insert(0, Reason("returned"))
        if event.reason not in possible:
            self._check_reason(possible[0] if possible else None, event.reason, f"the end of trial {event.trial}")
        if is_closing and not isinstance(self._last, TrialEnded):
            self._check_nothing_left(event.at)

    def _check_closed(self, event: SweepClosed) -> None:
        history = self._history
        left = [number for number, trial in history.trials.items() if not trial.row.is_over]
        if event.reason == "finished":
            if left:
                said = ", ".join(f"trial {number} is {history.table.rows[number].state}" for number in left)
                self._add(Lost, f"closes the sweep as finished, but {said}")
            elif not isinstance(self._last, TrialEnded):
                self._check_nothing_left(event.at)
        elif event.reason == "spent":
            if not self._has_trials_left and not history.live["running"]:
                self._add(Wrong, "closes the sweep for a spent budget, but no trial is left to run, so it is finished")
            expected = event.budget.value if event.budget is not None and event.budget.rule == STOP_WHEN_KEY else None
            budget = history.explain_budget(event.at, expected)
            if budget is None and self._has_current_budgets:
                self._add(Wrong, f"closes the sweep at {event.at} s for a spent budget, but no budget is spent")
            elif self._has_current_budgets:
                self._check_reason(budget, event.budget, "closing the sweep")
        elif event.reason == "halted":
            is_due = isinstance(self._last, NodeQuarantined) or (
                isinstance(self._last, SegmentFailed) and self._last.retry
            )
            if not is_due or history.num_reports:
                self._add(
                    Wrong,
                    "closes the sweep as halted, but this is possible only after a failure and before the first report",
                )

    def _check_nothing_left(self, at: float) -> None:
        """Check that nothing is left to run in a sweep that is closed as finished.

        Earlier formats closed a sweep as finished also when a budget was spent.
        """
        history = self._history
        if not self._has_trials_left:
            return
        if self._version < _FORMAT_WITH_SPENT and (self._is_budget_spent(at) or not self._has_current_budgets):
            return
        num_left = history.num_trials - len(history.trials)
        what = f"{num_left} trials have not been started" if history.can_start_trial else "some trials are not over"
        self._add(Lost, f"finishes the sweep, but {what}")

    @property
    def _has_trials_left(self) -> bool:
        """Whether a trial can start or resume."""
        history = self._history
        return bool(history.can_start_trial or history.live["waiting"] or history.choose_trial_to_resume() is not None)

    def _is_budget_spent(self, at: float) -> bool:
        return self._history.explain_budget(at) is not None


def format_checkpoint_name(trial: int, epoch: int, segment_number: int) -> str:
    """Return the name that `TrialSegment.make_checkpoint_name` gives to a checkpoint."""
    return f"{CHECKPOINTS_FOLDER}/{make_run_name(trial)}/epoch_{epoch:04d}_segment_{segment_number}.ckpt"


def is_same_value(ours: Any, theirs: Any) -> bool:
    """Return whether two plain values are the same; 1, 1.0 and True differ, and NaN equals NaN."""
    return not list(find_differences(ours, theirs))


def find_differences(ours: Any, theirs: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two plain values differ: the place, as a dotted path, and both values there.

    Floats may differ in their last digits (relative difference up to 1e-12), because they may have been computed again.
    1, 1.0 and True are different values.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in {**ours, **theirs}:
            name = f"{place}.{key}" if place else str(key)
            yield from find_differences(ours.get(key, ABSENT_VALUE), theirs.get(key, ABSENT_VALUE), name)
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from find_differences(one, other, f"{place}.{index}" if place else str(index))
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not (abs(ours - theirs) <= 1e-12 * abs(ours) or ours == theirs or (ours != ours and theirs != theirs)):
            yield place, ours, theirs
    elif ours != theirs or (isinstance(ours, (int, float)) and type(ours) is not type(theirs)):
        yield place, ours, theirs


ABSENT_VALUE = "(missing)"
