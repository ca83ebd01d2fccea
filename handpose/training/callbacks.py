"""Callbacks: the optimizer settings of a resumed run, a final validation, and pictures in the log."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

from handpose import drawing, geometry
from handpose.data.augment import to_view
from handpose.data.sample import HandBatch
from handpose.heatmaps import hide_unknown_depth
from handpose.training.module import HandPose


class ConfiguredOptimizer(pl.Callback):
    """Makes a resumed run use the optimizer settings and schedule of the configuration, not those of the checkpoint.

    A checkpoint restores the learning rate that it was saved with. A learning rate set for the resumed run would be
    ignored silently.
    """

    def __init__(self) -> None:
        self._configured: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._configured = [
            [_get_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer, configured in zip(trainer.optimizers, self._configured, strict=True):
            for group, settings in zip(optimizer.param_groups, configured, strict=True):
                group.update(settings)
            _move_step_counts(optimizer)
        for config in trainer.lr_scheduler_configs:
            _resume_schedule(config.scheduler)


def _move_step_counts(optimizer: Optimizer) -> None:
    """Move the step counts to the device where the optimizer expects them.

    A fused or capturable optimizer has them on the device of the weights, any other on the CPU. The optimizer that
    wrote the checkpoint may have been of the other kind.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(
                    parameter.device if group.get("fused") or group.get("capturable") else "cpu"
                )


def _resume_schedule(schedule: Any) -> None:
    """Set a schedule of this project, a LambdaLR, to its step count, whatever the schedule in the checkpoint was."""
    for i, (group, factor) in enumerate(zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True)):
        schedule.base_lrs[i] = group["initial_lr"]
        group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)


def _get_settings(group: dict[str, Any]) -> dict[str, Any]:
    return {"initial_lr": group["lr"]} | {name: value for name, value in group.items() if name != "params"}


class FinalValidation(pl.Callback):
    """Validates after the last step if max_steps or max_time ends the training within an epoch.

    Lightning would end without a validation, so that the last steps, or all of them, would have no checkpoint. This
    callback must come after Lightning's Timer.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
        if trainer.should_stop:
            trainer.check_val_every_n_epoch = 1


class PredictionPictures(pl.Callback):
    """Logs pictures of predictions for the same validation hands every N training steps and at the end.

    The pictures show the keypoints over the image, the skeletons in 3-D, and the heatmaps.

    Args:
        every_n_steps: number of training steps between pictures.
        num_hands: number of hands.
    """

    def __init__(self, *, every_n_steps: int, num_hands: int) -> None:
        self.every_n_steps = every_n_steps
        self.num_hands = num_hands
        self._last_step = 0  # of the last pictures; batches whose gradients are accumulated share a step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.every_n_steps:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        loader = trainer.val_dataloaders
        if not trainer.is_global_zero or loader is None or not isinstance(module, HandPose):
            return
        # Creating the loader's iterator draws a random number, which would change the training.
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(loader))
        hands = HandBatch(*(field.to(module.device) for field in batch))
        for name, picture in draw_prediction_pictures(module, hands, num_hands=self.num_hands).items():
            for logger in trainer.loggers:
                _log_picture(logger, f"val_pictures/{name}", picture, trainer.global_step)


@torch.no_grad()
def draw_prediction_pictures(module: HandPose, batch: HandBatch, *, num_hands: int) -> dict[str, np.ndarray]:
    """Draw the predictions for the first hands of a batch.

    The network gets the whole batch, because a compiled network would be compiled again for another batch size.

    Args:
        module: the network.
        batch: validation data on the module's device.
        num_hands: number of hands to draw.

    Returns:
        Name of the picture -> (H, W, 3) uint8.
    """
    was_training = module.training
    module.eval()
    view = to_view(batch)
    logits = module(view)
    predicted_m = module.decode(logits, view, batch.scale_m)[:num_hands]
    module.train(was_training)
    hands = HandBatch(*(field[:num_hands] for field in batch))
    images = _to_numpy(hands.image.permute(0, 2, 3, 1))
    pictures = {
        "keypoints": drawing.draw_predictions(
            images,
            _to_numpy(geometry.project(predicted_m, hands.intrinsics)),
            _to_numpy(geometry.project(hands.xyz_m, hands.intrinsics)),
        ),
    }
    if hands.has_depth.all():
        pictures["skeletons"] = drawing.draw_skeletons_3d(_to_numpy(predicted_m), _to_numpy(hands.xyz_m))
    u, v, depth = (_to_numpy(torch.softmax(axis[:num_hands].float(), dim=-1)) for axis in logits)
    truth = module.axes.encode(hands.xyz_m, hands.intrinsics, (images.shape[1], images.shape[2]))
    truth = hide_unknown_depth(truth, hands.has_depth)
    trained = [module.axes.draw_heatmaps(truth[..., i], bins=axis.shape[-1]) for i, axis in enumerate(logits)]
    peaks = [float(axis.nan_to_num().max()) for axis in trained]
    return pictures | {"heatmaps": drawing.draw_heatmaps(images, u, v, depth, _to_numpy(truth), peak_values=peaks)}


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _log_picture(logger: Logger, name: str, picture: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step=step)
