"""The evaluation of the FreiHAND challenge (Zimmermann et al. 2019) in NumPy and SciPy, apart from our other metrics.

It is written from the protocol that the authors publish (github.com/lmb-freiburg/freihand, eval.py), for keypoints: the
F-scores at 5 and 15 mm are defined on mesh vertices, which a keypoint method does not have. Two alignments are in use:

- official: centre, unit norm, `scipy.linalg.orthogonal_procrustes`, which may REFLECT the hand; gives `xyz_al_*`;
- the papers': the same, but a proper rotation only; gives `pa_*`. It is what PA-MPJPE means in the literature and here.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.linalg import orthogonal_procrustes

THRESHOLDS_M = np.linspace(0.0, 0.05, 100)

_TINY = 1e-8
"""Added to both norms, in metres: a prediction of zeros only, the toolbox's own example, falls onto the centroid."""


def compute_freihand_scores(predicted_m: NDArray[np.floating], target_m: NDArray[np.floating]) -> dict[str, float]:
    """Score predictions as the challenge does, and as papers do.

    predicted_m, target_m: (N, K, 3) in metres, camera frame, FreiHAND order. Returns
    `xyz_mean3d_cm`, `xyz_auc3d`: error and AUC as predicted, absolute position included (official);
    `xyz_al_mean3d_cm`, `xyz_al_auc3d`: after alignment, reflection allowed (official);
    `pa_mpjpe_mm`, `pa_auc`: after alignment without reflection (papers).
    Raises ValueError when the shapes differ or there is nothing to score.
    """
    predicted, target = np.asarray(predicted_m, np.float64), np.asarray(target_m, np.float64)
    if predicted.shape != target.shape or predicted.ndim != 3 or len(predicted) == 0:
        raise ValueError(f"predictions {predicted.shape} and targets {target.shape} must both be (N, K, 3) with N > 0")
    official = np.stack([align(p, t, reflection=True) for p, t in zip(predicted, target, strict=True)])
    proper = np.stack([align(p, t, reflection=False) for p, t in zip(predicted, target, strict=True)])
    errors, errors_official, errors_proper = (
        np.linalg.norm(x - target, axis=-1) for x in (predicted, official, proper)
    )
    return {
        "xyz_mean3d_cm": 100 * float(errors.mean()),
        "xyz_auc3d": compute_pck_auc(errors),
        "xyz_al_mean3d_cm": 100 * float(errors_official.mean()),
        "xyz_al_auc3d": compute_pck_auc(errors_official),
        "pa_mpjpe_mm": 1000 * float(errors_proper.mean()),
        "pa_auc": compute_pck_auc(errors_proper),
    }


def format_official_pa_mpjpe(value_mm: float) -> str:
    """Format a PA-MPJPE in mm that was computed with the official alignment, and name this alignment."""
    return f"PA-MPJPE {value_mm:.2f} mm, aligned as in FreiHAND's official eval.py, which allows a reflection"


def align(predicted: NDArray[np.float64], target: NDArray[np.float64], *, reflection: bool) -> NDArray[np.float64]:
    """Align one hand (K, 3) in metres to its target by rotation, scale and shift."""
    target_centroid = target.mean(axis=0)
    source, goal = predicted - predicted.mean(axis=0), target - target_centroid
    size = np.linalg.norm(goal) + _TINY
    source, goal = source / (np.linalg.norm(source) + _TINY), goal / size
    turn, scale = _find_orthogonal(source, goal) if reflection else _find_rotation(source, goal)
    return source @ turn * scale * size + target_centroid


def compute_pck_auc(errors_m: NDArray[np.float64]) -> float:
    """Area under the curve of correct keypoints of each joint, over its maximum, then the mean; errors_m: (N, K)."""
    pck = (errors_m[:, :, None] <= THRESHOLDS_M).mean(axis=0)  # (K, thresholds)
    areas = trapezoid(pck, THRESHOLDS_M, axis=-1) / THRESHOLDS_M[-1]
    return float(areas.mean())


def _find_orthogonal(source: NDArray[np.float64], goal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    turn, scale = orthogonal_procrustes(source, goal)
    return turn, float(scale)


def _find_rotation(source: NDArray[np.float64], goal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """As `orthogonal_procrustes`, but a proper rotation: the least stretched axis is turned back (Umeyama 1991)."""
    u, segment, vt = np.linalg.svd(source.T @ goal)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return (u * signs) @ vt, float((segment * signs).sum())
