"""Measures where the time of a segment goes, and what it uses.

On a GPU, the program on the CPU only submits work and runs ahead. The device is not synchronised in every step, because
that would slow the training down. So what is measured is the time of the program on the CPU:

- Waiting for data is the time in which the program asks the data loader for the next batch and has none. Copying it to
  the GPU counts as training, since the copy may wait for the GPU. While the program waits, the GPU may still have work:
  see `handpose.report.utilisation.judge`.
- The device is synchronised once per epoch, before the validation, so that steps that were only submitted do not count
  as validation.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import Profiler

from handpose.report.utilisation import PHASES, Phase, Utilisation
from handpose.sweep.trainable.nvml_gpu import open_gpu
from handpose.sweep.trainable.resource_sampler import ResourceSampler

_FETCH = "].train_dataloader_next"
"""End of the name under which Lightning (2.6) profiles that it fetches a training batch."""


class PhaseClock:
    """Adds up the time of each phase. A segment begins with its start-up.

    Args:
        started_at: when the segment started, by `clock`.
        clock: returns the time in seconds.
    """

    def __init__(self, *, started_at: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock() if started_at is None else started_at
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.phase: Phase = "start_up"

    def enter(self, phase: Phase) -> None:
        """Enter a phase."""
        now = self._clock()
        self._seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now

    def take(self) -> dict[Phase, float]:
        """Return phase -> seconds since the last call."""
        self.enter(self.phase)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


class FetchProfiler(Profiler):
    """Notices when Lightning fetches a training batch, and passes everything on to the configured profiler.

    Lightning's hooks do not tell the time to fetch a batch from the time to copy it to the device.

    Args:
        profiler: the Trainer's profiler.
        on_fetch: called before a training batch is fetched.
        on_fetched: called afterwards.
    """

    def __init__(self, profiler: Profiler, *, on_fetch: Callable[[], None], on_fetched: Callable[[], None]) -> None:
        super().__init__()
        self.profiler = profiler
        self._on_fetch = on_fetch
        self._on_fetched = on_fetched

    def start(self, action_name: str) -> None:
        self.profiler.start(action_name)
        if action_name.endswith(_FETCH):
            self._on_fetch()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(_FETCH):
            self._on_fetched()
        self.profiler.stop(action_name)

    def summary(self) -> str:
        return self.profiler.summary()

    def describe(self) -> None:
        self.profiler.describe()

    def teardown(self, stage: str | None) -> None:
        self.profiler.teardown(stage)


class UtilisationMeter(pl.Callback):
    """Measures a segment of a trial, within a `with` block. It changes nothing that the network computes.

    Args:
        cores: cores of the worker's slot.
        gpus: GPUs of the worker.
        started_at: when the segment started, by time.perf_counter.
    """

    def __init__(self, *, cores: int, gpus: float, started_at: float) -> None:
        self._gpus = gpus
        self._clock = PhaseClock(started_at=started_at)
        self._sampler = ResourceSampler(cores=cores)
        self._watches_gpu = False

    def __enter__(self) -> "UtilisationMeter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sampler.close()

    def take(self) -> Utilisation:
        """Return what the segment has used since the last call."""
        used = self._sampler.take()
        return Utilisation(
            self._clock.take(),
            used.cpu_percent,
            used.memory_mb,
            self._gpus,
            used.gpu.percent,
            used.gpu.memory_mb,
            used.gpu.power_w,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        owner: Any = trainer
        owner.profiler = FetchProfiler(owner.profiler, on_fetch=self._on_fetch, on_fetched=self._on_fetched)
        device = trainer.strategy.root_device
        if device.type != "cuda":
            self._gpus = 0.0
        if not self._watches_gpu:  # a segment has a Trainer for each fold
            self._watches_gpu = True
            self._sampler.watch_gpu(open_gpu(device))

    def begin_start_up(self) -> None:
        """Count the time from now on as start-up, because the segment begins another fold."""
        self._clock.enter("start_up")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_fetch()  # a data loader may start an epoch slowly

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._clock.enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._clock.enter("report")

    def _on_fetch(self) -> None:
        if self._clock.phase != "start_up":  # the first batch is part of it
            self._clock.enter("data")

    def _on_fetched(self) -> None:
        self._clock.enter("training")
