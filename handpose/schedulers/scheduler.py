"""Which trial goes on: the rules of early stopping, as configs/scheduler names them.

A rule hears of everything that happens in a sweep, in order, and what it answers depends on nothing else: no clock, no
generator that others draw from. So a sweep that was killed is brought back by telling a fresh rule the same things
again. Rules know nothing of Ray; population based training has a file of its own, population.py.
"""

from typing import Literal, NamedTuple, Protocol, TypeAlias

from handpose.search.space import Params

SchedulerDecision: TypeAlias = Literal["continue", "stop", "pause"]


class SegmentStart(NamedTuple):
    """A paused trial that goes on.

    From its own checkpoint; in a population from the newest checkpoint of trial `source`, with these complete `params`.
    """

    trial: int
    source: int | None = None
    params: Params | None = None


class Scheduler(Protocol):
    """Decides about trials, which are numbered in the order in which they begin; numbers may be missing.

    rungs: epochs at which trials are compared, ascending; empty where it compares at no fixed ones. needs_checkpoints:
    a trial must save a checkpoint at every rung, since it may pause there. takes_two: it does right by a sweep with two
    objectives. perturbs: it changes parameters on the way, so that trials that begin alike may end differently.
    """

    rungs: tuple[int, ...]
    needs_checkpoints: bool
    supports_two_objectives: bool
    perturbs_params: bool

    def on_trial_start(self, trial: int, params: Params) -> None:
        """A new trial runs, with all its parameters."""

    def on_trial_cost(self, trial: int, cost: float) -> None:
        """The second objective of a trial, smaller is better, where there is one; before its first report."""

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """What becomes of a trial after `epoch`, counted from 1; its epochs ascend, and may have gaps.

        loss: finite, smaller is better. The rule takes it that its answer is followed.
        """

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """The paused trial that should run before a new one begins; a question that changes nothing.

        can_begin: there are new trials left to begin.
        """

    def on_trial_resume(self, start: SegmentStart) -> None:
        """That one runs again."""

    def on_trial_end(self, trial: int) -> None:
        """A trial has diverged, failed for good or been cut off: it never runs again, and nobody goes on from it.

        What it reported still counts.
        """


class Fifo:
    """Trains every trial to its end; the other rules begin from this one."""

    rungs: tuple[int, ...] = ()
    needs_checkpoints = False
    supports_two_objectives = True
    perturbs_params = False

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Nothing to note."""

    def on_trial_cost(self, trial: int, cost: float) -> None:
        """Nothing to note."""

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Go on."""
        return "continue"

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """Nobody pauses."""
        return None

    def on_trial_resume(self, start: SegmentStart) -> None:
        """Nobody pauses."""

    def on_trial_end(self, trial: int) -> None:
        """Nothing to note."""
