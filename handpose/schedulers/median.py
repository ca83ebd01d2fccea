"""The median stopping scheduler (Golovin et al. 2017, Google Vizier)."""

import math
from bisect import insort
from collections import defaultdict
from typing import NamedTuple

from handpose.errors import UserError
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Fifo, SchedulerDecision


class MedianStopping(Fifo):
    """Scheduler with the median stopping rule of Google Vizier (Golovin et al. 2017), as in Ray's MedianStoppingRule.

    From the grace period on, a trial stops at an epoch if its best loss so far is above the median of the other trials'
    mean losses. The mean is taken from grace_period to that epoch, and only trials that were trained that far count.

    Args:
        grace_period: the first epoch at which a trial may stop.
        min_samples_required: the number of other trials that must have been trained that far.

    Raises:
        UserError: an argument is below 1.
    """

    supports_two_objectives = False  # the first alone would stop trials that are good in the second
    selects_only_at_rungs = False

    def __init__(self, *, grace_period: int, min_samples_required: int) -> None:
        for name, value in (("grace_period", grace_period), ("min_samples_required", min_samples_required)):
            if value < 1:
                raise UserError(f"scheduler.{name}={value} must be at least 1 (configs/scheduler/median.yaml)")
        self._grace_period = grace_period
        self._min_samples_required = min_samples_required
        self._histories: dict[int, _LossHistory] = {}
        self._means: defaultdict[int, list[float]] = defaultdict(list)  # epoch -> ascending, of all trained that far

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Stop the trial if its best loss is above the median of the other trials' means, otherwise continue."""
        before = self._histories.get(trial, _LossHistory())
        history = before.extend(epoch, loss, is_counted=epoch >= self._grace_period)
        self._histories[trial] = history
        if before.num_counted:
            for unreported in range(before.epoch + 1, epoch):
                insort(self._means[unreported], before.mean)
        if epoch < self._grace_period:
            return "continue"
        others, is_worse = self._means[epoch], False
        if len(others) >= self._min_samples_required:
            median = _compute_median(others)
            is_worse = history.best > median
            self.reason = Reason("median", value=history.best, cutoff=median, num_compared=len(others) + 1)
        insort(others, history.mean)
        return "stop" if is_worse else "continue"


class _LossHistory(NamedTuple):
    """The losses of a trial so far.

    Attributes:
        epoch: the last reported epoch.
        best: the best loss.
        total: the sum of the losses since the grace period, which the mean is taken of.
        num_counted: the number of these losses.
    """

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
