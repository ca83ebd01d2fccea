"""Predicting from more than one view of a picture: turned, mirrored, zoomed, or cropped round a first prediction.

Each view is what a virtual camera would have seen (Hartley and Zisserman 2004, section 8.4), so the joints found in it
come back into the picture's own camera frame exactly, and are averaged there. Cropping by a camera that looks at the
hand, not by cutting out pixels, is Yu et al. 2021 (PCLs).
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
from handpose.heatmaps import Axes, CameraAxes
from handpose.skeleton import ROOT

MAX_ZOOM = 8.0
"""How much a crop enlarges at most: a first prediction with all joints in one place has no size."""


class PosePredictor(Protocol):
    """A network that finds joints in a view; HandPose is one."""

    def predict_xyz_m(self, view: View, scale_m: Tensor) -> Tensor: ...


class Views:
    """The views of a picture that a test prediction is the mean of.

    num_rotations: views turned by up to rotation_deg to either side, evenly; 180 is the full circle. mirror: the mirror
    image of each as well. scales: each of them zoomed about its centre by these factors. crop: None, or the longer side
    of the joints' box as a fraction of the picture, once a first prediction has told where the hand is.

    Raises UserError for a value out of its range.
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
        """Raise UserError where a network whose axes do not know the camera is to see through another one."""
        if isinstance(axes, CameraAxes) and (self.crop is not None or self.scales != [1.0]):
            raise UserError(
                "test_time.crop and test_time.scales do not work with "
                "heatmap=camera_axes, to which an enlarged hand looks nearer; give test_time.crop=null "
                "test_time.scales=[1.0]"
            )

    @property
    def num_passes(self) -> int:
        """How often the network sees each picture."""
        return len(self.angles) * len(self.scales) * (2 if self.mirror else 1) + (self.crop is not None)

    def predict_xyz_m(self, module: PosePredictor, view: View, scale_m: Tensor) -> Tensor:
        """Joints in metres in the camera frame of the view, (B, K, 3); scale_m (B,) may be NaN."""
        if self.crop is None:
            return self._predict_mean(module, view, scale_m)
        found = project(module.predict_xyz_m(view, scale_m), view.intrinsics)
        rotation, intrinsics = look_at_joints(found, view.intrinsics, view.size, fill=self.crop)
        cropped_m = self._predict_mean(module, rotate_view(view, rotation, intrinsics), scale_m)
        return undo_rotation(cropped_m, rotation)

    def _predict_mean(self, module: PosePredictor, view: View, scale_m: Tensor) -> Tensor:
        return average_views(torch.stack(list(self._predict_views(module, view, scale_m))))

    def _predict_views(self, module: PosePredictor, view: View, scale_m: Tensor) -> Iterator[Tensor]:
        for angle in self.angles:
            for scale in self.scales:
                seen, rotation = _transform_view(view, angle, scale)
                yield undo_rotation(module.predict_xyz_m(seen, scale_m), rotation)
                if self.mirror:
                    reflected_m = module.predict_xyz_m(mirror_view(seen), scale_m)
                    yield undo_rotation(undo_mirror(reflected_m), rotation)


def undo_mirror(xyz_m: Tensor) -> Tensor:
    """Joints (..., 3) found in a mirror image, in the frame of the picture itself."""
    return xyz_m * xyz_m.new_tensor([-1.0, 1.0, 1.0])


def look_at_joints(uv: Tensor, intrinsics: Tensor, size: tuple[int, int], *, fill: float) -> tuple[Tensor, Tensor]:
    """The camera that looks at joints: its rotation (B, 3, 3) and intrinsics (B, 3, 3) for a picture of the same size.

    uv: (B, K, 2) in pixels of a picture of `size` (H, W) with intrinsics (B, 3, 3). The longer side of the joints' box
    fills that fraction of the shorter side of the new picture, whose middle is that of the box; it is enlarged by
    MOST_ZOOM at most.
    """
    rays = F.pad(normalize_image_points(uv, intrinsics), (0, 1), value=1.0)  # (B, K, 3)
    middle = (rays.amin(dim=1) + rays.amax(dim=1)) / 2.0
    rotation = _rotate_to_axis(F.normalize(middle, dim=-1))
    with disable_autocast(rays):
        seen = rays @ rotation.transpose(1, 2)
    points = seen[..., :2] / seen[..., 2:]
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


def average_views(xyz_m: Tensor) -> Tensor:
    """The mean of predictions of one hand, (V, B, K, 3) -> (B, K, 3), all in one camera frame.

    The pose is the mean of the joints relative to the root. The root lies on the mean of its rays, at the mean of its
    inverse depths: a picture measures a length over a depth, so there the errors are even to both sides (Civera et al.
    2008), where the mean of the depths would lie too far.
    """
    if len(xyz_m) == 1:
        return xyz_m[0]
    root = xyz_m[:, :, ROOT]  # (V, B, 3)
    depth = 1.0 / (1.0 / root[..., 2:]).mean(dim=0)  # (B, 1)
    ray = (root[..., :2] / root[..., 2:]).mean(dim=0)  # (B, 2)
    mean_root = torch.cat((ray * depth, depth), dim=-1)
    return to_root_relative(xyz_m).mean(dim=0) + mean_root[:, None]


def _list_angles(num_rotations: int, reach: float) -> list[float]:
    """Evenly over the full circle or from -reach to reach, in radians; one where nothing turns."""
    if num_rotations == 1 or reach == 0.0:
        return [0.0]
    if math.isclose(reach, math.pi):
        return [2.0 * math.pi * i / num_rotations for i in range(num_rotations)]
    return [reach * (2.0 * i / (num_rotations - 1) - 1.0) for i in range(num_rotations)]


def _transform_view(view: View, angle: float, scale: float) -> tuple[View, Tensor]:
    """The view turned and zoomed about its centre, and the rotation (B, 3, 3) of its camera."""
    size, angles = view.size, view.intrinsics.new_full((len(view.image),), angle)
    rotation = rotate_about_center(angles, view.intrinsics, size)
    if angle == 0.0 and scale == 1.0:
        return view, rotation  # a warp would cost time and change nothing
    no_shift = torch.zeros_like(view.intrinsics[:, :2, 0])
    intrinsics = zoom_intrinsics(view.intrinsics, torch.full_like(angles, scale), no_shift, size)
    return rotate_view(view, rotation, intrinsics), rotation


def undo_rotation(xyz_m: Tensor, rotation: Tensor) -> Tensor:
    """Joints (B, K, 3) in the frame of a camera turned by rotation (B, 3, 3) -> in that of the camera before."""
    with disable_autocast(rotation):
        return xyz_m @ rotation


def _rotate_to_axis(ray: Tensor) -> Tensor:
    """The rotation without roll (B, 3, 3) that takes unit rays (B, 3), all to the front, to the optical axis."""
    x, y, z = ray.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, zero, -x, zero, zero, -y, x, y, zero], dim=-1).view(-1, 3, 3)  # of ray x axis
    with disable_autocast(ray):
        square = cross @ cross
    return torch.eye(3, device=ray.device, dtype=ray.dtype) + cross + square / (1.0 + z)[:, None, None]
