"""How long a run may take from its start to its last file, and the time that is left.

`budget.minutes`, `budget.hours` and `budget.finish_by` limit the wall-clock time of train.py and tune.py. For tune.py
the limit includes everything: data, preflight, trials, confirmation, retraining, test predictions and report.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

import handpose
from handpose.errors import UserError

AUTO_MINUTES = 5.0
"""The budget of `python tune.py` without arguments that say how much to train."""

_Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Hours = Annotated[float, Field(gt=0, le=10 * 365 * 24, allow_inf_nan=False)]
_Minutes = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]  # longer budgets are given in hours
_SAFETY_FRACTION = 0.02
_MAX_SAFETY_S = 120.0
_JOB_MARGIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """The configuration group `budget`. Only one of `minutes` and `hours` can be given.

    Attributes:
        minutes: minutes that the run may take. `auto`: 5 for a sweep on synthetic hands for which neither a number of
            trials nor a number of epochs is given, and no limit otherwise. None: no limit.
        hours: the same in hours.
        gpu_hours: GPU-hours that the trials, the confirmation and the retraining of a sweep may use together. None: no
            limit.
        finish_by: time at which the run must have finished, for example 2026-12-04T18:00. Without an offset from UTC,
            it is the local time of the machine on which the run is started or submitted. None: no limit.
    """

    minutes: _Minutes | Literal["auto"] | None
    hours: _Hours | None
    gpu_hours: _Amount | None
    finish_by: str | None

    def __post_init__(self) -> None:
        if isinstance(self.minutes, (int, float)) and self.hours is not None:
            raise UserError(
                f"budget.minutes={self.minutes:g} and budget.hours={self.hours:g} contradict each other; give only one"
            )
        self.parse_finish_by()

    @property
    def limit_s(self) -> float:
        """Seconds that the run may take; infinity without a limit."""
        if self.hours is not None:
            return 3600.0 * self.hours
        return 60.0 * self.minutes if isinstance(self.minutes, (int, float)) else math.inf

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit of any kind."""
        return math.isfinite(self.limit_s) or self.gpu_hours is not None or self.finish_by is not None

    def parse_finish_by(self) -> float:
        """Return `finish_by` in seconds since the epoch; infinity if it is None.

        Raises:
            UserError: it is not a date with a time.
        """
        return math.inf if self.finish_by is None else _parse_moment(self.finish_by).timestamp()

    def check_is_ahead(self) -> None:
        """Raise UserError if `finish_by` is in the past."""
        if self.parse_finish_by() <= time.time():
            raise UserError(
                f"budget.finish_by={self.finish_by} is in the past; give a later time, or budget.finish_by=null "
                "for none"
            )

    def describe(self) -> str:
        """Return the overrides that give this budget, for messages."""
        return self._format_overrides("{:g}".format, str)

    def describe_larger(self) -> str:
        """Return overrides that give a budget of twice the size, for messages."""
        return self._format_overrides(lambda amount: f"{2 * amount:g}", lambda finish_by: "LATER")

    def describe_removal(self) -> str:
        """Return the overrides that remove this budget, for messages."""
        return self._format_overrides(lambda amount: "null", lambda finish_by: "null")

    def _format_overrides(self, format_amount: Callable[[float], str], format_moment: Callable[[str], str]) -> str:
        values = {"minutes": self.minutes, "hours": self.hours, "gpu_hours": self.gpu_hours}
        given = [
            f"budget.{name}={format_amount(value)}" for name, value in values.items() if isinstance(value, (int, float))
        ]
        if self.finish_by is not None:
            given.append(f"budget.finish_by={format_moment(self.finish_by)}")
        return " ".join(given)


def add_offset(finish_by: str) -> str:
    """Add the offset from UTC to a local time, so that it is the same moment on machines in other time zones.

    Args:
        finish_by: a value of `budget.finish_by`. If it has an offset, it is returned unchanged.

    Raises:
        UserError: it is not a date with a time.
    """
    moment = _parse_moment(finish_by)
    return finish_by if moment.tzinfo else moment.astimezone().isoformat(timespec="seconds")


def _parse_moment(finish_by: str) -> datetime:
    try:
        if "T" not in finish_by and " " not in finish_by:
            raise ValueError("no time of day")
        moment = datetime.fromisoformat(finish_by)
        moment.timestamp()
        return moment
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"budget.finish_by={finish_by} is not a date with a time; write it like 2026-12-04T18:00"
        ) from error


class Deadline:
    """When a run has to be finished.

    Args:
        settings: the budget.
        started_at: when the run has started, in seconds since the epoch; None: when this process imported the package.
        used_s: seconds that earlier processes have used for the same run.
        environment: variables of this process, which may name the end of a job.

    Attributes:
        at: when it has to be finished, in seconds since the epoch; infinity without a limit.
        is_end_of_job: whether the end of a Slurm job comes before that of the budget.
    """

    def __init__(
        self,
        settings: BudgetSettings,
        *,
        started_at: float | None = None,
        used_s: float = 0.0,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        started_at = handpose.IMPORTED_AT if started_at is None else started_at
        own_at = min(started_at + settings.limit_s - used_s, settings.parse_finish_by())
        job_end = read_job_end(environment) if settings.is_limited else math.inf
        self.at = min(own_at, job_end)
        self.is_end_of_job = job_end < own_at

    @property
    def is_limited(self) -> bool:
        """Whether there is a deadline."""
        return math.isfinite(self.at)

    @property
    def left_s(self) -> float:
        """Seconds that are left to plan with. A small part of the time is kept in reserve. Infinity without a limit."""
        left_s = self.at - time.time()
        return left_s - min(_MAX_SAFETY_S, max(1.0, _SAFETY_FRACTION * left_s)) if self.is_limited else math.inf


def read_job_end(environment: Mapping[str, str]) -> float:
    """Return when the wall time of this process's Slurm job ends, less a margin; infinity outside of a job.

    A job of cluster/slurm.py is requeued and resumes the sweep. It hides its end from tune.py, as all its variables.

    Args:
        environment: the variables of this process.
    """
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) - _JOB_MARGIN_S if end.isdigit() else math.inf
