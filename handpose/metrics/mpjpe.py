"""Mean joint errors: after Procrustes alignment, relative to the root, and in the image.

States are sums over samples in float64 on the device of the metric. So the result is the mean over the images, not a
mean of batch means, for batches of any size and any number of processes. A prediction that is not finite makes the
result NaN.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from handpose.geometry import procrustes_align, to_root_relative
from handpose.skeleton import ROOT

MM_PER_M = 1000.0


class _MeanDistance(Metric):
    """Mean over samples of the mean distance over joints."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the mean over all samples since the last reset, () float64; NaN if there are none."""
        return self.total / self.count

    def _add(self, predicted: Tensor, target: Tensor) -> None:
        distances = torch.linalg.vector_norm(predicted - target, dim=-1)  # (B, K)
        # Not in place: a network in bf16 casts the states of its metrics, and a sum in place would then stay in bf16.
        self.total = self.total + distances.mean(dim=-1).sum()
        self.count = self.count + len(distances)


class PaMpjpe(_MeanDistance):
    """PA-MPJPE in mm: mean joint error after each prediction is aligned by the best similarity transform.

    Args:
        reflection: allow mirroring as well, as FreiHAND's official eval.py does, whose figure papers report.
        **kwargs: arguments of torchmetrics.Metric.
    """

    def __init__(self, *, reflection: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reflection = reflection

    def update(self, predicted_m: Tensor, target_m: Tensor) -> None:
        """Add B samples.

        Args:
            predicted_m: (B, K, 3) joints in metres.
            target_m: (B, K, 3) joints in metres.
        """
        predicted, target = predicted_m.double(), target_m.double()
        aligned = procrustes_align(predicted, target, reflection=self.reflection)
        self._add(MM_PER_M * aligned, MM_PER_M * target)


class RootRelativeMpjpe(_MeanDistance):
    """Mean joint error in mm relative to the root joint. The root itself counts as a joint with error 0.

    Args:
        root: index of the root joint.
        **kwargs: arguments of torchmetrics.Metric.
    """

    def __init__(self, *, root: int = ROOT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def update(self, predicted_m: Tensor, target_m: Tensor) -> None:
        """Add B samples.

        Args:
            predicted_m: (B, K, 3) joints in metres.
            target_m: (B, K, 3) joints in metres.
        """
        predicted, target = (to_root_relative(xyz.double(), self.root) for xyz in (predicted_m, target_m))
        self._add(MM_PER_M * predicted, MM_PER_M * target)


class KeypointErrorPx(_MeanDistance):
    """Mean distance of the keypoints in the image, in pixels. Keypoints without a label are left out."""

    def update(self, predicted_uv: Tensor, target_uv: Tensor) -> None:
        """Add B samples.

        Args:
            predicted_uv: (B, K, 2) keypoints in pixels.
            target_uv: (B, K, 2) keypoints in pixels; NaN: the keypoint has no label.
        """
        has_label = ~target_uv.isnan().any(dim=-1)  # (B, K)
        distances = torch.linalg.vector_norm(predicted_uv.double() - target_uv.double(), dim=-1)
        num_labels = has_label.sum(dim=-1)
        means = distances.where(has_label, distances.new_zeros(())).sum(dim=-1) / num_labels.clamp_min(1)
        self.total = self.total + means.sum()
        self.count = self.count + (num_labels > 0).sum()
