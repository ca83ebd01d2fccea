"""Learning-rate schedules whose horizon is the run's own: a trial of 8 epochs decays within 8 epochs.

Each is called with the optimizer, the steps of the whole run and the steps of an epoch, and gives a scheduler that
Lightning steps after every batch.
"""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from handpose.errors import UserError


def warmup_cosine(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, warmup: float, final: float
) -> LambdaLR:
    """Linear warm-up over the first `warmup` of the run, then a half cosine down to `final` of the learning rate."""
    warmup_steps = max(1, round(warmup * num_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return _compute_half_cosine((step - warmup_steps) / max(1, num_steps - warmup_steps), final)

    return LambdaLR(optimizer, factor)


def flat_cosine(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, warmup: float, flat: float, final: float
) -> LambdaLR:
    """Linear warm-up over the first `warmup` of the run, the learning rate as it is until `flat` of the run, and then a
    half cosine down to `final` of it (RTMPose, Jiang et al. 2023)."""
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
    """Multiply the learning rate by gamma at each milestone.

    milestones: fractions of the run, so that a run of any length reaches them. Raises UserError for other numbers, such
    as epochs.
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
    """The learning rate as it is."""
    return LambdaLR(optimizer, lambda step: 1.0)


def _compute_half_cosine(progress: float, final: float) -> float:
    """From 1 down to `final` while progress goes from 0 to 1."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
