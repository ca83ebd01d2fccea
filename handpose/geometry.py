"""Geometry of hands: the pinhole camera and its inverse, Procrustes alignment, bone lengths, and the depth of the root.

Functions accept any number of leading batch dimensions, written as (...). Device and dtype of the result are those of
the input. In the camera frame x points right, y down and z away from the camera. Letters: K keypoints.

Intrinsics are upper triangular, [[fx, s, cx], [0, fy, cy], [0, 0, 1]], with any skew and principal point. Products with
them are written out element by element: autocast and TF32 would round a matrix product to 8-11 bits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from handpose.skeleton import BONES, ROOT

MIN_DEPTH = 0.1
"""Minimum depth, in mean bone lengths, that `solve_root_depth` leaves for the joint nearest to the camera."""

_MIN_BONE_LIMIT = math.log(1.5)
_MIN_SIZE_LIMIT = math.log(2.0)
_NUM_DEVIATIONS = 6.0
"""A bone or a hand is an outlier if its log length deviates from the median by more than this number of robust standard
deviations and by more than the limits above. Hands of real people differ by less than these limits."""

_PARENT = [parent for parent, _ in BONES]
_CHILD = [child for _, child in BONES]


def disable_autocast(like: Tensor) -> torch.autocast:
    """Return a context manager that disables mixed precision for matrix products.

    Mixed precision would round cameras and joints to 8 bits.

    Args:
        like: a tensor on the device concerned.
    """
    return torch.autocast(like.device.type, enabled=False)


def project(xyz: Tensor, intrinsics: Tensor) -> Tensor:
    """Project points to the image.

    Args:
        xyz: (..., K, 3) points in the camera frame.
        intrinsics: (..., 3, 3) in pixels.

    Returns:
        (..., K, 2) pixels. A point at depth 0 has no image; its result is inf or NaN.
    """
    x, y, z = xyz.unbind(-1)
    fx, skew, cx, fy, cy = _unpack_intrinsics(intrinsics)
    x, y = x / z, y / z
    return torch.stack((fx * x + skew * y + cx, fy * y + cy), dim=-1)  # (..., K, 2)


def project_lengths(lengths: Tensor, xyz: Tensor, intrinsics: Tensor) -> Tensor:
    """Return how long lengths (..., K) at points look in the image, across the view: (..., K) pixels.

    It is NaN for a point that is not in front of the camera.

    Args:
        lengths: in the unit of the points.
        xyz: (..., K, 3) points in the camera frame.
        intrinsics: (..., 3, 3) in pixels.
    """
    depth = xyz[..., 2]
    return torch.where(depth > 0, lengths * intrinsics[..., 0, 0, None] / depth, torch.nan)


def normalize_image_points(uv: Tensor, intrinsics: Tensor) -> Tensor:
    """Return where the ray of each pixel meets the plane of depth 1: K^-1 (u, v, 1) without its last element.

    Args:
        uv: (..., K, 2) pixels.
        intrinsics: (..., 3, 3) in pixels.

    Returns:
        (..., K, 2) x and y at depth 1.
    """
    fx, skew, cx, fy, cy = _unpack_intrinsics(intrinsics)
    y = (uv[..., 1] - cy) / fy
    x = (uv[..., 0] - cx - skew * y) / fx
    return torch.stack((x, y), dim=-1)


def back_project(uv: Tensor, depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Return the points with the given pixels and depths, the inverse of `project`.

    Args:
        uv: (..., K, 2) pixels.
        depth: (..., K) in any unit of length.
        intrinsics: (..., 3, 3) in pixels.

    Returns:
        (..., K, 3) points in the unit of `depth`.
    """
    points = normalize_image_points(uv, intrinsics)
    return torch.cat((points * depth[..., None], depth[..., None]), dim=-1)


def procrustes_align(predicted: Tensor, target: Tensor, *, reflection: bool = False) -> Tensor:
    """Align predictions to targets by the similarity transform with the smallest squared error (Umeyama 1991).

    Args:
        predicted: (..., K, 3) joints.
        target: (..., K, 3) joints in the same unit.
        reflection: allow mirroring as well, as FreiHAND's official eval.py does.

    Returns:
        (..., K, 3) aligned predictions in the dtype of `predicted`; they are computed in float64. If all joints of a
        prediction coincide, they are placed on the centroid of the target. A prediction that is not finite gives NaN.
    """
    dtype, predicted, target = predicted.dtype, predicted.double(), target.double()
    target_centroid = target.mean(dim=-2, keepdim=True)
    centred = predicted - predicted.mean(dim=-2, keepdim=True)
    covariance = centred.mT @ (target - target_centroid)  # (..., 3, 3)
    # svd raises an error for NaN, but one bad prediction must not stop the evaluation of the others.
    u, singular_values, vt = torch.linalg.svd(covariance.nan_to_num(0, 0, 0))
    if not reflection:
        sign = torch.linalg.det(u @ vt).sign()
        singular_values = torch.cat((singular_values[..., :2], singular_values[..., 2:] * sign[..., None]), dim=-1)
        u = torch.cat((u[..., :2], u[..., 2:] * sign[..., None, None]), dim=-1)
    scale = singular_values.sum(dim=-1) / _compute_squared_size(predicted, centred)
    aligned = (scale[..., None, None] * centred) @ (u @ vt) + target_centroid
    return aligned.to(dtype)


def to_root_relative(xyz: Tensor, root: int = ROOT) -> Tensor:
    """Return points (..., K, 3) relative to their root joint."""
    return xyz - xyz[..., root : root + 1, :]


def compute_bone_lengths(xyz: Tensor) -> Tensor:
    """Compute the lengths of the 20 bones in the order of `skeleton.BONES`: (..., K, 3) -> (..., 20)."""
    return torch.linalg.vector_norm(xyz[..., _CHILD, :] - xyz[..., _PARENT, :], dim=-1)


class HandProportions(NamedTuple):
    """Proportions of the N hands of a data set compared with the median hand.

    Attributes:
        size: (N,) log of the size of each hand relative to the median size, so 0 means equal.
        bones: (N, 20) log of the length of each bone relative to the median bone of a hand of the same size.
        is_unusual_size: (N,) bool, whether the size is an outlier.
        is_unusual_bone: (N, 20) bool, whether the length of a bone is an outlier.
    """

    size: Tensor
    bones: Tensor
    is_unusual_size: Tensor
    is_unusual_bone: Tensor

    @property
    def is_typical(self) -> Tensor:
        """(N,) bool, whether neither the size nor any bone of a hand is an outlier."""
        return ~(self.is_unusual_size | self.is_unusual_bone.any(dim=-1))


def compare_proportions(xyz: Tensor) -> HandProportions:
    """Compare the bones of hands with those of the median hand.

    The function uses medians and median absolute deviations, so wrong labels do not affect the result as long as fewer
    than half are wrong. The size of a hand is the median over its bones, which a single wrong joint does not change
    either.

    Args:
        xyz: (N, K, 3) joints, all in one unit.
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
    """Select the hands whose size and bones are not outliers.

    Args:
        xyz: (N, K, 3) joints, all in one unit.

    Returns:
        (M, K, 3) the typical hands; all hands if none is typical.
    """
    typical = xyz[compare_proportions(xyz).is_typical]
    return typical if len(typical) else xyz


def find_outliers(deviations: Tensor, *, min_limit: float) -> Tensor:
    """Find deviations of more than 6 robust standard deviations (1.4826 MAD) and more than `min_limit`.

    Args:
        deviations: (N, ...) deviations from the median.
        min_limit: smaller deviations are never outliers.

    Returns:
        (N, ...) bool. NaN is an outlier.
    """
    spread = 1.4826 * deviations.abs().nanmedian(dim=0).values
    return ~(deviations.abs() <= (_NUM_DEVIATIONS * spread).clamp_min(min_limit))  # `not <=` is true for NaN


def solve_root_depth(points: Tensor, relative_depth: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the absolute depth of the root from known bone lengths, in closed form.

    With joint j at (x_j, 1) (Z + r_j), a bone gives |d Z + e|^2 + (r_m - r_n)^2 = L^2, where d = x_m - x_n and
    e = x_m r_m - x_n r_n. Iqbal et al. 2018 solve this quadratic for one bone (here: a weight on that bone only). The
    sum over all bones is again a quadratic in Z, and its larger root averages the noise of 20 bones. Noise can leave no
    real root; then the result is the vertex of the parabola, the Z that comes nearest to a solution.

    Args:
        points: (..., K, 2) from `normalize_image_points`.
        relative_depth: (..., K) depth minus the depth of the root.
        lengths: (..., 20) or (20,) lengths of `skeleton.BONES`, in the unit of `relative_depth`.
        weights: (20,) how much each bone counts; None: all alike.

    Returns:
        (...) depth of the root in the unit of `lengths`. It is large enough to place every joint in front of the
        camera.
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
    """Return fx, skew, cx, fy and cy, each (..., 1) so that they broadcast over the keypoints."""
    (fx, skew, cx), (_, fy, cy) = (row.unbind(-1) for row in intrinsics[..., None, :2, :].unbind(-2))
    return fx, skew, cx, fy, cy


def _compute_squared_size(predicted: Tensor, centred: Tensor) -> Tensor:
    """Return the squared size (...) of each hand.

    It is infinite for a hand whose joints coincide, since its centred joints are only rounding errors.
    """
    size = centred.square().sum(dim=(-2, -1))
    rounding = 1e-12 * predicted.abs().amax(dim=(-2, -1))
    return size.masked_fill(size <= rounding.square(), torch.inf)


def _subtract_parents(values: Tensor) -> Tensor:
    """Return child minus parent for every bone: (..., K, C) -> (..., 20, C)."""
    return values[..., _CHILD, :] - values[..., _PARENT, :]


def _sum_weighted(of_bones: Tensor, weights: Tensor | None) -> Tensor:
    return (of_bones if weights is None else of_bones * weights).sum(dim=-1)
