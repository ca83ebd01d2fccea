"""A configuration made into the things that are trained. Below this file there are typed arguments only."""

import sys

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from handpose.config import instantiated
from handpose.data.datamodule import HandDataModule
from handpose.errors import UserError
from handpose.models.pose_net import PoseNet
from handpose.training.module import HandPose


def build(config: DictConfig, *, pretrained: bool = True, quiet: bool = False) -> tuple[HandPose, HandDataModule]:
    """Make the module and the data module of a configuration, seeded; no data is read yet.

    pretrained: False where a checkpoint brings the weights, so that none are fetched. Raises UserError for a value that
    its constructor refuses.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if pretrained and config.model.encoder.pretrained and not quiet:
        print(f"Getting the pretrained weights of {config.model.encoder.name}", file=sys.stderr, flush=True)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    return _module(config, pretrained=pretrained), _data(config, quiet=quiet)


def _module(config: DictConfig, *, pretrained: bool) -> HandPose:
    module = HandPose(
        net=_net(config, pretrained=pretrained),
        axes=instantiated(config, "heatmap"),
        loss=instantiated(config, "loss"),
        augment=instantiated(config, "augment"),
        optimizer=instantiated(config, "optimizer"),
        lr_schedule=instantiated(config, "lr_schedule"),
        seed=config.seed,
    )
    _check_optimizer(module)
    return module


def _net(config: DictConfig, *, pretrained: bool) -> PoseNet:
    without = {} if pretrained else {"pretrained": False, "weights": None}
    net = PoseNet(
        encoder=instantiated(config, "model.encoder", **without), decoder=instantiated(config, "model.decoder")
    )
    return net.to(memory_format=torch.channels_last)  # the layout that the loader's pictures come in


def _check_optimizer(module: HandPose) -> None:
    """The optimizer is made when training starts; what it refuses shows here."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    try:
        module.lr_schedule(module.optimizer(parameters), num_steps=2, steps_per_epoch=1)
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer, lr_schedule: {error}") from error


def _data(config: DictConfig, *, quiet: bool) -> HandDataModule:
    return HandDataModule(
        instantiated(config, "data.source"),
        image_size=config.data.image_size,
        batch_size=config.data.batch_size,
        pack_folder=config.paths.packed,
        seed=config.seed,
        num_workers=config.data.num_workers,
        progress=not quiet,
    )
