"""The moving average of the weights: what it is, and that everything that is kept or measured is of it."""

import pytest
import pytorch_lightning as pl
import torch

from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import fit, prepare_run

QUIET = ["pictures.every_n_steps=0", "logger=none"]


class Weights(pl.Callback):
    """All weights and statistics of the network after every step, and during every validation."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(copy_state(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.validations.append(copy_state(pl_module))


def copy_state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def train_module(config, folders, **options):
    weights = Weights()
    return weights, fit(config, folders, callbacks=[weights], quiet=True, **options)


def compute_average(steps, decay):
    """The moving average by its definition, in double precision; counts are the newest."""
    average = {name: tensor.double() for name, tensor in steps[0].items()}
    for n, weights in enumerate(steps[1:], start=1):
        keep = min(decay, (1 + n) / (10 + n))
        for name, tensor in weights.items():
            average[name] = (
                keep * average[name] + (1 - keep) * tensor if tensor.is_floating_point() else tensor.double()
            )
    return average


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_what_is_validated_and_saved_is_the_average_that_warms_up(configure, folders, decay):
    weights, result = train_module(configure(*QUIET, f"ema_decay={decay}"), folders)
    half = len(weights.steps) // 2
    assert_same(weights.validations[0], compute_average(weights.steps[:half], decay))
    assert_same(weights.validations[-1], compute_average(weights.steps, decay))
    saved = read_checkpoint(result.last_checkpoint)
    assert_same(saved["state_dict"], weights.validations[-1])
    assert_same(saved["current_model_state"], weights.steps[-1])


def test_training_itself_is_not_changed_by_averaging(configure, folders):
    without, _ = train_module(configure(*QUIET, "checkpoints.enabled=false"), folders)
    with_average, _ = train_module(configure(*QUIET, "checkpoints.enabled=false", "ema_decay=0.9"), folders)
    for one, other in zip(without.steps, with_average.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_network_is_the_average_when_training_ends_and_when_a_checkpoint_is_read(configure, folders):
    config = configure(*QUIET, "ema_decay=0.9")
    weights, result = train_module(config, folders)
    module = prepare_run(config, stage="test", checkpoint=result.last_checkpoint, quiet=True).module
    assert_same(copy_state(module), weights.validations[-1])


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(configure, folders):
    config = configure(*QUIET, "ema_decay=0.9", "trainer.max_epochs=3")
    whole, result = train_module(config, folders)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, folders, callbacks=[Stop()], quiet=True)
    resumed, again = train_module(config, folders, resume_from=folders.checkpoints / "last.ckpt")
    rest = len(resumed.steps)
    assert rest == 2 * len(whole.steps) // 3
    for one, other in zip(whole.steps[-rest:], resumed.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(whole.validations[-1][name], tensor) for name, tensor in resumed.validations[-1].items())
    assert again.metrics == result.metrics


@pytest.mark.parametrize(("before", "after"), [("0.0", "0.9"), ("0.9", "0.0")])
def test_averaging_can_begin_and_end_in_a_run_that_goes_on(configure, folders, before, after):
    fit(configure(*QUIET, "trainer.max_epochs=1", f"ema_decay={before}"), folders, quiet=True)
    last = folders.checkpoints / "last.ckpt"
    saved = read_checkpoint(last)["state_dict"]
    config = configure(*QUIET, "trainer.max_epochs=2", f"ema_decay={after}")
    weights, result = train_module(config, folders, resume_from=last)
    assert result.epochs == 2
    assert not torch.equal(
        weights.steps[0]["net.encoder.pyramid.conv_stem.weight"], saved["net.encoder.pyramid.conv_stem.weight"]
    )
