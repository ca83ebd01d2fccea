"""Find hands in photographs: the network sees square views, and the joints are in the photographs' camera frames."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handpose.data.augment import View, mirror_view
from handpose.evaluation.photographs import Photograph, make_whole_view_intrinsics, warp_photograph
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.trained_network import TrainedNetwork
from handpose.evaluation.views import look_at_joints, undo_mirror, undo_rotation
from handpose.geometry import project
from handpose.heatmaps import JointPrediction
from handpose.skeleton import NUM_JOINTS


@torch.no_grad()
def find_hands(
    network: TrainedNetwork,
    photographs: Sequence[Photograph],
    *,
    side: int,
    scale_m: float,
    fill: float | None,
    mirror: bool,
    near: NDArray[np.float64] | None = None,
) -> SplitPredictions:
    """Predict the joints of the hand in each of B photographs.

    Args:
        network: the network.
        photographs: B photographs, one hand in each.
        side: side of the square views that the network gets, in pixels.
        scale_m: length of the reference bone in metres; NaN if it is not known.
        fill: predict again on a crop around the first prediction, of which the hand fills this fraction; None: no crop.
        mirror: show the network mirror images, because the hands are of the side that it was not trained on.
        near: (B, K, 2) where the joints are expected, in pixels of the photographs, such as those of the frame before:
            the crop is around them, and the whole photographs are not looked at. None: they are found in these.

    Returns:
        The joints in the frame of each photograph's camera.
    """
    assert near is None or fill is not None, "joints are expected somewhere only for a crop"
    cameras = torch.from_numpy(np.stack([photograph.camera.intrinsics for photograph in photographs]))
    if near is None:
        whole = [
            make_whole_view_intrinsics(each.picture.size, each.camera.intrinsics, side=side) for each in photographs
        ]
        identity = torch.eye(3, dtype=torch.float64).expand_as(cameras)
        found = _find_joints(network, photographs, torch.from_numpy(np.stack(whole)), identity, side, scale_m, mirror)
        uv = project(found.xyz_m, cameras)
    else:
        uv = torch.from_numpy(near)
    if fill is not None:
        rotation, intrinsics = look_at_joints(uv, cameras, (side, side), fill=fill)
        found = _find_joints(network, photographs, intrinsics, rotation, side, scale_m, mirror)
    return SplitPredictions(found.xyz_m.numpy(), found.error_m.numpy())


def _find_joints(
    network: TrainedNetwork,
    photographs: Sequence[Photograph],
    intrinsics: Tensor,
    rotation: Tensor,
    side: int,
    scale_m: float,
    mirror: bool,
) -> JointPrediction:
    """Predict the joints through virtual cameras.

    Args:
        network: the network.
        photographs: B photographs.
        intrinsics: (B, 3, 3) of the virtual cameras.
        rotation: (B, 3, 3) from each photograph's camera to the virtual one.
        side: side of the views in pixels.
        scale_m: length of the reference bone in metres, or NaN.
        mirror: show mirror images.

    Returns:
        The joints in the frame of each photograph's camera.
    """
    homographies = (
        intrinsics[i] @ rotation[i] @ torch.linalg.inv(torch.from_numpy(photograph.camera.intrinsics))
        for i, photograph in enumerate(photographs)
    )
    images = [
        warp_photograph(item.picture, h.numpy(), side=side) for item, h in zip(photographs, homographies, strict=True)
    ]
    device = network.module.device
    view = View(
        image=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device).float() / 255.0,
        intrinsics=intrinsics.float().to(device),
        xyz_m=torch.full((len(images), NUM_JOINTS, 3), torch.nan, device=device),
    )
    scales = torch.full((len(images),), scale_m, device=device)
    found = network.views.predict(network.module, mirror_view(view) if mirror else view, scales)
    found_m, error_m = (each.double().cpu() for each in found)
    return JointPrediction(undo_rotation(undo_mirror(found_m) if mirror else found_m, rotation), error_m)
