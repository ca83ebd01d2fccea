"""The metrics that every validation and test computes: one for each file in configs/metrics.

The name of the file is the name of the metric, and its last word is the unit: configs/metrics/pa_mpjpe_mm.yaml is
logged as val/pa_mpjpe_mm. The direction is `higher_is_better` of the class.
"""

import difflib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torchmetrics import Metric, MetricCollection

from handpose.config_files import find_options
from handpose.errors import UserError, join_lines
from handpose.metrics.target import Mode, TargetMetric
from handpose.yaml_files import load_yaml

_STAGE = "val/"
_INPUTS = {"predicted_m", "target_m", "predicted_uv", "target_uv"}
_INPUTS_IN_IMAGE = {"predicted_uv", "target_uv"}


def list_validation_metrics() -> list[str]:
    """Return the names under which a validation logs its metrics."""
    return [f"{_STAGE}{name}" for name in find_options("metrics")]


def make_metrics(*, prefix: str = "", only_in_image: bool = False) -> MetricCollection:
    """Make a new metric for each file in configs/metrics.

    The `update` method of a metric takes any of these arguments: `predicted_m` and `target_m`, (B, K, 3) joints in
    metres in the camera frame; `predicted_uv` and `target_uv`, (B, K, 2) keypoints in pixels. A keypoint of target_uv
    is NaN if the data set has no label for it.

    Args:
        prefix: prefix of the name of each metric, such as `val/`.
        only_in_image: whether to leave out metrics that need joints in metres.

    Raises:
        UserError: a file names no metric class, or its options do not fit the class.
    """
    made = {f"{prefix}{name}": _make_metric(file) for name, file in find_options("metrics").items()}
    metrics: dict[str, Metric | MetricCollection] = {
        name: metric
        for name, metric in made.items()
        if not only_in_image or _get_inputs(type(metric)) <= _INPUTS_IN_IMAGE
    }
    return MetricCollection(metrics, compute_groups=False)


def get_direction(name: str) -> Mode | None:
    """Return the direction in which a validation metric is better. None if no validation logs a metric of that name."""
    file = find_options("metrics").get(name.removeprefix(_STAGE)) if name.startswith(_STAGE) else None
    return None if file is None else "max" if _find_class(file, _read(file)).higher_is_better else "min"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = load_yaml(file)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {join_lines(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("_target_"), str):
        raise UserError(f"{file} must name the class of a metric as _target_")
    return content


def _find_class(file: Path, content: dict[str, Any]) -> type[Metric]:
    try:
        metric = pkgutil.resolve_name(content["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: there is no {content['_target_']} ({error})") from error
    if not (isinstance(metric, type) and issubclass(metric, Metric) and isinstance(metric.higher_is_better, bool)):
        raise UserError(
            f"{file}: {content['_target_']} must be a torchmetrics.Metric whose higher_is_better is True or False"
        )
    unknown = _get_inputs(metric) - _INPUTS
    if unknown:
        raise UserError(
            f"{file}: update of {content['_target_']} asks for {', '.join(sorted(unknown))}, but there are "
            f"{', '.join(sorted(_INPUTS))}"
        )
    return metric


def _get_inputs(metric: type[Metric]) -> set[str]:
    return set(inspect.signature(metric.update).parameters) - {"self"}


def _make_metric(file: Path) -> Metric:
    content = _read(file)
    metric = _find_class(file, content)
    try:
        return metric(**{name: value for name, value in content.items() if name != "_target_"})
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error


def make_target_metric(name: str, mode: Mode | None, *, group: str) -> TargetMetric:
    """Return the validation metric that a configuration optimises.

    Args:
        name: value of `<group>.metric`.
        mode: value of `<group>.mode`; None: follow the metric.
        group: configuration group, for error messages.

    Raises:
        UserError: no validation logs the metric, or the mode contradicts the direction of the metric.
    """
    better = get_direction(name)
    if better is None:
        known = list_validation_metrics()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{group}.metric={name} is not measured; there are {', '.join(known)}{hint}")
    if mode not in (None, better):
        which = "larger" if better == "max" else "smaller"
        raise UserError(
            f"{group}.mode={mode} contradicts {group}.metric={name}, whose {which} values are better; leave out "
            f"{group}.mode"
        )
    return TargetMetric(name, better)


def is_measured_in_image_only(metrics: Mapping[str, Any]) -> bool:
    """Return whether test metrics are those of 2-D keypoints, of which no predictions in millimetres are written."""
    return "test/keypoint_error_px" in metrics and "test/pa_mpjpe_mm" not in metrics
