"""Build the network and the data module from a configuration. Code called from here takes only typed arguments."""

import copy
import json
import os
import sys

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from handpose.config import instantiate_key, to_plain_values
from handpose.data.datamodule import HandDataModule
from handpose.data.folds import Folds
from handpose.errors import UserError
from handpose.malloc import keep_freed_memory
from handpose.models.compilation import compile_in_place
from handpose.models.pose_net import PoseNet
from handpose.openmp import watch_contention
from handpose.resources import count_cores
from handpose.schema import list_parameters
from handpose.training.module import HandPose
from handpose.training.trainer import count_local_processes, has_fixed_num_threads, uses_gpu


def build_training(
    config: DictConfig, *, pretrained: bool = True, quiet: bool = False, cache_data: bool = False
) -> tuple[HandPose, HandDataModule]:
    """Build the module and the data module of a configuration, after seeding.

    No data is read, except with `cache_data`.

    Args:
        config: the composed configuration.
        pretrained: whether to fetch pretrained weights. False if a checkpoint provides the weights.
        quiet: print nothing.
        cache_data: read the training data now and keep it in memory for the next call with the same data set. The files
            must not change in between.

    Raises:
        UserError: a constructor refuses a value.
    """
    keep_freed_memory()
    _set_num_threads(config)
    encoder = config.model.encoder
    if pretrained and encoder.get("pretrained") and not quiet:
        print(f"Loading the pretrained weights of {encoder.get('name', encoder._target_)}", file=sys.stderr, flush=True)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = _build_module(config, pretrained=pretrained, quiet=quiet)
    return module, build_data(config, masks=module.augment.needs_masks, quiet=quiet, cache_data=cache_data)


def _set_num_threads(config: DictConfig) -> None:
    """Set the number of torch threads of this process: `num_threads`, else OMP_NUM_THREADS, else one per core.

    Cores are those that this process may use, divided among the processes that train together on this machine. By
    default, torch starts a thread for each core of the machine, even in a container that may use fewer. Several
    threads sleep instead of spin at barriers while other programs use the cores.
    """
    num_processes = count_local_processes(config)
    num_threads = config.num_threads or torch.get_num_threads()  # torch has read OMP_NUM_THREADS
    if not has_fixed_num_threads(config):
        num_threads = min(num_threads, max(1, count_cores() // num_processes))
    if num_threads != torch.get_num_threads():
        torch.set_num_threads(num_threads)
    if num_processes * config.trainer.get("num_nodes", 1) > 1:
        # Otherwise Lightning (2.6) replaces the number by its own, for which it divides all cores of the machine.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if num_threads > 1:
        watch_contention()


def _build_module(config: DictConfig, *, pretrained: bool, quiet: bool) -> HandPose:
    module = HandPose(
        net=_build_net(config, pretrained=pretrained, quiet=quiet),
        axes=instantiate_key(config, "heatmap"),
        loss=instantiate_key(config, "loss"),
        augment=instantiate_key(config, "augment"),
        optimizer=instantiate_key(config, "optimizer"),
        lr_schedule=instantiate_key(config, "lr_schedule"),
        encoder_lr_factor=config.encoder_lr_factor,
        seed=config.seed,
    )
    _check_optimizer(module)
    return module


def _build_net(config: DictConfig, *, pretrained: bool, quiet: bool) -> PoseNet:
    available = {"image_size": config.data.image_size} | ({} if pretrained else {"pretrained": False, "weights": None})
    accepted = list_parameters(config.model.encoder._target_)
    net = PoseNet(
        encoder=instantiate_key(
            config, "model.encoder", **{name: value for name, value in available.items() if name in accepted}
        ),
        decoder=instantiate_key(config, "model.decoder"),
        on_gpu=uses_gpu(config),
    )
    if not quiet and (note := getattr(net.encoder, "note", "")):
        print(note, file=sys.stderr, flush=True)
    if config.model.compile is not None:
        compile_in_place(net, config.model.compile)
    return net


def _check_optimizer(module: HandPose) -> None:
    """Create the optimizer and the schedule for one parameter, so that invalid options fail before training."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    try:
        module.lr_schedule(module.optimizer(parameters), num_steps=2, steps_per_epoch=1)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: foreach and fused are both set
        raise UserError(f"optimizer, lr_schedule: {error}") from error


def build_data(
    config: DictConfig, *, masks: bool = False, quiet: bool = False, cache_data: bool = False
) -> HandDataModule:
    """Build only the data module of a configuration.

    Args:
        config: the composed configuration.
        masks: whether to load the masks of the training images.
        quiet: print nothing.
        cache_data: see `build_training`.

    Raises:
        UserError: a constructor refuses a value.
    """
    has_cache = "cache_folder" in list_parameters(config.data.source._target_)
    data = HandDataModule(
        instantiate_key(config, "data.source", **({"cache_folder": config.paths.packed} if has_cache else {})),
        image_size=config.data.image_size,
        batch_size=config.data.batch_size,
        pack_folder=config.paths.packed,
        seed=config.seed,
        num_workers=config.data.num_workers,
        masks=masks,
        train_on_val=config.train_on_val,
        folds=Folds(config.folds.num, config.folds.index),
        num_test_batches=int(config.trainer.get("fast_dev_run") or 0) or None,
        progress=not quiet,
    )
    return _reuse_cached_data(data, config) if cache_data else data


_cached_data: dict[str, HandDataModule] = {}
"""The data module opened last, under a key that determines its content. It is never given to a Trainer."""


def _reuse_cached_data(data: HandDataModule, config: DictConfig) -> HandDataModule:
    """Return the data module with the annotations and packed images of an earlier one for the same data set, if any.

    The earlier one may hold out another fold.

    Reading FreiHAND's annotations and checking all its files takes a second or more, about as long as twenty training
    steps.
    """
    data_values = [to_plain_values(config.data)["source"], config.data.image_size, config.paths.packed]
    key = json.dumps([*data_values, data.masks, data.train_on_val, data.folds.num])
    if key not in _cached_data:
        _cached_data.clear()
        data.setup("fit")
        _cached_data[key] = data
    if _cached_data[key].folds != data.folds:
        _cached_data[key] = _cached_data[key].change_fold(data.folds.index)
    shared = copy.copy(_cached_data[key])
    shared.batch_size, shared.seed, shared.num_workers = data.batch_size, data.seed, data.num_workers
    shared.num_test_batches = data.num_test_batches
    return shared
