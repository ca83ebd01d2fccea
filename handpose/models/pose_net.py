"""The network: encoder, decoder, and nothing else; coordinates are read out of its logits by handpose.heatmaps."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from handpose.heatmaps import AxisLogits
from handpose.models.memory_format import choose_memory_format


class FeatureEncoder(Protocol):
    """What an encoder, a torch.nn.Module that a file in configs/model/encoder chooses, must have.

    Attributes:
        channels: channels of the feature maps, finest first.
        reductions: strides of the feature maps in pixels: a map of an (H, W) picture has H / reduction rows.

    An encoder may also have:
        note: what the user should know about its weights; printed before training.
        training_options: names of the options that may differ between a checkpoint and the network that loads it. All
            others define the architecture.
        depends_on_image_size: a static method. It is called with the encoder's options and returns whether the shapes
            of the weights depend on data.image_size.

    Its constructor is given `image_size`, the side of the pictures, and, if a checkpoint brings the weights,
    `pretrained=False` and `weights=None`, so far as its signature has them.
    """

    channels: Sequence[int]
    reductions: Sequence[int]

    def __call__(self, image: Tensor, /) -> Sequence[Tensor]:
        """Compute the feature maps of pictures, (B, 3, H, W) in [0, 1]: (B, channels[i], H / reductions[i], ...).

        Pictures whose sides are not multiples of the last reduction must be accepted as well.
        """


class PoseNet(nn.Module):
    """Picture -> logits along the axes.

    encoder: gives the pyramid. decoder: is called with `channels` and `reductions` of the encoder's pyramid and gives
    the module that turns the pyramid into AxisLogits. on_gpu: whether the network will be trained on a GPU, which
    decides the memory format of its weights and pictures.
    """

    def __init__(self, *, encoder: FeatureEncoder, decoder: Callable[..., nn.Module], on_gpu: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder(channels=encoder.channels, reductions=encoder.reductions)
        self.memory_format = choose_memory_format(self, on_gpu=on_gpu)
        self.to(memory_format=self.memory_format)

    def forward(self, image: Tensor) -> AxisLogits:
        """image: (B, 3, H, W) in [0, 1]."""
        if self.memory_format is torch.contiguous_format:  # loaders give channels last
            image = image.contiguous()
        return self.decoder(self.encoder(image))
