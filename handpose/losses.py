"""What a network is trained on: heatmaps, the coordinates they mean, and the bones between those, against the truth.

Every loss is called with the logits, the truth, and the axes, and returns the terms it is made of; their sum is the
loss. A joint outside the picture has no place on the heatmap: its coordinate along that axis is left out, and so are
the bones that end in it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from handpose.heatmaps import Axes, AxisLogits, HeatmapTruth, compute_expected_coordinates, to_at_least_float32
from handpose.skeleton import BONES, REFERENCE_BONE

Divergence = Literal["kl", "jsd"]

_BONE_ENDS = torch.tensor(BONES)  # (20, 2): parent, child
_REFERENCE = BONES.index(REFERENCE_BONE)
_MIN_BONE_LENGTH = 0.1
"""Length, in reference bones, below which a predicted bone has no direction to speak of."""
_MAX_BONE_LENGTH = 4.0
"""Length, in reference bones, that no bone of a hand has (the longest has 2.5): the label of that hand is wrong."""


@dataclass(eq=False, repr=False, kw_only=True)
class HeatmapLoss(nn.Module):
    """Divergence from the target heatmaps plus L1 of the soft-argmax coordinates, and what is asked of the bones.

    divergence: "kl", of the target from the heatmap, is SimCC's (Li et al. 2022); "jsd", symmetric and at most log 2,
    is DSNT's (Nibali et al. 2018). The coordinate term is integral regression's (Sun et al. 2018). heatmap_weight,
    coordinate_weight: of the two terms (coordinates count in tenths of the axis, so that the two are of one size).
    depth_weight: of the depth axis beside u and v. bone_length_weight: of the error of the bones' lengths, in lengths
    of the reference bone; bone_direction_weight: of 1 - cos of the angle between a bone and the true one; 0: the term
    is not there.
    """

    contract_variants = (
        {"bone_length_weight": 1.0, "bone_direction_weight": 1.0},
        {"divergence": "jsd", "bone_length_weight": 1.0, "bone_direction_weight": 1.0},
    )

    divergence: Divergence
    heatmap_weight: float
    coordinate_weight: float
    depth_weight: float
    bone_length_weight: float
    bone_direction_weight: float

    def __post_init__(self) -> None:
        super().__init__()
        self._compute_divergence = _DIVERGENCES[self.divergence]

    def forward(self, logits: AxisLogits, truth: HeatmapTruth, axes: Axes) -> dict[str, Tensor]:
        inside, target = find_inside(truth.coordinates)
        weights = inside * target.new_tensor([1.0, 1.0, self.depth_weight])
        divergence = torch.stack(
            [
                self._compute_divergence(
                    to_at_least_float32(axis), axes.draw_heatmaps(target[..., i], bins=axis.shape[-1])
                )
                for i, axis in enumerate(logits)
            ],
            dim=-1,
        )
        coordinates = compute_expected_coordinates(logits)
        distance = 10.0 * (coordinates - target).abs()
        terms = {
            "heatmap": self.heatmap_weight * weighted_mean(divergence, weights),
            "coordinate": self.coordinate_weight * weighted_mean(distance, weights),
        }
        if self.bone_length_weight or self.bone_direction_weight:
            terms |= self._compute_bone_losses(axes.normalize_hand(coordinates, truth), truth, inside)
        return terms

    def _compute_bone_losses(self, joints: Tensor, truth: HeatmapTruth, inside: Tensor) -> dict[str, Tensor]:
        """joints: predicted, (B, K, 3) in lengths of the reference bone; inside: (B, K, 3), 0 or 1."""
        seen = inside.amin(dim=-1)[:, _BONE_ENDS].amin(dim=-1)  # (B, 20): both ends are on all three axes
        bones, target = _compute_bones(joints), _compute_bones(truth.xyz_m)  # (B, 20, 3)
        target = target / torch.linalg.vector_norm(target[:, _REFERENCE, None], dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(target, dim=-1)  # (B, 20)
        # A reference bone of almost no length would make its hand thousands of times larger than all others.
        seen = seen * (length.amax(dim=-1, keepdim=True) < _MAX_BONE_LENGTH)
        terms = {}
        if self.bone_length_weight:
            error = (torch.linalg.vector_norm(bones, dim=-1) - length).abs()
            terms["bone_length"] = self.bone_length_weight * weighted_mean(error, seen)
        if self.bone_direction_weight:
            cosine = F.cosine_similarity(bones, target, dim=-1, eps=_MIN_BONE_LENGTH)
            terms["bone_direction"] = self.bone_direction_weight * weighted_mean(1.0 - cosine, seen)
        return terms


class CoordinateMse(nn.Module):
    """Mean squared error of the soft-argmax coordinates in the unit of the axes (mm for CameraAxes): the original's."""

    def forward(self, logits: AxisLogits, truth: HeatmapTruth, axes: Axes) -> dict[str, Tensor]:
        inside, target = find_inside(truth.coordinates)
        error = (compute_expected_coordinates(logits) - target) * axes.extent
        return {"coordinate": weighted_mean(error.square(), inside)}


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of heatmaps from their targets, (..., bins) -> (...), 0 or more."""
    return F.kl_div(torch.log_softmax(logits, dim=-1), target, reduction="none").sum(-1)


def js_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Jensen-Shannon divergence between heatmaps and their targets, (..., bins) -> (...), between 0 and log 2."""
    heatmap = torch.softmax(logits, dim=-1)
    # Where both vanish the logarithm's gradient would be infinite.
    middle = (0.5 * (heatmap + target)).clamp_min(torch.finfo(heatmap.dtype).tiny).log()
    from_target = F.kl_div(middle, target, reduction="none").sum(-1)
    from_heatmap = (heatmap * (torch.log_softmax(logits, dim=-1) - middle)).sum(-1)
    return 0.5 * (from_target + from_heatmap)


_DIVERGENCES = {"kl": kl_divergence, "jsd": js_divergence}


def _compute_bones(xyz: Tensor) -> Tensor:
    """From each bone's parent to its child, (B, K, 3) -> (B, 20, 3)."""
    return xyz[:, _BONE_ENDS[:, 1]] - xyz[:, _BONE_ENDS[:, 0]]


def find_inside(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """1 where a coordinate lies on its axis, else 0, and the coordinates, those off it in its middle; (B, K, 3) each.

    A weight of 0 would not do: a joint in the camera's plane has no finite coordinates.
    """
    inside = (coordinates >= 0.0) & (coordinates <= 1.0)
    return inside.to(coordinates.dtype), coordinates.where(inside, torch.full_like(coordinates, 0.5))


def weighted_mean(terms: Tensor, weights: Tensor) -> Tensor:
    """Of the processes that share a step, each gives its part of the mean over all of them, times their number.

    For DDP averages their gradients, while joints off the axes are not equally many in each.
    """
    total, num_processes = weights.sum(), 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        num_processes = distributed.get_world_size()
    return num_processes * (terms * weights).sum() / total.clamp_min(1.0)
