"""Ensembles: several networks whose predictions for the same image are averaged."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handpose.data.augment import View
from handpose.evaluation.views import PosePredictor, average_views
from handpose.training.module import HandPose


class Ensemble(nn.Module):
    """Predicts with several networks and averages their joints as `average_views` does.

    Args:
        members: the networks, all with axes of the same kind. They may differ in everything else.
    """

    def __init__(self, members: Sequence[HandPose]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.axes = members[0].axes

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.parameters()).device

    def predict_xyz_m(self, view: View, scale_m: Tensor) -> Tensor:
        """Predict the joints in a view; arguments and result are those of `HandPose.predict_xyz_m`."""
        members: Sequence[PosePredictor] = list(self.members)  # type: ignore[arg-type]
        return average_views(torch.stack([member.predict_xyz_m(view, scale_m) for member in members]))


def average_predictions(predictions_m: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Average predictions of several networks for the same hands.

    Args:
        predictions_m: (N, K, 3) joints of each network in metres, camera frame.

    Returns:
        (N, K, 3) joints in metres.
    """
    stacked = torch.from_numpy(np.stack(predictions_m))
    return average_views(stacked).numpy()
