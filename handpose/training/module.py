"""The LightningModule: one step of training, and the metrics of validation and test."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from handpose import geometry
from handpose.data.augment import Augmentation, View, to_view
from handpose.data.random_draws import BatchShare
from handpose.data.sample import HandBatch
from handpose.heatmaps import Axes, AxisLogits, HeatmapTruth
from handpose.metrics.validation import make_metrics


class _LossSums(NamedTuple):
    """The terms of the loss, added up over the steps of an epoch."""

    names: tuple[str, ...]
    total: Tensor  # (number of names,)
    num_steps: int


class HandPose(pl.LightningModule):
    """A network with what it takes to train it.

    net: pictures -> AxisLogits. axes: what the logits' axes mean. loss: called with logits, truth and axes, gives its
    terms. augment: random views of a batch. optimizer: called with parameter groups. lr_schedule: called with the
    optimizer, num_steps and steps_per_epoch. encoder_lr_factor: of the encoder's learning rate to that of the rest, for
    an encoder that has been trained before. seed: of the augmentation, whose draws depend on it and on the number of
    batches before alone, so that a resumed run goes on as it would have, and so do several processes that share its
    batches.

    Logs train/loss and its terms, and each metric of configs/metrics over all validation pictures, as val/pa_mpjpe_mm.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        axes: Axes,
        loss: nn.Module,
        augment: Augmentation,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[..., LambdaLR],
        encoder_lr_factor: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.net = net
        self.axes = axes
        self.loss = loss
        self.augment = augment
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.encoder_lr_factor = encoder_lr_factor
        self.seed = seed
        self._epoch: _LossSums | None = None
        self.val_metrics = make_metrics(prefix="val/")

    def forward(self, view: View) -> AxisLogits:
        return self.net(view.image.to(next(self.net.parameters()).dtype))  # which trainer.precision=64-true changes

    def predict_xyz_m(self, view: View, scale_m: Tensor) -> Tensor:
        """Joints in metres in the camera frame of the view, (B, K, 3); scale_m (B,) may be NaN."""
        return self.decode(self(view), view, scale_m)

    def decode(self, logits: AxisLogits, view: View, scale_m: Tensor) -> Tensor:
        """Joints in metres in the camera frame of the view, (B, K, 3), that the network's logits for it mean."""
        return self.axes.decode(self.axes.read_out(logits), view.intrinsics, view.size, scale_m)

    def training_step(self, batch: HandBatch, batch_idx: int) -> Tensor:
        view = self.augment(batch, self._make_generator(), BatchShare.for_this_process())
        coordinates = self.axes.encode(view.xyz_m, view.intrinsics, view.size)  # (B, K, 3)
        truth = HeatmapTruth(coordinates, view.xyz_m, view.intrinsics, view.size)
        terms = self.loss(self(view), truth, self.axes)
        values = torch.stack(list(terms.values()))
        self._add_losses(terms, values.detach())
        return values.sum()

    def _add_losses(self, names: Iterable[str], values: Tensor) -> None:
        """Add up a step's terms of the loss, (number of terms,), on the device.

        A log_dict a step costs a millisecond of the default network's 50 on a CPU (Lightning 2.6.6).
        """
        before, count = (self._epoch.total, self._epoch.num_steps) if self._epoch else (torch.zeros_like(values), 0)
        self._epoch = _LossSums(tuple(names), before + values, count + 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means over the epoch with its last batch; all batches have one size."""
        if self._epoch is None or not (self.trainer.is_last_batch or self.trainer.should_stop):
            return
        mean = self._epoch.total / self._epoch.num_steps
        terms = {f"train/{name}_loss": term for name, term in zip(self._epoch.names, mean, strict=True)}
        logged = {"train/loss": mean.sum()} | terms
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_epoch_start(self) -> None:
        self._epoch = None

    def validation_step(self, batch: HandBatch, batch_idx: int) -> None:
        predicted_m = self.predict_xyz_m(to_view(batch), batch.scale_m)
        self.val_metrics.update(  # each metric takes what its own `update` names
            predicted_m=predicted_m,
            target_m=batch.xyz_m,
            predicted_uv=geometry.project(predicted_m, batch.intrinsics),
            target_uv=geometry.project(batch.xyz_m, batch.intrinsics),
        )
        # Metrics are handed over as objects: Lightning computes them once, from their sums over all pictures.
        self.log_dict(dict(self.val_metrics.items()), on_step=False, on_epoch=True, batch_size=len(batch.image))

    def configure_optimizers(self) -> Any:
        steps_per_epoch = self._count_steps_per_epoch()
        num_steps = steps_per_epoch * (self.trainer.max_epochs or 1)
        if self.trainer.max_steps > 0:  # -1 means no limit
            num_steps = min(num_steps, self.trainer.max_steps)
        optimizer = self.optimizer(make_parameter_groups(self.net))
        for group in optimizer.param_groups:
            group["lr"] *= self.encoder_lr_factor if group["is_encoder"] else 1.0
        # A fused optimizer would unscale the gradients of 16-mixed itself, after clipping, so Lightning (2.6.6) refuses
        # to clip for it, in bf16-mixed too. Without this mark they are unscaled first, as for any other.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        schedule = self.lr_schedule(optimizer, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _count_steps_per_epoch(self) -> int:
        """Of the optimizer. Trainer.estimated_stepping_batches would open the loader before a resumed run knows its
        epoch, and the run would begin with the order of epoch 0 (Lightning 2.6.6)."""
        batches = len(self.trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        limit = self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    def _make_generator(self) -> torch.Generator:
        """Of the augmentation of this batch. Batches are counted, not steps, since a step may accumulate several."""
        num_before = 0 if self._trainer is None else self._trainer.fit_loop.total_batch_idx
        return torch.Generator().manual_seed(self.seed * 1_000_003 + num_before)


def make_parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters of encoder and decoder into those with and those without weight decay.

    Norms and biases do not decay (RTMPose, Jiang et al. 2023), nor do positional embeddings and tokens, nor what a
    module's `no_weight_decay()` names. No group is empty. The groups do not depend on the learning rates, so that a
    checkpoint can be resumed with others.
    """
    undecayed = _list_no_decay_names(net)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim <= 1 or name in undecayed
            groups.setdefault((is_kept, not name.startswith("encoder.")), []).append(parameter)
    return [
        {"params": groups[kept, rest], "is_encoder": not rest} | ({"weight_decay": 0.0} if kept else {})
        for kept, rest in sorted(groups)
    ]


_EMBEDDING_NAME = re.compile(
    r"(^|\.)(pos_embed|cls_token|dist_token|reg_token|mask_token)[^.]*(\.\d+)?$"
)  # or of a list


def _list_no_decay_names(net: nn.Module) -> set[str]:
    """Parameters of more than one dimension that do not decay: embeddings, and those that the modules themselves name.

    `no_weight_decay()` is timm's convention: the names of a module's parameters, relative to it.
    """
    names = {name for name, _ in net.named_parameters() if _EMBEDDING_NAME.search(name)}
    for prefix, module in net.named_modules():
        own = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names
