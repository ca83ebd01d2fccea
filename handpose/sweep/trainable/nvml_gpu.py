"""Reads the utilisation, memory and power of an NVIDIA GPU through NVML (nvidia-ml-py), if there is one."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class GpuReading(NamedTuple):
    """The state of a whole GPU, or of a MIG device. None: this device does not tell.

    Attributes:
        percent: share of the time since the last reading in which it executed anything.
        memory_mb: memory in use, in 1e6 bytes.
        power_w: power in watts.
    """

    percent: float | None = None
    memory_mb: float | None = None
    power_w: float | None = None


class NvmlGpu:
    """A GPU that NVML knows. Readings are those of the whole GPU, whoever uses it.

    Args:
        nvml: the module pynvml, after nvmlInit.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._last_sample_us = 0
        self._read_percent()  # the driver's buffer may hold samples from before the trial

    def read(self) -> GpuReading:
        """Read the GPU. What it does not support is None; MIG devices support memory only."""
        memory = self._ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 1e6)
        power = self._ask(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)
        return GpuReading(self._read_percent(), memory, power)

    def close(self) -> None:
        """Release NVML."""
        self._ask(self._nvml.nvmlShutdown)

    def _read_percent(self) -> float | None:
        """Return the mean of the samples that the driver has taken since the last call, several a second.

        The driver keeps about the last 20 s. A GPU without this buffer gives the utilisation of the last second.
        """
        samples = self._ask(self._list_samples) or []
        if samples:
            self._last_sample_us = max(time_us for time_us, _ in samples)
            return float(sum(percent for _, percent in samples) / len(samples))
        return self._ask(lambda: float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))

    def _list_samples(self) -> list[tuple[int, float]]:
        kind = self._nvml.NVML_GPU_UTILIZATION_SAMPLES
        _, samples = self._nvml.nvmlDeviceGetSamples(self._handle, kind, self._last_sample_us)
        return [(each.timeStamp, each.sampleValue.uiVal) for each in samples if each.timeStamp > self._last_sample_us]

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except self._nvml.NVMLError:  # for example not supported, or the GPU was lost
            return None


def open_gpu(device: torch.device) -> NvmlGpu | None:
    """Open the GPU that a trial trains on.

    Returns:
        The GPU; None if the device is no NVIDIA GPU, or without its driver or nvidia-ml-py.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        import pynvml  # imported here: not every installation has it
    except ImportError:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        pynvml.nvmlInit()
        uuid = find_uuid(index, str(torch.cuda.get_device_properties(index).uuid), os.environ)
        return NvmlGpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except (pynvml.NVMLError, AttributeError):  # AttributeError: torch for AMD's GPUs, whose devices have no UUID
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return None


def find_uuid(index: int, cuda_uuid: str, environment: Mapping[str, str]) -> str:
    """Find the name by which NVML knows a device of this process.

    An index in CUDA_VISIBLE_DEVICES is no index of NVML: CUDA counts the fastest GPU first, NVML goes by the PCI bus,
    and Ray counts within the variable that it was started with. So the GPU is identified by the UUID that CUDA gives
    for the device in use. Of a MIG device CUDA may give the UUID of the whole GPU, but such a device is visible only by
    its own UUID, which must stand in the variable in full.

    Args:
        index: number of the device in this process.
        cuda_uuid: its UUID as CUDA gives it, without a prefix.
        environment: the environment variables.

    Returns:
        A UUID that starts with `GPU-` or `MIG-`.
    """
    visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index < len(visible) and visible[index].startswith("MIG-"):
        return visible[index]
    return f"GPU-{cuda_uuid.removeprefix('GPU-')}"
