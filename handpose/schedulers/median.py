"""The median stopping rule (Golovin et al. 2017, Google Vizier)."""

import math
from bisect import insort
from collections import defaultdict
from typing import NamedTuple

from handpose.errors import UserError
from handpose.schedulers.scheduler import Fifo, SchedulerDecision


class MedianStopping(Fifo):
    """The median stopping rule (Golovin et al. 2017, Google Vizier), as Ray's MedianStoppingRule has it.

    From grace_period on a trial stops at an epoch when its best loss so far is above the median of what the others
    had on average from grace_period to that epoch; of them those count that have been trained as far, and there must be
    min_samples_required. Raises UserError for values that make no sense.
    """

    supports_two_objectives = False  # by the first alone it would stop what the second one is good for

    def __init__(self, *, grace_period: int, min_samples_required: int) -> None:
        for name, value in (("grace_period", grace_period), ("min_samples_required", min_samples_required)):
            if value < 1:
                raise UserError(f"scheduler.{name}={value} must be at least 1 (configs/scheduler/median.yaml)")
        self._grace_period = grace_period
        self._min_samples_required = min_samples_required
        self._histories: dict[int, _LossHistory] = {}
        self._means: defaultdict[int, list[float]] = defaultdict(list)  # epoch -> ascending, of all trained that far

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Stop, or go on."""
        before = self._histories.get(trial, _LossHistory())
        history = before.extend(epoch, loss, is_counted=epoch >= self._grace_period)
        self._histories[trial] = history
        if before.num_counted:
            for unreported in range(before.epoch + 1, epoch):
                insort(self._means[unreported], before.mean)
        if epoch < self._grace_period:
            return "continue"
        others = self._means[epoch]
        is_worse = len(others) >= self._min_samples_required and history.best > _compute_median(others)
        insort(others, history.mean)
        return "stop" if is_worse else "continue"


class _LossHistory(NamedTuple):
    """A trial so far: its best loss, and the sum of those that count in its mean."""

    epoch: int = 0
    best: float = math.inf
    total: float = 0.0
    num_counted: int = 0

    def extend(self, epoch: int, loss: float, *, is_counted: bool) -> "_LossHistory":
        total, num_counted = (self.total + loss, self.num_counted + 1) if is_counted else (self.total, self.num_counted)
        return _LossHistory(epoch, min(self.best, loss), total, num_counted)

    @property
    def mean(self) -> float:
        return self.total / self.num_counted


def _compute_median(ascending: list[float]) -> float:
    middle = len(ascending) // 2
    return (ascending[middle] + ascending[-1 - middle]) / 2
