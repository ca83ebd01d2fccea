"""What happened in a sweep, in the order it happened: `events.jsonl`, the one truth that a sweep is resumed from.

An event is written before anything else is done about it. Applied again in the same order, the events lead to the same
state and the same decisions. Ray's own snapshots cannot serve: they are at least 10 s apart
and leave the scheduler's rungs out (seen on Ray 2.60).
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from handpose.errors import UserError

if TYPE_CHECKING:  # workers read events without Optuna and Hydra
    from handpose.sweep.space import Params

Decision = Literal["continue", "pause", "stop", "complete", "diverged", "infeasible"]
"""What becomes of a trial after a report. stop: by the scheduler. complete: it has reached sweep.max_epochs."""

CloseReason = Literal["finished", "spent", "interrupted", "halted"]

FailureKind = Literal["error", "mistake", "killed", "gpu_memory", "preempted", "lost", "worn"]
"""error: it raised. mistake: it raised a UserError, which comes again. killed: its process is gone. gpu_memory: there
was not enough. preempted: the cluster took the machine away. lost: the machine is gone, or out of reach. worn: a trial
before it left the worker unfit. These three are not the trial's fault."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a trial. file: relative to the sweep's folder. checksum: CRC-32 of its bytes."""

    file: str
    epoch: int
    size_bytes: int
    checksum: int


@dataclass(frozen=True)
class Opened:
    """A process began to run the sweep, or went on with it.

    at: seconds of the sweep's own time, as in all events. num_trials: that it is to run, which may grow. gpus: of each
    trial, where nothing else is said.
    """

    at: float
    num_trials: int
    gpus: float = 0.0


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
    checkpoint: Saved | None = None
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
    checkpoint: Saved | None
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
    `interrupted`, by hand; `halted`, since no trial works. Earlier versions wrote `finished` for a spent budget too.
    """

    at: float
    reason: CloseReason


Event: TypeAlias = Opened | Asked | Begun | Measured | Reported | Failed | SetAside | Ended | Closed

EVENTS = "events.jsonl"
"""The file, in the folder of a sweep."""

_SYNC_EVERY_S = 1.0
_KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Opened, Asked, Begun, Measured, Reported, Failed, SetAside, Ended, Closed)
}


class EventLog:
    """The file of events: read once, then only added to.

    `events` are those that were in it. What a killed writer left of a last line is cut off. An event that was added
    outlives the process; a machine that loses its power loses the last second, and those epochs are trained again.
    Raises UserError where a line before the last is damaged, or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self.events, whole = _parse(content, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(self._file, whole)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error})") from error
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
            raise UserError(f"{self.path} cannot be written ({error})") from error
        self._size += len(line)

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


def read_events(path: Path) -> list[Event]:
    """The events of a sweep, which may be running. Raises UserError for a damaged file."""
    return _parse(path.read_bytes() if path.exists() else b"", path)[0]


def _parse(content: bytes, path: Path) -> tuple[list[Event], int]:
    """The events, and how many bytes hold whole ones."""
    events: list[Event] = []
    whole = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            events.append(_event(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if any(rest.strip(b"\0\r\n ") for rest in lines[number:]):
                raise UserError(
                    f"{path}: line {number} of {len(lines)} is damaged ({error}); remove it and all after it, and the "
                    "sweep goes on from there"
                ) from error
            break
        whole += len(line)
    return events, whole


def _event(values: dict[str, Any]) -> Event:
    if values.get("checkpoint") is not None:
        values["checkpoint"] = Saved(**values["checkpoint"])
    event: Event = _KINDS[values.pop("event")](**values)
    return event
