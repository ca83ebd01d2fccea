"""Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934): trials are compared at rungs."""

import math
import random
from collections.abc import Iterator
from functools import partial
from typing import Literal

from handpose.errors import UserError
from handpose.schedulers.rungs import AnyRung, ParetoRung, Rung
from handpose.schedulers.scheduler import Fifo, SchedulerDecision, SegmentStart
from handpose.search.space import Params


class Asha(Fifo):
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934).

    Trials are compared at the rungs, epochs grace_period * reduction_factor^k below max_epochs, rounded up. Only a
    report of exactly that epoch counts: one that comes later belongs to another fidelity. brackets: so many kinds of
    trial, of which kind s has no rung below grace_period * reduction_factor^s; the kind is drawn for each trial, with
    Ray's odds (those with more rungs more often, by exp), from the seed and its number alone.

    mode `stop`: the rule of Ray's AsyncHyperBandScheduler. A trial goes on at once unless it is below the
    1 - 1 / reduction_factor quantile of those that were there before it; so no checkpoint is needed, but the first ones
    pass whatever they are worth.
    mode `promote`: Algorithm 2 of the paper. A trial pauses at a rung, and goes on when it is among the best
    floor(n / reduction_factor) of the n that have reported there, at once or however late. Beyond the paper, which
    never runs out of new trials: when nothing runs, nothing may begin and no trial has reached max_epochs, the best of
    the highest rung goes on, so that a short sweep has a winner too.

    With two objectives trials are ranked at a rung by fronts, and within a front so that the first ones are spread over
    it (Schmucker et al. 2021, arXiv:2106.12639), the best of the first objective at the head. Mode `stop` then lets a
    trial go on that is among the first 1 + (n - 2) / reduction_factor of the n that are there with it, rounded down.
    Where all cost the same, no trial goes on that the quantile of one objective stops. The reverse can happen, since
    ranks are not interpolated: the quantile lies between two recorded losses, and a trial whose loss lies between them,
    or equals one of them, may stop here. Ranking takes time in proportion to n.

    Raises UserError when the values do not go together.
    """

    def __init__(
        self,
        *,
        mode: Literal["stop", "promote"],
        grace_period: int,
        reduction_factor: float,
        brackets: int,
        max_epochs: int,
        seed: int,
        num_objectives: Literal[1, 2] = 1,
    ) -> None:
        _check_asha_options(mode, grace_period, reduction_factor, brackets, max_epochs)
        self.needs_checkpoints = mode == "promote"
        self._max_epochs = max_epochs
        self._seed = seed
        all_epochs = list(_list_rung_epochs(grace_period, reduction_factor, max_epochs))
        self._costs: dict[int, float] = {}
        make_rung = Rung if num_objectives == 1 else partial(ParetoRung, costs=self._costs)
        self._brackets: list[dict[int, AnyRung]] = [
            {math.ceil(epoch - _ROUNDING): make_rung(reduction_factor) for epoch in all_epochs[skipped:]}
            for skipped in range(brackets)
        ]
        self.rungs = tuple(sorted(set().union(*self._brackets)))
        self._rungs_top_down = [
            bracket[epoch] for epoch in reversed(self.rungs) for bracket in self._brackets if epoch in bracket
        ]
        most = max(map(len, self._brackets))
        self._odds = [math.exp(len(bracket) - most) for bracket in self._brackets]
        self._bracket_by_trial: dict[int, dict[int, AnyRung]] = {}
        self._running: set[int] = set()
        self._paused: dict[int, AnyRung] = {}
        self._has_complete_trial = False

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Draw the trial's bracket."""
        self._bracket_by_trial[trial] = self._brackets[0]
        if len(self._brackets) > 1:
            rng = random.Random(f"bracket {self._seed} {trial}")  # text is hashed the same way in every process
            self._bracket_by_trial[trial] = rng.choices(self._brackets, self._odds)[0]
        self._running.add(trial)

    def on_trial_cost(self, trial: int, cost: float) -> None:
        """What it is ranked by beside its losses."""
        self._costs[trial] = cost

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """At a rung: go on, stop or pause, as the mode says; anywhere else: go on."""
        if epoch >= self._max_epochs:
            self._has_complete_trial = True
            self._running.discard(trial)
            return "continue"
        rung = self._bracket_by_trial[trial].get(epoch)
        if rung is None:
            return "continue"
        decide = self._pause_or_continue if self.needs_checkpoints else self._stop_or_continue
        return decide(rung, trial, loss)

    def _stop_or_continue(self, rung: AnyRung, trial: int, loss: float) -> SchedulerDecision:
        passes = rung.can_pass(trial, loss)
        rung.record(trial, loss)
        return "continue" if passes else "stop"

    def _pause_or_continue(self, rung: AnyRung, trial: int, loss: float) -> SchedulerDecision:
        rung.record(trial, loss)
        rung.add_waiting(trial)
        if self._find_promotable() == trial:
            rung.remove_waiting(trial)
            return "continue"
        self._paused[trial] = rung
        self._running.remove(trial)
        return "pause"

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """From the top rung down, the best trial waiting that is among its rung's best 1 / reduction_factor."""
        trial = self._find_promotable()
        if trial is None and not (can_start_trial or self._running or self._has_complete_trial):
            trial = next(
                (rung.find_best_waiting() for rung in self._rungs_top_down if rung.find_best_waiting() is not None),
                None,
            )
        return None if trial is None else SegmentStart(trial)

    def _find_promotable(self) -> int | None:
        return next((trial for rung in self._rungs_top_down if (trial := rung.find_promotable()) is not None), None)

    def on_trial_resume(self, start: SegmentStart) -> None:
        """It has been promoted from the rung that it waited on."""
        self._paused.pop(start.trial).remove_waiting(start.trial)
        self._running.add(start.trial)

    def on_trial_end(self, trial: int) -> None:
        """It is not promoted; its place in the rung stays taken."""
        self._running.discard(trial)
        if trial in self._paused:
            self._paused.pop(trial).remove_waiting(trial)


_ROUNDING = 1e-9
"""100 * 1.1 is a little above 110 in floating point, and is epoch 110 all the same."""


def _list_rung_epochs(grace_period: int, reduction_factor: float, max_epochs: int) -> Iterator[float]:
    epoch = float(grace_period)
    while math.ceil(epoch - _ROUNDING) < max_epochs:
        yield epoch
        epoch *= reduction_factor


def _check_asha_options(mode: str, grace_period: int, reduction_factor: float, brackets: int, max_epochs: int) -> None:
    if mode not in ("stop", "promote"):
        raise UserError(f"scheduler.mode={mode} is not known: configs/scheduler/asha.yaml takes stop or promote")
    if not 1 <= grace_period <= max_epochs:
        raise UserError(
            f"scheduler.grace_period={grace_period} must be at least 1 and at most sweep.max_epochs={max_epochs}: "
            "it is the first epoch at which configs/scheduler/asha.yaml compares trials"
        )
    if not reduction_factor > 1:
        raise UserError(
            f"scheduler.reduction_factor={reduction_factor:g} must be above 1: with configs/scheduler/asha.yaml one "
            "trial in so many goes on at each rung"
        )
    if brackets < 1:
        raise UserError(f"scheduler.brackets={brackets} must be at least 1 (configs/scheduler/asha.yaml)")
