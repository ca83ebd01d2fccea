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
    """Lets a Trainer predict with a trained module, on the Trainer's device and in its precision.

    Args:
        module: the trained module.
        views: the views of each image whose predictions are averaged.
    """

    def __init__(self, module: HandPose, *, views: Views) -> None:
        super().__init__()
        self.module = module
        self.views = views

    def predict_step(self, batch: HandBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Predict the joints of each image.

        Returns:
            (B,) positions in the split, and (B, K, 3) joints in metres in the batch's camera frame.
        """
        return batch.position, self.views.predict_xyz_m(self.module, to_view(batch), batch.scale_m)


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
