"""What glibc does with freed memory, counted in page faults by two forks of a process."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import os, resource
import torch
from handpose.malloc import keep_freed_memory
torch.set_num_threads(1)

def count_faults():
    net = torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)])
    images = torch.rand(8, 8, 192, 192)
    def train(steps):
        for _ in range(steps):
            net(images).sum().backward()
    train(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    train(3)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)

for set_up in (keep_freed_memory, lambda: None):
    if os.fork() == 0:
        set_up()
        count_faults()
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.slow
def test_memory_that_is_kept_is_not_cleared_by_the_kernel_again():
    # 0 to 110,000 on a machine that has nothing else to do; with much else the kernel takes some pages back by itself.
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    kept, default = map(int, done.stdout.split())
    assert kept < 0.1 * default
