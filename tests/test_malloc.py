"""What glibc does with freed memory, counted in page faults by processes of their own."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from handpose.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
net = torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)])
images = torch.rand(8, 8, 192, 192)
def train(steps):
    for _ in range(steps):
        net(images).sum().backward()
train(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
train(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_that_is_kept_is_not_cleared_by_the_kernel_again():
    # 0 to 180,000 on a machine that has nothing else to do; with much else the kernel takes some pages back by itself.
    assert faults("keep") < 0.1 * faults("default")
