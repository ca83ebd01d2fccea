"""Checks an intervention of the user in a running sweep, and makes the event that executes it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from handpose.errors import UserError
from handpose.search.searcher import Searcher
from handpose.search.space import Space
from handpose.sweep.controller.history import History, snapshot_trial
from handpose.sweep.record.events import SweepSteered, TrialSteered
from handpose.sweep.record.interventions import BUDGET_LIMITS, Intervention


class SteeringChecks(NamedTuple):
    """Checks of a command that need the configuration of the sweep. Each raises UserError if the sweep cannot go on so.

    Attributes:
        epochs: checks the number of epochs of a complete trial.
        space: checks a search space.
    """

    epochs: Callable[[int], None] = lambda max_epochs: None
    space: Callable[[Space], None] = lambda space: None


def make_steering_event(
    given: Intervention, *, at: float, history: History, searcher: Searcher, checks: SteeringChecks
) -> TrialSteered | SweepSteered:
    """Check an intervention against the state of the sweep, and make its event.

    This changes nothing, except that with `epochs` the scheduler decides about the complete trials.

    Args:
        given: the intervention.
        at: the sweep's own time in seconds.
        history: the state of the sweep.
        searcher: checks what it is to try: a configuration that the user adds, or another search space.
        checks: the checks that need the configuration of the sweep.

    Raises:
        UserError: it is not possible now.
    """
    if given.action in ("stop", "retry", "keep"):
        return _make_trial_event(given, at=at, history=history)
    limits = dict(given.limits)
    if given.action == "add":
        assert given.params is not None, "checked when the intervention was read"
        searcher.check_point(given.params)
        if any(point.params == given.params for point in history.added):
            raise UserError("this configuration has been added already, and is about to start")
        num_wanted = len(history.trials) + len(history.added) + 1
        if num_wanted > history.num_trials:
            limits["num_trials"] = num_wanted
    elif given.action == "trials":
        _check_num_trials(limits["num_trials"], searcher)
    elif given.action == "budget":
        _check_budget(limits, history)
    assert given.action in ("add", "trials", "epochs", "space", "slots", "pause", "resume", "budget")
    params = None if given.params is None else dict(given.params)
    event = SweepSteered(at, given.id, given.action, limits, params, space=given.space)
    if refusal := history.find_refusal(event):
        raise UserError(refusal)
    if given.action == "space":
        return _limit_trials_to_space(event, history, searcher, checks.space)
    return event if given.action != "epochs" else _decide_more_epochs(event, history, checks.epochs)


def _limit_trials_to_space(
    event: SweepSteered, history: History, searcher: Searcher, check_space: Callable[[Space], None]
) -> SweepSteered:
    """Check the event that changes the search space, and complete it with the number of trials if that changes."""
    if event.space is None or history.load_space is None:
        raise UserError("this sweep searches no space")
    space = history.load_space(event.space)
    check_space(space)
    num_points = searcher.check_space(space, [snapshot_trial(trial) for trial in history.trials.values()])
    wanted = history.settings.num_trials
    num_trials = wanted if num_points is None else min(wanted, num_points)
    return event if num_trials == history.num_trials else replace(event, limits={"num_trials": num_trials})


def _decide_more_epochs(event: SweepSteered, history: History, check_epochs: Callable[[int], None]) -> SweepSteered:
    """Complete the event that raises the number of epochs with what happens to the complete trials."""
    max_epochs = int(event.limits["max_epochs"] or 0)
    check_epochs(max_epochs)
    held = {number for number in history.list_complete_trials() if history.retention.list_checkpoints(number)}
    trials, decisions = history.decide_more_epochs(max_epochs, held)
    return replace(event, trials=trials, decisions=decisions, epochs_before=history.settings.max_epochs)


def _make_trial_event(given: Intervention, *, at: float, history: History) -> TrialSteered:
    assert given.trial is not None, "checked when the intervention was read"
    assert given.action in ("stop", "retry", "keep")
    event = TrialSteered(at, given.id, given.action, given.trial)
    if refusal := history.find_refusal(event):
        raise UserError(refusal)
    is_over = history.trials[given.trial].row.is_over
    if given.action == "keep" and is_over and not history.retention.list_checkpoints(given.trial):
        raise UserError(
            f"trial {given.trial} has been stopped and has no checkpoint left to resume from; add starts its "
            "configuration again in sweeps where trials may repeat one"
        )
    return event


def _check_num_trials(num_trials: float | None, searcher: Searcher) -> None:
    num_points = searcher.num_points
    if num_points is not None and num_trials is not None and num_trials > num_points:
        raise UserError(f"the search space has {num_points} configurations, and none is trained twice")


def _check_budget(limits: Mapping[str, float | None], history: History) -> None:
    if limits.get("gpu_hours") is not None and not history.gpus:
        raise UserError("gpu_hours would never be spent: trials use no GPU; give time_budget_s instead")
    if limits.get("stop_when") is None:
        return
    if history.settings.second_objective is not None or history.perturbs_params:
        raise UserError(
            "stop_when needs trials that one metric compares, each with fixed parameters; give time_budget_s instead"
        )


def describe_steering(event: TrialSteered | SweepSteered, history: History) -> str:
    """Describe what an intervention has changed, for the answer to the user.

    Args:
        event: the event of the intervention.
        history: the state of the sweep, which includes the event.
    """
    if isinstance(event, TrialSteered):
        trial = history.trials[event.trial]
        checkpoints = history.retention.list_checkpoints(event.trial)
        epoch = checkpoints[-1].epoch if checkpoints else 0
        start = f"from epoch {epoch}" if epoch else "from scratch"
        then = f", and waits for a slot to go on {start}" if trial.row.state == "waiting" else ""
        settings = history.settings
        end = f"trains to sweep.max_epochs={settings.max_epochs}"
        if settings.folds > 1:
            end = f"trains to the end of all {settings.folds} folds, epoch {settings.trial_epochs}"
        return {
            "stop": f"trial {event.trial} is stopped",
            "retry": f"trial {event.trial} is retried{then}",
            "keep": f"trial {event.trial} {end}{then}",
        }[event.action]
    settings = history.settings
    match event.action:
        case "add":
            return f"the next new trial has this configuration; the sweep has {history.num_trials} trials"
        case "trials":
            return f"the sweep has {history.num_trials} trials, of which {len(history.trials)} have been started"
        case "epochs":
            return _describe_more_epochs(event, history)
        case "space":
            return _describe_space(event, history)
        case "slots":
            return f"the largest number of trials at a time is {settings.max_concurrent}; running ones are not ended"
        case "pause":
            return "no trial starts, and running ones are interrupted when they have saved a checkpoint"
        case "resume":
            return "trials start again"
    return ", ".join(
        f"sweep.{name}={'null' if event.limits[name] is None else format(event.limits[name], 'g')}"
        for name in BUDGET_LIMITS
        if name in event.limits
    )


def _describe_more_epochs(event: SweepSteered, history: History) -> str:
    counts = Counter(event.decisions)
    num_lost = sum(row.epochs == event.epochs_before and row.is_over for row in history.table.rows.values())
    num_lost -= counts["stop"]
    parts = {
        "go on": counts["continue"],
        f"wait at the rung at epoch {event.epochs_before}": counts["pause"],
        f"are stopped at the rung at epoch {event.epochs_before}": counts["stop"],
        "are stopped because they have no checkpoint": num_lost,
    }
    text = f"a complete trial has {history.settings.max_epochs} epochs instead of {event.epochs_before}"
    complete = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
    return f"{text}; of those that were complete, {complete}" if complete else text


def _describe_space(event: SweepSteered, history: History) -> str:
    num_begun = len(history.trials)
    name = "" if event.space is None else event.space.name
    said = f"trials are proposed from {name} from now on; the sweep has {history.num_trials} trials"
    return (
        f"{said}, which have all been started; trials N adds some"
        if num_begun == history.num_trials
        else (f"{said}, of which {num_begun} have been started")
    )
