"""Keypoints <-> heatmaps: the one place that knows how coordinates become bins and bins become coordinates.

A network gives each joint three one-dimensional heatmaps, one along each axis (logits over bins). An axis runs over
[0, 1]; bin i of n has its centre at (i + 0.5) / n, and `sigma` is a fraction of the axis. So neither the depth of a
decoder nor the number of bins changes what the network is asked for, as long as sigma is at least half a bin. What the
axes mean is a choice: `ImageAxes` (u, v and relative depth, metric through the intrinsics; Iqbal et al. 2018) or
`CameraAxes` (fixed ranges of millimetres, as in the original design). So are the shape of the target heatmaps, and how
predicted heatmaps are read out when a network is used. In training they are always read out by the soft-argmax, which
has a gradient.

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
"""Standard deviation of a target heatmap, in bins, at least. A narrower one would fall into a single bin wherever its
coordinate lies in it, and would not tell where: its mean would be wrong by up to half a bin."""

_CURVE_POINTS = 513
"""Coordinates for which the debiased read-out knows the mean of the target; it is linear between them."""


class AxisLogits(NamedTuple):
    """What every decoder gives: unnormalised log-probabilities of each joint along the three axes."""

    u: Tensor  # (B, K, W)
    v: Tensor  # (B, K, H)
    depth: Tensor  # (B, K, D)


class HeatmapTruth(NamedTuple):
    """What is known of the hands in a batch of views; a loss takes of it what it needs."""

    coordinates: Tensor  # (B, K, 3), along the axes, as `encode` gives them
    xyz_m: Tensor  # (B, K, 3), metres, camera frame
    intrinsics: Tensor  # (B, 3, 3), px
    size: tuple[int, int]  # (H, W) of the pictures


def compute_bin_centers(bins: int, *, like: Tensor) -> Tensor:
    """Centres of the bins of an axis, (bins,) in [0, 1]."""
    return (torch.arange(bins, device=like.device, dtype=like.dtype) + 0.5) / bins


def draw_gaussian_heatmaps(coordinates: Tensor, *, bins: int, sigma: float) -> Tensor:
    """Draw a normalised Gaussian round each coordinate: its density at the centres of the bins.

    coordinates: (...) in units of the axis. sigma: its standard deviation; at least half a bin is used, so that the
    mean of the heatmap is the coordinate to 0.03 bins, but for what the border of the axis cuts off. Returns
    (..., bins) that sum to one, also where the coordinate lies outside the axis (there the nearest bins hold the mass).
    """
    distance = (compute_bin_centers(bins, like=coordinates) - coordinates.unsqueeze(-1)) / _compute_width(sigma, bins)
    return torch.softmax(-0.5 * distance.square(), dim=-1)


def draw_laplacian_heatmaps(coordinates: Tensor, *, bins: int, sigma: float) -> Tensor:
    """Draw a normalised Laplacian round each coordinate: a sharper peak and longer tails than the Gaussian's.

    A bin has the mass of the Laplacian within its borders: densities at the centres would be the same for all
    coordinates before the first and behind the last centre. sigma: its standard deviation, sqrt(2) times its scale; at
    least half a bin is used, with which the mean of the heatmap is the coordinate to 0.06 bins. Otherwise as
    `draw_gaussian_heatmaps`.
    """
    scale = _compute_width(sigma, bins) / math.sqrt(2.0)
    low = compute_bin_centers(bins, like=coordinates) - 0.5 / bins
    above_low = coordinates.clamp(0.0, 1.0).unsqueeze(-1) - low  # of all that lie outside the axis the mass is the same
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
    """Expected coordinate of each heatmap, (..., bins) -> (...) in [0, 1].

    Near the borders of the axis, and with mass spread over it, it is pulled towards the middle (Gu et al. 2021).
    """
    # Written out, because mixed precision rounds a matrix product to 8 bits: a third of a pixel of 96.
    return (torch.softmax(logits, dim=-1) * compute_bin_centers(logits.shape[-1], like=logits)).sum(dim=-1)


def debiased_argmax(logits: Tensor, *, sigma: float, target: HeatmapShape) -> Tensor:
    """The coordinate whose target heatmap has the mean of the given one, (..., bins) -> (...) in [0, 1].

    sigma, target: of the heatmaps the network was trained on. What the soft-argmax makes of each coordinate's own
    target is known, and is undone here: like Gu et al. 2021 it compensates the pull towards the middle, that of a
    target cut off by the border and that of mass that lies evenly over the axis. Exact for targets; inside the axis it
    is the soft-argmax, which is the best guess of a network that is not sure, as the place of the mode is not. One bin
    tells nothing about the coordinate: then the middle is returned.
    """
    if logits.shape[-1] == 1:
        return soft_argmax(logits)
    coordinates = torch.linspace(0.0, 1.0, _CURVE_POINTS, device=logits.device, dtype=logits.dtype)
    curve = _mean_above_minimum(_DRAW_FUNCTIONS[target](coordinates, bins=logits.shape[-1], sigma=sigma))  # rises
    mean = _mean_above_minimum(torch.softmax(logits, dim=-1)).clamp(curve[0], curve[-1]).unsqueeze(-1)
    above = (curve[1:-1] <= mean).sum(dim=-1)  # the piece of the curve, (...)
    low, high = curve[above], curve[above + 1]
    share = (mean.squeeze(-1) - low) / (high - low).clamp_min(torch.finfo(low.dtype).tiny)
    return (above + share.clamp(0.0, 1.0)) / (_CURVE_POINTS - 1)


def _mean_above_minimum(heatmaps: Tensor) -> Tensor:
    """Mean coordinate, (..., bins) -> (...), of what rises above the least bin; of an even heatmap the middle.

    Of two bins only one would be left, wherever the coordinate is: there it is the mean of all mass.
    """
    if heatmaps.shape[-1] < 3:
        return (heatmaps * compute_bin_centers(heatmaps.shape[-1], like=heatmaps)).sum(dim=-1)
    mass = heatmaps - heatmaps.amin(dim=-1, keepdim=True) + torch.finfo(heatmaps.dtype).tiny
    return (mass * compute_bin_centers(heatmaps.shape[-1], like=heatmaps)).sum(dim=-1) / mass.sum(dim=-1)


def to_at_least_float32(x: Tensor) -> Tensor:
    """Sums of fewer bits would lose them; what has more keeps them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_expected_coordinates(logits: AxisLogits) -> Tensor:
    """Soft-argmax of all joints along the three axes, (B, K, 3) in [0, 1], in at least float32."""
    return torch.stack([soft_argmax(to_at_least_float32(axis)) for axis in logits], dim=-1)


class _Axes(nn.Module):
    """What all axes share: the heatmaps that are drawn along them, and how they are read out."""

    extent: Tensor  # (3,), length of the axes in the unit of an error along them

    def __init__(self, *, sigma: float, target: HeatmapShape, read_out: ReadOut) -> None:
        if not 0.0 < sigma < 1.0:
            raise UserError(f"heatmap.sigma must be a fraction of the axis between 0 and 1, but it is {sigma}")
        super().__init__()
        self.sigma = sigma
        self.target = target
        self.kind = read_out

    def draw_heatmaps(self, coordinates: Tensor, *, bins: int) -> Tensor:
        """The heatmaps that a network is to give for coordinates (...) along one axis, (..., bins), of sum one."""
        return _DRAW_FUNCTIONS[self.target](coordinates, bins=bins, sigma=self.sigma)

    def read_out(self, logits: AxisLogits) -> Tensor:
        """Coordinates of all joints along the axes, (B, K, 3) in [0, 1], at least in float32: those it is judged by."""
        if self.kind == "soft_argmax":
            return compute_expected_coordinates(logits)
        return torch.stack(
            [debiased_argmax(to_at_least_float32(axis), sigma=self.sigma, target=self.target) for axis in logits],
            dim=-1,
        )


class ImageAxes(_Axes):
    """Axes u, v in pixels and depth relative to the root joint, in lengths of the reference bone.

    sigma, target: standard deviation, as a fraction of each axis, and shape of the target heatmaps. read_out: of
    predictions. `fit` takes from the training set what turns relative into metric depth: the range of the depth axis,
    the hand's mean proportions and its mean size; they travel in the checkpoint.
    """

    depth_range: Tensor  # ()
    bone_lengths: Tensor  # (20,), in lengths of the reference bone
    scale_m: Tensor  # ()

    def __init__(self, *, sigma: float, target: HeatmapShape, read_out: ReadOut) -> None:
        super().__init__(sigma=sigma, target=target, read_out=read_out)
        self.register_buffer("depth_range", torch.tensor(1.0))
        self.register_buffer("bone_lengths", torch.ones(len(BONES)))
        self.register_buffer("scale_m", torch.tensor(0.03))
        self.register_buffer("extent", torch.ones(3), persistent=False)

    def fit(self, xyz_m: Tensor, *, is_trained: bool = False) -> None:
        """Take range, proportions and size from the training set's joints, (N, K, 3) in metres, camera frame.

        Hands whose bones are far from the median hand do not count: a single wrong joint can make the reference bone
        of its hand arbitrarily short. is_trained: the range of depth stays, since the logits of a trained network
        refer to it.
        """
        typical_m = geometry.select_typical_hands(xyz_m)
        lengths = geometry.compute_bone_lengths(typical_m)
        scale = lengths[:, BONES.index(REFERENCE_BONE)]
        relative = (typical_m[..., 2] - typical_m[:, ROOT, None, 2]) / scale[:, None]
        if not is_trained:  # a tenth to spare, for hands the training set does not hold
            self.depth_range.copy_(1.1 * relative.abs().max())
        self.bone_lengths.copy_((lengths / scale[:, None]).mean(0))
        self.scale_m.copy_(scale.mean())

    def encode(self, xyz_m: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
        """Coordinates along the axes, (B, K, 3), of joints in metres; size is (H, W) of the picture.

        Outside [0, 1] where a joint lies outside the picture.
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
        """Joints in metres in the camera frame, (B, K, 3); scale_m (B,) is NaN where the hand's size is unknown.

        The root's depth comes in closed form from the intrinsics and the lengths of the bones.
        """
        uv, relative = self._split_coordinates(coordinates, size)
        points = geometry.normalize_image_points(uv, intrinsics)
        depth = geometry.solve_root_depth(points, relative, self.bone_lengths)[:, None] + relative
        scale = torch.where(scale_m.isfinite(), scale_m, self.scale_m)
        return geometry.back_project(uv, depth * scale[:, None], intrinsics)

    def normalize_hand(self, coordinates: Tensor, truth: HeatmapTruth) -> Tensor:
        """Joints in lengths of the true reference bone, (B, K, 3), on the rays of their pixels, the root in true depth.

        What bones are measured on. `decode` estimates the root's depth, and a square root in that has no gradient at 0.
        """
        uv, relative = self._split_coordinates(coordinates, truth.size)
        root = truth.xyz_m[:, ROOT, 2] / _compute_reference_length(truth.xyz_m)
        return geometry.back_project(uv, root[:, None] + relative, truth.intrinsics)

    def _split_coordinates(self, coordinates: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Pixels, (B, K, 2), and depth relative to the root's in lengths of the reference bone, (B, K)."""
        height, width = size
        uv = torch.stack([coordinates[..., 0] * width - 0.5, coordinates[..., 1] * height - 0.5], dim=-1)
        relative = (coordinates[..., 2] - 0.5) * 2.0 * self.depth_range
        return uv, relative - relative[:, ROOT, None]


class CameraAxes(_Axes):
    """Axes x, y, z of the camera frame over fixed ranges of millimetres: the original design, without intrinsics.

    x_mm, y_mm, z_mm: (low, high) of each axis. sigma, target, read_out: as in ImageAxes.
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
        """Check that the ranges hold the training set's joints, (N, K, 3) in metres; a share outside is refused."""
        outside = ((self.encode(xyz_m, xyz_m, (1, 1)) - 0.5).abs() > 0.5).float().mean().item()
        if outside > 0.01:
            typical_m = geometry.select_typical_hands(xyz_m)
            low, high = (1000 * typical_m.amin((0, 1))).tolist(), (1000 * typical_m.amax((0, 1))).tolist()
            raise UserError(
                f"{outside:.0%} of the training coordinates lie outside heatmap.x_mm, y_mm, z_mm; the joints span "
                f"{[round(x) for x in low]} to {[round(x) for x in high]} mm, so widen the ranges"
            )

    def encode(self, xyz_m: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
        """Coordinates along the axes, (B, K, 3); intrinsics and size play no part."""
        return (xyz_m - self.low_m) / (self.extent / 1000.0)

    def decode(self, coordinates: Tensor, intrinsics: Tensor, size: tuple[int, int], scale_m: Tensor) -> Tensor:
        """Joints in metres in the camera frame, (B, K, 3); only the coordinates play a part."""
        return self.low_m + coordinates * (self.extent / 1000.0)

    def normalize_hand(self, coordinates: Tensor, truth: HeatmapTruth) -> Tensor:
        """Joints in lengths of the true reference bone, (B, K, 3): what bones are measured on."""
        metres = self.decode(coordinates, truth.intrinsics, truth.size, truth.xyz_m)
        return metres / _compute_reference_length(truth.xyz_m)[:, None, None]


def _compute_reference_length(xyz_m: Tensor) -> Tensor:
    """Length of the reference bone, (B,) in metres."""
    return geometry.compute_bone_lengths(xyz_m)[:, BONES.index(REFERENCE_BONE)]


Axes = ImageAxes | CameraAxes
