"""Evaluation of the FreiHAND challenge (Zimmermann et al. 2019) in NumPy and SciPy, independent of the other metrics.

It follows the protocol that the authors publish (github.com/lmb-freiburg/freihand, eval.py) for keypoints. The F-scores
at 5 and 15 mm are left out: they are defined on mesh vertices, which a keypoint method does not have. There are two
alignments:

- official: centre, unit norm, `scipy.linalg.orthogonal_procrustes`, which may REFLECT the hand; gives `xyz_al_*`.
  Papers on FreiHAND report these figures;
- without reflection: the same with a proper rotation only; gives `pa_*`. A sweep optimises this PA-MPJPE.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes

THRESHOLDS_M = np.linspace(0.0, 0.05, 100)

_TINY = 1e-8
"""Added to both norms, in metres. A prediction of zeros only, the toolbox's own example, is then placed on the
centroid."""


def compute_freihand_scores(predicted_m: NDArray[np.floating], target_m: NDArray[np.floating]) -> dict[str, float]:
    """Score predictions as the challenge does, and with an alignment without reflection.

    Args:
        predicted_m: (N, K, 3) joints in metres, camera frame, FreiHAND order.
        target_m: (N, K, 3) joints in metres, camera frame, FreiHAND order.

    Returns:
        `xyz_mean3d_cm`, `xyz_auc3d`: error and AUC without alignment, so absolute position counts (official);
        `xyz_al_mean3d_cm`, `xyz_al_auc3d`: after alignment with reflection allowed (official);
        `pa_mpjpe_mm`, `pa_auc`: after alignment without reflection.

    Raises:
        ValueError: the shapes differ, or there is nothing to score.
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
    """Align one hand to its target by rotation, scale and translation.

    Args:
        predicted: (K, 3) joints in metres.
        target: (K, 3) joints in metres.
        reflection: allow reflection as well.
    """
    target_centroid = target.mean(axis=0)
    source, goal = predicted - predicted.mean(axis=0), target - target_centroid
    size = np.linalg.norm(goal) + _TINY
    source, goal = source / (np.linalg.norm(source) + _TINY), goal / size
    rotation, scale = _find_orthogonal(source, goal) if reflection else _find_rotation(source, goal)
    return source @ rotation * scale * size + target_centroid


def compute_pck_auc(errors_m: NDArray[np.float64]) -> float:
    """Return the area under the PCK curve of each joint as a fraction of its maximum, averaged over the joints.

    Args:
        errors_m: (N, K) errors in metres.
    """
    pck = (errors_m[:, :, None] <= THRESHOLDS_M).mean(axis=0)  # (K, thresholds)
    areas = np.trapezoid(pck, THRESHOLDS_M, axis=-1) / THRESHOLDS_M[-1]
    return float(areas.mean())


def _find_orthogonal(source: NDArray[np.float64], goal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    rotation, scale = orthogonal_procrustes(source, goal)
    return rotation, float(scale)


def _find_rotation(source: NDArray[np.float64], goal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Do the same without reflection: where needed, flip the axis of the smallest singular value (Umeyama 1991)."""
    u, singular_values, vt = np.linalg.svd(source.T @ goal)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return (u * signs) @ vt, float((singular_values * signs).sum())
