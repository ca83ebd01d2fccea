"""Baseline scores: the errors of always predicting the same pose, computed from the training set.

An error in mm alone says little, because a data set with similar poses is easy. So these errors are reported with it.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from handpose.geometry import procrustes_align, select_typical_hands, to_root_relative
from handpose.metrics.mpjpe import PaMpjpe, RootRelativeMpjpe

MAX_POSES = 8192
"""Number of poses that `compute_mean_pose` averages, evenly spaced over the data set.

The errors are then accurate to 0.01 mm, and computing them takes a second.
"""


def compute_mean_pose(xyz_m: NDArray[np.floating], *, iterations: int = 20) -> NDArray[np.float64]:
    """Compute the mean pose up to rotation, scale and translation, by generalised Procrustes analysis (Gower 1975).

    Reflections are not allowed. Hands whose bone lengths are far from those of the median hand are left out.

    Args:
        xyz_m: (N, K, 3) joints in metres.
        iterations: largest number of iterations.

    Returns:
        (K, 3) joints in metres. The centroid is at the origin, and the size is the mean size of the poses.

    Raises:
        ValueError: there are no poses.
    """
    if len(xyz_m) == 0:
        raise ValueError("the mean pose of a data set without poses is not defined")
    typical_m = select_typical_hands(torch.as_tensor(np.asarray(xyz_m), dtype=torch.float64)).numpy()
    poses = _center(torch.from_numpy(_select_evenly(typical_m, MAX_POSES)))
    size = torch.linalg.matrix_norm(poses).mean()
    mean = poses[0]
    for _ in range(iterations):
        previous, mean = mean, procrustes_align(poses, mean.expand_as(poses)).mean(dim=0)
        mean = mean * (size / torch.linalg.matrix_norm(mean))  # each alignment shrinks the mean a little
        if torch.linalg.matrix_norm(mean - previous) < 1e-6 * size:
            break
    return mean.numpy()


def compute_mean_pose_errors(training_xyz_m: NDArray[np.floating], xyz_m: NDArray[np.floating]) -> dict[str, float]:
    """Compute the errors of the best constant predictions that can be derived from the training set.

    Args:
        training_xyz_m: (M, K, 3) joints of the training set in metres.
        xyz_m: (N, K, 3) true joints in metres.

    Returns:
        `pa_mpjpe_mm` for a prediction of `compute_mean_pose`. `rr_mpjpe_mm` for the mean of the root-relative poses,
        because this metric also depends on the orientation.
    """
    target = torch.as_tensor(np.asarray(xyz_m), dtype=torch.float64)
    training = select_typical_hands(torch.as_tensor(np.asarray(training_xyz_m), dtype=torch.float64))
    pa, rr = PaMpjpe(), RootRelativeMpjpe()
    pa.update(torch.from_numpy(compute_mean_pose(training_xyz_m)).expand_as(target), target)
    rr.update(to_root_relative(training).mean(dim=0).expand_as(target), target)
    return {"pa_mpjpe_mm": float(pa.compute()), "rr_mpjpe_mm": float(rr.compute())}


def _select_evenly(xyz: NDArray[np.floating], num: int) -> NDArray[np.floating]:
    """Select at most `num` poses. Data sets consist of sequences, so the first poses would be of one person."""
    return xyz[np.linspace(0, len(xyz) - 1, min(num, len(xyz))).astype(np.int64)]


def _center(xyz: torch.Tensor) -> torch.Tensor:
    return xyz - xyz.mean(dim=-2, keepdim=True)
