"""Predictions of a network on a split, in one pass or as the mean over turned and mirrored views."""

import math
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from handpose.data.augment import View, mirrored, rotation_about_center, turned, unchanged
from handpose.data.sample import HandBatch
from handpose.geometry import exactly, project
from handpose.metrics.mpjpe import KeypointErrorPx, PaMpjpe, RootRelativeMpjpe
from handpose.metrics.pck import PckAuc
from handpose.training.module import HandPose

TestTime = Literal["none", "rotations", "rotations_mirror"]


class Predictor(pl.LightningModule):
    """Has a Trainer predict with a trained module, on the Trainer's device and in its precision.

    test_time: "rotations" predicts the mean over num_rotations views turned evenly over the full circle, and
    "rotations_mirror" takes the mirror image of each as well. The joints of each view are turned back exactly.
    """

    def __init__(self, module: HandPose, *, test_time: TestTime, num_rotations: int) -> None:
        super().__init__()
        self.module = module
        self.test_time = test_time
        self.num_rotations = num_rotations

    def predict_step(self, batch: HandBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Position in the split, (B,), and joints in metres in the batch's camera frame, (B, K, 3), of each image."""
        view = unchanged(batch)
        if self.test_time == "none":
            return batch.position, self.module.predict_xyz_m(view, batch.scale_m)
        angles = [2.0 * math.pi * i / self.num_rotations for i in range(self.num_rotations)]
        return batch.position, torch.stack([self._turned(view, angle, batch) for angle in angles]).mean(0)

    def _turned(self, view: View, angle: float, batch: HandBatch) -> Tensor:
        size = (view.image.shape[-2], view.image.shape[-1])
        angles = view.image.new_full((len(view.image),), angle)
        rotation = rotation_about_center(angles, view.intrinsics, size)
        seen = turned(view, rotation, view.intrinsics)
        predicted_m = self.module.predict_xyz_m(seen, batch.scale_m)
        if self.test_time == "rotations_mirror":
            reflected = self.module.predict_xyz_m(mirrored(seen), batch.scale_m)
            predicted_m = (predicted_m + reflected * reflected.new_tensor([-1.0, 1.0, 1.0])) / 2.0
        with exactly(rotation):
            return predicted_m @ rotation  # the inverse of the rotation that `turned` applied


def measure(
    predicted_m: NDArray[np.floating], target_m: NDArray[np.floating], intrinsics: NDArray[np.floating]
) -> dict[str, float]:
    """Errors of predictions: pa_mpjpe_mm, rr_mpjpe_mm, pck_auc and keypoint_error_px.

    predicted_m, target_m: (N, K, 3) in metres, camera frame; intrinsics: (N, 3, 3) of the pictures as the network saw
    them.
    """
    predicted, target, camera = (
        torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m, intrinsics)
    )
    errors = {"pa_mpjpe_mm": PaMpjpe(), "rr_mpjpe_mm": RootRelativeMpjpe(), "pck_auc": PckAuc()}
    for metric in errors.values():
        metric.update(predicted, target)
    pixels = KeypointErrorPx()
    pixels.update(project(predicted, camera), project(target, camera))
    return {name: float(metric.compute()) for name, metric in (errors | {"keypoint_error_px": pixels}).items()}
