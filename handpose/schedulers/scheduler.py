"""The protocol of schedulers, which configs/scheduler selects, and the FIFO scheduler.

A scheduler is notified of everything that happens in a sweep, in order, and its decisions depend on nothing else: no
clock but the time of the event, and no random generator that others draw from. So a killed sweep is resumed by
notifying a new scheduler of the same events. Schedulers do not depend on Ray.
"""

from typing import Literal, NamedTuple, Protocol, TypeAlias

from handpose.schedulers.reason import Reason
from handpose.search.space import Params

SchedulerDecision: TypeAlias = Literal["continue", "stop", "pause"]


class SegmentStart(NamedTuple):
    """A paused trial to resume.

    Attributes:
        trial: the number of the trial.
        source: None to resume from the trial's own checkpoint; in a population, the trial whose newest checkpoint to
            resume from.
        params: with a source, all parameters to continue with.
    """

    trial: int
    source: int | None = None
    params: Params | None = None


class Scheduler(Protocol):
    """Protocol of a scheduler. Trials are numbered in the order of their start; numbers may be missing.

    A scheduler may also have `on_space(space)`: the user has changed the search space, from which new trials come. A
    scheduler whose constructor asks for `space`, but which lacks this method, cannot go on then.

    Attributes:
        rungs: the epochs at which trials are compared, ascending. Empty if there are no fixed ones.
        needs_checkpoints: a trial must save a checkpoint at every rung, because it may pause there.
        supports_two_objectives: the scheduler can be used with two objectives.
        perturbs_params: the scheduler changes parameters during training, so that trials with the same initial
            parameters may end with different ones.
        selects_only_at_rungs: trials stop or pause only at an epoch in `rungs`, and only because of a comparison with
            the trials that reached the same rung. The report then shows these epochs, and takes the trials at the first
            of them for a sample that nobody has selected from.
        repeats_decisions: the same events give the same decisions on every machine, so that a resumed sweep makes its
            past decisions again to check its events. False if they depend on rounding, as those of a fitted model do:
            then the scheduler is given its past decisions (`on_past_result`).
        reason: why `on_trial_result` decides as it does. The sweep sets it to None before each call and stores what the
            call has set it to; None if nothing was compared. No decision depends on it.
        now: time of the event, in seconds of the sweep's own time. The sweep sets it before each call.
        can_start_trial: there are new trials left to start. The sweep sets it before `on_trial_result`.
    """

    rungs: tuple[int, ...]
    needs_checkpoints: bool
    supports_two_objectives: bool
    perturbs_params: bool
    selects_only_at_rungs: bool
    repeats_decisions: bool
    reason: Reason | None
    now: float
    can_start_trial: bool

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Handle the start of a new trial.

        Args:
            trial: the number of the trial.
            params: all its parameters.
        """

    def on_trial_cost(self, trial: int, cost: float) -> None:
        """Handle the cost of a trial, the second objective if there is one. Called before its first report.

        Args:
            trial: the number of the trial.
            cost: the measured cost; smaller is better.
        """

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Decide whether a trial continues, stops or pauses after a report.

        The scheduler assumes that its decision is followed, unless the user keeps the trial: after `pause`,
        `on_trial_resume` follows at once, and after `stop` the trial reports further epochs.

        Args:
            trial: the number of the trial.
            epoch: the reported epoch, counted from 1. The epochs of a trial ascend and may have gaps.
            loss: the reported loss, which is finite; smaller is better.
        """

    def on_past_result(self, trial: int, epoch: int, loss: float, decision: SchedulerDecision) -> None:
        """Handle a report whose decision was made before the sweep was resumed.

        Called instead of `on_trial_result` if the scheduler does not repeat its decisions. It is also called while the
        sweep runs, with `continue`, for a trial that the user keeps.

        Args:
            trial: the number of the trial.
            epoch: the reported epoch.
            loss: the reported loss.
            decision: the decision that was made.
        """

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """Return the paused trial to resume before a new one starts, or None. This changes no state.

        Args:
            can_start_trial: there are new trials left to start.
        """

    def explain_resume(self, start: SegmentStart) -> Reason | None:
        """Explain why a trial is resumed, right after `choose_trial_to_resume` has chosen it. This changes no state."""

    def on_trial_resume(self, start: SegmentStart) -> None:
        """Handle the resumption of a paused trial."""

    def on_segment_start(self, trial: int) -> None:
        """Handle the start of a segment: of a new trial, of one that is resumed, and of one that is retried."""

    def on_trial_end(self, trial: int) -> None:
        """Handle the end of a trial that diverged, failed for good, or ended without a decision of the scheduler.

        It does not run again unless the user wants it, and no other trial resumes from its checkpoints. Its reports
        still count.

        Args:
            trial: the number of the trial.
        """

    def on_trial_reopen(self, trial: int) -> None:
        """Handle a trial that goes on after its end, because the user retries or keeps it. It reports further epochs.

        Args:
            trial: the number of the trial, which had ended by a decision of the scheduler or by `on_trial_end`.
        """

    def on_max_epochs(self, max_epochs: int) -> None:
        """Handle a larger number of epochs of a complete trial, to which the user has raised it.

        `on_complete_trial` follows for each trial that was complete. A scheduler without these two methods cannot go on
        with more epochs.

        Args:
            max_epochs: the new number.
        """

    def on_complete_trial(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Decide whether a trial that was complete continues, stops or pauses now that trials have more epochs.

        Its last report has been given to `on_trial_result`, which took it for the end of the trial. The decision must
        not depend on rounding, even if `repeats_decisions` is False.

        Args:
            trial: the number of the trial.
            epoch: its last epoch.
            loss: the loss that it reported there.
        """


class Fifo:
    """Scheduler that trains every trial to its end; the base class of the other schedulers."""

    rungs: tuple[int, ...] = ()
    needs_checkpoints = False
    supports_two_objectives = True
    perturbs_params = False
    selects_only_at_rungs = True
    repeats_decisions = True
    reason: Reason | None = None
    now = 0.0
    can_start_trial = True

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Do nothing."""

    def on_trial_cost(self, trial: int, cost: float) -> None:
        """Do nothing."""

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Continue always."""
        return "continue"

    def on_past_result(self, trial: int, epoch: int, loss: float, decision: SchedulerDecision) -> None:
        """Do nothing."""

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """Return None, because no trial pauses."""
        return None

    def explain_resume(self, start: SegmentStart) -> Reason | None:
        """Return None: no reason is given."""
        return None

    def on_trial_resume(self, start: SegmentStart) -> None:
        """Do nothing, because no trial pauses."""

    def on_segment_start(self, trial: int) -> None:
        """Do nothing."""

    def on_trial_end(self, trial: int) -> None:
        """Do nothing."""

    def on_trial_reopen(self, trial: int) -> None:
        """Do nothing."""

    def on_max_epochs(self, max_epochs: int) -> None:
        """Do nothing."""

    def on_complete_trial(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Continue."""
        return "continue"
