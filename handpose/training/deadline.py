"""Ends a training in time, with its learning-rate schedule complete."""

import math
import statistics
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl

from handpose.budget import Deadline
from handpose.training.module import HandPose

_NUM_TIMED_STEPS = 20
_MIN_TIMED_STEPS = 3
_BROADCAST_EVERY_STEPS = 5
_TEST_OVERHEAD_S = 5.0
_VALIDATION_STEP_RATIO = 0.4
"""Time of a validation batch as a fraction of that of a training step, until a validation has been timed."""


class FitToDeadline(pl.Callback):
    """Fits a training into the time that is left, without planning for a constant speed of the machine.

    If the remaining steps do not fit, the learning-rate schedule advances faster than the steps, so that the learning
    rate has fallen to its final value when the time is over. The training then ends within an epoch, with a validation
    and a checkpoint. If everything fits, nothing changes. The speed is that of the last steps, so that how much fits is
    known anew when the machine becomes slower or faster.

    Some time is kept for the last validation, and for the predictions of the test split after the training. It is
    estimated from the time of a validation.

    With several processes the first one decides, and all follow.

    Args:
        deadline: when the run must be over.
        num_test_batches: number of batches of the test split times the views of each image.
    """

    def __init__(self, deadline: Deadline, *, num_test_batches: int) -> None:
        self.deadline = deadline
        self.num_test_batches = num_test_batches
        self._step_times_s: deque[float] = deque(maxlen=_NUM_TIMED_STEPS)
        self._last_step_at = math.nan  # until the second step: the first one of a run is slower
        self._validation_began = 0.0
        self._validation_s = math.nan
        self._extra_rate = 0.0
        self._due_steps = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if math.isfinite(self._last_step_at):  # the validation before does not count
            self._last_step_at = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_s = time.monotonic() - self._validation_began

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, HandPose)
        now = time.monotonic()
        if math.isfinite(self._last_step_at):
            self._step_times_s.append(now - self._last_step_at)
        self._last_step_at = now
        if trainer.world_size == 1 or batch_idx % _BROADCAST_EVERY_STEPS == 0:
            is_over, self._extra_rate = trainer.strategy.broadcast(self._decide(trainer, pl_module))
            trainer.should_stop = trainer.should_stop or is_over
        self._advance_schedule(trainer)

    def _decide(self, trainer: pl.Trainer, module: HandPose) -> tuple[bool, float]:
        """Return whether to stop, and how much faster than the steps the schedule has to advance."""
        if len(self._step_times_s) < _MIN_TIMED_STEPS:
            return self.deadline.left_s <= 0, 0.0
        step_s = statistics.fmean(self._step_times_s)
        batch_s = self._estimate_validation_batch_s(trainer, step_s)
        validation_s = batch_s * _count_validation_batches(trainer)
        training_s = self.deadline.left_s - validation_s - batch_s * self.num_test_batches - _TEST_OVERHEAD_S
        validation_share_s = validation_s / (trainer.num_training_batches * (trainer.check_val_every_n_epoch or 1))
        num_fitting = training_s / (step_s + validation_share_s) / trainer.accumulate_grad_batches
        num_left = min(num_fitting, module.num_steps - trainer.global_step)
        schedule_left = module.num_steps - trainer.lr_scheduler_configs[0].scheduler.last_epoch
        return training_s <= 0, max(0.0, schedule_left / max(1.0, num_left) - 1.0)

    def _advance_schedule(self, trainer: pl.Trainer) -> None:
        self._due_steps += self._extra_rate / trainer.accumulate_grad_batches
        while self._due_steps >= 1.0:
            self._due_steps -= 1.0
            for config in trainer.lr_scheduler_configs:
                config.scheduler.step()  # type: ignore[call-arg]  # the schedules of this project take no metric

    def _estimate_validation_batch_s(self, trainer: pl.Trainer, step_s: float) -> float:
        num_batches = _count_validation_batches(trainer)
        if num_batches and math.isfinite(self._validation_s):
            return self._validation_s / num_batches
        return _VALIDATION_STEP_RATIO * step_s


def _count_validation_batches(trainer: pl.Trainer) -> int:
    """Count the batches that this process validates; 0 without a validation split."""
    batches = trainer.num_val_batches
    return int(sum(batches) if isinstance(batches, list) else batches)
