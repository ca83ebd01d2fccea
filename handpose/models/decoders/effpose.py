"""Decoder of the original design: two branches of transposed convolutions on the encoder's last feature map.

One branch predicts x and y, the other z. In each, stride-2 transposed convolutions (4 x 4, as in Simple Baselines, Xiao
et al. 2018) double the feature map `depth` times. The first convolution is dense, the others are depthwise separable
(Howard et al. 2017). The mean over rows or columns leaves one line of features for each axis, from which a 1 x 1
convolution computes the one-dimensional heatmaps of the joints.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from handpose.heatmaps import AxisLogits
from handpose.skeleton import NUM_JOINTS


class EffPose(nn.Module):
    """Decoder from the last feature map to AxisLogits, with 2^depth bins for each cell of that feature map.

    Args:
        channels: channels of the encoder's feature maps, from the finest to the coarsest.
        reductions: strides of the encoder's feature maps in pixels; not used.
        depth: number of up-sampling blocks; the original design has 4.
        width: channels of every block; the original design has 128.
    """

    contract_variants = ({"depth": 0}, {"depth": 5})

    def __init__(self, *, channels: Sequence[int], reductions: Sequence[int], depth: int, width: int) -> None:
        super().__init__()
        self.xy_branch = _make_branch(channels[-1], width, depth)
        self.z_branch = _make_branch(channels[-1], width, depth)
        features = width if depth > 0 else channels[-1]
        self.x_head = nn.Conv1d(features, NUM_JOINTS, kernel_size=1)
        self.y_head = nn.Conv1d(features, NUM_JOINTS, kernel_size=1)
        self.z_head = nn.Conv1d(features, NUM_JOINTS, kernel_size=1)

    def forward(self, pyramid: Sequence[Tensor]) -> AxisLogits:
        """Turn the last of the encoder's feature maps into logits."""
        xy = self.xy_branch(pyramid[-1])  # (B, C, H, W)
        z = self.z_branch(pyramid[-1])  # (B, C, H, W)
        return AxisLogits(
            u=self.x_head(xy.mean(dim=2)),  # (B, K, W)
            v=self.y_head(xy.mean(dim=3)),  # (B, K, H)
            depth=self.z_head(z.mean(dim=3)),  # (B, K, H)
        )


def _make_branch(channels: int, width: int, depth: int) -> nn.Sequential:
    blocks = [_make_dense_block(channels, width) if i == 0 else _make_separable_block(width) for i in range(depth)]
    return nn.Sequential(*blocks)


def _make_dense_block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels, width, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _make_separable_block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1, groups=width, bias=False),
        nn.Conv2d(width, width, kernel_size=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
