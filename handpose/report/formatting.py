"""Formatting of metrics, costs, parameters and durations for people to read."""

from collections.abc import Mapping
from typing import Any

from handpose.report.trial_table import shorten_names


def format_metric_name(metric: str) -> str:
    """Format the name of a metric with its unit: `val/pa_mpjpe_mm` -> `PA-MPJPE mm`."""
    return " ".join(_split_name_and_unit(metric)).strip()


def format_metric(metric: str, value: float) -> str:
    """Format a metric with its value: `PA-MPJPE 12.34 mm`, `PCK-AUC 0.712`."""
    name, unit = _split_name_and_unit(metric)
    return f"{name} {format_metric_value(metric, value)} {unit}".strip()


def format_metric_value(metric: str, value: float) -> str:
    """Format a value of a metric: `12.34`, or `0.712` for a fraction such as an area under a curve."""
    _, unit = _split_name_and_unit(metric)
    return f"{value:.3f}" if not unit and abs(value) < 1 else f"{value:.2f}"


def format_comparison(metric: str, value: float, cutoff: float) -> tuple[str, str]:
    """Format two values of a metric that were compared: `PA-MPJPE 12.34 mm` and `12.30`.

    They have more digits if they would look equal although they differ.
    """
    name, unit = _split_name_and_unit(metric)
    texts = [format_metric_value(metric, each) for each in (value, cutoff)]
    for digits in (7, 17):
        if texts[0] == texts[1] and value != cutoff:
            texts = [f"{each:.{digits}g}" for each in (value, cutoff)]
    return f"{name} {texts[0]} {unit}".strip(), texts[1]


def format_interval(metric: str, low: float | None, high: float | None) -> str:
    """Format the ends of an interval to follow its mean: ` [9.60, 10.00]`; empty if there is no interval."""
    if low is None or high is None:
        return ""
    return f" [{format_metric_value(metric, low)}, {format_metric_value(metric, high)}]"


_UNITS = ("mm", "cm", "m", "px", "deg", "s", "ms", "percent")
"""Units that can be the last word of the name of a metric."""


def _split_name_and_unit(metric: str) -> tuple[str, str]:
    words = metric.rpartition("/")[2].split("_")
    unit = words.pop() if words[-1] in _UNITS else ""
    return "-".join(words).upper(), unit


_COSTS = {
    "num_parameters": ("parameters", "M", 1e6),
    "latency_ms": ("latency", "ms", 1.0),
    "memory_mb": ("memory", "MB", 1.0),
}
"""Cost of a trial -> displayed name, displayed unit, and the factor that the unit stands for."""


def format_cost_name(name: str) -> str:
    """Format the name of a cost with its unit: `latency_ms` -> `latency ms`."""
    return " ".join(_COSTS[name][:2])


def format_cost(name: str, value: float) -> str:
    """Format a cost with its value: `latency 3.14 ms`."""
    label, unit, _ = _COSTS[name]
    return f"{label} {format_cost_value(name, value)} {unit}"


def format_cost_value(name: str, value: float) -> str:
    """Format a value of a cost in the unit of `format_cost_name`: `3.14`."""
    number = cost_value(name, value)
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def cost_value(name: str, value: float) -> float:
    """Convert a value of a cost to the unit of `format_cost_name`."""
    return value / _COSTS[name][2]


def get_test_name(metric: str) -> str:
    """Return the name that a validation metric has on the test split: `test/pck_auc` for `val/pck_auc`."""
    return f"test/{metric.rpartition('/')[2]}"


def format_params(params: Mapping[str, Any]) -> str:
    """Format parameters with short names: `depth 3, sigma 0.012, lr 0.00081`."""
    names = shorten_names(params)
    return ", ".join(f"{names[key]} {format_value(value)}" for key, value in params.items())


def format_value(value: Any) -> str:
    """Format a value as in a configuration, but floats with three digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float, *, is_rough: bool = False) -> str:
    """Format a duration: `0:41`, `12:05`, `1:02:03`.

    Args:
        seconds: the duration.
        is_rough: whether to round it and name the unit: `40 s`, `12 min`, `1.5 h`.
    """
    if is_rough:
        if seconds < 90:
            return f"{max(10, round(seconds / 10) * 10)} s"
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
