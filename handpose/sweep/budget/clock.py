"""Counts the time that a sweep has used, over all processes and jobs that have run it.

The time is kept in budget.json in the sweep's folder. A process that is killed loses at most the last two seconds of
its count. The time between two processes does not count.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

import handpose
from handpose.budget import BudgetSettings, Deadline
from handpose.errors import UserError
from handpose.files import write_json

BUDGET_FILE = "budget.json"
"""Name of the file in the folder of a sweep."""

Stage = Literal["preparation", "trials", "confirmation", "retraining", "report"]

_SAVE_EVERY_S = 2.0


_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


@dataclass
class Decisions:
    """What has been decided about the rest of the budget, so that a resumed sweep does not change its mind.

    Attributes:
        planned_keys: configuration keys whose values were planned, and not given by the user.
        reserved_s: seconds that the trials leave for the confirmation and the retraining.
        reserved_gpu_s: GPU-seconds that they leave for these.
        top_k: number of finalists that are confirmed; None before the confirmation.
        seeds: number of seeds of the confirmation; None before the confirmation.
        least_top_k: number of finalists of an earlier confirmation, which a new plan keeps.
        least_seeds: number of its seeds.
        asked_trials: number of trials that the user configured; None if nothing was planned.
        asked_top_k: number of finalists that the user configured; None if nothing was planned.
        asked_seeds: number of seeds that the user configured; None if nothing was planned.
    """

    planned_keys: list[str] = field(default_factory=list)
    reserved_s: _Seconds = 0.0
    reserved_gpu_s: _Seconds = 0.0
    top_k: _Count | None = None
    seeds: _Count | None = None
    least_top_k: _Count = 0
    least_seeds: _Count = 0
    asked_trials: _Count | None = None
    asked_top_k: _Count | None = None
    asked_seeds: _Count | None = None

    def reopen_confirmation(self) -> None:
        """Let the confirmation be planned again. It is not going to be smaller than before."""
        self.least_top_k, self.least_seeds = self.top_k or self.least_top_k, self.seeds or self.least_seeds
        self.top_k = self.seeds = None


@dataclass
class _Content:
    """What budget.json holds."""

    seconds: dict[Stage, _Seconds]
    decisions: Decisions


class BudgetClock:
    """Counts the seconds of each stage of a sweep.

    Args:
        settings: the budget.
        folder: the folder of the sweep. If it has a budget.json, the times in it are added.

    Attributes:
        seconds: stage -> seconds used, over all processes.
        decisions: what has been decided. `save` makes changes permanent.

    Raises:
        UserError: budget.json is damaged.
    """

    def __init__(self, settings: BudgetSettings, folder: Path) -> None:
        self.seconds: dict[str, float] = {}
        self.decisions = Decisions()
        self._settings = settings
        self._file = folder / BUDGET_FILE
        self._stage: Stage = "preparation"
        self._lock, self._save_lock = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._read()
        self._earlier_s = self.used_s
        self._counted_until = handpose.IMPORTED_AT

    @property
    def used_s(self) -> float:
        """Seconds used so far, over all processes, as of the last count."""
        with self._lock:
            return sum(self.seconds.values())

    @property
    def deadline(self) -> Deadline:
        """When the sweep must be finished."""
        return Deadline(self._settings, used_s=self._earlier_s)

    @property
    def is_limited(self) -> bool:
        """Whether the sweep has a budget."""
        return self._settings.is_limited

    @property
    def gpu_s(self) -> float:
        """GPU-seconds that the budget allows; infinity without a limit."""
        return math.inf if self._settings.gpu_hours is None else 3600.0 * self._settings.gpu_hours

    def describe_limit(self) -> str:
        """Return the overrides that give the budget, and whether the end of a job limits it further."""
        return self._settings.describe() + (" (the Slurm job ends earlier)" if self.deadline.is_end_of_job else "")

    def describe_larger(self) -> str:
        """Return overrides that give a larger budget."""
        return self._settings.describe_larger()

    def describe_removal(self) -> str:
        """Return the overrides that remove the budget."""
        return self._settings.describe_removal()

    def count_used_s(self) -> float:
        """Return the seconds used until now, over all processes."""
        self._count()
        return self.used_s

    def enter(self, stage: Stage) -> None:
        """Count the time from now on to another stage."""
        self._count()
        self._stage = stage
        self.save()

    def start_saving(self) -> None:
        """Save the times every few seconds from now on. Without a budget, or if this is done already, do nothing.

        Call this only when no other process runs the sweep.
        """
        if self.is_limited and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="budget clock", daemon=True)
            self.save()
            self._thread.start()

    @contextlib.contextmanager
    def close_at_end(self) -> Iterator[None]:
        """Save the times for the last time at the end of the block."""
        try:
            yield
        finally:
            self._stop.set()
            if self._thread is not None:
                self._thread.join()
                self.save()

    def _run(self) -> None:
        while not self._stop.wait(_SAVE_EVERY_S):
            with contextlib.suppress(OSError):  # a full disk: the next time may work
                self.save()

    def _count(self) -> None:
        now = time.time()
        with self._lock:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + max(0.0, now - self._counted_until)
            self._counted_until = now

    def save(self) -> None:
        """Save the times and the decisions. This does nothing before `start_saving`."""
        self._count()
        if self._thread is None:
            return
        with self._save_lock:  # held while the times are read, so that a thread with older ones does not write last
            with self._lock:
                seconds = {stage: round(seconds, 1) for stage, seconds in self.seconds.items()}
            write_json(self._file, {"seconds": seconds, "decisions": asdict(self.decisions)}, indent=2, is_durable=True)

    def _read(self) -> None:
        try:
            content = TypeAdapter(_Content).validate_json(self._file.read_bytes(), strict=True)
        except FileNotFoundError:
            return
        except ValidationError as error:
            found = error.errors()[0]
            place = ".".join(map(str, found["loc"]))
            raise UserError(
                f"{self._file} is damaged ({place + ': ' if place else ''}{found['msg']}); remove it, and the time of "
                "the sweep is counted from now on"
            ) from error
        self.seconds, self.decisions = (
            {str(stage): used_s for stage, used_s in content.seconds.items()},
            content.decisions,
        )
