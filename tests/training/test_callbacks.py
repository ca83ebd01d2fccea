"""The optimizer of a resumed run is the configured one, whatever wrote the checkpoint."""

import pytest
import pytorch_lightning as pl
import torch

from handpose.errors import UserError
from handpose.training.build import build_training
from handpose.training.callbacks import PredictionPictures, _move_step_counts
from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import fit

QUIET = ["pictures.every_n_steps=0", "logger=none"]


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_step_counts_lie_where_the_optimizer_looks_for_them(fused, device):
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}
    _move_step_counts(optimizer)
    assert optimizer.state[weight]["step"].device.type == device


@pytest.mark.parametrize(("before", "after"), [("false", "true"), ("true", "false")])
def test_a_run_goes_on_with_another_kind_of_optimizer(configure, folders, before, after):
    fit(configure(*QUIET, "trainer.max_epochs=1", f"optimizer.fused={before}"), folders, quiet=True)
    config = configure(*QUIET, "trainer.max_epochs=2", f"optimizer.fused={after}")
    result = fit(config, folders, quiet=True, resume_from=folders.checkpoints / "last.ckpt")
    written = read_checkpoint(result.last_checkpoint)["optimizer_states"][0]
    assert [group["fused"] for group in written["param_groups"]] == [after == "true"] * 4
    steps = {float(state["step"]) for state in written["state"].values()}
    assert steps == {2.0 * (18 // 8)}


class Rates(pl.Callback):
    """Learning rates of the groups at every step."""

    def __init__(self):
        self.encoder, self.rest = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for group in trainer.optimizers[0].param_groups:
            (self.encoder if group["is_encoder"] else self.rest).append(group["lr"])


def record_rates(config, folders, **options):
    recorded = Rates()
    fit(config, folders, callbacks=[recorded], quiet=True, **options)
    return recorded


def test_the_encoder_learns_at_its_share_of_the_rate(configure, folders):
    plain = record_rates(configure(*QUIET, "trainer.max_epochs=1"), folders)
    slower = record_rates(configure(*QUIET, "trainer.max_epochs=1", "encoder_lr_factor=0.125"), folders)
    assert plain.encoder == plain.rest == slower.rest
    assert slower.encoder == pytest.approx([0.125 * rate for rate in plain.rest])


def test_a_run_goes_on_with_another_share_and_another_rate(configure, folders):
    """As population based training has it: of every group the configured rate counts, not the checkpoint's."""
    fit(configure(*QUIET, "trainer.max_epochs=1", "encoder_lr_factor=0.5"), folders, quiet=True)
    last = folders.checkpoints / "last.ckpt"
    given = [*QUIET, "lr_schedule=constant", "optimizer.lr=0.25"]
    resumed = record_rates(configure(*given, "encoder_lr_factor=0.125"), folders, resume_from=last)
    assert (set(resumed.rest), set(resumed.encoder)) == ({0.25}, {0.25 * 0.125})


def test_a_checkpoint_of_a_version_with_other_groups_is_a_sentence(configure, folders):
    fit(configure(*QUIET, "trainer.max_epochs=1"), folders, quiet=True)
    last = folders.checkpoints / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    for kept, dropped in ((0, 1), (1, 1)):
        groups[kept]["params"] += groups.pop(dropped)["params"]
    torch.save(checkpoint, last)
    with pytest.raises(UserError, match=r"another version, whose optimizer .* in 2; give model\.weights="):
        fit(configure(*QUIET), folders, quiet=True, resume_from=last)


def test_fused_and_foreach_together_are_a_sentence(configure):
    with pytest.raises(UserError, match=r"optimizer, lr_schedule: .*fused.*foreach"):
        build_training(configure("+optimizer.foreach=true"), quiet=True)


def test_pictures_are_drawn_once_a_step_that_accumulates_several_batches(configure, folders, monkeypatch):
    steps = []
    monkeypatch.setattr("handpose.training.callbacks.draw_prediction_pictures", lambda *_, **__: {})

    class Counted(PredictionPictures):
        def _draw(self, trainer, module):
            steps.append(trainer.global_step)
            super()._draw(trainer, module)

    accumulating = ["data.batch_size=4", "+trainer.accumulate_grad_batches=2", "checkpoints.enabled=false"]
    pictures = Counted(every_n_steps=1, num_hands=1)
    fit(configure(*QUIET, *accumulating), folders, callbacks=[pictures], quiet=True)
    assert steps == [1, 2, 3, 4]
