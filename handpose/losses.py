"""What a network is trained on: its heatmaps against the true coordinates along the axes.

Every loss is called with the logits, the coordinates (B, K, 3) in units of the axes, and the axes themselves, and
returns the terms it is made of; their sum is the loss. A joint outside the picture has no place on the heatmap: its
coordinate along that axis is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.heatmaps import Axes, AxisLogits, gaussian_heatmaps, read_out


def _inside(coordinates: Tensor) -> Tensor:
    """1 where a coordinate lies on its axis, else 0, (B, K, 3)."""
    return ((coordinates >= 0.0) & (coordinates <= 1.0)).to(coordinates.dtype)


def _mean(terms: Tensor, weights: Tensor) -> Tensor:
    return (terms * weights).sum() / weights.sum().clamp_min(1.0)


class HeatmapLoss(nn.Module):
    """KL divergence to a Gaussian heatmap plus L1 of the soft-argmax coordinate.

    The heatmap term is SimCC's (Li et al. 2022), the coordinate term integral regression's (Sun et al. 2018).
    heatmap_weight, coordinate_weight: of the two terms (coordinates count in tenths of the axis, so that the two are
    of one size). depth_weight: of the depth axis beside u and v.
    """

    def __init__(self, *, heatmap_weight: float, coordinate_weight: float, depth_weight: float) -> None:
        super().__init__()
        self.heatmap_weight = heatmap_weight
        self.coordinate_weight = coordinate_weight
        self.depth_weight = depth_weight

    def forward(self, logits: AxisLogits, coordinates: Tensor, axes: Axes) -> dict[str, Tensor]:
        weights = _inside(coordinates) * coordinates.new_tensor([1.0, 1.0, self.depth_weight])
        divergence = torch.stack(
            [self._divergence(axis.float(), coordinates[..., i], axes.sigma) for i, axis in enumerate(logits)], dim=-1
        )
        distance = 10.0 * (read_out(logits) - coordinates).abs()
        return {
            "heatmap": self.heatmap_weight * _mean(divergence, weights),
            "coordinate": self.coordinate_weight * _mean(distance, weights),
        }

    def _divergence(self, logits: Tensor, coordinates: Tensor, sigma: float) -> Tensor:
        target = gaussian_heatmaps(coordinates, bins=logits.shape[-1], sigma=sigma)
        return F.kl_div(torch.log_softmax(logits, dim=-1), target, reduction="none").sum(-1)


class CoordinateMse(nn.Module):
    """Mean squared error of the soft-argmax coordinates in the unit of the axes (mm for CameraAxes): the original's."""

    def forward(self, logits: AxisLogits, coordinates: Tensor, axes: Axes) -> dict[str, Tensor]:
        error = (read_out(logits) - coordinates) * axes.extent
        return {"coordinate": _mean(error.square(), _inside(coordinates))}
