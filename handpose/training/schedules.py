"""Learning-rate schedules whose horizon is the run's own: a trial of 8 epochs decays within 8 epochs.

Each is called with the optimizer, the steps of the whole run and the steps of an epoch, and gives a scheduler that
Lightning steps after every batch.
"""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, warmup: float, final: float
) -> LambdaLR:
    """Linear warm-up over the first `warmup` of the run, then a half cosine down to `final` of the learning rate."""
    warmup_steps = max(1, round(warmup * num_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return _half_cosine((step - warmup_steps) / max(1, num_steps - warmup_steps), final)

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
        return _half_cosine((step - flat_steps) / max(1, num_steps - flat_steps), final)

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int, milestones: Sequence[int], gamma: float
) -> LambdaLR:
    """The learning rate times gamma at the beginning of each of the given epochs (counted from 0)."""

    def factor(step: int) -> float:
        return gamma ** sum(step >= milestone * steps_per_epoch for milestone in milestones)

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, *, num_steps: int, steps_per_epoch: int) -> LambdaLR:
    """The learning rate as it is."""
    return LambdaLR(optimizer, lambda step: 1.0)


def _half_cosine(progress: float, final: float) -> float:
    """From 1 down to `final` while progress goes from 0 to 1."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
