"""Ensembles: several networks whose predictions for the same image are averaged."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handpose.data.augment import View
from handpose.evaluation.views import PosePredictor, average_views
from handpose.geometry import to_root_relative


class Ensemble(nn.Module):
    """Predicts with several networks and averages their joints as `average_views` does.

    Args:
        members: the networks. They may differ in everything but the images that they get.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def predict_xyz_m(self, view: View, scale_m: Tensor) -> Tensor:
        """Predict the joints in a view; arguments and result are those of `HandPose.predict_xyz_m`."""
        return average_views(torch.stack(self.predict_each_xyz_m(view, scale_m)))

    def predict_each_xyz_m(self, view: View, scale_m: Tensor) -> list[Tensor]:
        """Predict with each network: (B, K, 3) joints in metres for each."""
        members: Sequence[PosePredictor] = list(self.members)  # type: ignore[arg-type]
        return [member.predict_xyz_m(view, scale_m) for member in members]


def average_predictions(predictions_m: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Average predictions of several networks for the same hands.

    Args:
        predictions_m: (N, K, 3) joints of each network in metres, camera frame.

    Returns:
        (N, K, 3) joints in metres.
    """
    stacked = torch.from_numpy(np.stack(predictions_m))
    return average_views(stacked).numpy()


def compute_spread_m(predictions_m: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Compute how far the networks disagree about each joint, relative to the root.

    Args:
        predictions_m: (N, K, 3) joints of at least two networks in metres, camera frame.

    Returns:
        (N, K) root mean square distance from the mean, in metres.
    """
    relative = to_root_relative(torch.from_numpy(np.stack(predictions_m)))  # (M, N, K, 3)
    return relative.var(dim=0, unbiased=True).sum(dim=-1).sqrt().numpy()
