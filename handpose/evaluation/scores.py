"""What there is to say of predictions whose truth is known: errors by protocol, joint, finger and truncation.

Two protocols are in use and both are given: FreiHAND's own (`handpose.metrics.official`), whose alignment may mirror a
hand, and the papers', whose alignment may not. Letters: N hands, K keypoints.
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
"""Name, least and most joints outside the picture."""

NUM_RESAMPLES, NUM_WORST = 2000, 20
_MM_PER_M = 1000.0

Errors = NDArray[np.float64]


class JointErrors(NamedTuple):
    """The error of every joint of every hand, each (N, K)."""

    aligned_mm: Errors  # by rotation, scale and shift, without reflection
    root_relative_mm: Errors
    absolute_mm: Errors  # as predicted, in the camera frame
    pixels: Errors  # NaN for all joints of a hand of which one has no image, as at depth 0
    box_fraction: Errors  # pixels, divided by the longer side of the box around the hand's true keypoints


def compute_joint_errors(
    predicted_m: NDArray[np.floating], target_m: NDArray[np.floating], intrinsics: NDArray[np.floating]
) -> JointErrors:
    """Errors of predictions; predicted_m, target_m: (N, K, 3) metres, camera frame; intrinsics: (N, 3, 3)."""
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
    """How many joints of each hand lie outside its picture of `size` (H, W): (N,)."""
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
    """Everything of evaluation.json, as plain values.

    A predicted joint at depth 0, as of a hand of zeros, has no image. All errors in mm count it as FreiHAND's own
    evaluation does; errors in pixels are the means over the other hands, NaN where there are none, and
    `num_hands_without_pixels` says how many are left out.

    predicted_m, target_m: (N, K, 3) in metres, camera frame; intrinsics: (N, 3, 3) of the pictures, whose size is
    (H, W); training_m: (M, K, 3), for the mean pose; names: of the N hands.
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
    """The 95 % interval of the mean over hands (N,) by the percentile bootstrap (Efron 1979), hands drawn singly.

    Neighbouring frames of a sequence are alike, so for hands of sequences the true interval is wider.
    """
    generator = np.random.default_rng(seed)
    means = [per_hand[generator.integers(len(per_hand), size=len(per_hand))].mean() for _ in range(NUM_RESAMPLES)]
    return [float(end) for end in np.percentile(means, (2.5, 97.5))]


def _compute_distance(predicted: torch.Tensor, target: torch.Tensor) -> Errors:
    return torch.linalg.vector_norm(predicted - target, dim=-1).numpy()


def _compute_pck(errors_mm: Errors) -> dict[str, float]:
    """Share of the joints within each threshold."""
    return {str(threshold): float((errors_mm <= threshold).mean()) for threshold in THRESHOLDS_MM}


def _list_finger_joints(finger: str) -> list[int]:
    return [joint for joint, name in enumerate(JOINT_NAMES) if name.partition("_")[0] == finger]


def _compute_means(errors: JointErrors, part: Any) -> dict[str, float]:
    """The mean errors of some hands or joints."""
    return {
        "pa_mpjpe_mm": float(errors.aligned_mm[part].mean()),
        "rr_mpjpe_mm": float(errors.root_relative_mm[part].mean()),
        "keypoint_error_px": _compute_mean_of_finite(errors.pixels[part]),
    }


def _compute_mean_of_finite(values: Errors) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _group_by_truncation(errors: JointErrors, outside: NDArray[np.int64]) -> list[dict[str, Any]]:
    """One row for each bin of TRUNCATION that has hands."""
    rows: list[dict[str, Any]] = []
    for name, least, most in TRUNCATION:
        hands = np.flatnonzero((outside >= least) & (outside <= most))
        if len(hands):
            rows.append({"joints_outside": name, "num_hands": len(hands)} | _compute_means(errors, hands))
    return rows
