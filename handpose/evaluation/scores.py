"""Scores of predictions whose true joints are known: errors by protocol, joint, finger and truncation.

Two alignments are computed. FreiHAND's official one (`handpose.metrics.official`), which papers report, may mirror a
hand. The other one never does. Letters: N hands, K keypoints.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from handpose.evaluation.baselines import compute_mean_pose_errors
from handpose.geometry import procrustes_align, project, to_root_relative
from handpose.metrics.official import compute_freihand_scores, compute_pck_auc
from handpose.skeleton import FINGERS, JOINT_NAMES, ROOT

THRESHOLDS_MM = (5, 10, 15, 20, 30)
TRUNCATION = (("0", 0, 0), ("1-5", 1, 5), (">5", 6, len(JOINT_NAMES)))
"""Name of each bin, and the smallest and largest number of joints outside the image."""

NUM_RESAMPLES, NUM_WORST = 2000, 20
_MM_PER_M = 1000.0

Errors = NDArray[np.float64]


class JointErrors(NamedTuple):
    """The error of every joint of every hand.

    Attributes:
        aligned_mm: (N, K) after alignment by rotation, scale and translation, without reflection.
        root_relative_mm: (N, K) relative to the root joint.
        absolute_mm: (N, K) as predicted, in the camera frame.
        pixels: (N, K) in the image. NaN for all joints of a hand with a joint that has no projection, such as at depth
            0.
    """

    aligned_mm: Errors
    root_relative_mm: Errors
    absolute_mm: Errors
    pixels: Errors
    box_fraction: Errors


def compute_joint_errors(
    predicted_m: NDArray[np.floating], target_m: NDArray[np.floating], intrinsics: NDArray[np.floating]
) -> JointErrors:
    """Compute the error of every joint.

    Args:
        predicted_m: (N, K, 3) predicted joints in metres, camera frame.
        target_m: (N, K, 3) true joints in metres, camera frame.
        intrinsics: (N, 3, 3) of the images.
    """
    predicted, target, camera = (
        torch.as_tensor(np.asarray(x, np.float64)) for x in (predicted_m, target_m, intrinsics)
    )
    target_uv = project(target, camera)
    pixels = _compute_distance(project(predicted, camera), target_uv)
    pixels[~np.isfinite(pixels).all(axis=1)] = np.nan
    return JointErrors(
        aligned_mm=_compute_distance(procrustes_align(predicted, target), target) * _MM_PER_M,
        root_relative_mm=_compute_distance(to_root_relative(predicted), to_root_relative(target)) * _MM_PER_M,
        absolute_mm=_compute_distance(predicted, target) * _MM_PER_M,
        pixels=pixels,
        box_fraction=pixels / (target_uv.amax(dim=1) - target_uv.amin(dim=1)).amax(dim=-1, keepdim=True).numpy(),
    )


def count_joints_outside(
    target_m: NDArray[np.floating], intrinsics: NDArray[np.floating], size: tuple[int, int]
) -> NDArray[np.int64]:
    """Count the joints of each hand that are outside the image.

    Args:
        target_m: (N, K, 3) true joints in metres, camera frame.
        intrinsics: (N, 3, 3) of the images.
        size: (H, W) of the images.

    Returns:
        (N,) counts.
    """
    height, width = size
    uv = project(torch.as_tensor(np.asarray(target_m)), torch.as_tensor(np.asarray(intrinsics, target_m.dtype)))
    inside = (uv >= -0.5).all(-1) & (uv < uv.new_tensor([width - 0.5, height - 0.5])).all(-1)
    return (~inside).sum(dim=-1).numpy()


def compute_scores(
    predicted_m: NDArray[np.floating],
    target_m: NDArray[np.floating],
    intrinsics: NDArray[np.floating],
    *,
    size: tuple[int, int],
    training_m: NDArray[np.floating],
    names: Sequence[str],
) -> dict[str, Any]:
    """Compute the content of evaluation.json as plain values.

    A predicted joint at depth 0, such as in a hand of zeros, has no projection. All errors in mm include it, as in
    FreiHAND's own evaluation. Errors in pixels are means over the other hands, NaN if there are none, and
    `num_hands_without_pixels` is the number of hands that they leave out.

    Args:
        predicted_m: (N, K, 3) predicted joints in metres, camera frame.
        target_m: (N, K, 3) true joints in metres, camera frame.
        intrinsics: (N, 3, 3) of the images.
        size: (H, W) of the images.
        training_m: (M, K, 3) joints of the training set in metres, for the mean pose.
        names: names of the N hands.
    """
    errors = compute_joint_errors(predicted_m, target_m, intrinsics)
    official = compute_freihand_scores(predicted_m, target_m)
    per_hand = errors.aligned_mm.mean(axis=1)
    return {
        "num_hands": len(per_hand),
        "without_reflection": {
            "pa_mpjpe_mm": official.pop("pa_mpjpe_mm"),
            "pa_mpjpe_mm_interval_95": compute_bootstrap_interval(per_hand),
            "pa_auc": official.pop("pa_auc"),
        },
        "root_relative": {
            "root_joint": JOINT_NAMES[ROOT],
            "rr_mpjpe_mm": float(errors.root_relative_mm.mean()),
            "rr_auc": compute_pck_auc(errors.root_relative_mm / _MM_PER_M),
        },
        "official": official,
        "image_size_px": list(size),
        "keypoint_error_px": _compute_mean_of_finite(errors.pixels),
        "keypoint_error_box_fraction": _compute_mean_of_finite(errors.box_fraction),
        "num_hands_without_pixels": int(np.isnan(errors.pixels).all(axis=1).sum()),
        "pck": {
            "aligned": _compute_pck(errors.aligned_mm),
            "root_relative": _compute_pck(errors.root_relative_mm),
            "as_predicted": _compute_pck(errors.absolute_mm),
        },
        "mean_pose": compute_mean_pose_errors(training_m, target_m),
        "joints": {name: _compute_means(errors, np.s_[:, [joint]]) for joint, name in enumerate(JOINT_NAMES)},
        "fingers": {
            finger: _compute_means(errors, np.s_[:, _list_finger_joints(finger)]) for finger in ("wrist", *FINGERS)
        },
        "truncation": _group_by_truncation(errors, count_joints_outside(target_m, intrinsics, size)),
        "worst": [
            {"hand": names[i], "pa_mpjpe_mm": float(per_hand[i])}
            for i in np.argsort(-per_hand, kind="stable")[:NUM_WORST]
        ],
    }


def compute_bootstrap_interval(per_hand: Errors, *, seed: int = 0) -> list[float]:
    """Compute the 95 % interval of the mean over hands by the percentile bootstrap (Efron 1979) over single hands.

    Consecutive frames of a sequence are similar, so for hands from sequences the true interval is wider.

    Args:
        per_hand: (N,) errors.
        seed: seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    means = [per_hand[generator.integers(len(per_hand), size=len(per_hand))].mean() for _ in range(NUM_RESAMPLES)]
    return [float(end) for end in np.percentile(means, (2.5, 97.5))]


def _compute_distance(predicted: torch.Tensor, target: torch.Tensor) -> Errors:
    return torch.linalg.vector_norm(predicted - target, dim=-1).numpy()


def _compute_pck(errors_mm: Errors) -> dict[str, float]:
    """Compute the fraction of the joints within each threshold."""
    return {str(threshold): float((errors_mm <= threshold).mean()) for threshold in THRESHOLDS_MM}


def _list_finger_joints(finger: str) -> list[int]:
    return [joint for joint, name in enumerate(JOINT_NAMES) if name.partition("_")[0] == finger]


def _compute_means(errors: JointErrors, part: Any) -> dict[str, float]:
    """Compute the mean errors of some hands or joints."""
    return {
        "pa_mpjpe_mm": float(errors.aligned_mm[part].mean()),
        "rr_mpjpe_mm": float(errors.root_relative_mm[part].mean()),
        "keypoint_error_px": _compute_mean_of_finite(errors.pixels[part]),
    }


def _compute_mean_of_finite(values: Errors) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _group_by_truncation(errors: JointErrors, outside: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return one row for each bin of TRUNCATION that has hands."""
    rows: list[dict[str, Any]] = []
    for name, least, most in TRUNCATION:
        hands = np.flatnonzero((outside >= least) & (outside <= most))
        if len(hands):
            rows.append({"joints_outside": name, "num_hands": len(hands)} | _compute_means(errors, hands))
    return rows
