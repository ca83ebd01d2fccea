"""Makes schedulers and searchers from the configuration and the settings of a sweep."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from handpose.config import find_target
from handpose.errors import UserError
from handpose.schedulers.scheduler import Scheduler
from handpose.schema import bind_arguments
from handpose.search.searcher import Searcher
from handpose.search.space import Space
from handpose.sweep.record.settings import SweepSettings


def bind_scheduler(
    scheduler: Callable[..., Scheduler], sweep: SweepSettings, space: Space | None
) -> Callable[[], Scheduler]:
    """Make a function that creates new schedulers as configured.

    Args:
        scheduler: the partial class from configs/scheduler. Of `max_epochs` (of a complete trial, over all its folds),
            `folds`, `seed`, `space` and `num_objectives` it receives those that its signature asks for.
        sweep: settings of the sweep.
        space: search space of the sweep.

    Returns:
        A function that returns a new scheduler with each call.

    Raises:
        UserError: the scheduler's values are invalid, it does not support the sweep's second objective or its folds, or
            `sweep.stop_when` does not support one of them.
    """
    num_objectives = 1 if sweep.second_objective is None else 2
    fresh = bind_arguments(
        scheduler,
        max_epochs=sweep.trial_epochs,
        folds=sweep.folds,
        seed=sweep.seed,
        space=space,
        num_objectives=num_objectives,
    )
    if sweep.folds > 1 and fresh().perturbs_params:
        raise UserError(
            f"sweep.folds={sweep.folds} trains the same configuration with every fold, but {type(fresh()).__name__} "
            "changes parameters during training; give sweep.folds=1, or another scheduler such as scheduler=asha"
        )
    if not fresh().supports_two_objectives and sweep.second_objective is not None:
        raise UserError(
            f"sweep.second_objective={sweep.second_objective} needs a scheduler for two objectives, such as "
            f"scheduler=asha or fifo: {type(fresh()).__name__} compares trials by one objective alone"
        )
    if sweep.stop_when is not None and (sweep.second_objective is not None or fresh().perturbs_params):
        other = (
            f"{type(fresh()).__name__} changes parameters during training"
            if sweep.second_objective is None
            else f"sweep.second_objective={sweep.second_objective} has no single best trial"
        )
        raise UserError(
            f"sweep.stop_when={sweep.stop_when:g} needs trials that one metric compares, each with fixed parameters: "
            f"{other}; limit the sweep by sweep.time_budget_s or budget.hours instead"
        )
    return fresh


def make_searcher(
    searcher: Callable[..., Searcher], sweep: SweepSettings, space: Space, *, repeats: bool, **arguments: Any
) -> Searcher:
    """Make the searcher of a sweep.

    Args:
        searcher: the partial class from configs/searcher. It receives those arguments that its signature asks for.
        sweep: settings of the sweep.
        space: search space of the sweep.
        repeats: whether the same point may be suggested again, as for a population.
        arguments: further arguments, such as `folder`, `resume` or `defaults`.

    Raises:
        UserError: the searcher refuses an option.
    """
    return bind_arguments(
        searcher,
        space=space,
        name=sweep.name,
        metric=sweep.target.name,
        mode=sweep.target.mode,
        second_objective=sweep.second_objective,
        max_epochs=sweep.trial_epochs,
        folds=sweep.folds,
        seed=sweep.seed,
        repeats=repeats,
        **arguments,
    )()


def restore_scheduler(config: Mapping[str, Any], sweep: SweepSettings) -> Scheduler | None:
    """Make the scheduler of a sweep that is only read, not run.

    The folder of the sweep may belong to someone else, so that no class is made but those that configs/scheduler names.

    Args:
        config: the group `scheduler` from its sweep.yaml.
        sweep: settings of the sweep.

    Returns:
        A new scheduler, which knows no search space; None if it needs one, or if this version of the project does not
        have the scheduler, or has it with other options.
    """
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        scheduler = find_target("scheduler", config.get("_target_"))
        return None if scheduler is None else bind_scheduler(partial(scheduler, **options), sweep, None)()
    except (ImportError, AttributeError, TypeError, ValueError, UserError):
        return None
