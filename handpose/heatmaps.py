"""Keypoints <-> heatmaps: the only module that knows how coordinates become bins and bins become coordinates.

For each joint, a network predicts three one-dimensional heatmaps, one for each axis, as logits over bins. An axis
covers [0, 1]. The centre of bin i of n is at (i + 0.5) / n, and `sigma` is a fraction of the axis. So neither the depth
of the decoder nor the number of bins changes the targets, as long as sigma is at least half a bin.

The meaning of the axes can be chosen: `ImageAxes` (u, v and relative depth, which the intrinsics turn into metres;
Iqbal et al. 2018) or `CameraAxes` (fixed ranges in millimetres, as in the original design). The shape of the target
heatmaps can be chosen as well, and how coordinates are read from predicted heatmaps. Training always reads them by
soft-argmax, which has a gradient.

Letters: B batch, K keypoints, W, H, D bins along the axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from handpose import geometry
from handpose.errors import UserError
from handpose.skeleton import BONES, REFERENCE_BONE, ROOT

HeatmapShape = Literal["gaussian", "laplacian"]
ReadOut = Literal["soft_argmax", "debiased"]

_MIN_WIDTH = 0.5
"""Minimum standard deviation of a target heatmap, in bins. A narrower heatmap would fall almost into a single bin and
lose the position within that bin: its mean would be wrong by up to half a bin."""

_UNFITTED_RANGE = 1.0
"""Range of the depth axis before `fit`. No hand has it: relative depths of real hands reach 3 reference bones."""

_CURVE_POINTS = 513
"""Number of coordinates for which the debiased read-out computes the mean of the target. It interpolates linearly
between them."""


class AxisLogits(NamedTuple):
    """Output of every decoder: unnormalised log-probabilities of each joint along the three axes.

    Attributes:
        u: (B, K, W).
        v: (B, K, H).
        depth: (B, K, D).
    """

    u: Tensor
    v: Tensor
    depth: Tensor


class HeatmapTruth(NamedTuple):
    """Labels of a batch of views. Each loss uses the part that it needs.

    Attributes:
        coordinates: (B, K, 3) coordinates along the axes, from `encode`; NaN if unknown.
        xyz_m: (B, K, 3) joints in metres, camera frame. If the depth of a hand is unknown, only the projection of its
            joints has a meaning, and a joint without a label is NaN.
        intrinsics: (B, 3, 3) in pixels.
        size: (H, W) of the images in pixels.
    """

    coordinates: Tensor
    xyz_m: Tensor
    intrinsics: Tensor
    size: tuple[int, int]


class JointPrediction(NamedTuple):
    """What a network predicts for B images.

    Attributes:
        xyz_m: (B, K, 3) joints in metres in the camera frame.
        error_m: (B, K) how far each joint is expected to be from its true place, in metres: in the right proportions
            always, and of the right size if the network has been calibrated (`handpose.training.calibration`).
    """

    xyz_m: Tensor
    error_m: Tensor


def hide_unknown_depth(coordinates: Tensor, has_depth: Tensor) -> Tensor:
    """Return coordinates (B, K, 3) with NaN along the depth axis for the hands whose depth is unknown.

    Args:
        coordinates: (B, K, 3) coordinates along the axes u, v and depth, from `encode`.
        has_depth: (B,) bool.
    """
    hidden = coordinates.clone()
    hidden[..., 2] = coordinates[..., 2].masked_fill(~has_depth[:, None], torch.nan)
    return hidden


def compute_bin_centers(bins: int, *, like: Tensor) -> Tensor:
    """Return the centres of the bins of an axis, (bins,) in [0, 1]."""
    return (torch.arange(bins, device=like.device, dtype=like.dtype) + 0.5) / bins


def draw_gaussian_heatmaps(coordinates: Tensor, *, bins: int, sigma: float) -> Tensor:
    """Draw a normalised Gaussian around each coordinate, sampled at the centres of the bins.

    Args:
        coordinates: (...) coordinates in units of the axis.
        bins: number of bins.
        sigma: standard deviation as a fraction of the axis. At least half a bin is used, so that the mean of a heatmap
            equals its coordinate to within 0.03 bins, unless the border of the axis cuts the Gaussian off.

    Returns:
        (..., bins) heatmaps that sum to 1. If a coordinate lies outside the axis, the nearest bins hold the mass.
    """
    distance = (compute_bin_centers(bins, like=coordinates) - coordinates.unsqueeze(-1)) / _compute_width(sigma, bins)
    return torch.softmax(-0.5 * distance.square(), dim=-1)


def draw_laplacian_heatmaps(coordinates: Tensor, *, bins: int, sigma: float) -> Tensor:
    """Draw a normalised Laplacian around each coordinate. It has a sharper peak and longer tails than a Gaussian.

    The value of a bin is the mass of the Laplacian between its borders. Densities at the centres would be identical for
    all coordinates before the first centre, and for all behind the last one.

    Args:
        coordinates: (...) coordinates in units of the axis.
        bins: number of bins.
        sigma: standard deviation as a fraction of the axis, which is sqrt(2) times the scale parameter. At least half a
            bin is used, so that the mean of a heatmap equals its coordinate to within 0.06 bins, unless the border of
            the axis cuts the Laplacian off.

    Returns:
        (..., bins) heatmaps that sum to 1. If a coordinate lies outside the axis, the nearest bins hold the mass.
    """
    scale = _compute_width(sigma, bins) / math.sqrt(2.0)
    low = compute_bin_centers(bins, like=coordinates) - 0.5 / bins
    # Clamping changes nothing outside the axis: after normalisation the mass there does not depend on the distance.
    above_low = coordinates.clamp(0.0, 1.0).unsqueeze(-1) - low
    below_high = 1.0 / bins - above_low
    around = -torch.expm1(-above_low.clamp_min(0.0) / scale) - torch.expm1(-below_high.clamp_min(0.0) / scale)
    beside = -math.expm1(-1.0 / bins / scale) * torch.exp(-torch.maximum(-above_low, -below_high) / scale)
    mass = torch.where((above_low >= 0.0) & (below_high >= 0.0), around, beside)
    return mass / mass.sum(dim=-1, keepdim=True)


def _compute_width(sigma: float, bins: int) -> float:
    return max(sigma, _MIN_WIDTH / bins)


_DRAW_FUNCTIONS: dict[HeatmapShape, Callable[..., Tensor]] = {
    "gaussian": draw_gaussian_heatmaps,
    "laplacian": draw_laplacian_heatmaps,
}


def soft_argmax(logits: Tensor) -> Tensor:
    """Compute the expected coordinate of each heatmap.

    The result is biased towards the middle of the axis when the heatmap is near a border or has mass all over the axis
    (Gu et al. 2021).

    Args:
        logits: (..., bins) unnormalised log-probabilities.

    Returns:
        (...) coordinates in [0, 1].
    """
    # Not a matrix product, which mixed precision would round to 8 bits: a third of a pixel at an image size of 96 px.
    return (torch.softmax(logits, dim=-1) * compute_bin_centers(logits.shape[-1], like=logits)).sum(dim=-1)


def debiased_argmax(logits: Tensor, *, sigma: float, target: HeatmapShape) -> Tensor:
    """Return the coordinate whose target heatmap has the same mean as the given heatmap.

    The mean of a heatmap, its soft-argmax, is biased towards the middle of the axis. One cause is mass that is spread
    evenly over the axis; it is removed by subtracting the smallest value. The other cause is that the border of the
    axis cuts off part of the heatmap; it is corrected with a table of the means of target heatmaps (compare Gu et al.
    2021, who correct the same biases). The result is exact for target heatmaps. Away from the borders it is the mean,
    which is the best estimate of an uncertain network; the mode is not.

    Args:
        logits: (..., bins) unnormalised log-probabilities. A single bin contains no information about the coordinate;
            the result is then the middle of the axis.
        sigma: standard deviation of the heatmaps that the network was trained on, as a fraction of the axis.
        target: shape of those heatmaps.

    Returns:
        (...) coordinates in [0, 1].
    """
    if logits.shape[-1] == 1:
        return soft_argmax(logits)
    coordinates = torch.linspace(0.0, 1.0, _CURVE_POINTS, device=logits.device, dtype=logits.dtype)
    curve = _mean_above_minimum(_DRAW_FUNCTIONS[target](coordinates, bins=logits.shape[-1], sigma=sigma))  # increasing
    mean = _mean_above_minimum(torch.softmax(logits, dim=-1)).clamp(curve[0], curve[-1]).unsqueeze(-1)
    above = (curve[1:-1] <= mean).sum(dim=-1)  # (...) index of the segment of the curve
    low, high = curve[above], curve[above + 1]
    share = (mean.squeeze(-1) - low) / (high - low).clamp_min(torch.finfo(low.dtype).tiny)
    return (above + share.clamp(0.0, 1.0)) / (_CURVE_POINTS - 1)


def _mean_above_minimum(heatmaps: Tensor) -> Tensor:
    """Return the mean coordinate of each heatmap after its smallest bin is subtracted, (..., bins) -> (...).

    The result for a constant heatmap is the middle. With two bins the subtraction would always leave only one, so there
    the mean is taken over all mass.
    """
    if heatmaps.shape[-1] < 3:
        return (heatmaps * compute_bin_centers(heatmaps.shape[-1], like=heatmaps)).sum(dim=-1)
    mass = heatmaps - heatmaps.amin(dim=-1, keepdim=True) + torch.finfo(heatmaps.dtype).tiny
    return (mass * compute_bin_centers(heatmaps.shape[-1], like=heatmaps)).sum(dim=-1) / mass.sum(dim=-1)


def to_at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32, unless the tensor is more precise already. Sums with fewer bits would be too inexact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_expected_coordinates(logits: AxisLogits) -> Tensor:
    """Compute the soft-argmax of all joints along the three axes: (B, K, 3) in [0, 1], in at least float32."""
    return torch.stack([soft_argmax(to_at_least_float32(axis)) for axis in logits], dim=-1)


def compute_variances(logits: AxisLogits) -> Tensor:
    """Compute the variance of the heatmaps of all joints: (B, K, 3) in units of the axes, in at least float32.

    A network that is unsure where a joint is spreads its heatmap over all places that it thinks possible.
    """
    return torch.stack([_compute_variance(to_at_least_float32(axis)) for axis in logits], dim=-1)


def _compute_variance(logits: Tensor) -> Tensor:
    heatmap, centers = torch.softmax(logits, dim=-1), compute_bin_centers(logits.shape[-1], like=logits)
    mean = (heatmap * centers).sum(dim=-1, keepdim=True)
    return (heatmap * (centers - mean).square()).sum(dim=-1)


class _Axes(nn.Module):
    """Base class of all axes: draws heatmaps along them and reads coordinates from heatmaps."""

    extent: Tensor  # (3,), length of each axis in the unit of its errors

    def __init__(self, *, sigma: float, target: HeatmapShape, read_out: ReadOut) -> None:
        if not 0.0 < sigma < 1.0:
            raise UserError(f"heatmap.sigma must be a fraction of the axis between 0 and 1, but it is {sigma}")
        super().__init__()
        self.sigma = sigma
        self.target = target
        self.kind = read_out

    def draw_heatmaps(self, coordinates: Tensor, *, bins: int) -> Tensor:
        """Draw the target heatmaps for coordinates along one axis: (...) -> (..., bins), each with sum 1."""
        return _DRAW_FUNCTIONS[self.target](coordinates, bins=bins, sigma=self.sigma)

    def read_out(self, logits: AxisLogits) -> Tensor:
        """Read the coordinates of all joints from predicted heatmaps, as the configuration says.

        Metrics and predictions use these coordinates.

        Returns:
            (B, K, 3) in [0, 1], in at least float32.
        """
        if self.kind == "soft_argmax":
            return compute_expected_coordinates(logits)
        return torch.stack(
            [debiased_argmax(to_at_least_float32(axis), sigma=self.sigma, target=self.target) for axis in logits],
            dim=-1,
        )


class ImageAxes(_Axes):
    """Axes u and v in pixels, and depth relative to the root joint in lengths of the reference bone.

    `fit` takes from the training set what is needed to turn relative depth into metres: the range of the depth axis,
    and the mean proportions and mean size of the hands. Checkpoints contain these values.

    Args:
        sigma: standard deviation of the target heatmaps as a fraction of the axis. At least half a bin is used.
        target: shape of the target heatmaps.
        read_out: how coordinates are read from predicted heatmaps; soft_argmax: the mean of the heatmap; debiased: the
            mean, corrected near the borders of the axis. Either works with the same weights.
    """

    depth_range: Tensor  # ()
    bone_lengths: Tensor  # (20,), in lengths of the reference bone
    scale_m: Tensor  # ()

    def __init__(self, *, sigma: float, target: HeatmapShape, read_out: ReadOut) -> None:
        super().__init__(sigma=sigma, target=target, read_out=read_out)
        self.register_buffer("depth_range", torch.tensor(_UNFITTED_RANGE))
        self.register_buffer("bone_lengths", torch.ones(len(BONES)))
        self.register_buffer("scale_m", torch.tensor(0.03))
        self.register_buffer("extent", torch.ones(3), persistent=False)

    def fit(self, xyz_m: Tensor, *, is_trained: bool = False) -> None:
        """Fit range, proportions and size to the joints of the training set.

        Hands with bones that differ strongly from the median hand are ignored, since a single wrong joint can make the
        reference bone of its hand arbitrarily short.

        Args:
            xyz_m: (N, K, 3) joints in metres, camera frame; NaN for hands without depth, which are ignored.
            is_trained: keep the range of the depth axis, because the logits of a trained network refer to it. A network
                that was trained without depth has none to keep.
        """
        typical_m = geometry.select_typical_hands(xyz_m[~xyz_m.isnan().any(dim=-1).any(dim=-1)])
        lengths = geometry.compute_bone_lengths(typical_m)
        scale = lengths[:, BONES.index(REFERENCE_BONE)]
        relative = (typical_m[..., 2] - typical_m[:, ROOT, None, 2]) / scale[:, None]
        if not is_trained or self.depth_range == _UNFITTED_RANGE:
            # a margin of 10 % for hands that are not in the training set
            self.depth_range.copy_(1.1 * relative.abs().max())
        self.bone_lengths.copy_((lengths / scale[:, None]).mean(0))
        self.scale_m.copy_(scale.mean())

    def encode(self, xyz_m: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the coordinates of joints along the axes.

        Args:
            xyz_m: (B, K, 3) joints in metres, camera frame.
            intrinsics: (B, 3, 3) in pixels.
            size: (H, W) of the images in pixels.

        Returns:
            (B, K, 3) coordinates; those of a joint outside the image lie outside [0, 1].
        """
        height, width = size
        uv = geometry.project(xyz_m, intrinsics)
        relative = (xyz_m[..., 2] - xyz_m[:, ROOT, None, 2]) / _compute_reference_length(xyz_m)[:, None]
        return torch.stack(
            [
                (uv[..., 0] + 0.5) / width,
                (uv[..., 1] + 0.5) / height,
                0.5 + 0.5 * relative / self.depth_range,
            ],
            dim=-1,
        )

    def decode(self, coordinates: Tensor, intrinsics: Tensor, size: tuple[int, int], scale_m: Tensor) -> Tensor:
        """Return joints in the camera frame. The depth of the root is solved from the intrinsics and the bone lengths.

        Args:
            coordinates: (B, K, 3) coordinates along the axes.
            intrinsics: (B, 3, 3) in pixels.
            size: (H, W) of the images in pixels.
            scale_m: (B,) length of the reference bone in metres; NaN where it is unknown: then the mean of the training
                hands is used.

        Returns:
            (B, K, 3) joints in metres.
        """
        uv, relative = self._split_coordinates(coordinates, size)
        points = geometry.normalize_image_points(uv, intrinsics)
        depth = geometry.solve_root_depth(points, relative, self.bone_lengths)[:, None] + relative
        scale = torch.where(scale_m.isfinite(), scale_m, self.scale_m)
        return geometry.back_project(uv, depth * scale[:, None], intrinsics)

    def to_metres(
        self, distances: Tensor, xyz_m: Tensor, intrinsics: Tensor, size: tuple[int, int], scale_m: Tensor
    ) -> Tensor:
        """Convert small distances along the axes to metres.

        Args:
            distances: (B, K, 3) in units of the axes.
            xyz_m: (B, K, 3) joints from which they are measured, in metres.
            intrinsics, size, scale_m: as for `decode`.

        Returns:
            (B, K, 3) in metres.
        """
        height, width = size
        scale = torch.where(scale_m.isfinite(), scale_m, self.scale_m)[:, None]
        depth = xyz_m[..., 2]
        return torch.stack(
            [
                distances[..., 0] * width * depth / intrinsics[:, 0, 0, None],
                distances[..., 1] * height * depth / intrinsics[:, 1, 1, None],
                distances[..., 2] * 2.0 * self.depth_range * scale,
            ],
            dim=-1,
        )

    def normalize_hand(self, coordinates: Tensor, truth: HeatmapTruth) -> Tensor:
        """Return joints in lengths of the true reference bone. Losses measure bones on them.

        The joints lie on the rays of their pixels, and the root has its true depth. `decode` estimates this depth
        instead, but its estimate contains a square root that has no gradient at 0.

        Args:
            coordinates: (B, K, 3) coordinates along the axes.
            truth: labels of the batch.

        Returns:
            (B, K, 3).
        """
        uv, relative = self._split_coordinates(coordinates, truth.size)
        root = truth.xyz_m[:, ROOT, 2] / _compute_reference_length(truth.xyz_m)
        return geometry.back_project(uv, root[:, None] + relative, truth.intrinsics)

    def _split_coordinates(self, coordinates: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return pixels, (B, K, 2), and depth relative to the root in lengths of the reference bone, (B, K)."""
        height, width = size
        uv = torch.stack([coordinates[..., 0] * width - 0.5, coordinates[..., 1] * height - 0.5], dim=-1)
        relative = (coordinates[..., 2] - 0.5) * 2.0 * self.depth_range
        return uv, relative - relative[:, ROOT, None]


class CameraAxes(_Axes):
    """Axes x, y and z of the camera frame over fixed ranges, without intrinsics, as in the original design.

    Args:
        sigma: standard deviation of the target heatmaps as a fraction of the axis. At least half a bin is used.
        target: shape of the target heatmaps.
        read_out: how coordinates are read from predicted heatmaps; soft_argmax: the mean of the heatmap; debiased: the
            mean, corrected near the borders of the axis. Either works with the same weights.
        x_mm: lower and upper end of the x axis in mm.
        y_mm: lower and upper end of the y axis in mm.
        z_mm: lower and upper end of the z axis in mm.
    """

    low_m: Tensor  # (3,)

    def __init__(
        self,
        *,
        sigma: float,
        target: HeatmapShape,
        read_out: ReadOut,
        x_mm: Sequence[float],
        y_mm: Sequence[float],
        z_mm: Sequence[float],
    ) -> None:
        for name, pair in (("x_mm", x_mm), ("y_mm", y_mm), ("z_mm", z_mm)):
            if len(pair) != 2 or not pair[0] < pair[1]:
                raise UserError(f"heatmap.{name} must be [low, high] with low < high, but it is {list(pair)}")
        super().__init__(sigma=sigma, target=target, read_out=read_out)
        ranges = torch.tensor([list(x_mm), list(y_mm), list(z_mm)], dtype=torch.float32)
        self.register_buffer("low_m", ranges[:, 0] / 1000.0)
        self.register_buffer("extent", ranges[:, 1] - ranges[:, 0])

    def fit(self, xyz_m: Tensor, *, is_trained: bool = False) -> None:
        """Check that the ranges contain the joints of the training set.

        Args:
            xyz_m: (N, K, 3) joints in metres, camera frame.
            is_trained: not used.

        Raises:
            UserError: more than 1 % of the coordinates lie outside.
        """
        outside = ((self.encode(xyz_m, xyz_m, (1, 1)) - 0.5).abs() > 0.5).float().mean().item()
        if outside > 0.01:
            typical_m = geometry.select_typical_hands(xyz_m)
            low, high = (1000 * typical_m.amin((0, 1))).tolist(), (1000 * typical_m.amax((0, 1))).tolist()
            raise UserError(
                f"{outside:.0%} of the training coordinates lie outside heatmap.x_mm, y_mm, z_mm; the joints span "
                f"{[round(x) for x in low]} to {[round(x) for x in high]} mm, so widen the ranges"
            )

    def encode(self, xyz_m: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the coordinates of joints along the axes, (B, K, 3). Intrinsics and size are not used."""
        return (xyz_m - self.low_m) / (self.extent / 1000.0)

    def decode(self, coordinates: Tensor, intrinsics: Tensor, size: tuple[int, int], scale_m: Tensor) -> Tensor:
        """Return joints in metres in the camera frame, (B, K, 3). Only the coordinates are used."""
        return self.low_m + coordinates * (self.extent / 1000.0)

    def to_metres(
        self, distances: Tensor, xyz_m: Tensor, intrinsics: Tensor, size: tuple[int, int], scale_m: Tensor
    ) -> Tensor:
        """Convert distances along the axes to metres, (B, K, 3). Only the distances are used."""
        return distances * (self.extent / 1000.0)

    def normalize_hand(self, coordinates: Tensor, truth: HeatmapTruth) -> Tensor:
        """Return joints in lengths of the true reference bone, (B, K, 3). Losses measure bones on them."""
        metres = self.decode(coordinates, truth.intrinsics, truth.size, truth.xyz_m)
        return metres / _compute_reference_length(truth.xyz_m)[:, None, None]


def _compute_reference_length(xyz_m: Tensor) -> Tensor:
    """Return the length of the reference bone, (B,) in metres."""
    return geometry.compute_bone_lengths(xyz_m)[:, BONES.index(REFERENCE_BONE)]


Axes = ImageAxes | CameraAxes
