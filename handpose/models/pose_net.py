"""The network: an encoder and a decoder. handpose.heatmaps turns its logits into coordinates."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from handpose.heatmaps import AxisLogits
from handpose.models.memory_format import choose_memory_format


class FeatureEncoder(Protocol):
    """Interface of an encoder: a torch.nn.Module that a file in configs/model/encoder chooses.

    An encoder may have further attributes:

    - note: text about its weights that the user should know; printed before training.
    - training_options: names of the options that may differ between a checkpoint and the network that loads it. All
      others define the architecture.
    - depends_on_image_size: a static method. It is called with the encoder's options and returns whether the shapes of
      its weights depend on data.image_size.

    If its constructor has these arguments, it is called with `image_size`, the side of the images in pixels, and, if a
    checkpoint provides the weights, with `pretrained=False` and `weights=None`.

    Attributes:
        channels: channels of the feature maps, from the finest to the coarsest.
        reductions: strides of the feature maps in pixels, in the same order. The feature map of an (H, W) image
            has H / reduction rows.
    """

    channels: Sequence[int]
    reductions: Sequence[int]

    def __call__(self, image: Tensor, /) -> Sequence[Tensor]:
        """Compute feature maps.

        Images whose sides are not multiples of the last reduction must be accepted as well.

        Args:
            image: (B, 3, H, W) in [0, 1].

        Returns:
            Feature map i is (B, channels[i], H / reductions[i], W / reductions[i]).
        """


class PoseNet(nn.Module):
    """Network from images to logits along the axes.

    Args:
        encoder: computes the feature pyramid.
        decoder: makes the decoder. It is called with `channels` and `reductions` of the encoder and returns a module
            that turns the feature pyramid into AxisLogits.
        on_gpu: whether the network will be trained on a GPU. This decides the memory format of weights and images.
    """

    def __init__(self, *, encoder: FeatureEncoder, decoder: Callable[..., nn.Module], on_gpu: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder(channels=encoder.channels, reductions=encoder.reductions)
        self.memory_format = choose_memory_format(self, on_gpu=on_gpu)
        self.to(memory_format=self.memory_format)

    def forward(self, image: Tensor) -> AxisLogits:
        """Predict logits for images, (B, 3, H, W) in [0, 1]."""
        if self.memory_format is torch.contiguous_format:  # data loaders return channels last
            image = image.contiguous()
        return self.decoder(self.encoder(image))
