"""Predictions of a network on a split, and their errors."""

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from handpose.data.augment import to_view
from handpose.data.sample import HandBatch
from handpose.evaluation.views import Views
from handpose.geometry import compute_bone_lengths, project
from handpose.metrics.mpjpe import PaMpjpe, RootRelativeMpjpe
from handpose.metrics.validation import make_metrics
from handpose.skeleton import BONES, REFERENCE_BONE
from handpose.training.module import HandPose


class PredictionModule(pl.LightningModule):
    """Has a Trainer predict with a trained module, on the Trainer's device and in its precision.

    views: those of each picture that a prediction is the mean of.
    """

    def __init__(self, module: HandPose, *, views: Views) -> None:
        super().__init__()
        self.module = module
        self.views = views

    def predict_step(self, batch: HandBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Position in the split, (B,), and joints in metres in the batch's camera frame, (B, K, 3), of each image."""
        return batch.position, self.views.predict_xyz_m(self.module, to_view(batch), batch.scale_m)


def compute_errors(
    predicted_m: NDArray[np.floating], target_m: NDArray[np.floating], intrinsics: NDArray[np.floating]
) -> dict[str, float]:
    """Measure predictions by every metric of configs/metrics.

    predicted_m, target_m: (N, K, 3) in metres, camera frame; intrinsics: (N, 3, 3) of the pictures as the network saw
    them. Returns name, such as pa_mpjpe_mm, -> value.
    """
    predicted, target, camera = (
        torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m, intrinsics)
    )
    metrics = make_metrics()
    metrics.update(
        predicted_m=predicted,
        target_m=target,
        predicted_uv=project(predicted, camera),
        target_uv=project(target, camera),
    )
    return {name: float(value) for name, value in metrics.compute().items()}


def compute_official_pa_mpjpe_mm(predicted_m: NDArray[np.floating], target_m: NDArray[np.floating]) -> float:
    """Compute PA-MPJPE as FreiHAND's official eval.py does: the alignment allows a reflection.

    Args:
        predicted_m: (N, K, 3) joints in metres.
        target_m: (N, K, 3) joints in metres.

    Returns:
        The error in mm.
    """
    metric = PaMpjpe(reflection=True)
    metric.update(*(torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m)))
    return float(metric.compute())


def compute_true_size_rr_mpjpe_mm(
    predicted_m: NDArray[np.floating], target_m: NDArray[np.floating], assumed_m: float
) -> float:
    """Root-relative error in mm if each hand's reference bone had been known.

    predicted_m, target_m: (N, K, 3) in metres; assumed_m: the length that the predictions were made with.
    """
    predicted, target = (torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m))
    length_m = compute_bone_lengths(target)[:, BONES.index(REFERENCE_BONE)]
    metric = RootRelativeMpjpe()
    metric.update(predicted * (length_m / assumed_m)[:, None, None], target)
    return float(metric.compute())
