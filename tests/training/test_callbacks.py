"""The optimizer of a resumed run is the configured one, whatever wrote the checkpoint."""

import pytest
import torch

from handpose.errors import UserError
from handpose.training.build import build
from handpose.training.callbacks import _place_step_counts
from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import fit

QUIET = ["pictures.every_n_steps=0", "logger=none"]


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_step_counts_lie_where_the_optimizer_looks_for_them(fused, device):
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}
    _place_step_counts(optimizer)
    assert optimizer.state[weight]["step"].device.type == device


@pytest.mark.parametrize(("before", "after"), [("false", "true"), ("true", "false")])
def test_a_run_goes_on_with_another_kind_of_optimizer(configure, folders, before, after):
    fit(configure(*QUIET, "trainer.max_epochs=1", f"optimizer.fused={before}"), folders, quiet=True)
    config = configure(*QUIET, "trainer.max_epochs=2", f"optimizer.fused={after}")
    result = fit(config, folders, quiet=True, resume_from=folders.checkpoints / "last.ckpt")
    written = read_checkpoint(result.last_checkpoint)["optimizer_states"][0]
    assert [group["fused"] for group in written["param_groups"]] == [after == "true"] * 2
    steps = {float(state["step"]) for state in written["state"].values()}
    assert steps == {2.0 * (18 // 8)}


def test_fused_and_foreach_together_are_a_sentence(configure):
    with pytest.raises(UserError, match=r"optimizer, lr_schedule: .*fused.*foreach"):
        build(configure("+optimizer.foreach=true"), quiet=True)
