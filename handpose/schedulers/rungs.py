"""The rungs of successive halving: the epochs at which trials are compared, with the results reported there."""

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from handpose.pareto import rank_points
from handpose.schedulers.reason import Reason


class RungComparison(NamedTuple):
    """Whether a trial passes a rung, and why."""

    passes: bool
    reason: Reason


class Rung:
    """The results that trials reported at one epoch, and the trials that wait there for a promotion.

    Both are sorted lists of (loss, trial), the best first.
    """

    def __init__(self, reduction_factor: float) -> None:
        self._reduction_factor = reduction_factor
        self._results: list[tuple[float, int]] = []
        self._waiting: list[tuple[float, int]] = []
        self._losses: dict[int, float] = {}

    def record(self, trial: int, loss: float) -> None:
        insort(self._results, (loss, trial))
        self._losses[trial] = loss

    def compare(self, trial: int, loss: float) -> RungComparison:
        """Compare a loss that is not recorded yet with the quantile of the results recorded so far."""
        cutoff, rank = self.compute_cutoff(), bisect_left(self._results, (loss, trial)) + 1
        reason = Reason("rung", value=loss, cutoff=cutoff, rank=rank, num_compared=len(self._results) + 1)
        return RungComparison(cutoff is None or loss <= cutoff, reason)

    def compute_cutoff(self) -> float | None:
        """Return the loss above which a trial stops, or None if there is no result yet.

        This is NumPy's linear percentile of the negated losses, which Ray uses. It repeats NumPy's arithmetic step by
        step for the same rounding, but takes a list that is already sorted.
        """
        last = len(self._results) - 1
        if last < 0:
            return None
        place = last * ((1 - 1 / self._reduction_factor) * 100 / 100)
        below = math.floor(place)
        low, high = (-self._results[max(last - i, 0)][0] for i in (below, below + 1))
        part = place - below
        return -(low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part))

    def add_waiting(self, trial: int) -> None:
        insort(self._waiting, (self._losses[trial], trial))

    def remove_waiting(self, trial: int) -> None:
        del self._waiting[bisect_left(self._waiting, (self._losses[trial], trial))]

    def find_best_waiting(self) -> int | None:
        """Return the best waiting trial, or None if none waits."""
        return self._waiting[0][1] if self._waiting else None

    def find_promotable(self) -> int | None:
        """Return the best waiting trial, or None if it cannot be promoted yet.

        It can be promoted if it is among the best floor(n / reduction_factor) of the n trials recorded here.
        """
        if not self._waiting:
            return None
        return self.find_best_waiting() if bisect_left(self._results, self._waiting[0]) < self._num_promotable else None

    def explain_rank(self, trial: int) -> Reason:
        """Return the place of a recorded trial, and how many of the best can be promoted."""
        loss = self._losses[trial]
        rank, num_results = bisect_left(self._results, (loss, trial)) + 1, len(self._results)
        return Reason("rung", value=loss, rank=rank, num_compared=num_results, num_passing=self._num_promotable)

    @property
    def _num_promotable(self) -> int:
        return math.floor(len(self._results) / self._reduction_factor)


class ParetoRung:
    """The same as `Rung`, for two objectives.

    Args:
        reduction_factor: about one trial in this many continues.
        costs: trial -> its second objective. The caller fills it.
    """

    def __init__(self, reduction_factor: float, *, costs: Mapping[int, float]) -> None:
        self._reduction_factor = reduction_factor
        self._costs = costs
        self._losses: dict[int, float] = {}
        self._waiting: set[int] = set()
        self._promotable_trials: list[int] | None = None

    def record(self, trial: int, loss: float) -> None:
        self._losses[trial] = loss
        self._promotable_trials = None

    def compare(self, trial: int, loss: float) -> RungComparison:
        """Rank a trial with this loss, which is not recorded yet, together with the results recorded so far.

        With equal costs this is at least as strict as `Rung.compare`; see `Asha`.
        """
        losses = {**self._losses, trial: loss}
        num_passing = 1 + math.floor(max(0, len(losses) - 2) / self._reduction_factor)
        passing = self._sort_best_first(losses, max_trials=num_passing)
        return RungComparison(trial in passing, _explain_pareto_rank(trial, losses, passing, num_passing))

    def add_waiting(self, trial: int) -> None:
        self._waiting.add(trial)

    def remove_waiting(self, trial: int) -> None:
        self._waiting.remove(trial)

    def find_best_waiting(self) -> int | None:
        """Return the best waiting trial, or None if none waits."""
        return next((trial for trial in self._sort_best_first(self._losses) if trial in self._waiting), None)

    def find_promotable(self) -> int | None:
        """Return the best waiting trial, or None if it cannot be promoted yet.

        It can be promoted if it is among the best floor(n / reduction_factor) of the n trials recorded here.
        """
        if not self._waiting:
            return None
        return next((trial for trial in self._list_promotable_trials() if trial in self._waiting), None)

    def explain_rank(self, trial: int) -> Reason:
        """Return the place of a recorded trial if it is among the best, and how many of these can be promoted."""
        return _explain_pareto_rank(trial, self._losses, self._list_promotable_trials(), self._num_promotable)

    @property
    def _num_promotable(self) -> int:
        return math.floor(len(self._losses) / self._reduction_factor)

    def _list_promotable_trials(self) -> list[int]:
        if self._promotable_trials is None:
            self._promotable_trials = self._sort_best_first(self._losses, max_trials=self._num_promotable)
        return self._promotable_trials

    def _sort_best_first(self, losses: Mapping[int, float], max_trials: int | None = None) -> list[int]:
        trials = sorted(losses)  # equal results are ordered by number, not by time
        order = rank_points([(losses[trial], self._costs[trial]) for trial in trials], max_points=max_trials)
        return [trials[index] for index in order]


def _explain_pareto_rank(trial: int, losses: Mapping[int, float], best: list[int], num_passing: int) -> Reason:
    """Return the place of a trial among the best ones; the places of the others are not computed."""
    rank = best.index(trial) + 1 if trial in best else None
    return Reason("pareto_rung", value=losses[trial], rank=rank, num_compared=len(losses), num_passing=num_passing)


AnyRung: TypeAlias = Rung | ParetoRung
