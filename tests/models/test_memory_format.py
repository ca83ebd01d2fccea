"""Memory formats: channels last wherever oneDNN's backward pass is safe with it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from handpose.config import compose
from handpose.heatmaps import AxisLogits
from handpose.models.memory_format import choose_memory_format
from handpose.models.pose_net import PoseNet
from handpose.training.build import build_training

SMALL = ["data.image_size=64", "data.batch_size=2", "model.decoder.depth=1", "num_threads=1", "trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("convolution", "is_safe"),
    [
        (nn.Conv2d(3, 8, 1, stride=2), False),
        (nn.Conv2d(15, 8, 1, stride=4), False),
        (nn.Conv2d(2, 8, 1, stride=(1, 2)), False),
        (nn.Conv2d(16, 8, 1, stride=2), True),
        (nn.Conv2d(3, 8, 1), True),
        (nn.Conv2d(3, 8, 3, stride=2), True),
    ],
    ids=str,
)
def test_a_strided_1x1_convolution_of_few_channels_is_contiguous_on_a_cpu(convolution, is_safe):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), convolution)
    assert (choose_memory_format(net, on_gpu=False) is torch.channels_last) == is_safe
    assert choose_memory_format(net, on_gpu=True) is torch.channels_last


class OneConvolution(nn.Module):
    """Stands in for an encoder, and keeps the picture that it was shown."""

    channels, reductions = (8,), (2,)

    def __init__(self, kernel_size):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, kernel_size, stride=2)

    def forward(self, image):
        self.image = image
        return [self.convolution(image)]


class Head(nn.Module):
    def __init__(self, channels, reductions):
        super().__init__()

    def forward(self, pyramid):
        return AxisLogits(*[pyramid[-1].mean(dim=2)] * 3)


@pytest.mark.parametrize(("kernel_size", "layout"), [(1, torch.contiguous_format), (2, torch.channels_last)])
def test_weights_and_pictures_of_a_network_have_one_memory_format(kernel_size, layout):
    net = PoseNet(encoder=OneConvolution(kernel_size), decoder=Head)
    net(torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert net.encoder.image.is_contiguous(memory_format=layout)
    assert net.encoder.convolution.weight.is_contiguous(memory_format=layout)


def test_the_default_network_is_channels_last():
    assert build_training(compose("train", SMALL), quiet=True)[0].net.memory_format is torch.channels_last


_TRAIN = """
import os
import sys
import torch
from handpose.config import compose
from handpose.sweep.trainable.trial_cost import make_random_hands
from handpose.training.build import build_training


def train(name):
    config = compose("train", sys.argv[1:] + [f"model.encoder.name={name}"])
    module, _ = build_training(config, quiet=True)
    hands = make_random_hands(2, 64)
    module.axes.fit(hands.xyz_m)
    optimizer = torch.optim.AdamW(module.net.parameters())
    for step in range(3):
        view = module.augment(hands, torch.Generator().manual_seed(step))
        torch.stack([axis.square().mean() for axis in module(view)]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in module.net.parameters())


for name in ("mobileone_s0", "repvgg_a0", "fastvit_t8"):
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"{name} ended with status {status}"
    else:
        train(name)
        os._exit(0)
"""


@pytest.mark.slow
def test_networks_that_begin_with_such_a_convolution_train():
    """In processes of their own, since what it guards against is the end of the process."""
    done = subprocess.run([sys.executable, "-c", _TRAIN, *SMALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


_PROBE = """
import os
import torch
from torch import nn
from handpose.models.memory_format import choose_memory_format

torch.set_num_threads(1)
for stride in range(1, 5):
    for channels in range(1, 17):
        net = nn.Conv2d(channels, 16, 1, stride)
        if choose_memory_format(net, on_gpu=False) is not torch.channels_last:
            continue
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            assert status == 0, f"{net} died with status {status}"
            continue
        net = net.to(memory_format=torch.channels_last)
        for _ in range(5):
            picture = torch.rand(4, channels, 48, 48).contiguous(memory_format=torch.channels_last).requires_grad_()
            net(picture).sum().backward()
        os._exit(0)
"""


@pytest.mark.slow
def test_what_is_channels_last_survives_its_backward_pass():
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
