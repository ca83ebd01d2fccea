"""What happened in a sweep, in the order it happened: `events.jsonl`, the one truth that a sweep is resumed from.

An event is written before anything else is done about it. Applied again in the same order, the events lead to the same
state and the same decisions. Ray's own snapshots cannot serve: they are at least 10 s apart
and leave the scheduler's rungs out (seen on Ray 2.60).
"""

import json
import math
import os
import time
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from handpose.errors import UserError, explain, naming

if TYPE_CHECKING:  # workers read events without Optuna and Hydra
    from handpose.search.space import Params

EVENTS_FORMAT = 3
"""Version of the file's format; to be raised with every new kind of event, field or value.

Each `opened` line carries the version of the program that continues the file. Files of format 1 carry none. Format 3
tells a spent budget from a finished sweep, and ends a sweep when every point of a finite space has been tried.
"""

Decision = Literal["continue", "pause", "stop", "complete", "diverged", "infeasible"]
"""What becomes of a trial after a report. stop: by the scheduler. complete: it has reached sweep.max_epochs."""

CloseReason = Literal["finished", "spent", "interrupted", "halted"]

FailureKind = Literal["error", "mistake", "killed", "gpu_memory", "preempted", "lost", "worn"]
"""error: it raised. mistake: it raised a UserError, which comes again. killed: its process is gone. gpu_memory: there
was not enough. preempted: the cluster took the machine away. lost: the machine is gone, or out of reach. worn: a trial
before it left the worker unfit. These three are not the trial's fault."""


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint of a trial. file: relative to the sweep's folder. checksum: CRC-32 of its bytes."""

    file: str
    epoch: int
    size_bytes: int
    checksum: int


@dataclass(frozen=True)
class Opened:
    """A process began to run the sweep, or went on with it.

    at: seconds of the sweep's own time, as in all events. num_trials: that it is to run, which may grow. gpus: of each
    trial, where nothing else is said. version: of the format of the events that follow.
    """

    at: float
    num_trials: int
    gpus: float = 0.0
    version: int = EVENTS_FORMAT


@dataclass(frozen=True)
class Asked:
    """The searcher proposed a trial."""

    at: float
    trial: int
    params: "Params"


@dataclass(frozen=True)
class Begun:
    """A stretch of a trial was sent to a worker.

    stretch: counted from 1. epoch: trained before. gpus: its share; None: as all. source: the trial that it goes on
    from, if not itself; checkpoint: that one's, in a place of its own; params: changed ones.
    """

    at: float
    trial: int
    stretch: int
    epoch: int
    gpus: float | None = None
    source: int | None = None
    checkpoint: CheckpointRecord | None = None
    params: "Params | None" = None


@dataclass(frozen=True)
class Measured:
    """What a trial costs, measured before it is trained."""

    at: float
    trial: int
    costs: Mapping[str, float]
    decision: Decision


@dataclass(frozen=True)
class Reported:
    """A trial reported an epoch.

    resumed_from: the epoch of the checkpoint that its stretch began with. note: what went wrong without ending it.
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


@dataclass(frozen=True)
class Failed:
    """A stretch failed.

    retry: the trial is tried again, from its newest checkpoint, with this share of a GPU. node: that it ran on; empty
    where that is not known.
    """

    at: float
    trial: int
    kind: FailureKind
    cause: str
    traceback: str
    retry: bool
    gpus: float | None = None
    node: str = ""


@dataclass(frozen=True)
class SetAside:
    """One trial after the other failed on a node, while others work: nothing more runs there, and no try was lost."""

    at: float
    node: str


@dataclass(frozen=True)
class Ended:
    """A trial ended without a report: the budget was spent, nothing was left to promote it, or it came back early."""

    at: float
    trial: int
    state: Literal["stopped", "failed"]
    cause: str = ""


@dataclass(frozen=True)
class Closed:
    """The process that ran the sweep left it in order.

    reason: `finished`, nothing is left to run; `spent`, a budget is used up, and a larger one lets the sweep go on;
    `interrupted`, by hand; `halted`, since no trial works. Before format 3 a spent budget was `finished`, too.
    """

    at: float
    reason: CloseReason


Event: TypeAlias = Opened | Asked | Begun | Measured | Reported | Failed | SetAside | Ended | Closed

EVENTS_FILE = "events.jsonl"
"""The file, in the folder of a sweep."""

_SYNC_EVERY_S = 1.0
_KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Opened, Asked, Begun, Measured, Reported, Failed, SetAside, Ended, Closed)
}

_HINTS = {
    kind: typing.get_type_hints(kind, localns={"Params": dict[str, Any]})
    for kind in (CheckpointRecord, *_KINDS.values())
}


class EventLog:
    """The file of events: read once, then only added to.

    `events` are those that were in it. A last line without a line end, which a killed process left, is dropped. An
    event that was added outlives the process; a machine that loses its power loses the last second, and those epochs
    are trained again. Raises UserError for a damaged file and for one of a later format, both of which are left as
    they are, and where the file cannot be written.
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
            raise UserError(explain(error, path, verb="written")) from error
        self._size = whole
        self._next_sync = 0.0

    def append(self, event: Event) -> None:
        """Write an event. Raises UserError, with nothing added, where that cannot be done."""
        line = (json.dumps({"event": type(event).__name__.lower(), **asdict(event)}) + "\n").encode()
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._size + written)
            if time.monotonic() >= self._next_sync:  # takes milliseconds, while a worker waits for its decision
                os.fsync(self._file)
                self._next_sync = time.monotonic() + _SYNC_EVERY_S
        except OSError as error:  # such as a full disk, in the middle of the line
            os.ftruncate(self._file, self._size)
            raise UserError(explain(error, self.path, verb="written")) from error
        self._size += len(line)

    def close(self) -> None:
        try:
            with naming(self.path):
                os.fsync(self._file)
        finally:
            os.close(self._file)


def read_events(path: Path) -> list[Event]:
    """The events of a sweep, which may be running. Raises UserError for a damaged file and one of a later format."""
    return _parse_events(path.read_bytes() if path.exists() else b"", path)[0]


def _parse_events(content: bytes, path: Path) -> tuple[list[Event], int]:
    """The events, and how many bytes hold whole lines."""
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
    """Why an event cannot follow those before it. asked: trials so far, to which that of an `asked` line is added."""
    if isinstance(event, Asked):
        if event.trial in suggested:
            return f"asks for trial {event.trial} again; {_RESTORE_HINT}"
        suggested.add(event.trial)
    elif not isinstance(event, (Opened, SetAside, Closed)) and event.trial not in suggested:
        return f"is about trial {event.trial}, which no line before it asks for; {_RESTORE_HINT}"
    return ""


# --- reading lines ----------------------------------------------------------------------------------------------------

_RESTORE_HINT = "restore the file from a copy; nothing has been changed"


class EventLine(NamedTuple):
    """A line of the file, numbered from 1.

    event: None where the line is torn or has a problem. problem: what is wrong with the line, the end of a sentence
    that begins with its number. A torn line, which has no line end, can only be the last one, and is no problem.
    """

    number: int
    num_bytes: int
    event: Event | None
    problem: str = ""


def scan_event_lines(content: bytes) -> Iterator[EventLine]:
    """The lines of a file of events, also those that cannot be read."""
    version = 1
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        num_bytes = len(line) + 1
        try:
            event = _parse_event(line, version)
        except _LineError as error:
            yield EventLine(number, num_bytes, None, str(error))
            continue
        if isinstance(event, Opened):
            version = event.version
        yield EventLine(number, num_bytes, event)
    if lines[-1]:
        yield EventLine(len(lines), len(lines[-1]), None)


class _LineError(Exception):
    """What is wrong with a line."""


def _parse_event(line: bytes, version: int) -> Event:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise _LineError(f"is damaged: it is no JSON ({error}); {_RESTORE_HINT}") from error
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        raise _LineError(f"is damaged: it names no event; {_RESTORE_HINT}")
    name = values.pop("event")
    if name == "opened":
        version = _read_version(values)
    if name not in _KINDS:
        raise _LineError(f"has an event {name!r}, which is unknown: {_explain_unknown(version)}")
    event: Event = _build_record(_KINDS[name], values, name, version)
    return event


def _read_version(values: dict[str, Any]) -> int:
    """The format that an `opened` line announces."""
    version = values.setdefault("version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _LineError(f"is damaged: the version of its format is {version!r}; {_RESTORE_HINT}")
    if version > EVENTS_FORMAT:
        raise _LineError(f"begins events of format {version}, {_explain_later_format()}")
    return version


def _explain_later_format() -> str:
    return (
        f"but this version of the project reads formats up to {EVENTS_FORMAT}: use the later version that wrote it; "
        "nothing has been changed"
    )


def _explain_unknown(version: int) -> str:
    """For what this format does not have, which a file of it must not have either."""
    return (
        f"the file is of format {version}, and this version of the project reads formats up to "
        f"{EVENTS_FORMAT}; if a later "
        "version wrote the line, use that version; nothing has been changed"
    )


def _build_record(kind: type[Any], values: dict[str, Any], name: str, version: int) -> Any:
    """An instance from a JSON object. name: for messages."""
    known = {field.name: field for field in fields(kind)}
    for field in known.values():
        is_required = field.default is MISSING or version > 1
        if is_required and field.name not in values:
            raise _LineError(f"is damaged: {name!r} lacks {field.name!r}; {_RESTORE_HINT}")
    for key, value in values.items():
        if key not in known:
            raise _LineError(f"has a field {key!r} of {name!r}, which is unknown: {_explain_unknown(version)}")
        hint = _HINTS[kind][key]
        if CheckpointRecord in typing.get_args(hint) and isinstance(value, dict):
            values[key] = _build_record(CheckpointRecord, value, key, version)
        elif not _has_type(value, hint):
            raise _LineError(f"is damaged: {key!r} of {name!r} cannot be {value!r}; {_RESTORE_HINT}")
    if not math.isfinite(values.get("at", 0.0)):
        raise _LineError(f"is damaged: 'at' of {name!r} cannot be {values['at']!r}; {_RESTORE_HINT}")
    return kind(**values)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None:  # a mapping
        return isinstance(value, dict) and all(_has_type(each, arguments[1]) for each in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
