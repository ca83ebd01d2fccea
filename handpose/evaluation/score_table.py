"""Scores as text for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from handpose.evaluation.scores import THRESHOLDS_MM


def make_table(scores: Mapping[str, Any]) -> str:
    """Format the scores of `handpose.evaluation.scores` as a few dozen lines."""
    return "\n".join([*_format_protocols(scores), "", *_format_parts(scores), "", *_format_worst(scores)])


def _format_protocols(scores: Mapping[str, Any]) -> Iterator[str]:
    papers, official, pck = scores["papers"], scores["official"], scores["pck"]
    low, high = papers["pa_mpjpe_mm_interval_95"]
    thresholds = "".join(f"{threshold:>7}" for threshold in THRESHOLDS_MM)
    yield f"{scores['num_hands']} hands{'':<42}{'mm':>8}{'AUC':>8}   PCK within mm:{thresholds}"[:200]
    yield _format_row(
        "papers: aligned, no reflection (PA-MPJPE)", papers["pa_mpjpe_mm"], papers["pa_auc"], pck["aligned"]
    )
    yield _format_row("papers: relative to the root", papers["rr_mpjpe_mm"], papers["rr_auc"], pck["root_relative"])
    yield _format_row(
        "official: aligned, reflection allowed", 10 * official["xyz_al_mean3d_cm"], official["xyz_al_auc3d"], None
    )
    yield _format_row(
        "official: as predicted, absolute", 10 * official["xyz_mean3d_cm"], official["xyz_auc3d"], pck["as_predicted"]
    )
    yield _format_row("mean pose of the training set, aligned", scores["mean_pose"]["pa_mpjpe_mm"], None, None)
    yield _format_row("mean pose, relative to the root", scores["mean_pose"]["rr_mpjpe_mm"], None, None)
    yield ""
    left_out = scores["num_hands_without_pixels"]
    without = f", without {left_out} hand{'s' if left_out > 1 else ''} that have no image (a joint at depth 0)"
    yield f"in the picture: {scores['keypoint_error_px']:.2f} px{without if left_out else ''}"
    yield (
        f"PA-MPJPE's 95 % interval: {low:.2f} to {high:.2f} mm, by a bootstrap over single hands (frames of one "
        "sequence are alike, for these it is too narrow)"
    )


def _format_row(name: str, error_mm: float, auc: float | None, pck: Mapping[str, float] | None) -> str:
    area = "" if auc is None else f"{auc:.3f}"
    shares = "" if pck is None else f"{'':17}" + "".join(f"{100 * share:6.1f}%" for share in pck.values())
    return f"{name:<44}{error_mm:>8.2f}{area:>8}{shares}"


def _format_parts(scores: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'by finger, joint and truncation':<44}{'PA mm':>8}{'RR mm':>8}{'px':>8}"
    for finger, errors in scores["fingers"].items():
        yield _format_errors(finger, errors)
        for joint, of_joint in scores["joints"].items():
            if joint != finger and joint.partition("_")[0] == finger:
                yield _format_errors(f"  {joint}", of_joint)
    for row in scores["truncation"]:
        yield _format_errors(f"{row['joints_outside']} joints outside the picture ({row['num_hands']} hands)", row)


def _format_errors(name: str, errors: Mapping[str, Any]) -> str:
    figures = (errors[key] for key in ("pa_mpjpe_mm", "rr_mpjpe_mm", "keypoint_error_px"))
    return f"{name:<44}" + "".join(f"{value:>8.2f}" for value in figures)


def _format_worst(scores: Mapping[str, Any]) -> Iterator[str]:
    yield "worst hands, PA mm: " + ", ".join(f"{row['hand']} {row['pa_mpjpe_mm']:.1f}" for row in scores["worst"][:8])
