"""Learning-rate schedules over the length of the run. A trial of 8 epochs decays within 8 epochs.

Each function takes the optimizer, the number of steps of the whole run and the number of steps of an epoch. It returns
a scheduler that Lightning steps after every batch.
"""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from handpose.errors import UserError


def warmup_cosine(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, warmup: float, final: float
) -> LambdaLR:
    """Create a linear warm-up followed by a half cosine.

    Args:
        optimizer: the optimizer.
        num_steps: number of steps of the run.
        steps_per_epoch: number of steps of an epoch.
        warmup: fraction of the run in which the learning rate rises to its full value
        final: final learning rate as a fraction of the full one
    """
    warmup_steps = max(1, round(warmup * num_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return _compute_half_cosine((step - warmup_steps) / max(1, num_steps - warmup_steps), final)

    return LambdaLR(optimizer, factor)


def flat_cosine(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, warmup: float, flat: float, final: float
) -> LambdaLR:
    """Create a linear warm-up, a constant part, and a half cosine (RTMPose, Jiang et al. 2023).

    Args:
        optimizer: the optimizer.
        num_steps: number of steps of the run.
        steps_per_epoch: number of steps of an epoch.
        warmup: fraction of the run in which the learning rate rises to its full value
        flat: fraction of the run, including the warm-up, after which the learning rate falls
        final: final learning rate as a fraction of the full one
    """
    warmup_steps = max(1, round(warmup * num_steps))
    flat_steps = max(warmup_steps, round(flat * num_steps))

    def factor(step: int) -> float:
        if step < flat_steps:
            return min(1.0, (step + 1) / warmup_steps)
        return _compute_half_cosine((step - flat_steps) / max(1, num_steps - flat_steps), final)

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, milestones: Sequence[float], gamma: float
) -> LambdaLR:
    """Create a schedule that multiplies the learning rate by `gamma` at each milestone.

    Args:
        optimizer: the optimizer.
        num_steps: number of steps of the run.
        steps_per_epoch: number of steps of an epoch.
        milestones: fractions of the run at which the learning rate falls, e.g. epochs 100 and 140 of 145 as
            [0.689655172, 0.965517241]
        gamma: factor on the learning rate at each milestone

    Raises:
        UserError: a milestone is not a fraction, for example because it is an epoch.
    """
    if not all(0.0 <= milestone < 1.0 for milestone in milestones):
        raise UserError(
            f"lr_schedule.milestones={list(milestones)} must be fractions of the run, from 0 to below 1; divide epochs "
            "by trainer.max_epochs"
        )
    steps = [round(milestone * num_steps) for milestone in milestones]

    def factor(step: int) -> float:
        return gamma ** sum(step >= milestone for milestone in steps)

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int) -> LambdaLR:
    """Create a schedule that keeps the learning rate constant."""
    return LambdaLR(optimizer, lambda step: 1.0)


def _compute_half_cosine(progress: float, final: float) -> float:
    """Return a factor that falls from 1 to `final` while `progress` rises from 0 to 1."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
