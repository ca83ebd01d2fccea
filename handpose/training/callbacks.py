"""What happens beside the training: checkpoints that know their configuration, and pictures in the log."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor


from handpose.data.augment import unchanged
from handpose.data.sample import HandBatch
from handpose.heatmaps import read_out
from handpose import drawing, geometry
from handpose.training.module import HandPose


class ConfigInCheckpoint(pl.Callback):
    """Puts the composed configuration, as plain values, into every checkpoint under `config`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config


def best_checkpoint(folder: Path, *, metric: str, mode: str, every_n_epochs: int) -> ModelCheckpoint:
    """The best by a validation metric, with its value in the file name, and last.ckpt."""
    name = metric.rpartition("/")[2]
    return ModelCheckpoint(
        dirpath=folder,
        filename=f"best-epoch{{epoch:03d}}-{name}{{{metric}:.3f}}",
        auto_insert_metric_name=False,
        monitor=metric,
        mode=mode,
        save_last=True,
        every_n_epochs=every_n_epochs,
        enable_version_counter=False,
    )


class Pictures(pl.Callback):
    """Pictures of the same validation hands every N training steps and at the end: over the image, in 3-D, heatmaps."""

    def __init__(self, *, every_n_steps: int, num_hands: int) -> None:
        self.every_n_steps = every_n_steps
        self.num_hands = num_hands

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.every_n_steps:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loader = trainer.val_dataloaders
        if not trainer.is_global_zero or loader is None or not isinstance(module, HandPose):
            return
        hands = _first(next(iter(loader)), self.num_hands, module.device)
        for name, picture in _pictures(module, hands).items():
            for logger in trainer.loggers:
                _log_picture(logger, f"val_pictures/{name}", picture, trainer.global_step)


def _first(batch: HandBatch, num_hands: int, device: torch.device) -> HandBatch:
    return HandBatch(*(field[:num_hands].to(device) for field in batch))


@torch.no_grad()
def _pictures(module: HandPose, hands: HandBatch) -> dict[str, np.ndarray]:
    was_training = module.training
    module.eval()
    view = unchanged(hands)
    logits = module(view)
    size = (hands.image.shape[-2], hands.image.shape[-1])
    predicted_m = module.axes.decode(read_out(logits), hands.intrinsics, size, hands.scale_m)
    module.train(was_training)
    images = _numpy(hands.image.permute(0, 2, 3, 1))
    pictures = {
        "keypoints": drawing.predictions_over_images(
            images,
            _numpy(geometry.project(predicted_m, hands.intrinsics)),
            _numpy(geometry.project(hands.xyz_m, hands.intrinsics)),
        ),
        "skeletons": drawing.skeletons_3d(_numpy(predicted_m), _numpy(hands.xyz_m)),
    }
    u, v, depth = (_numpy(torch.softmax(axis.float(), dim=-1)) for axis in logits)
    return pictures | {"heatmaps": drawing.heatmaps_along_axes(images, u, v, depth)}


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _log_picture(logger: Logger, name: str, picture: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step=step)
