"""Looks on while a network is trained for a few steps: how long a step takes, and what memory torch holds.

Memory is counted by torch's allocator on a GPU, and on the CPU from the profiler's events: unlike the size of the
process it does not depend on what ran there before.
"""

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

from handpose.data.augment import unchanged
from handpose.data.sample import HandBatch

NUM_PROFILED_STEPS = 2
"""The first steps, whose memory is counted: at the second one the optimizer has its state. The others are timed."""
NUM_VALIDATION_BATCHES = 2
"""Batches of the validation, of which the first prepares."""

_LATENCY_WARM_UP = 2
_LATENCY_REPEATS = (7, 50)
_LATENCY_S = 0.5
"""One picture is timed for so long, at least and at most so often. What else the machine does only adds to a time, so
that the least one counts: beside six other processes on two cores it was 1.9 to 2.2 ms, and 2.0 to 2.3 ms alone, where
the median of seven was 27 to 37 ms.
"""
CONTEXT_BYTES = 500e6
"""What a process takes of a GPU beside its tensors: kernels, the work spaces of cuDNN and cuBLAS. Rough."""
_MB = 1e6


class CostMonitor(pl.Callback):
    """Measures while a module is fitted for one epoch of a few steps, with a validation of NUM_VALIDATED batches.

    saves: a checkpoint too, for its size. began_s: when the first step began, by time.perf_counter. memory_mb: that
    torch holds at the peak of a step, in 1e6 bytes. gpu: its name, and memory_share the part of it that the process
    took; empty and 0 on a CPU. latency_ms: of one picture through the network, in evaluation, the least of many.
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
        return self._steps_s[0]

    @property
    def step_s(self) -> float:
        """Median seconds of a step, the loop round it included."""
        return statistics.median(after - before for before, after in pairwise(self._steps_s[NUM_PROFILED_STEPS:]))

    @property
    def validation_batch_s(self) -> float:
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
        self._steps_s.append(_read_device_clock(pl_module.device))  # the last step's end

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
            self.memory_mb = torch.mps.driver_allocated_memory() / _MB  # what is there now: it does not tell the peak
        if self._saves_checkpoint:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trial.ckpt"
                trainer.save_checkpoint(file)
                self.checkpoint_mb = file.stat().st_size / _MB

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._profile is not None:  # there can be only one in a process
            self._profile.stop()
            self._profile = None


def _read_device_clock(device: torch.device) -> float:
    """Seconds, when all that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _time_forward_passes(module: pl.LightningModule, batch: HandBatch) -> Iterator[float]:
    """Of one picture through the network, which is in evaluation."""
    view = unchanged(HandBatch(*(field[:1] for field in batch)))
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
    """The most that was allocated on the CPU at one time, beyond what was there when the profile began.

    The profiler does not see that memory from before is freed, so that none of it may be.
    """
    kineto: Any = profile.profiler and profile.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
