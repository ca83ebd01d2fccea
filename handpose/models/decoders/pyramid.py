"""Our decoder: a top-down pyramid with skip connections, heatmaps for u and v, and a depth head that sees all joints.

Each of `depth` blocks doubles the size of the feature map and adds the encoder's feature map of that size, if there is
one (Lin et al. 2017). The two-dimensional heatmap of each joint is summed over rows and over columns as probabilities,
so its one-dimensional heatmaps are the marginals of one distribution (Sun et al. 2018). Relative depth depends on the
whole hand. So features are collected under the heatmap of each joint, and one small network sees the features and
positions of all joints, and the whole image.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.errors import UserError
from handpose.heatmaps import AxisLogits, soft_argmax, to_at_least_float32
from handpose.skeleton import NUM_JOINTS


class Pyramid(nn.Module):
    """Decoder from a feature pyramid to AxisLogits.

    After `depth` doublings the feature map has `bins_per_cell` bins along u and v for each of its cells.

    Args:
        channels: channels of the encoder's feature maps, from the finest to the coarsest.
        reductions: strides of the encoder's feature maps in pixels, in the same order.
        depth: number of up-sampling blocks; 0: a plain head on the encoder's last feature map.
        width: channels of the first three blocks. Each further block has half as many as the one before, at least 16,
            and four times as many cells.
        skips: skip connections; add: add the encoder's feature map of the same size.
        conv: 3 x 3 convolutions of the blocks: depthwise separable or dense.
        head: what u and v are read from; heatmaps: two-dimensional heatmaps; axes: separate features for each axis,
            averaged over rows or columns.
        bins_per_cell: bins along u and v for each cell of the last feature map.
        depth_bins: bins along the depth axis.
        depth_hidden: hidden width of the network that predicts depth.

    Raises:
        UserError: `depth` is negative.
    """

    contract_variants = (
        {"depth": 0},
        {"depth": 0, "head": "axes"},
        {"depth": 5},
        {"conv": "separable", "width": 20},
        {"bins_per_cell": 2},
        {"head": "axes", "bins_per_cell": 3, "skips": "none"},
    )

    def __init__(
        self,
        *,
        channels: Sequence[int],
        reductions: Sequence[int],
        depth: int,
        width: int,
        skips: Literal["none", "add"],
        conv: Literal["separable", "dense"],
        head: Literal["heatmaps", "axes"],
        bins_per_cell: int,
        depth_bins: int,
        depth_hidden: int,
    ) -> None:
        if depth < 0:
            raise UserError(f"model.decoder.depth must be 0 or more, but it is {depth}")
        super().__init__()
        widths = [width, *(max(min(16, width), width // 2 ** max(0, i - 2)) for i in range(depth))]
        block = _make_separable_block if conv == "separable" else _make_dense_block
        self.stem = _make_convolution(channels[-1], width, kernel_size=1) if depth else nn.Identity()
        self.blocks = nn.ModuleList(block(a, b) for a, b in pairwise(widths))
        self.skips = nn.ModuleDict()
        self.reductions = list(reductions)
        if skips == "add":
            for i, before in enumerate(widths[:-1]):
                reduction = reductions[-1] // 2 ** (i + 1)
                if reduction in reductions:
                    self.skips[str(i)] = nn.Conv2d(channels[self._map(reduction)], before, kernel_size=1, bias=False)
        features = widths[-1] if depth else channels[-1]
        self.head = (_HeatmapHead if head == "heatmaps" else _AxesHead)(features, bins_per_cell=bins_per_cell)
        self.depth_head = _DepthHead(features, channels[-1], bins=depth_bins, hidden=depth_hidden)

    def _map(self, reduction: int) -> int:
        return self.reductions.index(reduction)

    def forward(self, pyramid: Sequence[Tensor]) -> AxisLogits:
        """Turn the encoder's feature maps, from the finest to the coarsest, into logits."""
        x = self.stem(pyramid[-1])  # (B, C, h, w)
        for i, block in enumerate(self.blocks):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            if str(i) in self.skips:
                x = x + self.skips[str(i)](pyramid[self._map(self.reductions[-1] // 2 ** (i + 1))])
            x = block(x)  # (B, C, 2h, 2w)
        u, v, attention = self.head(x)  # (B, K, W), (B, K, H), (B, K, h, w) of the last block
        places = torch.stack([soft_argmax(u), soft_argmax(v)], dim=-1).detach()  # (B, K, 2)
        return AxisLogits(u=u, v=v, depth=self.depth_head(x, attention, places, pyramid[-1]))


class _HeatmapHead(nn.Module):
    """Head with two-dimensional heatmaps, whose marginals are the one-dimensional heatmaps along u and v."""

    def __init__(self, width: int, *, bins_per_cell: int) -> None:
        super().__init__()
        self.bins_per_cell = bins_per_cell
        self.heatmaps = nn.Conv2d(width, NUM_JOINTS * bins_per_cell**2, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits and attention.

        Args:
            x: (B, C, h, w) features.

        Returns:
            (B, K, k w) logits along u, with k bins for each cell;
            (B, K, k h) logits along v;
            (B, K, h, w) probability of each joint in each cell.
        """
        k, (height, width) = self.bins_per_cell, x.shape[-2:]
        heatmaps = to_at_least_float32(self.heatmaps(x)).contiguous()  # (B, K k k, h, w)
        heatmaps = heatmaps.view(-1, NUM_JOINTS, k, k, height, width)  # dims 2, 3: within a cell; 4, 5: cells
        u = torch.logsumexp(heatmaps, dim=(2, 4)).transpose(2, 3).flatten(2)  # (B, K, k w)
        v = torch.logsumexp(heatmaps, dim=(3, 5)).transpose(2, 3).flatten(2)  # (B, K, k h)
        attention = torch.softmax(heatmaps.flatten(2), dim=-1)
        return u, v, attention.view(-1, NUM_JOINTS, k * k, height, width).sum(dim=2)


class _AxesHead(nn.Module):
    """Head that computes the logits along u and along v from separate features (like SimCC, Li et al. 2022)."""

    def __init__(self, width: int, *, bins_per_cell: int) -> None:
        super().__init__()
        self.bins_per_cell = bins_per_cell
        self.u = _make_line_block(width, NUM_JOINTS * bins_per_cell)
        self.v = _make_line_block(width, NUM_JOINTS * bins_per_cell)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits and attention. Arguments and results are those of `_HeatmapHead.forward`."""
        u, v = self._bins(self.u(x.mean(dim=2))), self._bins(self.v(x.mean(dim=3)))  # (B, K, k w), (B, K, k h)
        return u, v, self._interleave(v)[:, :, :, None] * self._interleave(u)[:, :, None, :]

    def _bins(self, of_cells: Tensor) -> Tensor:
        """Put the k bins of each cell side by side: (B, K k, n) -> (B, K, k n)."""
        count, _, cells = of_cells.shape
        return to_at_least_float32(of_cells).reshape(count, NUM_JOINTS, -1, cells).transpose(2, 3).flatten(2)

    def _interleave(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1).unflatten(-1, (-1, self.bins_per_cell)).sum(-1)


class _DepthHead(nn.Module):
    """Head that computes logits along the depth axis.

    Its inputs are the features under the heatmap of each joint, the position of each joint, and the mean features of
    the image. A residual network is known to work well for the step from 2-D positions to depths (Martinez et al.
    2017).
    """

    def __init__(self, width: int, channels: int, *, bins: int, hidden: int) -> None:
        super().__init__()
        self.bins = bins
        self.joint = nn.Linear(width, 16)
        self.mix = nn.Sequential(
            nn.Linear((16 + 2) * NUM_JOINTS + channels, hidden),
            nn.ReLU(inplace=True),
            _Residual(hidden),
            _Residual(hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, NUM_JOINTS * bins),
        )

    def forward(self, features: Tensor, attention: Tensor, coordinates: Tensor, coarse: Tensor) -> Tensor:
        """Compute logits along the depth axis.

        Args:
            features: (B, C, h, w) features of the last block.
            attention: (B, K, h, w) probability of each joint in each cell.
            coordinates: (B, K, 2) positions along u and v in [0, 1].
            coarse: (B, C', h', w') last feature map of the encoder.

        Returns:
            (B, K, D) logits.
        """
        joints = attention.flatten(2) @ features.flatten(2).transpose(1, 2)  # (B, K, C)
        coordinates = 4.0 * (coordinates - 0.5)  # scaled to about the size of the features
        whole = torch.cat([self.joint(joints).flatten(1), coarse.mean(dim=(2, 3)), coordinates.flatten(1)], dim=1)
        return self.mix(whole).view(-1, NUM_JOINTS, self.bins)


class _Residual(nn.Module):
    """Residual block of two layers on (B, width). It starts as the identity, with a last layer of zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(inplace=True), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _make_convolution(channels: int, width: int, *, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _make_line_block(width: int, channels: int) -> nn.Sequential:
    """Return a block (B, C, n) -> (B, channels, n) in which neighbouring positions see each other."""
    return nn.Sequential(
        nn.Conv1d(width, width, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Conv1d(width, channels, kernel_size=1),
    )


def _make_dense_block(before: int, width: int) -> nn.Sequential:
    return _make_convolution(before, width, kernel_size=3)


def _make_separable_block(before: int, width: int) -> nn.Sequential:
    depthwise = nn.Conv2d(before, before, kernel_size=3, padding=1, groups=before, bias=False)
    return nn.Sequential(depthwise, *_make_convolution(before, width, kernel_size=1))
