import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from handpose.data.augment import to_view
from handpose.evaluation.predict import compute_errors
from handpose.training.fit import build_training, fit
from handpose.training.module import make_parameter_groups


@pytest.fixture
def built(configure):
    module, data = build_training(configure(), quiet=True)
    data.prepare_data()
    module.axes.fit(torch.from_numpy(data.splits.train.xyz_m).float())
    return module.eval(), data


class Logged(dict):
    def __call__(self, values, **_):
        self.update(values)


def test_validation_is_the_error_over_all_pictures_however_they_are_batched(built, monkeypatch):
    module, data = built
    logged = Logged()
    monkeypatch.setattr(module, "log_dict", logged)
    batches = list(data.val_dataloader())
    halves = [
        type(batch)(*(field[part] for field in batch)) for batch in batches for part in (slice(0, 1), slice(1, None))
    ]
    with torch.no_grad():
        for i, batch in enumerate(halves):
            module.validation_step(batch, i)
        predicted = torch.cat([module.predict_xyz_m(to_view(batch), batch.scale_m) for batch in batches])
    truth, intrinsics = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("xyz_m", "intrinsics"))
    expected = compute_errors(predicted.numpy(), truth.numpy(), intrinsics.numpy())
    assert {key.removeprefix("val/"): float(metric.compute()) for key, metric in logged.items()} == pytest.approx(
        expected, rel=1e-4
    )


def test_a_network_that_is_right_scores_zero(built):
    truth = np.asarray(built[1].splits.val.xyz_m)
    scores = compute_errors(truth, truth, built[1].splits.val.intrinsics)
    assert scores == pytest.approx({"pa_mpjpe_mm": 0, "rr_mpjpe_mm": 0, "keypoint_error_px": 0, "pck_auc": 1}, abs=1e-2)


def test_a_few_steps_on_one_batch_lower_its_loss(built, monkeypatch):
    module, data = built
    monkeypatch.setattr(module, "log_dict", Logged())
    module.train()
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(make_parameter_groups(module.net), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_weights_decay_and_norms_and_biases_do_not(built):
    net = built[0].net
    groups = make_parameter_groups(net)
    for group in groups:
        decays = group.get("weight_decay") is None
        assert all((parameter.ndim > 1) == decays for parameter in group["params"])
        part = net.encoder if group["is_encoder"] else net.decoder
        assert set(group["params"]) <= set(part.parameters())
    assert [(group["is_encoder"], group.get("weight_decay")) for group in groups] == [
        (True, None),
        (False, None),
        (True, 0.0),
        (False, 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_no_group_of_parameters_is_empty(built):
    net = built[0].net
    for parameter in net.encoder.parameters():
        parameter.requires_grad = parameter.ndim > 1
    groups = make_parameter_groups(net)
    assert [(group["is_encoder"], group.get("weight_decay")) for group in groups] == [
        (True, None),
        (False, None),
        (False, 0.0),
    ]
    assert all(group["params"] for group in groups)


class Rates(pl.Callback):
    """Keeps the learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", ["flat_cosine", "warmup_cosine", "multistep"])
def test_a_schedule_ends_with_the_run_that_max_steps_cuts_short(configure, folders, schedule):
    def rates(*overrides):
        seen = Rates()
        config = configure(
            *["data.batch_size=2", f"lr_schedule={schedule}", "checkpoints.enabled=false", "logger=none", *overrides]
        )
        fit(config, folders, callbacks=[seen], quiet=True)
        return seen.seen

    whole = rates("trainer.max_epochs=1")
    cut = rates("trainer.max_epochs=50", f"+trainer.max_steps={len(whole)}")
    assert len(whole) > 5
    assert cut == pytest.approx(whole)
    assert cut[-1] < 0.2 * max(cut)
