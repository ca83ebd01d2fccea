"""The ASHA scheduler: asynchronous successive halving (Li et al. 2018, arXiv:1810.05934)."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from handpose.errors import UserError
from handpose.schedulers.reason import Reason
from handpose.schedulers.rungs import AnyRung, ParetoRung, Rung
from handpose.schedulers.scheduler import Fifo, SchedulerDecision, SegmentStart
from handpose.search.space import Params


class Asha(Fifo):
    """Scheduler that stops or pauses unpromising trials early: asynchronous successive halving (Li et al. 2018).

    Trials are compared at rungs, the epochs grace_period * reduction_factor^k below max_epochs, rounded up. Only a
    report of exactly that epoch counts: a later report belongs to another fidelity.

    With folds, the last epoch of the first fold is a rung, so that a bad trial stops after one fold. It replaces a rung
    just before it (within a factor of the square root of reduction_factor), where trials would be compared by nearly
    the same results. Later rungs are rounded up to the end of a fold, because values change only there.

    Mode `stop` is the rule of Ray's AsyncHyperBandScheduler. A trial continues unless its result is worse than the
    1 - 1 / reduction_factor quantile of the trials that reached the rung before it. No checkpoint is needed, but the
    first trial at a rung always continues, and the next ones are compared with few others.

    Mode `promote` is Algorithm 2 of the paper. A trial pauses at a rung. It is promoted as soon as it is among the best
    floor(n / reduction_factor) of the n trials that reported there, which may be at once or much later. The paper never
    runs out of new trials, so one rule is added here: if no trial runs, none can start and none has reached max_epochs,
    the best waiting trial of the highest rung is promoted. So a short sweep has a winner too.

    With two objectives, a rung ranks its trials by Pareto fronts. Within a front, the order spreads the first trials
    over the front, starting with the best in the first objective (Schmucker et al. 2021, arXiv:2106.12639). In mode
    `stop` a trial then continues if it is among the first 1 + (n - 2) / reduction_factor, rounded down, of the n trials
    at the rung, itself included. If all costs are equal, every trial that the one-objective quantile stops is stopped
    here too. The reverse is not true, because ranks are not interpolated: the quantile lies between two recorded
    losses, and a trial whose loss lies between them or equals one of them may be stopped here. The time to rank grows
    linearly with n.

    Args:
        mode: `stop` ends unpromising trials at a rung. `promote` pauses them there, and may promote them later.
        grace_period: the epoch of the first rung.
        reduction_factor: about one trial in this many continues at each rung.
        brackets: the number of brackets. Bracket s has no rung below grace_period * reduction_factor^s. The bracket of
            a trial is drawn from the seed and the trial's number alone, with Ray's probabilities: the softmax of the
            brackets' numbers of rungs.
        max_epochs: the number of epochs of a complete trial.
        seed: the seed of the brackets.
        num_objectives: 1 or 2.
        folds: the number of folds that a complete trial is trained with.

    Raises:
        UserError: a value is out of range.
    """

    contract_variants = ({"mode": "promote", "brackets": 3, "reduction_factor": 2}, {"brackets": 2})

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
        folds: int = 1,
    ) -> None:
        _check_asha_options(mode, grace_period, reduction_factor, brackets, max_epochs // folds)
        self.needs_checkpoints = mode == "promote"
        self._grace_period, self._reduction_factor = grace_period, reduction_factor
        self._seed, self._folds = seed, folds
        self._costs: dict[int, float] = {}
        self._make_rung = Rung if num_objectives == 1 else partial(ParetoRung, costs=self._costs)
        self._brackets: list[dict[int, AnyRung]] = [{} for _ in range(brackets)]
        self._add_rungs(max_epochs)
        self._bracket_by_trial: dict[int, dict[int, AnyRung]] = {}
        self._running: set[int] = set()
        self._paused: dict[int, AnyRung] = {}
        self._has_complete_trial = False

    def _add_rungs(self, max_epochs: int) -> None:
        """Add the rungs below max_epochs that the brackets lack."""
        self._max_epochs = max_epochs
        all_epochs = _list_all_rung_epochs(self._grace_period, self._reduction_factor, max_epochs, self._folds)
        for skipped, bracket in enumerate(self._brackets):
            for epoch in all_epochs[skipped:]:
                bracket.setdefault(math.ceil(epoch - _ROUNDING), self._make_rung(self._reduction_factor))
        self.rungs = tuple(sorted(set().union(*self._brackets)))
        self._rungs_top_down = [
            bracket[epoch] for epoch in reversed(self.rungs) for bracket in self._brackets if epoch in bracket
        ]
        most = max(map(len, self._brackets))
        self._odds = [math.exp(len(bracket) - most) for bracket in self._brackets]

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Draw the trial's bracket."""
        self._bracket_by_trial[trial] = self._brackets[0]
        if len(self._brackets) > 1:
            rng = random.Random(f"bracket {self._seed} {trial}")  # text gives the same seed in every process
            self._bracket_by_trial[trial] = rng.choices(self._brackets, self._odds)[0]
        self._running.add(trial)

    def on_trial_cost(self, trial: int, cost: float) -> None:
        """Store the second objective, which ranks the trial together with its loss."""
        self._costs[trial] = cost

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Decide by the mode at a rung of the trial's bracket, and continue at every other epoch."""
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
        passes, self.reason = rung.compare(trial, loss)
        rung.record(trial, loss)
        return "continue" if passes else "stop"

    def _pause_or_continue(self, rung: AnyRung, trial: int, loss: float) -> SchedulerDecision:
        rung.record(trial, loss)
        rung.add_waiting(trial)
        self.reason = rung.explain_rank(trial)
        if self._find_promotable() == trial:
            rung.remove_waiting(trial)
            return "continue"
        self._paused[trial] = rung
        self._running.remove(trial)
        return "pause"

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """Return the best promotable trial of the highest rung that has one.

        If there is none, and the sweep would end without a complete trial, return the best waiting trial of the highest
        rung.
        """
        trial = self._find_promotable()
        if trial is None and not (can_start_trial or self._running or self._has_complete_trial):
            trial = next(
                (rung.find_best_waiting() for rung in self._rungs_top_down if rung.find_best_waiting() is not None),
                None,
            )
        return None if trial is None else SegmentStart(trial)

    def _find_promotable(self) -> int | None:
        return next((trial for rung in self._rungs_top_down if (trial := rung.find_promotable()) is not None), None)

    def explain_resume(self, start: SegmentStart) -> Reason:
        """Return the trial's place at its rung. The rule is `last_rung` if the trial cannot be promoted otherwise."""
        rung = self._paused[start.trial]
        reason = rung.explain_rank(start.trial)
        return reason if rung.find_promotable() == start.trial else replace(reason, rule="last_rung")

    def on_trial_resume(self, start: SegmentStart) -> None:
        """Remove the trial from the rung where it waited."""
        self._paused.pop(start.trial).remove_waiting(start.trial)
        self._running.add(start.trial)

    def on_trial_end(self, trial: int) -> None:
        """Stop waiting to promote the trial. Its result still counts at the rung."""
        self._running.discard(trial)
        if trial in self._paused:
            self._paused.pop(trial).remove_waiting(trial)

    def on_trial_reopen(self, trial: int) -> None:
        """Count the trial as one that runs, until it pauses at its next rung."""
        self._running.add(trial)

    def on_max_epochs(self, max_epochs: int) -> None:
        """Add the rungs up to the new number of epochs. Trials keep their brackets."""
        self._has_complete_trial = False
        self._add_rungs(max_epochs)

    def on_complete_trial(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Decide as at a report of this epoch, which may be a rung now."""
        self._running.add(trial)
        return self.on_trial_result(trial, epoch, loss)


_ROUNDING = 1e-9
"""Tolerance before rounding up: 100 * 1.1 is slightly above 110 in floating point, but means epoch 110."""


def _list_all_rung_epochs(grace_period: int, reduction_factor: float, max_epochs: int, folds: int) -> list[float]:
    epochs = list(_list_rung_epochs(grace_period, reduction_factor, max_epochs))
    if folds == 1:
        return epochs
    fold_epochs = max_epochs // folds
    early = [epoch for epoch in epochs if epoch * math.sqrt(reduction_factor) <= fold_epochs]
    later = [math.ceil(epoch / fold_epochs - _ROUNDING) * fold_epochs for epoch in epochs if epoch > fold_epochs]
    return sorted({*early, fold_epochs, *(epoch for epoch in later if epoch < max_epochs)})


def _list_rung_epochs(grace_period: int, reduction_factor: float, max_epochs: int) -> Iterator[float]:
    epoch = float(grace_period)
    while math.ceil(epoch - _ROUNDING) < max_epochs:
        yield epoch
        epoch *= reduction_factor


def _check_asha_options(mode: str, grace_period: int, reduction_factor: float, brackets: int, max_epochs: int) -> None:
    if mode not in ("stop", "promote"):
        raise UserError(f"scheduler.mode={mode} is unknown; scheduler=asha takes stop or promote")
    if not 1 <= grace_period <= max_epochs:
        raise UserError(
            f"scheduler.grace_period={grace_period} must be at least 1 and at most sweep.max_epochs={max_epochs}: "
            "it is the first epoch at which configs/scheduler/asha.yaml compares trials"
        )
    if not reduction_factor > 1:
        raise UserError(
            f"scheduler.reduction_factor={reduction_factor:g} must be above 1: one trial in "
            "reduction_factor continues at each rung (configs/scheduler/asha.yaml)"
        )
    if brackets < 1:
        raise UserError(f"scheduler.brackets={brackets} must be at least 1 (configs/scheduler/asha.yaml)")
