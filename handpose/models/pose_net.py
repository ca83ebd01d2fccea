"""The network: encoder, decoder, and nothing else; coordinates are read out of its logits by handpose.heatmaps."""

from collections.abc import Callable

from torch import Tensor, nn

from handpose.heatmaps import AxisLogits
from handpose.models.encoder import Encoder


class PoseNet(nn.Module):
    """Picture -> logits along the axes.

    decoder: is called with `channels` and `reductions` of the encoder's pyramid and gives the module that turns the
    pyramid into AxisLogits.
    """

    def __init__(self, *, encoder: Encoder, decoder: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder(channels=encoder.channels, reductions=encoder.reductions)

    def forward(self, image: Tensor) -> AxisLogits:
        """image: (B, 3, H, W) in [0, 1]."""
        return self.decoder(self.encoder(image))
