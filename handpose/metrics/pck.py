"""Area under the curve of correct keypoints (PCK) over error thresholds, as FreiHAND and STB report it.

The state is a count for each threshold, so the sum over batches and processes is exact.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from handpose.geometry import procrustes_align


class PckAuc(Metric):
    """Area under the PCK curve from 0 to `max_mm` by the trapezoid rule, as a fraction of its maximum.

    A joint is correct if its error is at most the threshold. A prediction that is not finite is never correct.

    Args:
        max_mm: largest threshold in mm.
        steps: number of thresholds.
        aligned: measure errors after Procrustes alignment; otherwise in the camera frame without alignment.
        reflection: allow mirroring in the alignment, as FreiHAND's own evaluation does.
        **kwargs: arguments of torchmetrics.Metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    within: Tensor
    count: Tensor

    def __init__(
        self, *, max_mm: float = 50.0, steps: int = 100, aligned: bool = True, reflection: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.max_mm, self.steps = max_mm, steps
        self.aligned, self.reflection = aligned, reflection
        self.add_state("within", torch.zeros(steps, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted_m: Tensor, target_m: Tensor) -> None:
        """Add B samples.

        Args:
            predicted_m: (B, K, 3) joints in metres.
            target_m: (B, K, 3) joints in metres.
        """
        predicted, target = predicted_m.double(), target_m.double()
        if self.aligned:
            predicted = procrustes_align(predicted, target, reflection=self.reflection)
        errors_mm = 1000 * torch.linalg.vector_norm(predicted - target, dim=-1).flatten()
        self.within = self.within + (errors_mm[:, None] <= self._thresholds_mm(errors_mm.device)).sum(dim=0)
        self.count = self.count + errors_mm.numel()

    def compute(self) -> Tensor:
        """Return the area, () float64 between 0 and 1; NaN if there are no samples."""
        pck = self.within / self.count.double()
        return torch.trapezoid(pck, self._thresholds_mm(pck.device)) / self.max_mm

    def _thresholds_mm(self, device: torch.device) -> Tensor:
        """Return the thresholds. They are not a buffer, because a network in bf16 would round it."""
        return torch.linspace(0, self.max_mm, self.steps, dtype=torch.float64, device=device)
