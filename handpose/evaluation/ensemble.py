"""Ensembles: several networks whose predictions for the same image are averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from handpose.data.augment import View
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.views import PosePredictor, combine_predictions
from handpose.heatmaps import JointPrediction
from handpose.training.module import HandPose


class Ensemble(nn.Module):
    """Predicts with several networks and combines their predictions (`combine_predictions`).

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

    def predict(self, view: View, scale_m: Tensor) -> JointPrediction:
        """Predict the joints in a view; arguments and result are those of `HandPose.predict`."""
        members: Sequence[PosePredictor] = list(self.members)  # type: ignore[arg-type]
        return combine_predictions([member.predict(view, scale_m) for member in members])


def combine_split_predictions(predictions: Sequence[SplitPredictions]) -> SplitPredictions:
    """Combine predictions of several networks for the same split, as `combine_predictions` does."""
    combined = combine_predictions([JointPrediction(*map(torch.from_numpy, each)) for each in predictions])
    return SplitPredictions(*(each.numpy() for each in combined))
