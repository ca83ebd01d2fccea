"""Measures what a trial costs: trains its network for a few steps on random images, on the same device as a trial.

This module runs in a worker, so it imports little. It reads no data set and leaves no files.
"""

import copy
import gc
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from handpose.config import compose
from handpose.data.sample import HandBatch
from handpose.errors import UserError
from handpose.garbage import collect_as_usual
from handpose.models.weights import find_weights_file
from handpose.skeleton import NUM_JOINTS
from handpose.sweep.record.settings import LatencyOf
from handpose.sweep.trainable.cost_callback import NUM_PROFILED_STEPS, NUM_VALIDATION_BATCHES, CostMonitor
from handpose.sweep.trainable.gpu_memory import check_gpu_is_visible
from handpose.training.batch_norm import SyncBatchNormPlugin
from handpose.training.build import build_training
from handpose.training.checkpoints import read_initial_weights
from handpose.training.module import HandPose
from handpose.training.results import RunFolders
from handpose.training.trainer import (
    check_trainer,
    count_limited_batches,
    explain_trainer_errors,
    make_training_trainer,
    suppress_library_output,
)

MIN_STEPS = NUM_PROFILED_STEPS + 1

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad allocation")


class DataSize(NamedTuple):
    """Size of the data in the default configuration.

    Attributes:
        image_size: side length of the images in pixels.
        num_train: number of training images.
        num_val: number of validation images.
    """

    image_size: int
    num_train: int
    num_val: int


class TrialCost(NamedTuple):
    """The measured costs of one configuration.

    Attributes:
        num_parameters: parameters of the network.
        start_s: seconds until the first step, without imports.
        step_s: seconds of a training step.
        validation_batch_s: seconds of a validation batch, which is as large as a training batch.
        steps_per_epoch: training steps of an epoch.
        batches_per_validation: batches of a validation.
        max_epochs: epochs of a whole training.
        validation_interval: epochs from one validation to the next.
        memory_mb: as in `CostMonitor`.
        gpu_memory_fraction: as in `CostMonitor`.
        process_mb: peak main memory of the process, including its data loader processes but not shared files, in MB.
        gpu: as in `CostMonitor`.
        latency_ms: as in `CostMonitor`.
        checkpoint_mb: as in `CostMonitor`.
        trace: loss and metrics; configurations that train in the same way have the same trace.
        ignored: parameters whose value did not reach the configuration.
        folds: number of folds that a complete trial is trained with.
    """

    num_parameters: int
    start_s: float
    step_s: float
    validation_batch_s: float
    steps_per_epoch: int
    batches_per_validation: int
    max_epochs: int
    validation_interval: int
    memory_mb: float
    gpu_memory_fraction: float
    process_mb: float
    gpu: str
    latency_ms: float
    checkpoint_mb: float
    trace: tuple[float, ...]
    ignored: tuple[str, ...]
    folds: int = 1

    @property
    def epoch_s(self) -> float:
        """Seconds of a training epoch, with its share of the validations."""
        validation_s = self.batches_per_validation * self.validation_batch_s
        return self.steps_per_epoch * self.step_s + validation_s / self.validation_interval

    @property
    def trial_s(self) -> float:
        """Seconds of a trial that is trained to its last epoch."""
        return self.folds * (self.start_s + self.max_epochs * self.epoch_s)


class ProbeFailure(NamedTuple):
    """Why a configuration cannot be trained.

    Attributes:
        kind: `value`: it raised a UserError; `memory`: there is too little memory; `error`: it raised another
            exception; `killed`: its worker process was ended from outside; `crashed`: its worker process received a
            fatal signal, for example SIGSEGV; `time`: it took too long.
        reason: the message.
    """

    kind: Literal["value", "memory", "error", "killed", "crashed", "time"]
    reason: str


class TrialCostProbe:
    """Measures trial costs in a worker. It returns failures instead of raising them."""

    def wait_until_ready(self) -> None:
        """Do nothing: the call returns when the worker has imported everything."""

    def measure_cost(self, *args: Any, **kwargs: Any) -> TrialCost | ProbeFailure:
        """Call `measure_trial_cost` with the same arguments, and return a failure instead of raising it."""
        collect_as_usual()
        try:
            return measure_trial_cost(*args, **kwargs)
        except UserError as error:
            return ProbeFailure("value", str(error))
        except Exception as error:
            is_memory = isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS)
            return ProbeFailure("memory" if is_memory else "error", f"{type(error).__name__}: {summarise_error(error)}")
        finally:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def summarise_error(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 200 characters, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def split_batch(config: DictConfig, num_workers: int) -> DictConfig:
    """Return the configuration for one of the workers that share each batch.

    Raises:
        UserError: the batch size is not divisible by the number of workers.
    """
    if num_workers == 1:
        return config
    size = config.data.batch_size
    if size % num_workers:
        raise UserError(
            f"data.batch_size={size} cannot be shared equally among sweep.workers_per_trial={num_workers}; give a "
            "multiple of it"
        )
    config = copy.deepcopy(config)
    OmegaConf.update(config, "data.batch_size", size // num_workers)
    return config


def measure_trial_cost(
    overrides: Sequence[str],
    params: Mapping[str, Any],
    data: DataSize,
    *,
    num_steps: int,
    weights: bool,
    num_workers: int = 1,
    gpus: float = 0.0,
    latency_of: LatencyOf = None,
) -> TrialCost:
    """Measure the costs of a configuration in this process.

    Args:
        overrides: overrides for train.py, as a worker gets them; they include the parameters.
        params: the parameters of the trial.
        data: the size of the data.
        num_steps: number of training steps, at least MIN_STEPS.
        weights: whether to load pretrained weights. They do not change the costs, but loading them can fail.
        num_workers: number of workers that share each batch. This process does the work of one of them, except for the
            communication.
        gpus: GPUs that this process holds.
        latency_of: what latency_ms is the time of; see `SweepSettings`.

    Raises:
        UserError: the configuration is invalid.
        GpuNotVisibleError: this process holds a GPU that torch does not find.
        Exception: whatever torch raises when it cannot train the network.
    """
    assert num_steps >= MIN_STEPS
    began = time.perf_counter()
    config = split_batch(compose("train", list(overrides)), num_workers)
    check_trainer(config)
    check_gpu_is_visible(config.trainer.accelerator, gpus)
    _check_weights(config)
    steps, batches = _count_batches(config, data, num_workers)
    with suppress_library_output():
        module, _ = build_training(config, pretrained=weights, quiet=True)
    hands = make_random_hands(config.data.batch_size, config.data.image_size or data.image_size)
    module.axes.fit(hands.xyz_m)
    watch = CostMonitor(saves_checkpoint=True)
    metrics = _train_briefly(module, config, _RepeatedBatch(hands, num_steps), watch)
    return TrialCost(
        num_parameters=count_parameters(module),
        start_s=watch.first_step_at_s - began,
        step_s=watch.step_s,
        validation_batch_s=watch.validation_batch_s,
        steps_per_epoch=steps,
        batches_per_validation=batches,
        max_epochs=config.trainer.max_epochs,
        validation_interval=config.trainer.check_val_every_n_epoch,
        memory_mb=watch.memory_mb,
        gpu_memory_fraction=watch.gpu_memory_fraction,
        process_mb=_measure_process_mb() + _LOADERS * config.data.num_workers * _LOADER_PROCESS_MB,
        gpu=watch.gpu,
        latency_ms=watch.latency_ms if latency_of is None else _measure_exported(module, hands, latency_of),
        checkpoint_mb=watch.checkpoint_mb,
        trace=tuple(float(value) for _, value in sorted(metrics.items())),
        ignored=tuple(key for key, value in params.items() if _is_ignored(config, key, value)),
        folds=config.folds.num,
    )


def _train_briefly(
    module: pl.LightningModule, config: DictConfig, data: pl.LightningDataModule, watch: CostMonitor
) -> dict[str, torch.Tensor]:
    """Train and validate for one short epoch, as the configuration says. Return the loss and the metrics."""
    with tempfile.TemporaryDirectory() as folder, suppress_library_output(), explain_trainer_errors(config):
        trainer = make_training_trainer(
            _shorten_training(config), RunFolders(*[Path(folder)] * 3), callbacks=[watch], quiet=True
        )
        trainer.fit(module, datamodule=data)
    return dict(trainer.callback_metrics)


def measure_costs(module: pl.LightningModule, *, latency_of: LatencyOf = None) -> dict[str, float]:
    """Measure the costs that `searcher.constraints` can limit. Call this in `on_fit_start`.

    A copy of the module is trained. Neither the module nor any random number generator changes, so the training that
    follows is bit for bit the same as without the measurement.

    Args:
        module: a module that a Trainer is about to fit.
        latency_of: what latency_ms is the time of; see `SweepSettings`.

    Returns:
        num_parameters: parameters of the network. latency_ms: time of one image through the network in evaluation mode.
            memory_mb: peak memory that torch holds during a training step.
    """
    trainer: Any = module.trainer
    device, data, watch = trainer.strategy.root_device, trainer.datamodule, CostMonitor(saves_checkpoint=False)
    with isolate_rng(), suppress_library_output():
        rehearsal = pl.Trainer(
            max_epochs=1,
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=trainer.precision,
            gradient_clip_val=trainer.gradient_clip_val,
            callbacks=[watch],
            plugins=[LightningEnvironment()],
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        hands = make_random_hands(data.batch_size, data.image_size)
        alone = SyncBatchNormPlugin(on_gpu=False).revert(copy.deepcopy(module).cpu())  # each worker measures alone
        rehearsal.fit(alone, datamodule=_RepeatedBatch(hands, NUM_PROFILED_STEPS))
        latency_ms = watch.latency_ms if latency_of is None else _measure_exported(alone, hands, latency_of)
    return {
        "num_parameters": float(count_parameters(module)),
        "latency_ms": latency_ms,
        "memory_mb": watch.memory_mb,
    }


def _measure_exported(
    module: pl.LightningModule, hands: HandBatch, precision: Literal["fp32", "fp16", "int8"]
) -> float:
    """Measure the time of one image through the exported network on the CPU, in milliseconds."""
    # Imported here because few sweeps need it: ONNX and its runtime take a second to import.
    from handpose.evaluation.onnx_precision import measure_exported_latency_ms

    assert isinstance(module, HandPose), "trials train a HandPose"
    return measure_exported_latency_ms(copy.deepcopy(module).cpu(), hands.image.numpy(), precision)


def count_parameters(module: pl.LightningModule) -> int:
    """Count the parameters of the network; nothing else in a module has parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_random_hands(batch_size: int, image_size: int) -> HandBatch:
    """Make a batch with noise as images and random joints in front of the camera. Every call returns the same values.

    Args:
        batch_size: number of hands.
        image_size: side length of the images in pixels.

    Returns:
        A batch as a data loader returns it.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (batch_size, image_size, image_size, 3), dtype=torch.uint8, generator=generator)
    xyz_m = 0.05 * torch.randn(batch_size, NUM_JOINTS, 3, generator=generator) + torch.tensor([0.0, 0.0, 0.6])
    focal, center = 2.0 * image_size, image_size / 2.0
    intrinsics = torch.tensor([[focal, 0.0, center], [0.0, focal, center], [0.0, 0.0, 1.0]])
    return HandBatch(
        image=pictures.permute(0, 3, 1, 2),
        intrinsics=intrinsics.repeat(batch_size, 1, 1),
        xyz_m=xyz_m,
        scale_m=torch.full((batch_size,), 0.03),
        position=torch.arange(batch_size),
        mask=torch.zeros(batch_size, 1, image_size, image_size, dtype=torch.uint8),
        has_depth=torch.ones(batch_size, dtype=torch.bool),
    )


class _RepeatedBatch(pl.LightningDataModule):
    """A data module that returns the same batch again and again."""

    def __init__(self, hands: HandBatch, num_steps: int) -> None:
        super().__init__()
        self.hands = hands
        self.num_steps = num_steps

    def train_dataloader(self) -> DataLoader[HandBatch]:
        return self._loader(self.num_steps)

    def val_dataloader(self) -> DataLoader[HandBatch]:
        return self._loader(NUM_VALIDATION_BATCHES)

    def _loader(self, num_batches: int) -> DataLoader[HandBatch]:
        batches: Any = [self.hands] * num_batches
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())


_LOADERS = 2
"""Data loaders of a trial, for training and for validation. Each has `data.num_workers` processes."""
_LOADER_PROCESS_MB = 100.0
"""Estimated private memory of a data loader process, in MB: a fork that shares most of its memory with the trial."""


def _measure_process_mb(status: Path = Path("/proc/self/status")) -> float:
    """Return the peak main memory that this process has used, in MB, without mapped files; NaN if it is unknown.

    Mapped files are, for example, libraries and packed images. The processes of a machine share them (some 400 MB with
    torch).
    """
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not status.exists():
        return (peak if sys.platform == "darwin" else 1024 * peak) / 1e6
    mapped = re.search(r"^RssFile:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
    return 1024 * (peak - int(mapped[1] if mapped else 0)) / 1e6


def _shorten_training(config: DictConfig) -> DictConfig:
    """Return the configuration with one epoch and without limits on batches; the rest of the Trainer stays as it is."""
    config = copy.deepcopy(config)
    once = {"max_epochs": 1, "check_val_every_n_epoch": 1, "limit_train_batches": 1.0, "limit_val_batches": 1.0}
    for key, value in once.items():
        OmegaConf.update(config, f"trainer.{key}", value)
    return config


def _check_weights(config: DictConfig) -> None:
    """Check that the weights exist: the cost is measured without them, but the trial needs them."""
    if (weights := config.model.encoder.get("weights")) is not None:
        find_weights_file(weights)
    if config.model.weights is not None:
        read_initial_weights(config)


def _count_batches(config: DictConfig, data: DataSize, num_workers: int) -> tuple[int, int]:
    """Return the number of batches of an epoch and of a validation."""
    devices = config.trainer.devices
    num_devices = num_workers if num_workers > 1 else devices
    batch_size = config.data.batch_size * (num_devices if isinstance(num_devices, int) and num_devices > 0 else 1)
    if batch_size > data.num_train:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is more than the {data.num_train} images of the training split"
        )
    return (
        count_limited_batches(config, "train", data.num_train // batch_size),
        count_limited_batches(config, "val", math.ceil(data.num_val / batch_size)),
    )


def _is_ignored(config: DictConfig, key: str, value: Any) -> bool:
    """Return whether the configuration has another number than the parameter."""
    if not isinstance(value, (bool, int, float)) or "/" in key or "@" in key:
        return False
    found = OmegaConf.select(config, key)
    return isinstance(found, (bool, int, float)) and found != value
