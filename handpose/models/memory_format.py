"""The memory format of a network: channels last where that is safe, else contiguous."""

import torch
from torch import nn


def choose_memory_format(net: nn.Module, *, on_gpu: bool) -> torch.memory_format:
    """Return channels last, unless a convolution of the network would corrupt memory in this format on a CPU.

    Args:
        net: the network.
        on_gpu: whether the network will run on a GPU, where channels last is always safe.
    """
    if not on_gpu and any(_would_corrupt_memory(module) for module in net.modules()):
        return torch.contiguous_format
    return torch.channels_last


def _would_corrupt_memory(module: nn.Module) -> bool:
    """Whether oneDNN's backward pass of this convolution writes beyond its buffers when the input is channels last.

    Measured with guard pages (torch 2.14): this happens for 1 x 1 kernels with a stride above 1 and fewer input
    channels than a vector register holds floats, that is 2 to 7 with AVX2 and 2 to 15 with AVX-512. The forward pass is
    correct.
    """
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels < 16
    )
