"""What a network that ignores the image would score: one constant pose, taken from the training set.

A result in mm says little by itself, since a data set of similar poses is easy; these errors are printed beside it.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from handpose.geometry import procrustes_align, select_typical_hands, to_root_relative
from handpose.metrics.mpjpe import PaMpjpe, RootRelativeMpjpe

MAX_POSES = 8192
"""Poses that `compute_mean_pose` averages, evenly spaced over the data set: enough for 0.01 mm in the errors, and a
second.
"""


def compute_mean_pose(xyz_m: NDArray[np.floating], *, iterations: int = 20) -> NDArray[np.float64]:
    """The mean of poses up to rotation, scale and shift: generalised Procrustes (Gower 1975), without reflection.

    xyz_m: (N, K, 3) in metres. Hands whose bones are far from the median hand do not count. Returns (K, 3) in metres,
    its centroid at the origin and its size the mean size of the poses. Raises ValueError when there is no pose.
    """
    if len(xyz_m) == 0:
        raise ValueError("the mean pose of a data set without poses is not defined")
    typical_m = select_typical_hands(torch.as_tensor(np.asarray(xyz_m), dtype=torch.float64)).numpy()
    poses = _center(torch.from_numpy(_select_evenly(typical_m, MAX_POSES)))
    size = torch.linalg.matrix_norm(poses).mean()
    mean = poses[0]
    for _ in range(iterations):
        previous, mean = mean, procrustes_align(poses, mean.expand_as(poses)).mean(dim=0)
        mean = mean * (size / torch.linalg.matrix_norm(mean))  # each alignment shrinks a little
        if torch.linalg.matrix_norm(mean - previous) < 1e-6 * size:
            break
    return mean.numpy()


def compute_mean_pose_errors(training_xyz_m: NDArray[np.floating], xyz_m: NDArray[np.floating]) -> dict[str, float]:
    """Errors on the poses `xyz_m` of the two best constant predictions known from the training set.

    Both (N, K, 3) in metres. `pa_mpjpe_mm` predicts `compute_mean_pose`; `rr_mpjpe_mm` the plain mean of the
    root-relative poses, since there the orientation counts.
    """
    target = torch.as_tensor(np.asarray(xyz_m), dtype=torch.float64)
    training = select_typical_hands(torch.as_tensor(np.asarray(training_xyz_m), dtype=torch.float64))
    pa, rr = PaMpjpe(), RootRelativeMpjpe()
    pa.update(torch.from_numpy(compute_mean_pose(training_xyz_m)).expand_as(target), target)
    rr.update(to_root_relative(training).mean(dim=0).expand_as(target), target)
    return {"pa_mpjpe_mm": float(pa.compute()), "rr_mpjpe_mm": float(rr.compute())}


def _select_evenly(xyz: NDArray[np.floating], num: int) -> NDArray[np.floating]:
    """At most `num` poses; the data sets run in sequences, so a prefix would be one person's hand."""
    return xyz[np.linspace(0, len(xyz) - 1, min(num, len(xyz))).astype(np.int64)]


def _center(xyz: torch.Tensor) -> torch.Tensor:
    return xyz - xyz.mean(dim=-2, keepdim=True)
