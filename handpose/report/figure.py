"""Charts as plotly.js draws them: plain dictionaries, whose colours are names that the page's style sheet gives values.

So one file decides what light, dark and paper look like. The palette is Okabe and Ito's, which the colour-blind can
tell apart; what a colour says, a shape or a place says too.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from handpose.report.sweep_record import TrialRecord
from handpose.report.trial_table import TrialState

Trace: TypeAlias = dict[str, Any]
Figure: TypeAlias = dict[str, Any]
"""Traces as `data`, `layout`, and `height` in pixels."""

COLOURS = ("@blue", "@orange", "@green", "@vermillion", "@purple", "@sky")
STATE_COLOURS: dict[TrialState, str] = {
    "complete": "@blue",
    "stopped": "@sky",
    "paused": "@green",
    "running": "@green",
    "waiting": "@green",
    "diverged": "@vermillion",
    "infeasible": "@orange",
    "failed": "@purple",
}
STATE_SYMBOLS: dict[TrialState, str] = {
    "complete": "circle",
    "stopped": "x-thin-open",
    "paused": "line-ns-open",
    "running": "circle-open",
    "waiting": "circle-open",
    "diverged": "triangle-up",
    "infeasible": "square",
    "failed": "diamond",
}


def make_figure(data: Sequence[Trace], *, x: str, y: str, height: int = 340, **layout: Any) -> Figure:
    """A chart with titled axes. layout: of plotly, as xaxis={...}; merged with what all charts have."""
    axes = {name: {"title": {"text": title}, **layout.pop(name, {})} for name, title in (("xaxis", x), ("yaxis", y))}
    return {"data": [*data], "layout": {**axes, **layout}, "height": height}


def round_for_plot(value: float) -> float | None:
    """Five digits, which is more than a screen shows; a number that is none is a gap."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def error_bars(middles: Sequence[float], ends: Sequence[tuple[float, float]], **style: Any) -> dict[str, Any]:
    """Error bars from the low to the high end around each middle. style: as plotly's."""
    above = [round_for_plot(max(0.0, high - middle)) for middle, (_, high) in zip(middles, ends, strict=True)]
    below = [round_for_plot(max(0.0, middle - low)) for middle, (low, _) in zip(middles, ends, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **style}


def dots_of_trials(trials: Sequence[TrialRecord], x: Sequence[Any], *, at: str = "", **style: Any) -> Trace:
    """A dot for each trial's last value. at: end of the text shown on hovering; style: of plotly, as marker={...}."""
    return {
        "x": x,
        "y": [round_for_plot(trial.value) for trial in trials],
        "customdata": [[trial.number, trial.epochs] for trial in trials],
        "mode": "markers",
        "hovertemplate": f"trial %{{customdata[0]}} at epoch %{{customdata[1]}}: %{{y}}{at}<extra></extra>",
        **style,
    }


def range_without_outliers(values: Sequence[float], sign: float, *, num: int, share: float) -> dict[str, Any]:
    """An axis on which a few bad values do not squeeze the others; all of it if there are none.

    Args:
        values: finite values; with fewer than `num` the axis has all of them.
        sign: factor that makes smaller values better.
        num: see above.
        share: share of the values that the axis has at the least.
    """
    losses = sign * np.asarray(values)
    if len(losses) < num:
        return {}
    least, usual, most = losses.min(), np.quantile(losses, share), losses.max()
    margin = 0.05 * (usual - least)
    if most <= usual + 10 * margin:
        return {}
    return {"range": [round_for_plot(end) for end in sorted((sign * (least - margin), sign * (usual + margin)))]}


def choose_time_unit(seconds: float) -> tuple[float, str]:
    """Seconds of a unit in which a duration is easily read, and its name."""
    if seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def join_with_gaps(lines: Sequence[Sequence[Any]]) -> list[Any]:
    """Lines one after the other, as one trace has them: hundreds of traces would be slow."""
    joined: list[Any] = []
    for line in lines:
        joined += [*line, None]
    return joined[:-1]
