"""Prediction from several views of an image: rotated, mirrored, zoomed, or cropped around a first prediction.

Each view is the image of a virtual camera (Hartley and Zisserman 2004, section 8.4). So the joints that are found in it
can be converted exactly to the camera frame of the original image, and are averaged there. Crops are views of a camera
that looks at the hand, not cut-out pixels, as in Yu et al. 2021 (PCLs).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from handpose.data.augment import View, mirror_view, rotate_about_center, rotate_view, zoom_intrinsics
from handpose.errors import UserError
from handpose.geometry import disable_autocast, normalize_image_points, project, to_root_relative
from handpose.heatmaps import Axes, CameraAxes, JointPrediction
from handpose.skeleton import ROOT

MAX_ZOOM = 8.0
"""The largest enlargement of a crop. A first prediction with all joints at one point has no size."""


class PosePredictor(Protocol):
    """A network that predicts the joints in a view, such as HandPose."""

    def predict(self, view: View, scale_m: Tensor) -> JointPrediction: ...


class Views:
    """The views of an image whose predictions are averaged.

    Args:
        num_rotations: number of rotated views
        rotation_deg: largest rotation of a view, to either side; 180: the full circle
        mirror: also predict the mirror image of each view; only for networks trained with augment.mirror
        scales: zoom factors; each view is predicted with each of them
        crop: predict again on a crop of which the hand fills this fraction, e.g. 0.6; None: no crop

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self, *, num_rotations: int, rotation_deg: float, mirror: bool, scales: Sequence[float], crop: float | None
    ) -> None:
        if num_rotations < 1:
            raise UserError(f"test_time.num_rotations must be at least 1, but it is {num_rotations}")
        if not 0.0 <= rotation_deg <= 180.0:
            raise UserError(f"test_time.rotation_deg must lie between 0 and 180, but it is {rotation_deg}")
        if not scales or not all(0.1 <= scale <= 10.0 for scale in scales):
            raise UserError(f"test_time.scales must be factors between 0.1 and 10, but it is {list(scales)}")
        if crop is not None and not 0.0 < crop <= 1.0:
            raise UserError(f"test_time.crop must be null or above 0 and at most 1, but it is {crop}")
        self.angles = _list_angles(num_rotations, math.radians(rotation_deg))
        self.mirror = mirror
        self.scales = [float(scale) for scale in scales]
        self.crop = crop

    def check_axes(self, axes: Axes) -> None:
        """Raise UserError if the views change the camera but the axes of the network do not depend on the camera."""
        if isinstance(axes, CameraAxes) and (self.crop is not None or self.scales != [1.0]):
            raise UserError(
                "test_time.crop and test_time.scales do not work with "
                "heatmap=camera_axes, because an enlarged hand would look nearer; give test_time.crop=null "
                "test_time.scales=[1.0]"
            )

    @property
    def num_passes(self) -> int:
        """The number of images that the network gets for each prediction."""
        return len(self.angles) * len(self.scales) * (2 if self.mirror else 1) + (self.crop is not None)

    def predict(self, module: PosePredictor, view: View, scale_m: Tensor) -> JointPrediction:
        """Predict the joints in a view, and how far each is expected to be from its true place.

        Args:
            module: the network.
            view: B images with their cameras.
            scale_m: (B,) length of each hand's reference bone in metres; NaN if it is not known.

        Returns:
            The joints in the camera frame of the view.
        """
        if self.crop is None:
            return self._predict_mean(module, view, scale_m)
        uv = project(module.predict(view, scale_m).xyz_m, view.intrinsics)
        rotation, intrinsics = look_at_joints(uv, view.intrinsics, view.size, fill=self.crop)
        cropped = self._predict_mean(module, rotate_view(view, rotation, intrinsics), scale_m)
        return cropped._replace(xyz_m=undo_rotation(cropped.xyz_m, rotation))

    def predict_xyz_m(self, module: PosePredictor, view: View, scale_m: Tensor) -> Tensor:
        """Predict only the joints in a view, (B, K, 3) in metres. Arguments are those of `predict`."""
        return self.predict(module, view, scale_m).xyz_m

    def _predict_mean(self, module: PosePredictor, view: View, scale_m: Tensor) -> JointPrediction:
        return combine_predictions(list(self._predict_views(module, view, scale_m)))

    def _predict_views(self, module: PosePredictor, view: View, scale_m: Tensor) -> Iterator[JointPrediction]:
        for angle in self.angles:
            for scale in self.scales:
                transformed, rotation = _transform_view(view, angle, scale)
                found = module.predict(transformed, scale_m)
                yield found._replace(xyz_m=undo_rotation(found.xyz_m, rotation))
                if self.mirror:
                    reflected = module.predict(mirror_view(transformed), scale_m)
                    yield reflected._replace(xyz_m=undo_rotation(undo_mirror(reflected.xyz_m), rotation))


def undo_mirror(xyz_m: Tensor) -> Tensor:
    """Convert joints (..., 3) that were found in a mirror image to the frame of the original image."""
    return xyz_m * xyz_m.new_tensor([-1.0, 1.0, 1.0])


def look_at_joints(uv: Tensor, intrinsics: Tensor, size: tuple[int, int], *, fill: float) -> tuple[Tensor, Tensor]:
    """Compute the camera that looks at the joints, for an image of the same size.

    The longer side of the joints' bounding box fills a fraction of the shorter side of the new image, and the box is in
    the middle. The enlargement is at most MAX_ZOOM.

    Args:
        uv: (B, K, 2) joints in pixels.
        intrinsics: (B, 3, 3) of the camera.
        size: (H, W) of the image.
        fill: the fraction.

    Returns:
        (B, 3, 3) rotation and (B, 3, 3) intrinsics of the new camera.
    """
    rays = F.pad(normalize_image_points(uv, intrinsics), (0, 1), value=1.0)  # (B, K, 3)
    middle = (rays.amin(dim=1) + rays.amax(dim=1)) / 2.0
    rotation = _rotate_to_axis(F.normalize(middle, dim=-1))
    with disable_autocast(rays):
        rotated = rays @ rotation.transpose(1, 2)
    points = rotated[..., :2] / rotated[..., 2:]
    low, high = points.amin(dim=1), points.amax(dim=1)  # (B, 2)
    height, width = size
    focal = fill * min(size) / (high - low).amax(dim=-1)
    focal = torch.minimum(focal, MAX_ZOOM * intrinsics[:, 0, 0])  # (B,)
    center = (low + high) / 2.0
    camera = torch.zeros_like(intrinsics)
    camera[:, 0, 0] = camera[:, 1, 1] = focal
    camera[:, 0, 2] = (width - 1) / 2.0 - focal * center[:, 0]
    camera[:, 1, 2] = (height - 1) / 2.0 - focal * center[:, 1]
    camera[:, 2, 2] = 1.0
    return rotation, camera


def combine_predictions(predictions: Sequence[JointPrediction]) -> JointPrediction:
    """Combine predictions of the same hands in one camera frame, from several views or by several networks.

    Their joints are averaged (`average_views`). Where they disagree, the expected error is larger: its square is the
    mean of the squares, plus the variance of the joints relative to the root.
    """
    if len(predictions) == 1:
        return predictions[0]
    joints = torch.stack([each.xyz_m for each in predictions])
    within = torch.stack([each.error_m for each in predictions]).square().mean(dim=0)
    between = to_root_relative(joints).var(dim=0).sum(dim=-1)
    return JointPrediction(average_views(joints), (within + between).sqrt())


def average_views(xyz_m: Tensor) -> Tensor:
    """Average predictions of the same hands.

    The pose is the mean of the root-relative joints. The root is on the mean of its rays, at the depth whose inverse is
    the mean of the inverse depths. An image measures a length divided by a depth, so the errors of the inverse depth
    are symmetric (Civera et al. 2008). The mean of the depths would be too large.

    Args:
        xyz_m: (V, B, K, 3) joints of V predictions in one camera frame, in metres.

    Returns:
        (B, K, 3) joints in metres.
    """
    if len(xyz_m) == 1:
        return xyz_m[0]
    root = xyz_m[:, :, ROOT]  # (V, B, 3)
    depth = 1.0 / (1.0 / root[..., 2:]).mean(dim=0)  # (B, 1)
    ray = (root[..., :2] / root[..., 2:]).mean(dim=0)  # (B, 2)
    mean_root = torch.cat((ray * depth, depth), dim=-1)
    return to_root_relative(xyz_m).mean(dim=0) + mean_root[:, None]


def _list_angles(num_rotations: int, reach: float) -> list[float]:
    """List angles in radians, evenly over the full circle or from -reach to reach; only 0 if nothing is rotated."""
    if num_rotations == 1 or reach == 0.0:
        return [0.0]
    if math.isclose(reach, math.pi):
        return [2.0 * math.pi * i / num_rotations for i in range(num_rotations)]
    return [reach * (2.0 * i / (num_rotations - 1) - 1.0) for i in range(num_rotations)]


def _transform_view(view: View, angle: float, scale: float) -> tuple[View, Tensor]:
    """Rotate and zoom a view about its centre. Return the view and the (B, 3, 3) rotation of its camera."""
    size, angles = view.size, view.intrinsics.new_full((len(view.image),), angle)
    rotation = rotate_about_center(angles, view.intrinsics, size)
    if angle == 0.0 and scale == 1.0:
        return view, rotation  # a warp would take time and change nothing
    no_shift = torch.zeros_like(view.intrinsics[:, :2, 0])
    intrinsics = zoom_intrinsics(view.intrinsics, torch.full_like(angles, scale), no_shift, size)
    return rotate_view(view, rotation, intrinsics), rotation


def undo_rotation(xyz_m: Tensor, rotation: Tensor) -> Tensor:
    """Convert joints from the frame of a rotated camera to that of the camera before the rotation.

    Args:
        xyz_m: (B, K, 3) joints in the frame of the rotated camera.
        rotation: (B, 3, 3) rotation of the camera.

    Returns:
        (B, K, 3) joints in the frame before the rotation.
    """
    with disable_autocast(rotation):
        return xyz_m @ rotation


def _rotate_to_axis(ray: Tensor) -> Tensor:
    """Compute the (B, 3, 3) rotations without roll that map unit rays (B, 3), all with z > 0, to the optical axis."""
    x, y, z = ray.unbind(-1)
    zero = torch.zeros_like(x)
    # Matrix of the cross product of ray and axis.
    cross = torch.stack([zero, zero, -x, zero, zero, -y, x, y, zero], dim=-1).view(-1, 3, 3)
    with disable_autocast(ray):
        square = cross @ cross
    return torch.eye(3, device=ray.device, dtype=ray.dtype) + cross + square / (1.0 + z)[:, None, None]
