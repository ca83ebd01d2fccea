"""Builds fresh schedulers from the configuration of a sweep."""

import inspect
from collections.abc import Callable
from typing import Any

from handpose.errors import UserError
from handpose.schedulers.scheduler import Scheduler
from handpose.search.space import Space
from handpose.sweep.record.settings import SweepSettings


def bind_scheduler(scheduler: Callable[..., Scheduler], sweep: SweepSettings, space: Space) -> Callable[[], Scheduler]:
    """What makes fresh rules, as configs/scheduler has them; each is given what its signature asks for.

    Raises UserError at once where the scheduler's values do not go together, or not with two objectives.
    """
    known: dict[str, Any] = {
        "max_epochs": sweep.max_epochs,
        "seed": sweep.seed,
        "space": space,
        "num_objectives": 1 if sweep.second_objective is None else 2,
    }
    wanted = inspect.signature(scheduler).parameters
    extra = {name: value for name, value in known.items() if name in wanted}

    def fresh() -> Scheduler:
        return scheduler(**extra)

    if not fresh().supports_two_objectives and sweep.second_objective is not None:
        raise UserError(
            f"sweep.second_objective={sweep.second_objective} needs scheduler=asha or fifo: {type(fresh()).__name__} "
            "compares trials by one objective alone"
        )
    return fresh
