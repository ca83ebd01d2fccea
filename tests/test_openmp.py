"""When OpenMP's threads spin, and what other programs take of the cores."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from handpose import openmp
from handpose.config_files import REPOSITORY
from handpose.openmp import WAIT_VARIABLES, ContentionWatch, read_wait_s, watch_contention
from handpose.resources import count_cores

MEASURE_SPINNING = """
import time
import torch
from handpose.openmp import SleepingThreads
torch.set_num_threads(2)
numbers = torch.zeros(1_000_000)
def measure_cpu_s():
    numbers.add_(1)
    before = time.process_time()
    for _ in range(20):
        numbers.add_(1)
        time.sleep(0.02)
    return time.process_time() - before
sleeping = SleepingThreads()
print(measure_cpu_s())
for change in (sleeping.start, sleeping.stop, sleeping.start):
    change()
    time.sleep(0.3)
    print(measure_cpu_s())
"""


@pytest.mark.skipif(sys.platform != "linux" or count_cores() < 2, reason="needs GNU OpenMP and two cores")
@pytest.mark.slow
def test_threads_spin_after_an_operation_except_while_they_are_to_sleep():
    """Counted in processor time, which does not depend on what else the machine does."""
    kept = {name: value for name, value in os.environ.items() if name not in (*WAIT_VARIABLES, "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_SPINNING],
        env=kept | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    spinning, sleeping, spinning_again, sleeping_again = map(float, done.stdout.split())
    assert sleeping < spinning / 3  # a twentieth on an idle machine
    assert sleeping_again < spinning_again / 3


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count waiting threads")
def test_two_threads_on_one_core_wait_for_each_other():
    def compute_on_one_core():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            hashlib.sha256(bytes(1_000_000))  # without Python's lock

    before = read_wait_s()
    threads = [threading.Thread(target=compute_on_one_core) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.45)
    waited_s = read_wait_s() - before  # while they live
    for thread in threads:
        thread.join()
    assert waited_s > 0.2


class FakeCores:
    """Cores of which other programs take some, and a clock."""

    def __init__(self):
        self.now_s = self.waited_s = self.lost_cores = 0.0
        self.watch = ContentionWatch(lambda: self.waited_s, clock=lambda: self.now_s)

    def update(self, seconds):
        """Update every half second for so long; returns how much of this time the cores counted as contended."""
        contended_s = 0.0
        for _ in range(round(2 * seconds)):
            self.now_s += 0.5
            # Threads that sleep at barriers do not show what they lose.
            self.waited_s += 0.0 if self.watch.lost_cores else 0.5 * self.lost_cores
            self.watch.update()
            contended_s += 0.5 if self.watch.lost_cores else 0.0
        return contended_s


def test_free_cores_are_never_contended():
    cores = FakeCores()
    cores.lost_cores = 0.4  # a logger now and then
    assert cores.update(1000) == 0


def test_contention_is_seen_in_a_second_and_rarely_tried_again_while_it_lasts():
    cores = FakeCores()
    cores.update(60)
    cores.lost_cores = 0.67
    assert cores.update(1) >= 0.5
    assert cores.watch.lost_cores == pytest.approx(0.67)
    assert cores.update(600) >= 0.95 * 600


def test_the_end_of_contention_is_seen_soon_after_a_short_one_and_in_half_a_minute_after_a_long_one():
    for contended_s, most_s in ((2, 4.5), (600, 30.5)):
        cores = FakeCores()
        cores.update(60)
        cores.lost_cores = 2.0
        cores.update(contended_s)
        cores.lost_cores = 0.0
        assert cores.update(100) <= most_s
        assert cores.watch.lost_cores == 0


def test_cores_that_were_free_for_long_are_tried_again_soon():
    cores = FakeCores()
    for lost_cores, seconds in ((2.0, 600), (0.0, 100), (2.0, 1)):
        cores.lost_cores = lost_cores
        cores.update(seconds)
    cores.lost_cores = 0.0
    assert 0 < cores.update(100) <= 4.5


@pytest.mark.parametrize("name", [None, *WAIT_VARIABLES])
def test_how_the_user_lets_threads_wait_is_left_as_it_is(monkeypatch, name):
    started = []
    monkeypatch.setattr(openmp.threading.Thread, "start", lambda self: started.append(self))
    for each in WAIT_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "1")
    assert watch_contention.__wrapped__().lost_cores == 0
    assert len(started) == (name is None)
