"""The GPU of a trial among those of the machine, and what is read of it, with a stand-in for NVML."""

import sys
from types import SimpleNamespace

import pytest
import torch

from handpose.sweep.trainable.nvml_gpu import GpuReading, NvmlGpu, find_uuid, open_gpu

UUID = "6f1b3d9a-0000-1111-2222-333344445555"
MIG = "MIG-1c2d3e4f-0000-1111-2222-333344445555"


@pytest.mark.parametrize(
    ("visible", "index", "found"),
    [
        (None, 0, f"GPU-{UUID}"),
        ("3", 0, f"GPU-{UUID}"),  # an index of CUDA's own order, which NVML does not have
        ("GPU-6f1b", 0, f"GPU-{UUID}"),  # CUDA also takes the beginning of a UUID, but NVML does not
        (f"0, {MIG}", 1, MIG),
        (f"{MIG},0", 1, f"GPU-{UUID}"),
        ("", 0, f"GPU-{UUID}"),
    ],
)
def test_the_gpu_is_named_by_its_own_uuid_and_a_mig_device_by_the_one_in_the_variable(visible, index, found):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert find_uuid(index, UUID, environment) == found


class FakeNvmlError(Exception):
    """As pynvml.NVMLError."""


class FakeNvml:
    """A driver. samples: (microseconds, percent) that it has buffered; lacks: functions that the device lacks."""

    NVML_GPU_UTILIZATION_SAMPLES = 1
    NVMLError = FakeNvmlError

    def __init__(self, samples=(), lacks=()):
        self.samples, self.lacks, self.opened, self.num_users = list(samples), lacks, [], 0

    def __getattribute__(self, name):
        if name.startswith("nvml") and name in object.__getattribute__(self, "lacks"):
            raise FakeNvmlError(f"{name} is not supported")
        return object.__getattribute__(self, name)

    def nvmlInit(self):  # noqa: N802
        self.num_users += 1

    def nvmlShutdown(self):  # noqa: N802
        self.num_users -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.opened.append(uuid)
        return uuid

    def nvmlDeviceGetSamples(self, handle, kind, since):  # noqa: N802
        fresh = [(at, value) for at, value in self.samples if at >= since]  # NVML may repeat the last one
        return 1, [SimpleNamespace(timeStamp=at, sampleValue=SimpleNamespace(uiVal=value)) for at, value in fresh]

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return SimpleNamespace(gpu=33)

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=5_000_000_000)

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        return 250_000


def test_the_percentage_is_the_mean_of_the_samples_since_the_last_reading():
    nvml = FakeNvml([(100, 0), (200, 10)])
    gpu = NvmlGpu(nvml, "gpu")
    nvml.samples += [(300, 80), (400, 100)]
    assert gpu.read() == GpuReading(90.0, 5000.0, 250.0)
    nvml.samples += [(500, 50)]
    assert gpu.read().percent == 50.0


def test_a_gpu_without_buffered_samples_gives_its_present_utilisation():
    assert NvmlGpu(FakeNvml(lacks=("nvmlDeviceGetSamples",)), "gpu").read().percent == 33.0


def test_what_a_mig_device_does_not_support_is_none():
    lacks = ("nvmlDeviceGetSamples", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage")
    assert NvmlGpu(FakeNvml(lacks=lacks), "mig").read() == GpuReading(None, 5000.0, None)


@pytest.fixture
def cuda(monkeypatch):
    """As if CUDA showed one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUID))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return install


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_gpu_that_the_trial_trains_on_is_opened_and_released(cuda, device):
    nvml = cuda(FakeNvml())
    gpu = open_gpu(torch.device(device))
    assert (nvml.opened, nvml.num_users) == ([f"GPU-{UUID}"], 1)
    gpu.close()
    assert nvml.num_users == 0


@pytest.mark.parametrize("lacks", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_a_driver_or_the_gpu_there_is_nothing_to_read_and_nothing_is_printed(cuda, lacks, capfd):
    cuda(FakeNvml(lacks=(lacks,)))
    assert open_gpu(torch.device("cuda:0")) is None
    assert capfd.readouterr() == ("", "")


def test_without_the_package_there_is_nothing_to_read(cuda):
    cuda(None)  # importing it raises ImportError
    assert open_gpu(torch.device("cuda:0")) is None


def test_a_cpu_is_no_gpu():
    assert open_gpu(torch.device("cpu")) is None
