"""What this process and its children use, measured on work whose size is known."""

import mmap
import subprocess
import sys
import threading
import time

import pytest

from handpose.sweep.trainable.nvml_gpu import GpuReading
from handpose.sweep.trainable.resource_sampler import ResourceSampler


@pytest.fixture
def make_sampler():
    samplers = []

    def make(**options):
        samplers.append(ResourceSampler(**{"cores": 1, "every_s": 60.0} | options))
        return samplers[-1]

    yield make
    for sampler in samplers:
        sampler.close()


def work(cpu_s):
    """Use so many CPU seconds, however busy the machine is."""
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        sum(range(1000))


def use(sampler, seconds):
    """CPU seconds that the sampler counts over a time in which this process uses so many."""
    sampler.take()
    began = time.perf_counter()
    work(seconds)
    time.sleep(0.2)
    return sampler.take().cpu_percent / 100 * (time.perf_counter() - began)


def test_cpu_time_is_a_share_of_the_cores(make_sampler):
    assert use(make_sampler(), 0.3) == pytest.approx(0.3, abs=0.1)
    assert 4 * use(make_sampler(cores=4), 0.3) == pytest.approx(0.3, abs=0.1)


def test_waiting_uses_no_cpu_time(make_sampler):
    assert use(make_sampler(), 0.0) < 0.05


CHILD = "import time; x = b'x' * 200_000_000; print(1, flush=True); input(); t = time.process_time() + 0.4\n"
CHILD += "while time.process_time() < t: pass\nprint(2, flush=True); input()"


def test_the_time_and_the_memory_of_child_processes_count_while_they_live_and_afterwards(make_sampler):
    alone_mb = make_sampler().take().memory_mb
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD], **pipes) as child:
        child.stdout.readline()
        sampler = make_sampler()
        began = time.perf_counter()
        assert sampler.take().memory_mb > alone_mb + 180
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        used_s = sampler.take().cpu_percent / 100 * (time.perf_counter() - began)
        assert used_s == pytest.approx(0.4, abs=0.15)
        child.communicate("\n")
    sampler.take()
    time.sleep(0.5)
    assert sampler.take().cpu_percent < 50  # what it used is not counted again when it has ended


def test_memory_is_the_largest_sample(make_sampler):
    sampler = make_sampler(every_s=1000.0)
    before_mb = sampler.take().memory_mb
    with mmap.mmap(-1, 100_000_000) as held:  # freed at once, which memory of malloc need not be
        for _ in range(100):
            held.write(bytes(1_000_000))
        sampler._sample()
    sampler._sample()
    assert sampler.take().memory_mb > before_mb + 80
    sampler._sample()
    assert sampler.take().memory_mb < before_mb + 50


class FakeGpu:
    """Readings one after another."""

    def __init__(self, *readings):
        self.readings, self.is_closed = list(readings), False

    def read(self):
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def close(self):
        self.is_closed = True


def test_readings_of_a_gpu_are_combined_and_stay_until_the_next_sample(make_sampler):
    sampler = make_sampler()
    sampler.watch_gpu(FakeGpu(GpuReading(20.0, 500.0, None), GpuReading(60.0, 400.0, None)))
    with sampler._lock:
        sampler._sample()
        sampler._sample()
    assert sampler.take().gpu == GpuReading(40.0, 500.0, None)
    assert sampler.take().gpu == GpuReading(40.0, 500.0, None)  # a short epoch, before the next sample


def test_closing_ends_the_thread_and_releases_the_gpu():
    sampler, gpu = ResourceSampler(cores=1, every_s=0.01), FakeGpu(GpuReading())
    sampler.watch_gpu(gpu)
    time.sleep(0.1)
    sampler.close()
    assert gpu.is_closed
    assert "utilisation" not in {thread.name for thread in threading.enumerate()}
