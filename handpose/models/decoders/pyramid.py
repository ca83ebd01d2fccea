"""Our decoder: a top-down pyramid with skips, two-dimensional heatmaps read along their axes, depth read at the joints.

`depth` blocks double the encoder's last map, each adding the encoder's map of that size where there is one (Lin et
al. 2017). The joints' two-dimensional logits are summed over rows and columns in probability, so the one-dimensional
heatmaps are the marginals of one distribution (Sun et al. 2018). Relative depth is a matter of the whole hand: each
joint's features are gathered under its own heatmap, and one small network sees all joints and the whole picture.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.errors import UserError
from handpose.heatmaps import AxisLogits
from handpose.skeleton import NUM_JOINTS


class Pyramid(nn.Module):
    """Feature pyramid -> AxisLogits.

    channels, reductions: of the encoder's pyramid, finest first. depth: number of up-sampling blocks, 0 for none.
    width: channels of the first three blocks; each further one, at four times the cells, has half as many, at least 16.
    skips: "add" the encoder's maps, or "none". depth_bins: along the depth axis. depth_hidden: width of its network.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        reductions: Sequence[int],
        depth: int,
        width: int,
        skips: Literal["none", "add"],
        depth_bins: int,
        depth_hidden: int,
    ) -> None:
        if depth < 0:
            raise UserError(f"model.decoder.depth must be 0 or more, but it is {depth}")
        super().__init__()
        widths = [max(min(16, width), width // 2 ** max(0, i - 2)) for i in range(depth)]
        self.stem = _convolution(channels[-1], width, kernel_size=1)
        self.blocks = nn.ModuleList(_separable(a, b) for a, b in pairwise([width, *widths]))
        self.skips = nn.ModuleDict()
        if skips == "add":
            for i, before in enumerate([width, *widths][:depth]):
                reduction = reductions[-1] // 2 ** (i + 1)
                if reduction in reductions:
                    source = channels[list(reductions).index(reduction)]
                    self.skips[str(i)] = nn.Conv2d(source, before, kernel_size=1, bias=False)
        self.reductions = list(reductions)
        features = widths[-1] if widths else width
        self.heatmaps = nn.Conv2d(features, NUM_JOINTS, kernel_size=1)
        self.depth_head = _DepthHead(features, channels[-1], bins=depth_bins, hidden=depth_hidden)

    def forward(self, pyramid: Sequence[Tensor]) -> AxisLogits:
        x = self.stem(pyramid[-1])  # (B, C, h, w)
        for i, block in enumerate(self.blocks):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            if str(i) in self.skips:
                source = self.reductions.index(self.reductions[-1] // 2 ** (i + 1))
                x = x + self.skips[str(i)](pyramid[source])
            x = block(x)  # (B, C, 2h, 2w)
        heatmaps = self.heatmaps(x).float()  # (B, K, H, W); sums of bfloat16 would keep 8 bits
        return AxisLogits(
            u=torch.logsumexp(heatmaps, dim=2),  # (B, K, W)
            v=torch.logsumexp(heatmaps, dim=3),  # (B, K, H)
            depth=self.depth_head(x, heatmaps, pyramid[-1]),  # (B, K, D)
        )


class _DepthHead(nn.Module):
    """Features gathered under each joint's heatmap, and the whole picture's -> logits along the depth axis."""

    def __init__(self, width: int, channels: int, *, bins: int, hidden: int) -> None:
        super().__init__()
        self.bins = bins
        self.joint = nn.Linear(width, 16)
        self.mix = nn.Sequential(
            nn.Linear(16 * NUM_JOINTS + channels, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, NUM_JOINTS * bins),
        )

    def forward(self, features: Tensor, heatmaps: Tensor, coarse: Tensor) -> Tensor:
        attention = torch.softmax(heatmaps.flatten(2), dim=-1)  # (B, K, HW)
        joints = attention @ features.flatten(2).transpose(1, 2)  # (B, K, C)
        whole = torch.cat([self.joint(joints).flatten(1), coarse.mean(dim=(2, 3))], dim=1)
        return self.mix(whole).view(-1, NUM_JOINTS, self.bins)


def _convolution(channels: int, width: int, *, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _separable(before: int, width: int) -> nn.Sequential:
    depthwise = nn.Conv2d(before, before, kernel_size=3, padding=1, groups=before, bias=False)
    return nn.Sequential(depthwise, *_convolution(before, width, kernel_size=1))
