"""The LightningModule: training steps, the optimizer, and the metrics of the validation."""

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
from handpose.heatmaps import Axes, AxisLogits, HeatmapTruth, JointPrediction, compute_variances, hide_unknown_depth
from handpose.metrics.validation import make_metrics
from handpose.training.calibration import Calibration


class _LossSums(NamedTuple):
    """Sums of the loss terms over the steps of an epoch."""

    names: tuple[str, ...]
    total: Tensor  # (number of names,)
    num_steps: int


class HandPose(pl.LightningModule):
    """A network with everything needed to train it.

    It logs train/loss and the terms of the loss, and each metric of configs/metrics over all validation images, such as
    val/pa_mpjpe_mm.

    Args:
        net: images -> AxisLogits.
        axes: the meaning of the logits' axes.
        loss: called with logits, truth and axes; returns its terms by name.
        augment: returns a random view of a batch.
        optimizer: called with parameter groups.
        lr_schedule: called with the optimizer, num_steps and steps_per_epoch.
        encoder_lr_factor: the encoder's learning rate as a multiple of that of the other parameters, for a pretrained
            encoder.
        seed: seed of the augmentation. Its random numbers depend only on the seed and on the number of earlier batches.
            So they are the same when a run is resumed, and when several processes divide its batches.
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
        self.calibration = Calibration()
        self.val_metrics = make_metrics(prefix="val/")

    def measure_only_in_image(self) -> None:
        """Validate with the metrics that need only 2-D keypoints, for a validation split without depth."""
        self.val_metrics = make_metrics(prefix="val/", only_in_image=True)

    def forward(self, view: View) -> AxisLogits:
        return self.net(view.image.to(next(self.net.parameters()).dtype))  # 64 bits with trainer.precision=64-true

    def predict_xyz_m(self, view: View, scale_m: Tensor) -> Tensor:
        """Predict the joints in a view.

        Args:
            view: B images with their cameras.
            scale_m: (B,) length of each hand's reference bone in metres; NaN if it is not known.

        Returns:
            (B, K, 3) joints in metres in the camera frame of the view.
        """
        return self.decode(self(view), view, scale_m)

    def predict(self, view: View, scale_m: Tensor) -> JointPrediction:
        """Predict the joints in a view, and how far each is expected to be from its true place.

        Args:
            view: B images with their cameras.
            scale_m: (B,) length of each hand's reference bone in metres; NaN if it is not known.
        """
        logits = self(view)
        xyz_m = self.decode(logits, view, scale_m)
        errors = self.calibration.compute_errors(compute_variances(logits))
        along_axes_m = self.axes.to_metres(errors, xyz_m, view.intrinsics, view.size, scale_m)
        return JointPrediction(xyz_m, torch.linalg.vector_norm(along_axes_m, dim=-1))

    def decode(self, logits: AxisLogits, view: View, scale_m: Tensor) -> Tensor:
        """Decode the network's logits for a view into joints.

        Returns:
            (B, K, 3) joints in metres in the camera frame of the view.
        """
        return self.axes.decode(self.axes.read_out(logits), view.intrinsics, view.size, scale_m)

    def training_step(self, batch: HandBatch, batch_idx: int) -> Tensor:
        view = self.augment(batch, self._make_generator(), BatchShare.for_this_process())
        coordinates = self.axes.encode(view.xyz_m, view.intrinsics, view.size)  # (B, K, 3)
        coordinates = hide_unknown_depth(coordinates, batch.has_depth)
        truth = HeatmapTruth(coordinates, view.xyz_m, view.intrinsics, view.size)
        terms = self.loss(self(view), truth, self.axes)
        values = torch.stack(list(terms.values()))
        self._add_losses(terms, values.detach())
        return values.sum()

    def _add_losses(self, names: Iterable[str], values: Tensor) -> None:
        """Add the loss terms of a step, (number of terms,), to the sums of the epoch, without leaving the device.

        Calling log_dict at every step would take 1 ms of the 50 ms of a step of the default network on a CPU (Lightning
        2.6.6).
        """
        total, count = (self._epoch.total, self._epoch.num_steps) if self._epoch else (torch.zeros_like(values), 0)
        self._epoch = _LossSums(tuple(names), total + values, count + 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means over the epoch after its last batch. All batches have the same size."""
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
        self.val_metrics.update(  # each metric receives the arguments that its `update` names
            predicted_m=predicted_m,
            target_m=batch.xyz_m,
            predicted_uv=geometry.project(predicted_m, batch.intrinsics),
            target_uv=geometry.project(batch.xyz_m, batch.intrinsics),
        )
        # Log the metric objects: Lightning then computes each metric once, from its sums over all images.
        self.log_dict(dict(self.val_metrics.items()), on_step=False, on_epoch=True, batch_size=len(batch.image))

    def configure_optimizers(self) -> Any:
        steps_per_epoch = self._count_steps_per_epoch()
        num_steps = steps_per_epoch * (self.trainer.max_epochs or 1)
        if self.trainer.max_steps > 0:  # -1 means no limit
            num_steps = min(num_steps, self.trainer.max_steps)
        self.num_steps = num_steps
        optimizer = self.optimizer(make_parameter_groups(self.net))
        for group in optimizer.param_groups:
            group["lr"] *= self.encoder_lr_factor if group["is_encoder"] else 1.0
        # A fused optimizer would unscale the gradients of 16-mixed itself, after clipping. So Lightning (2.6.6) refuses
        # to clip gradients for it, in bf16-mixed too. With this attribute they are unscaled before clipping, as for
        # other optimizers.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        schedule = self.lr_schedule(optimizer, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _count_steps_per_epoch(self) -> int:
        """Count the optimizer steps of an epoch.

        Trainer.estimated_stepping_batches would create the loader before a resumed run knows its epoch. The run would
        then start with the order of epoch 0 (Lightning 2.6.6).
        """
        batches = len(self.trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        limit = self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    def _make_generator(self) -> torch.Generator:
        """Make the random generator for the augmentation of this batch.

        It depends on the number of batches, not of steps, because a step may accumulate several batches.
        """
        num_before = 0 if self._trainer is None else self._trainer.fit_loop.total_batch_idx
        return torch.Generator().manual_seed(self.seed * 1_000_003 + num_before)


def make_parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters of encoder and decoder into groups with and without weight decay.

    Norms and biases do not decay (RTMPose, Jiang et al. 2023). Neither do positional embeddings and tokens, nor the
    parameters that a module's `no_weight_decay()` names. No group is empty. The groups do not depend on the learning
    rates, so that a checkpoint can be resumed with other ones.
    """
    undecayed = _list_no_decay_names(net)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            is_undecayed = parameter.ndim <= 1 or name in undecayed
            groups.setdefault((is_undecayed, not name.startswith("encoder.")), []).append(parameter)
    return [
        {"params": groups[kept, rest], "is_encoder": not rest} | ({"weight_decay": 0.0} if kept else {})
        for kept, rest in sorted(groups)
    ]


_EMBEDDING_NAME = re.compile(
    r"(^|\.)(pos_embed|cls_token|dist_token|reg_token|mask_token)[^.]*(\.\d+)?$"
)  # the number is for lists of embeddings


def _list_no_decay_names(net: nn.Module) -> set[str]:
    """List the parameters with more than one dimension that do not decay.

    They are embeddings, and the parameters that modules name in `no_weight_decay()`. This is timm's convention: it
    returns the names of the module's parameters, relative to the module.
    """
    names = {name for name, _ in net.named_parameters() if _EMBEDDING_NAME.search(name)}
    for prefix, module in net.named_modules():
        own = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names
