"""Measures the time of a step and the memory that torch holds while a network is trained for a few steps.

On a GPU, torch's allocator counts the memory. On the CPU, the memory is counted from the profiler's events: unlike the
size of the process, this does not depend on what ran in the process before.
"""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from handpose.data.augment import to_view
from handpose.data.sample import HandBatch

NUM_PROFILED_STEPS = 2
"""Number of first steps whose memory is measured; from the second one on, the optimizer has its state.

The steps after these are timed.
"""
NUM_VALIDATION_BATCHES = 2
"""Number of validation batches; the first is a warm-up."""

_LATENCY_WARM_UP = 2
_LATENCY_REPEATS = (7, 50)
_LATENCY_S = 0.5
"""How long the network is timed on one image, within the two limits on repeats.

Other work on the machine only adds to a time, so the minimum counts. Next to six other processes on two cores, the
minimum was 1.9 to 2.2 ms, and 2.0 to 2.3 ms alone, whereas the median of seven was 27 to 37 ms.
"""
CONTEXT_BYTES = 500e6
"""Rough GPU memory of a process in addition to its tensors: kernels, and work spaces of cuDNN and cuBLAS."""
_MB = 1e6


class CostMonitor(pl.Callback):
    """Measures costs while a module is fitted for one short epoch with NUM_VALIDATION_BATCHES validation batches.
    Args:
        saves_checkpoint: whether to save a checkpoint, to measure its size.

    Attributes:
        memory_mb: peak memory that torch holds during a step, in 1e6 bytes. On MPS it is the memory at the end, since
            MPS does not report the peak.
        gpu_memory_fraction: fraction of the GPU's memory that the process used; 0 without a CUDA GPU.
        gpu: name of the CUDA GPU; empty without one.
        latency_ms: time of one image through the network in evaluation mode, the minimum of many.
        checkpoint_mb: size of a checkpoint, in 1e6 bytes.
    """

    def __init__(self, *, saves_checkpoint: bool) -> None:
        self._saves_checkpoint = saves_checkpoint
        self._steps_s: list[float] = []
        self._validations_s: list[float] = []
        self._profile: torch.profiler.profile | None = None
        self._held_bytes = 0
        self._before_bytes = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        self.memory_mb = math.nan
        self.gpu_memory_fraction = 0.0
        self.gpu = ""
        self.latency_ms = math.nan
        self.checkpoint_mb = math.nan

    @property
    def first_step_at_s(self) -> float:
        """When the first step started, by time.perf_counter."""
        return self._steps_s[0]

    @property
    def step_s(self) -> float:
        """Median seconds of a training step, including the loop around it."""
        return statistics.median(after - before for before, after in pairwise(self._steps_s[NUM_PROFILED_STEPS:]))

    @property
    def validation_batch_s(self) -> float:
        """Seconds of the last validation batch."""
        return self._validations_s[-1] - self._validations_s[-2]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps_s.append(_read_device_clock(pl_module.device))
        if batch_idx == 0 and pl_module.device.type == "cpu":
            held = (*batch, *pl_module.parameters(), *pl_module.buffers())
            self._held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
            gc.collect()  # the memory of earlier trainings must not be freed while the profile runs
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is not None and batch_idx == NUM_PROFILED_STEPS - 1:
            self._profile.stop()
            self.memory_mb = (self._held_bytes + _compute_peak_bytes(self._profile)) / _MB
            self._profile = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps_s.append(_read_device_clock(pl_module.device))  # end of the last step

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validations_s.append(_read_device_clock(pl_module.device))
        if batch_idx == NUM_VALIDATION_BATCHES - 1:
            with trainer.precision_plugin.val_step_context():
                self.latency_ms = 1e3 * min(_time_forward_passes(pl_module, batch))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device
        if device.type == "cuda":
            self.gpu = torch.cuda.get_device_name(device)
            self.memory_mb = (torch.cuda.max_memory_allocated(device) - self._before_bytes) / _MB
            whole = torch.cuda.get_device_properties(device).total_memory
            self.gpu_memory_fraction = (torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES) / whole
        elif device.type == "mps":
            self.memory_mb = torch.mps.driver_allocated_memory() / _MB  # MPS reports no peak
        if self._saves_checkpoint:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trial.ckpt"
                trainer.save_checkpoint(file)
                self.checkpoint_mb = file.stat().st_size / _MB

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._profile is not None:  # a process can have only one profiler
            self._profile.stop()
            self._profile = None


def _read_device_clock(device: torch.device) -> float:
    """Return time.perf_counter in seconds when the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _time_forward_passes(module: pl.LightningModule, batch: HandBatch) -> Iterator[float]:
    """Yield the seconds of each pass of one image through the network, which is in evaluation mode."""
    view = to_view(HandBatch(*(field[:1] for field in batch)))
    for _ in range(_LATENCY_WARM_UP):
        module(view)
    least, most = _LATENCY_REPEATS
    began = before = _read_device_clock(module.device)
    for repeat in range(most):
        if repeat >= least and before - began >= _LATENCY_S:
            return
        module(view)
        after = _read_device_clock(module.device)
        yield after - before
        before = after


def _compute_peak_bytes(profile: torch.profiler.profile) -> int:
    """Return the peak of the memory on the CPU that was allocated since the profile started, in bytes.

    The profiler does not see that memory from before is freed, so none of that memory may be freed while it runs.
    """
    kineto: Any = profile.profiler and profile.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
