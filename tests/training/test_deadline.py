"""A training that has to end in time, with a clock that the test moves: one second for each batch."""

import math

import pytest
import pytorch_lightning as pl
import torch

from handpose.training import deadline as deadline_module
from handpose.training.checkpoints import read_checkpoint
from handpose.training.deadline import FitToDeadline
from handpose.training.fit import fit
from handpose.training.schedules import warmup_cosine

OVERRIDES = ["pictures.every_n_steps=0", "logger=none", "lr_schedule=warmup_cosine", "trainer.max_epochs=16"]
NUM_STEPS_PER_EPOCH = 4  # of 18 images
OVERRIDES += ["lr_schedule.warmup=0.05", "lr_schedule.final=0.01", "optimizer.lr=0.005", "data.batch_size=4"]


class Clock(pl.Callback):
    """Seconds pass with the batches, and a deadline is at a given second."""

    def __init__(self, monkeypatch, *, finish_s, batch_s=lambda step: 1.0, validation_batch_s=0.0):
        self.now, self.finish_s, self.batch_s, self.validation_batch_s = 0.0, finish_s, batch_s, validation_batch_s
        self.rates, self.num_validations = [], 0
        monkeypatch.setattr(deadline_module, "time", self)
        monkeypatch.setattr(deadline_module, "_TEST_OVERHEAD_S", 0.0)

    def monotonic(self):
        return self.now

    @property
    def left_s(self):
        return self.finish_s - self.now

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.now += self.batch_s(trainer.global_step)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.now += self.validation_batch_s

    def on_validation_end(self, trainer, pl_module):
        self.num_validations += 1


@pytest.fixture
def train(configure, folders):
    def trained(clock, *, num_test_batches=0):
        callback = FitToDeadline(clock, num_test_batches=num_test_batches)
        return fit(configure(*OVERRIDES), folders, callbacks=[clock, callback], quiet=True)

    return trained


@pytest.fixture
def whole(configure):
    """The learning rates of the whole training, from the schedule alone."""
    config = configure(*OVERRIDES)
    num_steps = 16 * NUM_STEPS_PER_EPOCH
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    schedule = warmup_cosine(optimizer, num_steps=num_steps, steps_per_epoch=1, warmup=0.05, final=0.01)
    return [config.optimizer.lr * schedule.lr_lambdas[0](step) for step in range(num_steps)]


def test_a_training_that_fits_is_not_changed(train, whole, monkeypatch):
    clock = Clock(monkeypatch, finish_s=len(whole) + 100)
    train(clock)
    assert clock.rates == pytest.approx(whole)


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_a_training_ends_in_time_with_its_learning_rate_at_the_end_of_the_schedule(train, whole, monkeypatch, share):
    finish_s = round(share * len(whole))
    clock = Clock(monkeypatch, finish_s=finish_s)
    result = train(clock)
    assert finish_s - 2 <= len(clock.rates) <= finish_s
    assert clock.rates[-1] == pytest.approx(whole[-1], abs=0.03 * max(whole))
    assert clock.rates[:3] == pytest.approx(whole[:3])
    assert clock.num_validations == math.ceil(len(clock.rates) / NUM_STEPS_PER_EPOCH)  # the last one within an epoch
    assert read_checkpoint(result.last_checkpoint)["global_step"] == len(clock.rates)


def test_a_machine_that_becomes_slower_shortens_the_rest(train, whole, monkeypatch):
    half = len(whole) // 2
    clock = Clock(monkeypatch, finish_s=1.5 * len(whole), batch_s=lambda step: 1.0 if step < half else 4.0)
    train(clock)
    assert clock.finish_s - 8 < clock.now <= clock.finish_s
    assert clock.rates[:half] == pytest.approx(whole[:half])
    assert clock.rates[-1] < 0.1 * max(whole)


def test_time_is_kept_for_the_validations_and_the_predictions(train, whole, monkeypatch):
    clock = Clock(monkeypatch, finish_s=40, validation_batch_s=0.5)
    train(clock, num_test_batches=20)
    assert 26 <= clock.now <= 30


def test_a_deadline_that_has_passed_leaves_one_step_and_a_checkpoint(train, monkeypatch):
    clock = Clock(monkeypatch, finish_s=-5)
    result = train(clock)
    assert len(clock.rates) == 1
    assert clock.num_validations == 1
    assert result.last_checkpoint is not None
