"""Losses on heatmaps, on the coordinates that they represent, and on the bones between the joints.

Every loss is called with the logits, the truth and the axes. It returns its terms by name; the sum of the terms is the
loss. A joint outside the image has no place on the heatmap. Its coordinate along that axis is left out, and so are the
bones that start or end at it. The same holds for unknown coordinates, which are NaN: a joint without a label, and the
depth of a hand of which only 2-D keypoints are known.
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
"""Length in reference bones. A shorter predicted bone has no reliable direction."""
_PLACEHOLDER = torch.stack([torch.arange(21.0), torch.arange(21.0) ** 2, torch.ones(21)], dim=-1)
"""(K, 3) Finite joints of which no bone has length 0."""
_MAX_BONE_LENGTH = 4.0
"""Length in reference bones. No real bone is longer (the longest measures about 2.5), so a longer one means that the
label of the hand is wrong."""


@dataclass(eq=False, repr=False, kw_only=True)
class HeatmapLoss(nn.Module):
    """Divergence from the target heatmaps, L1 distance of the soft-argmax coordinates, and errors of the bones.

    The KL divergence is the loss of SimCC (Li et al. 2022), the JS divergence that of DSNT (Nibali et al. 2018). The
    coordinate term is that of integral regression (Sun et al. 2018).

    Attributes:
        divergence: divergence between predicted and target heatmaps; kl: Kullback-Leibler divergence; jsd:
            Jensen-Shannon divergence, which is symmetric and at most log 2.
        heatmap_weight: weight of the divergence. With coordinate_weight=1, 5 gives the proportion of DSNT, whose axes
            have length 2 and not 10.
        coordinate_weight: weight of the L1 distance of the coordinates. The distance is measured in tenths of the axis,
            so that it is about as large as the divergence.
        depth_weight: weight of the depth axis relative to u and v.
        bone_length_weight: weight of the error of the bone lengths, which are measured in lengths of the reference
            bone; 0: not computed.
        bone_direction_weight: weight of the error of the bone directions, 1 - cos of the angle between predicted and
            true bone; 0: not computed.
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
        """Compute the terms of the loss.

        Args:
            logits: logits of a batch.
            truth: labels of the batch.
            axes: the axes that the logits refer to.

        Returns:
            Name of each term -> its value, a scalar that includes the weight of the term.
        """
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
            # A hand without depth has no bones. Its weight is 0, but that alone would not remove a NaN.
            has_depth = ~truth.coordinates[..., 2:].isnan().any(dim=1, keepdim=True)  # (B, 1, 1)
            truth = truth._replace(xyz_m=truth.xyz_m.where(has_depth, _PLACEHOLDER.to(truth.xyz_m)))
            terms |= self._compute_bone_losses(axes.normalize_hand(coordinates, truth), truth, inside)
        return terms

    def _compute_bone_losses(self, joints: Tensor, truth: HeatmapTruth, inside: Tensor) -> dict[str, Tensor]:
        """Compute the terms of the bones.

        Args:
            joints: (B, K, 3) predicted joints in lengths of the reference bone.
            truth: labels of the batch.
            inside: (B, K, 3), 1 where a coordinate lies on its axis, else 0.
        """
        is_counted = inside.amin(dim=-1)[:, _BONE_ENDS].amin(dim=-1)  # (B, 20): both ends lie on all three axes
        bones, target = _compute_bones(joints), _compute_bones(truth.xyz_m)  # (B, 20, 3)
        target = target / torch.linalg.vector_norm(target[:, _REFERENCE, None], dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(target, dim=-1)  # (B, 20)
        # If the labelled reference bone is almost 0 long, the hand measured by it is thousands of times too large.
        is_counted = is_counted * (length.amax(dim=-1, keepdim=True) < _MAX_BONE_LENGTH)
        terms = {}
        if self.bone_length_weight:
            error = (torch.linalg.vector_norm(bones, dim=-1) - length).abs()
            terms["bone_length"] = self.bone_length_weight * weighted_mean(error, is_counted)
        if self.bone_direction_weight:
            cosine = F.cosine_similarity(bones, target, dim=-1, eps=_MIN_BONE_LENGTH)
            terms["bone_direction"] = self.bone_direction_weight * weighted_mean(1.0 - cosine, is_counted)
        return terms


class CoordinateMse(nn.Module):
    """Mean squared error of the soft-argmax coordinates in the unit of the axes, as in the original design.

    The unit is mm for `CameraAxes`.
    """

    def forward(self, logits: AxisLogits, truth: HeatmapTruth, axes: Axes) -> dict[str, Tensor]:
        """Compute the only term of the loss. Arguments and result are those of `HeatmapLoss.forward`."""
        inside, target = find_inside(truth.coordinates)
        error = (compute_expected_coordinates(logits) - target) * axes.extent
        return {"coordinate": weighted_mean(error.square(), inside)}


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence of target heatmaps from predicted ones.

    Args:
        logits: (..., bins) unnormalised log-probabilities.
        target: (..., bins) heatmaps that sum to 1.

    Returns:
        (...) divergences, at least 0.
    """
    return F.kl_div(torch.log_softmax(logits, dim=-1), target, reduction="none").sum(-1)


def js_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence between predicted and target heatmaps.

    Args:
        logits: (..., bins) unnormalised log-probabilities.
        target: (..., bins) heatmaps that sum to 1.

    Returns:
        (...) divergences between 0 and log 2.
    """
    heatmap = torch.softmax(logits, dim=-1)
    # Where both are 0, the gradient of the logarithm would be infinite.
    middle = (0.5 * (heatmap + target)).clamp_min(torch.finfo(heatmap.dtype).tiny).log()
    from_target = F.kl_div(middle, target, reduction="none").sum(-1)
    from_heatmap = (heatmap * (torch.log_softmax(logits, dim=-1) - middle)).sum(-1)
    return 0.5 * (from_target + from_heatmap)


_DIVERGENCES = {"kl": kl_divergence, "jsd": js_divergence}


def _compute_bones(xyz: Tensor) -> Tensor:
    """Return the vector from the parent to the child of each bone: (B, K, 3) -> (B, 20, 3)."""
    return xyz[:, _BONE_ENDS[:, 1]] - xyz[:, _BONE_ENDS[:, 0]]


def find_inside(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Find the coordinates that lie on their axis, and replace all others by a finite value.

    A weight of 0 alone would not exclude the others: a joint in the plane of the camera has no finite coordinates.

    Args:
        coordinates: (B, K, 3) coordinates in units of the axes.

    Returns:
        1 where a coordinate lies on its axis, else 0; and the coordinates, with 0.5 for those outside. Both (B, K, 3).
    """
    inside = (coordinates >= 0.0) & (coordinates <= 1.0)
    return inside.to(coordinates.dtype), coordinates.where(inside, torch.full_like(coordinates, 0.5))


def weighted_mean(terms: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted mean over all processes that share a step.

    DDP averages the gradients of the processes, but their weights may have different sums, since each has another
    number of joints outside the axes. So each process returns its part of the total mean, multiplied by the number of
    processes.

    Args:
        terms: values.
        weights: a weight for each term, 0 or more.
    """
    total, num_processes = weights.sum(), 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        num_processes = distributed.get_world_size()
    return num_processes * (terms * weights).sum() / total.clamp_min(1.0)
