"""Lightning's Trainer as this project uses it: its loggers, its silence, and what a machine cannot give."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment
from pytorch_lightning.strategies import Strategy

from handpose.config import instantiated, plain
from handpose.errors import UserError
from handpose.metrics.validation import target_metric
from handpose.training.averaging import AveragedWeights
from handpose.training.batch_norm import SharedStatistics
from handpose.training.callbacks import Pictures
from handpose.training.checkpoints import BestAndLast, ConfigInCheckpoint, WholeFiles
from handpose.training.progress import Progress
from handpose.training.results import RunFolders


class Team(NamedTuple):
    """Processes that somebody else has started to share each step, of which this is one."""

    strategy: Strategy
    environment: ClusterEnvironment


def training_trainer(
    config: DictConfig,
    folders: RunFolders,
    *,
    callbacks: Sequence[pl.Callback] = (),
    quiet: bool = False,
    team: Team | None = None,
) -> pl.Trainer:
    """A Trainer that fits: with checkpoints, a log, pictures and, unless quiet, progress.

    team: that this process belongs to; None: Lightning starts what trainer.devices says.
    """
    averaging = [AveragedWeights(decay=config.ema_decay)] if config.ema_decay > 0.0 else []
    every = [*averaging, *callbacks, ConfigInCheckpoint(plain(config))]
    saving, pictures = config.checkpoints, config.pictures
    if saving.enabled:
        target = target_metric(saving.metric, saving.mode, group="checkpoints")
        every.append(
            BestAndLast(
                folders.checkpoints,
                metric=None if config.train_on_val else target.name,
                mode=target.mode,
                every_n_epochs=saving.every_n_epochs,
            )
        )
    logger = _logger(config, folders)
    if logger and pictures.every_n_steps > 0:
        every.append(Pictures(every_n_steps=pictures.every_n_steps, num_hands=pictures.num_hands))
    return _trainer(
        config,
        callbacks=[*every, *_progress(config, quiet)],
        logger=logger,
        enable_checkpointing=saving.enabled,
        default_root_dir=str(folders.logs),
        **({"limit_val_batches": 0} if config.train_on_val else {}),  # nothing is held out
        **({"strategy": team.strategy, "devices": "auto"} if team else {}),
        environment=team.environment if team else None,
    )


def predicting_trainer(config: DictConfig, *, quiet: bool = False) -> pl.Trainer:
    """A Trainer that predicts, and leaves nothing behind."""
    return _trainer(config, callbacks=_progress(config, quiet), logger=False, enable_checkpointing=False)


def check_trainer(config: DictConfig) -> None:
    """See that this machine has what the configuration asks of it; raises UserError."""
    if config.logger.name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("logger=wandb needs the package wandb, which is not installed: pip install wandb")
    _check_devices(config.trainer.accelerator, config.trainer.devices)
    with calm():
        _trainer(config, logger=False, enable_checkpointing=False)


def _check_devices(accelerator: str, devices: Any) -> None:
    num_gpus = torch.cuda.device_count()
    found = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}" if num_gpus else "no GPU"
    if accelerator in ("gpu", "cuda") and not num_gpus:
        raise UserError(f"trainer.accelerator={accelerator}, but this machine has no GPU that torch can use")
    if accelerator != "cpu" and isinstance(devices, int) and devices > max(1, num_gpus):
        raise UserError(f"trainer.devices={devices}, but this machine has {found}")


def _trainer(config: DictConfig, *, environment: ClusterEnvironment | None = None, **arguments: Any) -> pl.Trainer:
    try:
        return instantiated(
            config,
            "trainer",
            use_distributed_sampler=False,  # the loader's own sampler shares the batches out
            # Lightning's detection of Slurm goes wrong inside a trial (lightning #6389).
            plugins=[
                environment or LightningEnvironment(),
                WholeFiles(),
                SharedStatistics(on_gpu=trains_on_gpu(config)),
            ],
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            **arguments,
        )
    except InstantiationException as error:  # Lightning's MisconfigurationException
        raise UserError(f"trainer: {' '.join(str(error.__cause__).split())}") from error


def trains_on_gpu(config: DictConfig) -> bool:
    """Whether the configured Trainer uses a GPU of this machine that torch reaches by CUDA or ROCm."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def _progress(config: DictConfig, quiet: bool) -> list[pl.Callback]:
    return [Progress()] if config.trainer.enable_progress_bar and not quiet else []


def _logger(config: DictConfig, folders: RunFolders) -> Logger | bool:
    if config.logger.name == "none":
        return False
    if config.logger.name == "tensorboard":
        return EpochLogger(save_dir=str(folders.logs), name="", version="tensorboard")
    return WandbLogger(
        project=config.logger.project, name=config.logger.run_name, save_dir=str(folders.logs), config=plain(config)
    )


class EpochLogger(TensorBoardLogger):
    """Logs by epoch, counted from 1, as the trials of a sweep are, which lie beside it. All scalars are of an epoch."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        scalars = dict(metrics)
        epoch = scalars.pop("epoch", None)  # that Lightning adds
        super().log_metrics(scalars, step if epoch is None else int(epoch) + 1)


_NOT_FOR_USERS = (
    r"The `srun` command is available",  # on a login node; where nobody asked for it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6.6 on torch 2.15
    r".*does not have many workers",  # a batch is one gather
    r".*is smaller than the logging interval",
    r"Be aware that when using `ckpt_path`",  # of callbacks that are turned off on purpose
    r"The checkpoint was not created with WeightAveraging",  # the average begins with what is gone on from
    r".*exists and is not empty",  # a retraining's checkpoints lie beside its log
)
_QUIETER = {
    "pytorch_lightning": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "huggingface_hub": logging.ERROR,  # a dozen lines of retries, where one sentence follows
    "timm": logging.ERROR,  # of the classifier, whose weights a pyramid has no use for
}


@contextmanager
def calm() -> Iterator[None]:
    """Keep back what libraries say that a user can do nothing with: hints, hardware that is absent, deprecations."""
    logs = [logging.getLogger(name) for name in _QUIETER]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(_QUIETER[log.name])
        with warnings.catch_warnings():
            for message in _NOT_FOR_USERS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
