"""Lightning's Trainer with this project's plugins, callbacks and loggers, and checks of what the machine supports."""

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from handpose.config import instantiate_key, to_plain_values
from handpose.errors import UserError, join_lines
from handpose.metrics.validation import make_target_metric
from handpose.openmp import watch_contention
from handpose.training.averaging import AveragedWeights
from handpose.training.batch_norm import SyncBatchNormPlugin
from handpose.training.callbacks import FinalValidation, PredictionPictures
from handpose.training.checkpoints import AtomicCheckpointIO, BestAndLastCheckpoint, ConfigInCheckpoint
from handpose.training.free_cores import FreeCores
from handpose.training.progress import ProgressBar
from handpose.training.results import RunFolders


class ProcessGroup(NamedTuple):
    """The processes that train together. They were started outside Lightning, and this process is one of them."""

    strategy: Strategy
    environment: ClusterEnvironment


def make_training_trainer(
    config: DictConfig,
    folders: RunFolders,
    *,
    callbacks: Sequence[pl.Callback] = (),
    quiet: bool = False,
    process_group: ProcessGroup | None = None,
) -> pl.Trainer:
    """Make a Trainer for training, with checkpoints, a log, pictures and, unless quiet, progress.

    Args:
        config: the composed configuration.
        folders: where to save files.
        callbacks: further callbacks.
        quiet: show no progress.
        process_group: the processes that train together, this one included; None: Lightning starts as many as
            trainer.devices says.
    """
    averaging = [AveragedWeights(decay=config.ema_decay)] if config.ema_decay > 0.0 else []
    all_callbacks = [*averaging, *callbacks, ConfigInCheckpoint(to_plain_values(config))]
    if torch.get_num_threads() > 1 and not has_fixed_num_threads(config):
        all_callbacks.append(FreeCores(watch_contention()))
    saving, pictures = config.checkpoints, config.pictures
    if saving.enabled:
        target = make_target_metric(saving.metric, saving.mode, group="checkpoints")
        all_callbacks.append(
            BestAndLastCheckpoint(
                folders.checkpoints,
                metric=None if config.train_on_val else target.name,
                mode=target.mode,
                every_n_epochs=saving.every_n_epochs,
            )
        )
    logger = _make_logger(config, folders)
    if logger and pictures.every_n_steps > 0:
        all_callbacks.append(PredictionPictures(every_n_steps=pictures.every_n_steps, num_hands=pictures.num_hands))
    trainer = _make_trainer(
        config,
        callbacks=[*all_callbacks, *_make_progress_callbacks(config, quiet)],
        logger=logger,
        enable_checkpointing=saving.enabled,
        default_root_dir=str(folders.logs),
        **({"limit_val_batches": 0} if config.train_on_val else {}),  # no data is held out
        **({"strategy": process_group.strategy, "devices": "auto"} if process_group else {}),
        environment=process_group.environment if process_group else None,
    )
    trainer.callbacks.append(FinalValidation())  # type: ignore[attr-defined]  # after Lightning's Timer
    # Without a file, the profiler writes to Lightning's log, which is silenced.
    if config.trainer.get("profiler") is not None:
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        profiler.dirpath, profiler.filename = folders.logs, "profile"
    return trainer


def make_prediction_trainer(config: DictConfig, *, quiet: bool = False) -> pl.Trainer:
    """Make a Trainer that predicts every batch it gets and writes no files."""
    return _make_trainer(
        config,
        callbacks=_make_progress_callbacks(config, quiet),
        logger=False,
        enable_checkpointing=False,
        max_time=None,
        profiler=None,
    )


def apply_fast_dev_run(config: DictConfig) -> DictConfig:
    """Return the configuration of a run with `trainer.fast_dev_run` batches in each stage.

    Lightning's own fast_dev_run would skip checkpoints, so that the test predictions could not be tried.

    Returns:
        A changed copy, or the same configuration if `trainer.fast_dev_run` is off.

    Raises:
        UserError: the configuration resumes a training.
    """
    num_batches = int(config.trainer.get("fast_dev_run") or 0)
    if not num_batches:
        return config
    if config.model.checkpoint_path is not None and not config.test:
        raise UserError(
            f"trainer.fast_dev_run={num_batches} starts a training and cannot resume one; give model.weights="
            f"{config.model.checkpoint_path} instead of model.checkpoint_path, or test=true to try the predictions"
        )
    config = copy.deepcopy(config)
    limits = {"max_epochs": 1, "limit_train_batches": num_batches, "limit_val_batches": num_batches}
    for key, value in {**limits, "check_val_every_n_epoch": 1}.items():
        OmegaConf.update(config, f"trainer.{key}", value)
    config.checkpoints.every_n_epochs = 1
    if config.logger.name == "wandb":
        config.logger.name = "none"
    return config


def count_limited_batches(config: DictConfig, stage: Literal["train", "val"], num_batches: int) -> int:
    """Count the batches of an epoch under `trainer.limit_<stage>_batches`, as Lightning does.

    A float of at most 1.0 is a fraction of the batches. Any other limit is a number of batches.

    Args:
        config: the composed configuration.
        stage: the stage.
        num_batches: number of batches without the limit.

    Raises:
        UserError: no batch is left.
    """
    key = f"limit_{stage}_batches"
    limit = config.trainer[key]
    is_part = isinstance(limit, float) and limit <= 1.0
    limited = int(num_batches * limit) if is_part else min(num_batches, int(limit))
    if num_batches and not limited:
        raise UserError(
            f"trainer.{key}={limit:g} leaves none of the {num_batches} batches; give a larger fraction, or a number of "
            f"batches, such as trainer.{key}=1"
        )
    return limited


def check_trainer(config: DictConfig) -> None:
    """Raise UserError if this machine cannot run the configured Trainer."""
    if config.logger.name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("logger=wandb needs the package wandb, which is not installed: pip install wandb")
    _check_devices(config.trainer.accelerator, config.trainer.devices)
    num_nodes = config.trainer.get("num_nodes", 1)
    if num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={num_nodes} would wait for other nodes; start the same command on each of them with "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK set"
        )
    with suppress_library_output():
        trainer = _make_trainer(config, logger=False, enable_checkpointing=False)
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    if any((timer.time_remaining() or 0.0) <= 0 for timer in timers):
        raise UserError(f"trainer.max_time={config.trainer.max_time} leaves no time to train; give a longer one")


def _check_devices(accelerator: str, devices: Any) -> None:
    num_gpus = torch.cuda.device_count()
    found = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}" if num_gpus else "no GPU"
    if accelerator in ("gpu", "cuda") and not num_gpus:
        raise UserError(f"trainer.accelerator={accelerator}, but this machine has no GPU that torch can use")
    if accelerator != "cpu" and isinstance(devices, int) and devices > max(1, num_gpus):
        raise UserError(f"trainer.devices={devices}, but this machine has {found}")


def _make_trainer(config: DictConfig, *, environment: ClusterEnvironment | None = None, **arguments: Any) -> pl.Trainer:
    try:
        return instantiate_key(
            config,
            "trainer",
            fast_dev_run=False,  # apply_fast_dev_run has replaced it by limits
            limit_test_batches=1.0,
            limit_predict_batches=1.0,
            use_distributed_sampler=False,  # the loader's sampler divides the batches among processes
            # Lightning's detection of Slurm fails inside a trial (lightning #6389).
            plugins=[
                environment or LightningEnvironment(),
                AtomicCheckpointIO(),
                SyncBatchNormPlugin(on_gpu=uses_gpu(config)),
            ],
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            _convert_="all",  # Lightning does not accept a DictConfig for max_time
            **arguments,
        )
    except InstantiationException as error:  # Lightning's MisconfigurationException
        raise _make_user_error(error.__cause__) from error


@contextmanager
def explain_trainer_errors(config: DictConfig) -> Iterator[None]:
    """Convert errors that the Trainer's arguments cause in Lightning and torch during training to UserError."""
    try:
        yield
    except MisconfigurationException as error:
        raise _make_user_error(error) from error
    except RuntimeError as error:
        if config.trainer.get("deterministic") is True and "deterministic" in str(error):
            raise UserError(
                f"trainer.deterministic=true: {_get_first_sentence(error)}; trainer.deterministic=warn only warns"
            ) from error
        if config.trainer.get("detect_anomaly") and "returned nan values" in str(error):
            raise UserError(
                f"trainer.detect_anomaly=true: {_get_first_sentence(error)} (the warning above shows where in the "
                "forward pass); a smaller optimizer.lr may help"
            ) from error
        raise


def _make_user_error(error: BaseException | None) -> UserError:
    return UserError(f"trainer: {join_lines(error)}")


def _get_first_sentence(error: BaseException) -> str:
    return join_lines(error).partition(". ")[0].rstrip(".")


def uses_gpu(config: DictConfig) -> bool:
    """Whether the configured Trainer uses a GPU of this machine through CUDA or ROCm."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def count_local_processes(config: DictConfig) -> int:
    """Count the training processes that Lightning starts on this machine: one per device."""
    devices = config.trainer.devices
    if isinstance(devices, int) and devices > 0:
        return devices
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if uses_gpu(config) else 1
    return len(devices) if OmegaConf.is_list(devices) else 1


def has_fixed_num_threads(config: DictConfig) -> bool:
    """Return whether the user has given the number of threads, by `num_threads` or OMP_NUM_THREADS."""
    return config.num_threads is not None or bool(os.environ.get("OMP_NUM_THREADS"))


def _make_progress_callbacks(config: DictConfig, quiet: bool) -> list[pl.Callback]:
    if quiet:
        return []
    return [ProgressBar(metric=config.checkpoints.metric, shows_bar=bool(config.trainer.enable_progress_bar))]


def _make_logger(config: DictConfig, folders: RunFolders) -> Logger | bool:
    if config.logger.name == "none":
        return False
    if config.logger.name == "tensorboard":
        return EpochLogger(save_dir=str(folders.logs), name="", version="tensorboard")
    return WandbLogger(
        project=config.logger.project,
        name=config.logger.run_name,
        save_dir=str(folders.logs),
        config=to_plain_values(config),
    )


class EpochLogger(TensorBoardLogger):
    """TensorBoard logger whose steps are epochs, counted from 1, like those of the trials of a sweep.

    All scalars of this project are per epoch.
    """

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        scalars = dict(metrics)
        epoch = scalars.pop("epoch", None)  # added by Lightning
        super().log_metrics(scalars, step if epoch is None else int(epoch) + 1)


_IGNORED_WARNINGS = (
    r"The `srun` command is available",  # on a login node of a cluster
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6.6 on torch 2.15
    r".*does not have many workers",  # workers are not needed: a batch is one gather
    r".*is smaller than the logging interval",
    r"Be aware that when using `ckpt_path`",  # about callbacks that are deliberately off
    # The average then starts with the weights of the checkpoint.
    r"The checkpoint was not created with WeightAveraging",
    r".*exists and is not empty",  # the log folder of a retraining contains its checkpoints
)
_LOG_LEVELS = {
    "pytorch_lightning": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "huggingface_hub": logging.ERROR,  # a dozen lines about retries, before our error message
    "timm": logging.ERROR,  # about the weights of the classifier, which is not used
}


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """Suppress messages of libraries that do not help the user: hints, missing hardware, deprecations."""
    logs = [logging.getLogger(name) for name in _LOG_LEVELS]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(_LOG_LEVELS[log.name])
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
