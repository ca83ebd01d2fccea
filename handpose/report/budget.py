"""The plan of a budget, and what was used of it, for the terminal."""

import math
from collections.abc import Mapping

from handpose.report.formatting import format_duration


def format_budget_plan(
    *,
    limit: str,
    used_s: float,
    num_trials: int,
    max_epochs: int,
    trials_s: float,
    num_finalists: int,
    num_seeds: int,
    confirmation_s: float,
    retrain_epochs: float,
    schedule_epochs: int,
    retraining_s: float,
    asked: Mapping[str, int],
) -> str:
    """Format how a budget is divided, in a line for each part.

    Args:
        limit: the overrides that give the budget.
        used_s: seconds used so far.
        num_trials: number of trials.
        max_epochs: epochs of a complete trial.
        trials_s: seconds that the trials are expected to take.
        num_finalists: number of finalists that are confirmed.
        num_seeds: number of seeds of the confirmation; 0: no confirmation.
        confirmation_s: seconds that the confirmation is expected to take.
        retrain_epochs: epochs of the retraining that are expected to fit; 0: no retraining.
        schedule_epochs: epochs of the retraining without a budget.
        retraining_s: seconds that the retraining is expected to take.
        asked: what is smaller than configured, configuration key -> configured value.
    """
    parts = [f"up to {num_trials} trials of at most {max_epochs} epochs in {_format_rough(trials_s)}"]
    if num_finalists and num_seeds:
        finalists = f"{num_finalists} finalist{'' if num_finalists == 1 else 's'}"
        seeds = f"{num_seeds} seed{'' if num_seeds == 1 else 's'}"
        parts.append(f"{finalists} confirmed with {seeds} in {_format_rough(confirmation_s)}")
    if schedule_epochs:
        some = "all" if retrain_epochs >= schedule_epochs else f"{max(1, math.floor(retrain_epochs))} of"
        parts.append(f"{some} {schedule_epochs} epochs of the retraining in {_format_rough(retraining_s)}")
    lines = [f"the budget  {limit}, of which {_format_rough(used_s)} are used: {', '.join(parts)}"]
    if asked:
        values = ", ".join(f"{key}={value}" for key, value in asked.items())
        lines.append(f"{'':<12}reduced to fit; configured are {values}, which need a larger budget")
    return "\n".join(lines)


def format_budget_use(seconds: Mapping[str, float], *, limit: str) -> str:
    """Format how much time each part has taken.

    Args:
        seconds: part -> seconds.
        limit: the overrides that give the budget.
    """
    parts = ", ".join(f"{name} {format_duration(each)}" for name, each in seconds.items() if each >= 0.5)
    return f"time        {format_duration(sum(seconds.values()))} of {limit}: {parts}"


def _format_rough(seconds: float) -> str:
    return format_duration(seconds, is_rough=True)
