"""Samples the CPU time, the main memory and the GPU of a worker while it trains a trial."""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

import psutil

from handpose.sweep.trainable.nvml_gpu import GpuReading, NvmlGpu

SAMPLE_EVERY_S = 15.0
"""Seconds between two samples. A sample takes some 30 ms, most of them to count the memory of the processes."""


class ResourceUse(NamedTuple):
    """What a worker used since the last time it was asked. None: not known.

    Attributes:
        cpu_percent: CPU time as a share of the cores.
        memory_mb: largest sampled main memory, in 1e6 bytes.
        gpu: means of the GPU's utilisation and power, and the largest memory in use.
    """

    cpu_percent: float | None
    memory_mb: float | None
    gpu: GpuReading


class ResourceSampler:
    """Samples this process and its children, such as the processes of data loaders, in a thread.

    The thread starts at once. Close the sampler at the end.

    Args:
        cores: cores of the slot.
        every_s: seconds between two samples.
    """

    def __init__(self, *, cores: int, every_s: float = SAMPLE_EVERY_S) -> None:
        self._cores = cores
        self._every_s = every_s
        self._process = psutil.Process()
        self._children: list[psutil.Process] = []
        self._gpu: NvmlGpu | None = None
        self._memory_mb: list[float] = []
        self._readings: list[GpuReading] = []
        self._last: tuple[float | None, GpuReading] = None, GpuReading()
        self._taken_at, self._taken_cpu_s = time.perf_counter(), self._count_cpu_s()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="utilisation", daemon=True)
        self._thread.start()

    def watch_gpu(self, gpu: NvmlGpu | None) -> None:
        """Also sample this GPU from now on. The sampler closes it."""
        with self._lock:
            self._gpu = gpu

    def take(self) -> ResourceUse:
        """Return what was used since the last call.

        Memory and GPU are those of the last samples if none was due since then. The first call takes one.
        """
        with self._lock:
            if not self._memory_mb and self._last[0] is None:
                self._sample()
            now, cpu_s = time.perf_counter(), self._count_cpu_s()
            elapsed_s, used_s = now - self._taken_at, cpu_s - self._taken_cpu_s
            self._taken_at, self._taken_cpu_s = now, cpu_s
            percent = 100 * max(0.0, used_s) / (elapsed_s * self._cores) if elapsed_s > 0 else None
            if self._memory_mb:
                self._last = max(self._memory_mb), _combine_readings(self._readings)
                self._memory_mb, self._readings = [], []
            return ResourceUse(percent, *self._last)

    def close(self) -> None:
        """Stop the thread, and release the GPU."""
        self._stop.set()
        self._thread.join()
        if self._gpu is not None:
            self._gpu.close()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            with self._lock:
                self._sample()

    def _sample(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._children = self._process.children(recursive=True)
        self._memory_mb.append(sum(map(_count_memory_mb, [self._process, *self._children])))
        self._readings.append(self._gpu.read() if self._gpu is not None else GpuReading())

    def _count_cpu_s(self) -> float:
        """Return the CPU seconds of this process, of its children that have ended, and of those seen last time."""
        own = os.times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in self._children:
            with contextlib.suppress(psutil.Error):  # it has ended, and is counted as such
                times = child.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total


def _count_memory_mb(process: psutil.Process) -> float:
    """Return the memory of a process in 1e6 bytes; 0 if it has ended.

    Shared memory is divided among the processes that share it (PSS). Where the system does not tell, as on macOS, it is
    the memory of the process alone (USS).
    """
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0.0
    return float(getattr(memory, "pss", memory.uss)) / 1e6


def _combine_readings(readings: Iterable[GpuReading]) -> GpuReading:
    percents, memories, powers = (
        [value for value in values if value is not None] for values in zip(*readings, strict=True)
    )
    return GpuReading(
        statistics.fmean(percents) if percents else None,
        max(memories, default=None),
        statistics.fmean(powers) if powers else None,
    )
