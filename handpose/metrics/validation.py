"""The metrics of a validation. The direction of each is its class's own `higher_is_better`."""

import difflib

from torchmetrics import Metric

from handpose.errors import UserError
from handpose.metrics.mpjpe import KeypointErrorPx, PaMpjpe, RootRelativeMpjpe
from handpose.metrics.pck import PckAuc
from handpose.metrics.target import Mode, TargetMetric

JOINT_METRICS: dict[str, type[Metric]] = {
    "val/pa_mpjpe_mm": PaMpjpe,
    "val/rr_mpjpe_mm": RootRelativeMpjpe,
    "val/pck_auc": PckAuc,
}
"""Metrics of the joints in space, by the name under which a validation logs them."""

PIXEL_METRICS: dict[str, type[Metric]] = {"val/keypoint_error_px": KeypointErrorPx}
"""Metrics of the keypoints in the image."""

VALIDATION_METRICS = {**JOINT_METRICS, **PIXEL_METRICS}


def direction(name: str) -> Mode | None:
    """Which direction of a validation metric is better; None for a name that no validation logs."""
    metric = VALIDATION_METRICS.get(name)
    return None if metric is None else "max" if metric.higher_is_better else "min"


def target_metric(name: str, mode: Mode | None, *, group: str) -> TargetMetric:
    """The validation metric that a configuration optimises.

    Args:
        name: value of `<group>.metric`.
        mode: value of `<group>.mode`; None follows the metric.
        group: configuration group, for error messages.

    Raises:
        UserError: no validation logs the metric, or the mode contradicts its direction.
    """
    better = direction(name)
    if better is None:
        near = difflib.get_close_matches(name, VALIDATION_METRICS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{group}.metric={name} is not measured; there are {', '.join(VALIDATION_METRICS)}{hint}")
    if mode not in (None, better):
        which = "larger" if better == "max" else "smaller"
        raise UserError(
            f"{group}.mode={mode} contradicts {group}.metric={name}, of which {which} is better; leave {group}.mode out"
        )
    return TargetMetric(name, better)
