"""Predictions of a network on a split, and their errors."""

from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from handpose.data.augment import to_view
from handpose.data.sample import HandBatch
from handpose.evaluation.views import Views
from handpose.geometry import compute_bone_lengths, project, to_root_relative
from handpose.heatmaps import compute_variances
from handpose.metrics.mpjpe import PaMpjpe, RootRelativeMpjpe
from handpose.metrics.validation import make_metrics
from handpose.skeleton import BONES, REFERENCE_BONE, ROOT
from handpose.training.calibration import Calibration, fit_calibration
from handpose.training.module import HandPose


class SplitPredictions(NamedTuple):
    """Predictions for the N images of a split, in its order.

    Attributes:
        xyz_m: (N, K, 3) joints in metres in the camera frame.
        error_m: (N, K) how far each joint is expected to be from its true place relative to the root, in metres.
    """

    xyz_m: NDArray[np.float64]
    error_m: NDArray[np.float64]


class CalibrationSample(NamedTuple):
    """What the network says about N images and how far it is off.

    Attributes:
        variances: (N, K, 3) of the heatmaps, in squared units of the axes.
        errors: (N, K, 3) absolute errors along the axes; NaN for joints outside the image.
        metres: (N, K, 3) metres that a unit of each axis is long at each joint.
        distance_m: (N, K) distance from the true place relative to the root.
    """

    variances: NDArray[np.float64]
    errors: NDArray[np.float64]
    metres: NDArray[np.float64]
    distance_m: NDArray[np.float64]


class CalibrationModule(pl.LightningModule):
    """Lets a Trainer compare a trained module's heatmaps with the truth.

    Args:
        module: the trained module.
    """

    def __init__(self, module: HandPose) -> None:
        super().__init__()
        self.module = module

    def predict_step(self, batch: HandBatch, batch_idx: int) -> tuple[Tensor, ...]:
        """Return (B,) positions in the split, and the parts of a `CalibrationSample`."""
        view, axes = to_view(batch), self.module.axes
        logits = self.module(view)
        coordinates = axes.read_out(logits)
        camera = view.intrinsics, view.size
        true = axes.encode(view.xyz_m, *camera)
        xyz_m = axes.decode(coordinates, *camera, batch.scale_m)
        is_inside = (true >= 0.0) & (true <= 1.0)
        errors = (coordinates - true).abs().where(is_inside, torch.full_like(true, torch.nan))
        metres = axes.to_metres(torch.ones_like(true), xyz_m, *camera, batch.scale_m)
        distance_m = torch.linalg.vector_norm(to_root_relative(xyz_m) - to_root_relative(view.xyz_m), dim=-1)
        return batch.position, compute_variances(logits), errors, metres, distance_m


def calibrate(sample: CalibrationSample) -> Calibration:
    """Find the calibration for which the mean expected error is that of the true errors, relative to the root."""
    calibration = fit_calibration(sample.variances, sample.errors)
    if calibration == Calibration():
        return calibration
    along_axes = calibration.compute_errors(torch.from_numpy(sample.variances)).numpy() * sample.metres
    expected_m = np.linalg.norm(along_axes, axis=-1)
    others = np.arange(expected_m.shape[1]) != ROOT
    return calibration.scale(float(sample.distance_m[:, others].mean() / expected_m[:, others].mean()))


class PredictionModule(pl.LightningModule):
    """Lets a Trainer predict with a trained module, on the Trainer's device and in its precision.

    Args:
        module: the trained module.
        views: the views of each image whose predictions are averaged.
    """

    def __init__(self, module: HandPose, *, views: Views) -> None:
        super().__init__()
        self.module = module
        self.views = views

    def predict_step(self, batch: HandBatch, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the joints of each image.

        Returns:
            (B,) positions in the split, (B, K, 3) joints in metres in the batch's camera frame, and (B, K) expected
            errors in metres.
        """
        return batch.position, *self.views.predict(self.module, to_view(batch), batch.scale_m)


def compute_errors(
    predicted_m: NDArray[np.floating],
    target_m: NDArray[np.floating],
    intrinsics: NDArray[np.floating],
    *,
    only_in_image: bool = False,
) -> dict[str, float]:
    """Compute every metric of configs/metrics.

    Args:
        predicted_m: (N, K, 3) predicted joints in metres, camera frame.
        target_m: (N, K, 3) true joints in metres, camera frame.
        intrinsics: (N, 3, 3) of the images that the network gets.
        only_in_image: whether to compute only metrics that need no joints in metres. Then only the projection of
            target_m has a meaning, and a joint without a label is NaN.

    Returns:
        Name, such as pa_mpjpe_mm, -> value.
    """
    predicted, target, camera = (
        torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m, intrinsics)
    )
    metrics = make_metrics(only_in_image=only_in_image)
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
    """Compute the root-relative error in mm that the predictions would have with the true size of each hand.

    Args:
        predicted_m: (N, K, 3) predicted joints in metres.
        target_m: (N, K, 3) true joints in metres.
        assumed_m: length of the reference bone with which the predictions were made, in metres.
    """
    predicted, target = (torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m))
    length_m = compute_bone_lengths(target)[:, BONES.index(REFERENCE_BONE)]
    metric = RootRelativeMpjpe()
    metric.update(predicted * (length_m / assumed_m)[:, None, None], target)
    return float(metric.compute())
