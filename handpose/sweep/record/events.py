"""The event log of a sweep, `events.jsonl`: the single source of truth from which a sweep is resumed.

Each event is written before the program acts on it. Replaying the events in the same order gives the same state and
the same decisions. Ray's own snapshots cannot replace the log: they are at least 10 s apart and do not contain the
scheduler's rungs (observed with Ray 2.60).
"""

import json
import math
import os
import time
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from handpose.errors import UserError, add_file_name, explain_file_error
from handpose.files import stays_inside
from handpose.formats import upgrade_event
from handpose.schedulers.reason import Reason

if TYPE_CHECKING:  # workers read events without Optuna and Hydra
    from handpose.search.space import Params

EVENTS_FORMAT = 7
"""Version of the file format. Increase it with every new kind of event, field or value.

Each `sweep_opened` line contains the format version of the program that writes the lines after it. Files of format 1
contain no version. Format 3 distinguishes a spent budget from a finished sweep, and it ends a sweep when every point of
a finite search space has been tried. Format 4 has other names for the kinds of events and of failures, and for a field
(handpose/formats.py). Format 5 records the reasons of decisions and the origins of proposals. Format 6 has two more
reasons: what a trial is worth (scheduler=freeze_thaw), and that further trials are expected to gain little
(`sweep.stop_when`). It also has the interventions of the user in a running sweep: `trial_steered`, `sweep_steered`, and
`added_by` of a suggested trial. In format 7 the user can raise `sweep.max_epochs` and change
the search space.
"""

FORMAT_WITH_REASONS = 5
"""First format in which each decision has its reason."""

_FORMAT_WITH_INTERVENTIONS = 6
_FORMAT_WITH_MORE_EPOCHS = 7

_SINCE_REASONS = {"since": FORMAT_WITH_REASONS}
_SINCE_INTERVENTIONS = {"since": _FORMAT_WITH_INTERVENTIONS}
_SINCE_MORE_EPOCHS = {"since": _FORMAT_WITH_MORE_EPOCHS}
"""Metadata of the fields that earlier formats do not have."""

Decision = Literal["continue", "pause", "stop", "complete", "diverged", "infeasible"]
"""What happens to a trial after a report or after its costs have been measured.

- continue: it trains on.
- pause: the scheduler pauses it at a rung.
- stop: the scheduler stops it early.
- complete: it has reached `sweep.max_epochs`.
- diverged: its metric is not finite, or it is worse than the trial's best by more than `sweep.divergence_factor`.
- infeasible: it violates a constraint on its costs, or its second objective is not finite.
"""

CloseReason = Literal["finished", "spent", "interrupted", "halted"]

TrialAction = Literal["stop", "retry", "keep"]
"""What a user does with a trial of a running sweep.

- stop: it ends as `stopped`.
- retry: a trial that has failed, or that the user has stopped, waits to be resumed, and its retries count from 0.
- keep: the scheduler neither stops nor pauses it any more. A paused or stopped trial waits to be resumed.
"""

SweepAction = Literal["add", "trials", "epochs", "space", "slots", "pause", "resume", "budget"]
"""What a user does with a running sweep.

- add: the next trial has the given parameters.
- epochs: a complete trial has more epochs from now on. Running segments, which train to fewer, end when they report a
  checkpoint, or at their last epoch.
- space: trials are proposed from another search space from now on.
- trials, slots, budget: limits change.
- pause: no segment starts, and a running one ends when it reports a checkpoint.
- resume: the end of a pause.
"""

FailureKind = Literal["error", "user_error", "killed", "gpu_memory", "preempted", "lost", "unfit_worker"]
"""Why a segment of a trial failed.

- error: it raised an exception.
- user_error: it raised a UserError, which would be raised again on a retry.
- killed: its process died.
- gpu_memory: the GPU ran out of memory.
- preempted: the cluster took the machine away.
- lost: the machine died or cannot be reached.
- unfit_worker: an earlier trial left the worker process unfit for another one.

The last three are not the trial's fault and do not count as retries.
"""


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint of a trial.

    Attributes:
        file: name, relative to the folder of the sweep.
        epoch: number of epochs trained when it was saved.
        size_bytes: size of the file.
        checksum: CRC-32 of the content.
    """

    file: str
    epoch: int
    size_bytes: int
    checksum: int


@dataclass(frozen=True)
class SweepOpened:
    """A process started or resumed the sweep.

    Attributes:
        at: the sweep's own time in seconds, added up over all processes that have run it. All events have this field.
        num_trials: number of trials to run. It may be larger when the sweep is resumed.
        gpus: GPUs that each trial holds, unless another event gives the trial its own value.
        version: format version of the events that follow.
    """

    at: float
    num_trials: int
    gpus: float = 0.0
    version: int = EVENTS_FORMAT


@dataclass(frozen=True)
class TrialSuggested:
    """The searcher proposed a trial.

    Attributes:
        at: the sweep's own time in seconds.
        trial: number of the trial.
        params: configuration key -> value.
        origin: where the parameters come from, such as `the default configuration`.
        added_by: id of the intervention with which the user has added the trial; empty if the searcher proposed it.
    """

    at: float
    trial: int
    params: "Params"
    origin: str = field(default="", metadata=_SINCE_REASONS)
    added_by: str = field(default="", metadata=_SINCE_INTERVENTIONS)


@dataclass(frozen=True)
class SegmentStarted:
    """A segment of a trial was sent to a worker.

    Attributes:
        at: the sweep's own time in seconds.
        trial: number of the trial.
        segment: number of the segment within the trial, counted from 1.
        epoch: number of epochs trained before this segment.
        gpus: GPUs that the trial holds; None: `SweepOpened.gpus`.
        source: the trial from whose checkpoint this one resumes (population based training); None: its own.
        checkpoint: the trial's own copy of the checkpoint of `source`.
        params: all parameters of the trial from now on (population based training); None: unchanged.
        reason: why the scheduler resumed the paused trial; None: the trial was not paused.
    """

    at: float
    trial: int
    segment: int
    epoch: int
    gpus: float | None = None
    source: int | None = None
    checkpoint: CheckpointRecord | None = None
    params: "Params | None" = None
    reason: Reason | None = field(default=None, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class CostsMeasured:
    """The costs of a trial were measured before its training.

    Attributes:
        at: the sweep's own time in seconds.
        trial: number of the trial.
        costs: name -> cost.
        decision: `continue` or `infeasible`.
        reason: which limit an infeasible trial violates.
    """

    at: float
    trial: int
    costs: Mapping[str, float]
    decision: Decision
    reason: Reason | None = field(default=None, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class EpochReported:
    """A trial reported an epoch.

    Attributes:
        at: the sweep's own time in seconds.
        trial: number of the trial.
        epoch: number of epochs trained.
        metrics: name -> value of the validation metrics.
        node: name of the node on which the trial runs.
        resumed_from: epoch of the checkpoint from which the segment was resumed; 0 if it started from scratch.
        checkpoint: the newest checkpoint, if one has been saved since the last report.
        decision: what happens to the trial.
        note: a problem that did not end the trial.
        reason: why the decision was made; None if the trial continues and was not compared with others.
    """

    at: float
    trial: int
    epoch: int
    metrics: Mapping[str, float]
    node: str
    resumed_from: int
    checkpoint: CheckpointRecord | None
    decision: Decision
    note: str = ""
    reason: Reason | None = field(default=None, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class SegmentFailed:
    """A segment of a trial failed.

    Attributes:
        at: the sweep's own time in seconds.
        trial: number of the trial.
        kind: why it failed.
        cause: the error message in one line.
        traceback: the full text of the error.
        retry: whether the trial is retried from its newest checkpoint.
        gpus: GPUs that the trial holds from now on; None: `SweepOpened.gpus`.
        node: name of the node on which it ran; empty if it is unknown.
        reason: why the trial is retried or not.
    """

    at: float
    trial: int
    kind: FailureKind
    cause: str
    traceback: str
    retry: bool
    gpus: float | None = None
    node: str = ""
    reason: Reason | None = field(default=None, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class NodeQuarantined:
    """A node was quarantined: several different trials failed on it while other nodes work.

    No more trials run on the node. The failures on it do not count as retries of the trials.

    Attributes:
        at: the sweep's own time in seconds.
        node: name of the node.
        trials: numbers of the trials that failed on it since its last report.
    """

    at: float
    node: str
    trials: list[int] = field(default_factory=list, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended without a final report.

    Either the sweep finished and the paused trial was not promoted, or the trial's function returned early. In files
    before format 3 a spent budget also ended the trials that were not over.

    Attributes:
        at: the sweep's own time in seconds.
        trial: number of the trial.
        state: state of the trial from now on.
        cause: the error message of a failed trial, in one line.
        reason: `not_promoted` or `returned`.
    """

    at: float
    trial: int
    state: Literal["stopped", "failed"]
    cause: str = ""
    reason: Reason | None = field(default=None, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class SweepClosed:
    """The process that ran the sweep closed it normally.

    Attributes:
        at: the sweep's own time in seconds.
        reason: `finished`: nothing is left to run. `spent`: a budget is used up, and the sweep can be resumed with a
            larger one. `interrupted`: the user stopped it. `halted`: the first trials all failed. Before format 3 a
            spent budget was recorded as `finished`, too.
        budget: with `spent`, the budget: its configuration key, the amount used, and as the cutoff the whole amount.
            With the key `sweep.stop_when`, the gain that was expected, and as the cutoff the least one to go on.
    """

    at: float
    reason: CloseReason
    budget: Reason | None = field(default=None, metadata=_SINCE_REASONS)


@dataclass(frozen=True)
class TrialSteered:
    """The user intervened in a trial, and this is its effect.

    Attributes:
        at: the sweep's own time in seconds.
        intervention: id of the intervention. Each one is executed once.
        action: what the user does.
        trial: number of the trial.
    """

    at: float
    intervention: str
    action: TrialAction
    trial: int


@dataclass(frozen=True)
class SpaceRecord:
    """A search space to which the user has changed.

    Attributes:
        name: name of its file, without a folder.
        text: the text of the file.
    """

    name: str
    text: str


@dataclass(frozen=True)
class SweepSteered:
    """The user intervened in the sweep, and this is its effect.

    Attributes:
        at: the sweep's own time in seconds.
        intervention: id of the intervention. Each one is executed once.
        action: what the user does.
        limits: name in the configuration group `sweep` -> its value from now on; None: no limit.
        params: with `add`, configuration key -> value, as the user gave them.
        trials: with `epochs`, the trials that were complete and have a checkpoint, in the order in which they were
            completed. The other complete trials end as `stopped`.
        decisions: with `epochs`, what the scheduler decides about each of these trials.
        epochs_before: with `epochs`, the number of epochs of a complete trial before.
        space: with `space`, the search space from which trials are proposed from now on.
    """

    at: float
    intervention: str
    action: SweepAction
    limits: Mapping[str, float | None] = field(default_factory=dict)
    params: "Params | None" = None
    trials: list[int] = field(default_factory=list, metadata=_SINCE_MORE_EPOCHS)
    decisions: list[Literal["continue", "pause", "stop"]] = field(default_factory=list, metadata=_SINCE_MORE_EPOCHS)
    epochs_before: int = field(default=0, metadata=_SINCE_MORE_EPOCHS)
    space: SpaceRecord | None = field(default=None, metadata=_SINCE_MORE_EPOCHS)


Event: TypeAlias = (
    SweepOpened
    | TrialSuggested
    | SegmentStarted
    | CostsMeasured
    | EpochReported
    | SegmentFailed
    | NodeQuarantined
    | TrialEnded
    | SweepClosed
    | TrialSteered
    | SweepSteered
)

EVENTS_FILE = "events.jsonl"
"""Name of the event log in the folder of a sweep."""

_SYNC_EVERY_S = 1.0
_KINDS: dict[str, type[Any]] = {
    "sweep_opened": SweepOpened,
    "trial_suggested": TrialSuggested,
    "segment_started": SegmentStarted,
    "costs_measured": CostsMeasured,
    "epoch_reported": EpochReported,
    "segment_failed": SegmentFailed,
    "node_quarantined": NodeQuarantined,
    "trial_ended": TrialEnded,
    "sweep_closed": SweepClosed,
    "trial_steered": TrialSteered,
    "sweep_steered": SweepSteered,
}
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}

_HINTS = {
    kind: typing.get_type_hints(kind, localns={"Params": dict[str, Any]})
    for kind in (CheckpointRecord, SpaceRecord, Reason, *_KINDS.values())
}
_NESTED_RECORDS = {
    kind: {name: record for name, hint in hints.items() for record in typing.get_args(hint) if record in _HINTS}
    for kind, hints in _HINTS.items()
}
"""Kind of event -> name of a field -> the record that it contains."""


class SegmentInterruptions:
    """Finds the segments that end because the user has paused the sweep, or has raised `sweep.max_epochs`.

    A trial that would go on is interrupted when it has just reported a checkpoint, because it would lose epochs
    otherwise. During a pause, one that saves none trains to its end. After `sweep.max_epochs` has been raised, a
    running segment still trains to the former number of epochs. There it ends in any case, and its trial is resumed.

    Attributes:
        is_sweep_paused: whether the user has paused the sweep.
    """

    def __init__(self) -> None:
        self.is_sweep_paused = False
        self._running: set[int] = set()
        self._outdated: dict[int, int] = {}  # trial -> epoch at which its running segment ends

    def add(self, event: Event) -> str:
        """Add the next event.

        Returns:
            The rule of the reason for which the event interrupts a segment: `sweep_paused` or `epochs_raised`; empty if
            it does not.
        """
        match event:
            case SweepOpened() | SweepClosed():
                self._running.clear()
                self._outdated.clear()
                self.is_sweep_paused = False
            case SegmentStarted():
                self._running.add(event.trial)
            case SweepSteered(action="pause" | "resume"):
                self.is_sweep_paused = event.action == "pause"
            case SweepSteered(action="epochs"):
                self._outdated = {**dict.fromkeys(self._running, event.epochs_before), **self._outdated}
            case EpochReported():
                rule = self._find_rule(event)
                if rule or event.decision != "continue":
                    self._end(event.trial)
                return rule
            case CostsMeasured(decision="infeasible") | SegmentFailed() | TrialEnded() | TrialSteered(action="stop"):
                self._end(event.trial)
        return ""

    def _find_rule(self, event: EpochReported) -> str:
        if event.decision != "continue":
            return ""
        end, has_checkpoint = self._outdated.get(event.trial), event.checkpoint is not None
        if end is not None and (has_checkpoint or event.epoch >= end):
            return "epochs_raised"
        return "sweep_paused" if self.is_sweep_paused and has_checkpoint else ""

    def _end(self, trial: int) -> None:
        self._running.discard(trial)
        self._outdated.pop(trial, None)


def is_space_name(name: str) -> bool:
    """Return whether a text is the name of a file that can hold a search space."""
    return Path(name).name == name and Path(name).suffix in (".yaml", ".yml", ".py") and "\0" not in name


def get_kind(event: Event) -> str:
    """Return the kind of an event, as the log has it under `event`."""
    return _KIND_NAMES[type(event)]


class EventLog:
    """The event log of a sweep. It is read once, and after that events are only appended.

    If a killed process left an incomplete last line, the line is dropped. An appended event survives the end of the
    process. A power failure can lose the events appended since the last fsync, which `append` calls at most once a
    second; the epochs of these events are trained again.

    Args:
        path: the file. It is created if it does not exist.

    Attributes:
        events: the events that the file contained when it was opened.

    Raises:
        UserError: the file is damaged, has a later format, or cannot be written. A damaged file and a file of a later
            format are not changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self.events, whole = _parse_events(content, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(self._file, whole)
        except OSError as error:
            raise UserError(explain_file_error(error, path, verb="written")) from error
        self._size = whole
        self._next_sync = 0.0

    def append(self, event: Event) -> None:
        """Append an event to the file.

        Raises:
            UserError: the event cannot be written. The file is then unchanged.
        """
        line = (json.dumps({"event": get_kind(event), **_to_json_values(event)}) + "\n").encode()
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._size + written)
            if time.monotonic() >= self._next_sync:  # fsync takes milliseconds, and a worker waits for its decision
                os.fsync(self._file)
                self._next_sync = time.monotonic() + _SYNC_EVERY_S
        except OSError as error:  # for example a disk that became full in the middle of the line
            os.ftruncate(self._file, self._size)
            raise UserError(explain_file_error(error, self.path, verb="written")) from error
        self._size += len(line)

    def close(self) -> None:
        """Write the file to the disk (fsync) and close it."""
        try:
            with add_file_name(self.path):
                os.fsync(self._file)
        finally:
            os.close(self._file)


def _to_json_values(event: Event) -> dict[str, Any]:
    """Return the fields of an event. A reason has only the fields that are not None, which keeps the file small."""
    values = asdict(event)
    for name in ("reason", "budget"):
        if isinstance(values.get(name), dict):
            values[name] = {key: value for key, value in values[name].items() if value is not None}
    return values


def read_events(path: Path) -> list[Event]:
    """Read the events of a sweep, which may still be running.

    Args:
        path: the event log. If it does not exist, there are no events.

    Raises:
        UserError: the file is damaged or has a later format.
    """
    return _parse_events(path.read_bytes() if path.exists() else b"", path)[0]


def _parse_events(content: bytes, path: Path) -> tuple[list[Event], int]:
    """Return the events, and how many bytes of `content` are complete lines."""
    events: list[Event] = []
    asked: set[int] = set()
    whole, num_lines = 0, content.count(b"\n")
    for line in scan_event_lines(content):
        problem = line.problem or (_find_order_problem(line.event, asked) if line.event else "")
        if problem:
            raise UserError(f"{path}: line {line.number} of {num_lines} {problem}")
        if line.event is not None:
            events.append(line.event)
            whole += line.num_bytes
    return events, whole


def _find_order_problem(event: Event, suggested: set[int]) -> str:
    """Explain why an event cannot follow the ones before it; empty if it can.

    Adds the trial of a `trial_suggested` event to `suggested`, the trials that have been suggested so far.
    """
    if isinstance(event, TrialSuggested):
        if event.trial in suggested:
            return f"suggests trial {event.trial} again; {_RESTORE_HINT}"
        suggested.add(event.trial)
    elif isinstance(event, (SweepOpened, NodeQuarantined, SweepClosed, SweepSteered)):
        return ""
    elif event.trial not in suggested:
        return f"is about trial {event.trial}, which no line before it suggests; {_RESTORE_HINT}"
    return ""


# --- reading lines ----------------------------------------------------------------------------------------------------

_RESTORE_HINT = "restore the file from a copy; nothing has been changed"


class EventLine(NamedTuple):
    """A line of the event log.

    Attributes:
        number: number of the line, counted from 1.
        num_bytes: length of the line, with its line end.
        event: the event; None if the line is incomplete or has a problem.
        problem: what is wrong with the line, as the end of a sentence that begins with its number. Only the last line
            can be incomplete (without a line end), and that is not a problem.
    """

    number: int
    num_bytes: int
    event: Event | None
    problem: str = ""


def scan_event_lines(content: bytes) -> Iterator[EventLine]:
    """Yield the lines of an event log, including those that cannot be parsed."""
    version = 1
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        num_bytes = len(line) + 1
        try:
            event = _parse_event(line, version)
        except _LineError as error:
            yield EventLine(number, num_bytes, None, str(error))
            continue
        if isinstance(event, SweepOpened):
            version = event.version
        yield EventLine(number, num_bytes, event)
    if lines[-1]:
        yield EventLine(len(lines), len(lines[-1]), None)


_FORMAT_WITH_NEW_NAMES = 4


class _LineError(Exception):
    """A line of the event log is invalid; the message says why."""


def _parse_event(line: bytes, version: int) -> Event:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise _LineError(f"is damaged: it is not JSON ({error}); {_RESTORE_HINT}") from error
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        raise _LineError(f"is damaged: it names no event; {_RESTORE_HINT}")
    name = values.pop("event")
    if name in ("opened", "sweep_opened"):
        version = _read_version(values)
    if version < _FORMAT_WITH_NEW_NAMES:
        name, values = upgrade_event(name, values)
    if name not in _KINDS:
        raise _LineError(f"has an event {name!r}, which is unknown: {_explain_unknown(version)}")
    event: Event = _build_record(_KINDS[name], values, name, version)
    return event


def _read_version(values: dict[str, Any]) -> int:
    """Read the format version from a `sweep_opened` line; without one it is set to 1."""
    version = values.setdefault("version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _LineError(f"is damaged: the version of its format is {version!r}; {_RESTORE_HINT}")
    if version > EVENTS_FORMAT:
        raise _LineError(f"starts events of format {version}, {_explain_later_format()}")
    return version


def _explain_later_format() -> str:
    return (
        f"but this version of the project reads formats up to {EVENTS_FORMAT}: use the later version that wrote it; "
        "nothing has been changed"
    )


def _explain_unknown(version: int) -> str:
    """Explain an event or field that the format of the file does not define."""
    return (
        f"the file is of format {version}, and this version of the project reads formats up to "
        f"{EVENTS_FORMAT}; if a later version wrote the line, use that version; nothing has been changed"
    )


def _build_record(kind: type[Any], values: dict[str, Any], name: str, version: int) -> Any:
    """Build an event, checkpoint record or reason from a JSON object. `name` appears in error messages.

    A field with a default value may be missing in format 1, in formats that do not have it, and in a reason.
    """
    fields_by_name = {each.name: each for each in fields(kind)}
    for each in fields_by_name.values():
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        is_optional = has_default and (kind is Reason or version < each.metadata.get("since", 2))
        if each.name not in values and not is_optional:
            raise _LineError(f"is damaged: {name!r} lacks {each.name!r}; {_RESTORE_HINT}")
    for key, value in values.items():
        if key not in fields_by_name:
            raise _LineError(f"has a field {key!r} of {name!r}, which is unknown: {_explain_unknown(version)}")
        if key in _NESTED_RECORDS[kind] and isinstance(value, dict):
            values[key] = _build_record(_NESTED_RECORDS[kind][key], value, key, version)
        elif not _has_type(value, _HINTS[kind][key]):
            raise _LineError(f"is damaged: {key!r} of {name!r} cannot be {value!r}; {_RESTORE_HINT}")
    if kind is CheckpointRecord and not stays_inside(values["file"]):
        raise _LineError(f"is damaged: 'file' of {name!r} cannot be {values['file']!r}; {_RESTORE_HINT}")
    if kind is SpaceRecord and not is_space_name(values["name"]):
        raise _LineError(f"is damaged: 'name' of {name!r} cannot be {values['name']!r}; {_RESTORE_HINT}")
    if not math.isfinite(values.get("at", 0.0)):
        raise _LineError(f"is damaged: 'at' of {name!r} cannot be {values['at']!r}; {_RESTORE_HINT}")
    return kind(**values)


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_has_type(each, arguments[0]) for each in value)
    if origin is not None:  # a mapping
        return isinstance(value, dict) and all(_has_type(each, arguments[1]) for each in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
