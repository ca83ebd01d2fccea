"""The pinhole camera and its inverse, Procrustes alignment, bone lengths, and the absolute depth of the root.

Any number of leading dimensions is a batch (written ...); device and dtype follow the input. Camera frame: x to the
right, y down, z away from the camera. Letters: K keypoints.

Intrinsics are upper triangular, [[fx, s, cx], [0, fy, cy], [0, 0, 1]], with any skew and principal point. Their
products are written out rather than as a matrix product, because autocast and TF32 would round that to 8-11 bits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from handpose.skeleton import BONES, ROOT

MIN_DEPTH = 0.1
"""The least depth that `solve_root_depth` leaves to the joint nearest to the camera, in mean lengths of a bone."""

_MIN_BONE_LIMIT = math.log(1.5)
_MIN_SIZE_LIMIT = math.log(2.0)
_NUM_DEVIATIONS = 6.0
"""A bone or a hand is an outlier if its log length deviates from the median by more than so many robust standard
deviations, and by at least the limits above: hands of real people differ by less."""

_PARENT = [parent for parent, _ in BONES]
_CHILD = [child for _, child in BONES]


def disable_autocast(like: Tensor) -> torch.autocast:
    """A context in which mixed precision leaves matrix products alone: it would round a camera or a joint to 8 bits."""
    return torch.autocast(like.device.type, enabled=False)


def project(xyz: Tensor, intrinsics: Tensor) -> Tensor:
    """Project points to the image: (..., K, 3) and (..., 3, 3) -> (..., K, 2) in pixels.

    A point at depth 0 has no image and gives inf or NaN.
    """
    x, y, z = xyz.unbind(-1)
    fx, skew, cx, fy, cy = _unpack_intrinsics(intrinsics)
    x, y = x / z, y / z
    return torch.stack((fx * x + skew * y + cx, fy * y + cy), dim=-1)  # (..., K, 2)


def normalize_image_points(uv: Tensor, intrinsics: Tensor) -> Tensor:
    """Where the ray of each pixel meets the plane of depth 1: K^-1 (u, v, 1), without its last 1.

    uv: (..., K, 2) in pixels; intrinsics: (..., 3, 3). Returns (..., K, 2).
    """
    fx, skew, cx, fy, cy = _unpack_intrinsics(intrinsics)
    y = (uv[..., 1] - cy) / fy
    x = (uv[..., 0] - cx - skew * y) / fx
    return torch.stack((x, y), dim=-1)


def back_project(uv: Tensor, depth: Tensor, intrinsics: Tensor) -> Tensor:
    """The inverse of `project` where the depth is known.

    uv: (..., K, 2) in pixels; depth: (..., K) in any unit of length; intrinsics: (..., 3, 3).
    Returns (..., K, 3) in the unit of `depth`.
    """
    points = normalize_image_points(uv, intrinsics)
    return torch.cat((points * depth[..., None], depth[..., None]), dim=-1)


def procrustes_align(predicted: Tensor, target: Tensor, *, reflection: bool = False) -> Tensor:
    """Bring predictions onto targets by the similarity transform with the least squared error (Umeyama 1991).

    predicted, target: (..., K, 3) in one unit. Computed in float64, returned in the dtype of `predicted`.
    reflection: whether a mirrored hand may be aligned too, as in FreiHAND's own evaluation; most papers forbid it.
    A prediction whose joints all coincide comes to lie on the target's centroid; one that is not finite gives NaN.
    """
    dtype, predicted, target = predicted.dtype, predicted.double(), target.double()
    target_centroid = target.mean(dim=-2, keepdim=True)
    centred = predicted - predicted.mean(dim=-2, keepdim=True)
    covariance = centred.mT @ (target - target_centroid)  # (..., 3, 3)
    u, segment, vt = torch.linalg.svd(covariance.nan_to_num(0, 0, 0))  # svd raises for NaN, and one hand is no reason
    if not reflection:
        sign = torch.linalg.det(u @ vt).sign()
        segment = torch.cat((segment[..., :2], segment[..., 2:] * sign[..., None]), dim=-1)
        u = torch.cat((u[..., :2], u[..., 2:] * sign[..., None, None]), dim=-1)
    scale = segment.sum(dim=-1) / _compute_squared_size(predicted, centred)
    aligned = (scale[..., None, None] * centred) @ (u @ vt) + target_centroid
    return aligned.to(dtype)


def to_root_relative(xyz: Tensor, root: int = ROOT) -> Tensor:
    """Points (..., K, 3) relative to their root joint."""
    return xyz - xyz[..., root : root + 1, :]


def compute_bone_lengths(xyz: Tensor) -> Tensor:
    """Lengths of the 20 bones in the order of `skeleton.BONES`: (..., K, 3) -> (..., 20)."""
    return torch.linalg.vector_norm(xyz[..., _CHILD, :] - xyz[..., _PARENT, :], dim=-1)


class HandProportions(NamedTuple):
    """How the N hands of a data set compare with the median hand. Logarithms, so that 0 means equal."""

    size: Tensor  # (N,) log of the hand's size relative to the median size
    bones: Tensor  # (N, 20) log of each bone's length relative to the median bone of a hand of that size
    is_unusual_size: Tensor  # (N,) bool
    is_unusual_bone: Tensor  # (N, 20) bool

    @property
    def is_typical(self) -> Tensor:
        """(N,) bool: neither the size nor any bone is an outlier."""
        return ~(self.is_unusual_size | self.is_unusual_bone.any(dim=-1))


def compare_proportions(xyz: Tensor) -> HandProportions:
    """Compare the bones of N hands, (N, K, 3) in one unit, with the median hand.

    Only medians and median absolute deviations are used, so wrong labels do not move the result while they are fewer
    than half. The size of a hand is the median over its bones; one wrong joint does not change it either.
    """
    lengths = compute_bone_lengths(xyz.double())
    size = (lengths / lengths.nanmedian(dim=0).values).nanmedian(dim=-1).values
    shape = lengths / size[:, None]
    bones = (shape / shape.nanmedian(dim=0).values).log()
    size = (size / size.nanmedian()).log()
    return HandProportions(
        size,
        bones,
        is_unusual_size=find_outliers(size, min_limit=_MIN_SIZE_LIMIT),
        is_unusual_bone=find_outliers(bones, min_limit=_MIN_BONE_LIMIT),
    )


def select_typical_hands(xyz: Tensor) -> Tensor:
    """The hands, (M, K, 3) of (N, K, 3), whose size and bones are no outliers; all of them where none is typical."""
    typical = xyz[compare_proportions(xyz).is_typical]
    return typical if len(typical) else xyz


def find_outliers(deviations: Tensor, *, min_limit: float) -> Tensor:
    """Which deviations from a median, (N, ...), are more than 6 robust standard deviations (1.4826 MAD) and
    `min_limit`.
    """
    spread = 1.4826 * deviations.abs().nanmedian(dim=0).values
    return ~(deviations.abs() <= (_NUM_DEVIATIONS * spread).clamp_min(min_limit))  # NaN is an outlier too


def solve_root_depth(points: Tensor, relative_depth: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
    """Absolute depth of the root from known bone lengths, in closed form.

    points: (..., K, 2) from `normalize_image_points`; relative_depth: (..., K), depth minus that of the root; lengths:
    (..., 20) or (20,) of `skeleton.BONES`; weights: (20,), how much to trust each bone (1 by default).
    Returns (...,) in the unit of the depths and lengths, at least so large that every joint lies before the camera.

    With joint j at (x_j, 1) (Z + r_j), a bone gives |d Z + e|^2 + (r_m - r_n)^2 = L^2, where d = x_m - x_n and
    e = x_m r_m - x_n r_n. Iqbal et al. 2018 solve this quadratic for one bone (here: weight on that bone only); the
    sum over all bones is again a quadratic in Z, and its larger root averages the noise of 20 bones. Noise can leave no
    real root; then its vertex is the Z that comes nearest.
    """
    rays, r = points, relative_depth[..., None]
    d = _subtract_parents(rays)  # (..., 20, 2)
    e = _subtract_parents(rays * r)  # (..., 20, 2)
    excess = e.square().sum(-1) + _subtract_parents(r).square().sum(-1) - lengths.square()  # (..., 20)
    a = _sum_weighted(d.square().sum(-1), weights)
    b = _sum_weighted((d * e).sum(-1), weights)
    c = _sum_weighted(excess, weights)
    z = ((b.square() - a * c).clamp_min(0).sqrt() - b) / a.clamp_min(1e-12)
    return torch.maximum(z, MIN_DEPTH * lengths.mean(dim=-1) - relative_depth.amin(dim=-1))


def _unpack_intrinsics(intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fx, skew, cx, fy, cy, each (..., 1), so that they broadcast over the keypoints."""
    (fx, skew, cx), (_, fy, cy) = (row.unbind(-1) for row in intrinsics[..., None, :2, :].unbind(-2))
    return fx, skew, cx, fy, cy


def _compute_squared_size(predicted: Tensor, centred: Tensor) -> Tensor:
    """Squared size of a hand (...,); infinite for a point, whose centred joints are rounding errors only."""
    size = centred.square().sum(dim=(-2, -1))
    rounding = 1e-12 * predicted.abs().amax(dim=(-2, -1))
    return size.masked_fill(size <= rounding.square(), torch.inf)


def _subtract_parents(values: Tensor) -> Tensor:
    """Child minus parent of every bone: (..., K, C) -> (..., 20, C)."""
    return values[..., _CHILD, :] - values[..., _PARENT, :]


def _sum_weighted(of_bones: Tensor, weights: Tensor | None) -> Tensor:
    return (of_bones if weights is None else of_bones * weights).sum(dim=-1)
