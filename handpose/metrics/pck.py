"""Area under the curve of correct keypoints over the error threshold, as FreiHAND and STB report it.

The state is a count for each threshold, so batches and processes add up exactly.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from handpose.geometry import procrustes_align


class PckAuc(Metric):
    """Area under PCK from 0 to `max_mm` by the trapezoid rule over `steps` thresholds, as a fraction of its maximum.

    A joint is correct when its error is at most the threshold; one that is not finite never is.
    aligned: errors after Procrustes alignment, else in the camera frame as they are. reflection: whether the alignment
    may mirror the hand, as FreiHAND's own evaluation does.
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
        """Add B samples; both (B, K, 3) in metres."""
        predicted, target = predicted_m.double(), target_m.double()
        if self.aligned:
            predicted = procrustes_align(predicted, target, reflection=self.reflection)
        errors_mm = 1000 * torch.linalg.vector_norm(predicted - target, dim=-1).flatten()
        self.within = self.within + (errors_mm[:, None] <= self._thresholds_mm(errors_mm.device)).sum(dim=0)
        self.count = self.count + errors_mm.numel()

    def compute(self) -> Tensor:
        """The area, () float64 between 0 and 1; NaN before the first update."""
        pck = self.within / self.count.double()
        return torch.trapezoid(pck, self._thresholds_mm(pck.device)) / self.max_mm

    def _thresholds_mm(self, device: torch.device) -> Tensor:
        """Not a buffer, because a network in bf16 would round it."""
        return torch.linspace(0, self.max_mm, self.steps, dtype=torch.float64, device=device)
