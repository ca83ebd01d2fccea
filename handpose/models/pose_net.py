"""The network: encoder, decoder, and nothing else; coordinates are read out of its logits by handpose.heatmaps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from handpose.heatmaps import AxisLogits
from handpose.models.encoder import Encoder
from handpose.models.memory_format import fastest_memory_format


class PoseNet(nn.Module):
    """Picture -> logits along the axes.

    decoder: is called with `channels` and `reductions` of the encoder's pyramid and gives the module that turns the
    pyramid into AxisLogits. on_gpu: whether the network will be trained on a GPU, which decides the memory format of
    its weights and pictures.
    """

    def __init__(self, *, encoder: Encoder, decoder: Callable[..., nn.Module], on_gpu: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder(channels=encoder.channels, reductions=encoder.reductions)
        self.memory_format = fastest_memory_format(self, on_gpu=on_gpu)
        self.to(memory_format=self.memory_format)

    def forward(self, image: Tensor) -> AxisLogits:
        """image: (B, 3, H, W) in [0, 1]."""
        if self.memory_format is torch.contiguous_format:  # loaders give channels last
            image = image.contiguous()
        return self.decoder(self.encoder(image))
