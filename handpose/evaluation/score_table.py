"""Scores as text for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from handpose.evaluation.confidence import LEFT_OUT
from handpose.evaluation.scores import THRESHOLDS_MM

_NAME_WIDTH = 46


def make_table(scores: Mapping[str, Any]) -> str:
    """Format the scores of `handpose.evaluation.scores` as a few dozen lines."""
    parts = [_format_protocols(scores), _format_confidence(scores), _format_parts(scores), _format_worst(scores)]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def _format_protocols(scores: Mapping[str, Any]) -> Iterator[str]:
    official, proper, relative, pck = (
        scores[key] for key in ("official", "without_reflection", "root_relative", "pck")
    )
    low, high = proper["pa_mpjpe_mm_interval_95"]
    thresholds = "".join(f"{threshold:>7}" for threshold in THRESHOLDS_MM)
    hands = f"{scores['num_hands']} hands"
    yield f"{hands:<{_NAME_WIDTH}}{'mm':>8}{'AUC':>8}   PCK within mm:{thresholds}"
    yield _format_row(
        "PA-MPJPE as in FreiHAND's eval.py (in papers)",
        10 * official["xyz_al_mean3d_cm"],
        official["xyz_al_auc3d"],
        None,
    )
    yield _format_row("PA-MPJPE without reflection", proper["pa_mpjpe_mm"], proper["pa_auc"], pck["aligned"])
    yield _format_row(
        f"root-relative, at {relative['root_joint']}", relative["rr_mpjpe_mm"], relative["rr_auc"], pck["root_relative"]
    )
    yield _format_row(
        "absolute, as in FreiHAND's eval.py",
        10 * official["xyz_mean3d_cm"],
        official["xyz_auc3d"],
        pck["as_predicted"],
    )
    yield _format_row("mean pose, PA-MPJPE without reflection", scores["mean_pose"]["pa_mpjpe_mm"], None, None)
    yield _format_row("mean pose, root-relative", scores["mean_pose"]["rr_mpjpe_mm"], None, None)
    yield ""
    yield (
        "Compare the first line with papers on FreiHAND: their alignment, that of the official eval.py, allows a "
        "reflection."
    )
    yield "A sweep optimises PA-MPJPE without reflection (val/pa_mpjpe_mm), unless sweep.metric names another metric."
    yield (
        f"PA-MPJPE without reflection has the 95 % interval {low:.2f} to {high:.2f} mm, from a bootstrap over hands. "
        "The interval is too narrow if the hands are frames of one sequence."
    )
    height, width = scores["image_size_px"]
    left_out = scores["num_hands_without_pixels"]
    without = f"; {left_out} hand{'s' if left_out > 1 else ''} with a joint at depth 0 left out"
    yield (
        f"Mean keypoint error in images of {width} x {height} px: {scores['keypoint_error_px']:.2f} px, "
        f"{scores['keypoint_error_box_fraction']:.1%} of the longer side of the hand's box{without if left_out else ''}"
    )


def _format_row(name: str, error_mm: float, auc: float | None, pck: Mapping[str, float] | None) -> str:
    area = "" if auc is None else f"{auc:.3f}"
    shares = "" if pck is None else f"{'':17}" + "".join(f"{100 * share:6.1f}%" for share in pck.values())
    return f"{name:<{_NAME_WIDTH}}{error_mm:>8.2f}{area:>8}{shares}"


def _format_confidence(scores: Mapping[str, Any]) -> Iterator[str]:
    """Format how far the expected errors can be trusted, if they are known."""
    confidence = scores.get("confidence")
    if confidence is None:
        return
    if not confidence["is_calibrated"]:
        yield "The expected errors are not calibrated: they tell which joints are less certain, but not by how much."
    yield (
        f"Expected error of a joint, relative to the root: {confidence['mean_expected_mm']:.2f} mm on average, and "
        f"really {confidence['mean_observed_mm']:.2f} mm (in ten groups of joints, the two differ by "
        f"{confidence['calibration_error_mm']:.2f} mm)."
    )
    yield (
        f"Without the {LEFT_OUT:.0%} of the joints with the largest expected errors, the mean error is "
        f"{confidence['gain_without_least_confident']:.0%} lower. Area under the sparsification error: "
        f"{confidence['sparsification_error']:.3f}; rank correlation of expected and true errors: "
        f"{confidence['rank_correlation']:.2f}."
    )


def _format_parts(scores: Mapping[str, Any]) -> Iterator[str]:
    titles = f"{'PA mm':>8}{'RR mm':>8}{'px':>8}"
    yield f"{'by finger, joint and truncation':<{_NAME_WIDTH}}{titles}   (PA without reflection)"
    for finger, errors in scores["fingers"].items():
        yield _format_errors(finger, errors)
        for joint, of_joint in scores["joints"].items():
            if joint != finger and joint.partition("_")[0] == finger:
                yield _format_errors(f"  {joint}", of_joint)
    for row in scores["truncation"]:
        yield _format_errors(f"{row['joints_outside']} joints outside the picture ({row['num_hands']} hands)", row)


def _format_errors(name: str, errors: Mapping[str, Any]) -> str:
    figures = (errors[key] for key in ("pa_mpjpe_mm", "rr_mpjpe_mm", "keypoint_error_px"))
    return f"{name:<{_NAME_WIDTH}}" + "".join(f"{value:>8.2f}" for value in figures)


def _format_worst(scores: Mapping[str, Any]) -> Iterator[str]:
    yield "worst hands, PA-MPJPE without reflection in mm: " + ", ".join(
        f"{row['hand']} {row['pa_mpjpe_mm']:.1f}" for row in scores["worst"][:8]
    )
