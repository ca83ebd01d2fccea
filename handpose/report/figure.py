"""Charts for plotly.js, as plain dictionaries.

Colours are names such as `@blue`, whose values are in the style sheet of the page. So one file defines the light, dark
and print themes. The palette is that of Okabe and Ito, whose colours colour-blind people can distinguish. Colour is
never the only cue: shape or position show the same information.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from handpose.report.sweep_record import TrialRecord
from handpose.report.trial_table import TrialState

Trace: TypeAlias = dict[str, Any]
Figure: TypeAlias = dict[str, Any]
"""A dictionary with the traces as `data`, the `layout`, and the `height` in pixels."""

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
    """Make a chart with titled axes.

    Args:
        data: the traces.
        x: title of the x-axis.
        y: title of the y-axis.
        height: height in pixels.
        layout: further plotly layout, such as `xaxis={...}`. page.js adds the layout that all charts have in common.
    """
    axes = {name: {"title": {"text": title}, **layout.pop(name, {})} for name, title in (("xaxis", x), ("yaxis", y))}
    return {"data": [*data], "layout": {**axes, **layout}, "height": height}


def round_for_plot(value: float) -> float | None:
    """Round to five digits, more than a screen can show. A value that is not finite becomes None, a gap in the plot."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def error_bars(middles: Sequence[float], ends: Sequence[tuple[float, float]], **style: Any) -> dict[str, Any]:
    """Make error bars around the middles.

    Args:
        middles: the values.
        ends: the low and the high end of each error bar.
        style: further plotly attributes of the error bars.
    """
    above = [round_for_plot(max(0.0, high - middle)) for middle, (_, high) in zip(middles, ends, strict=True)]
    below = [round_for_plot(max(0.0, middle - low)) for middle, (low, _) in zip(middles, ends, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **style}


def dots_of_trials(trials: Sequence[TrialRecord], x: Sequence[Any], *, at: str = "", **style: Any) -> Trace:
    """Make a trace with a dot for the last value of each trial.

    Args:
        trials: the trials.
        x: the x-coordinate of each trial.
        at: end of the hover text.
        style: further plotly attributes of the trace, such as `marker={...}`.
    """
    return {
        "x": x,
        "y": [round_for_plot(trial.value) for trial in trials],
        "customdata": [[trial.number, trial.epochs] for trial in trials],
        "mode": "markers",
        "hovertemplate": f"trial %{{customdata[0]}} at epoch %{{customdata[1]}}: %{{y}}{at}<extra></extra>",
        **style,
    }


def range_without_outliers(values: Sequence[float], sign: float, *, num: int, share: float) -> dict[str, Any]:
    """Choose the range of an axis so that a few very bad values do not compress the others.

    Args:
        values: finite values.
        sign: factor for the values, after which smaller is better.
        num: with fewer values than this, the axis shows all of them.
        share: least fraction of the values that the axis shows.

    Returns:
        Plotly attributes of the axis; empty if the axis shows all values.
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
    """Choose a readable unit for a duration. Returns the seconds of the unit, and its name."""
    if seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def join_with_gaps(lines: Sequence[Sequence[Any]]) -> list[Any]:
    """Join lines to one trace, with gaps between them, because hundreds of traces would be slow."""
    joined: list[Any] = []
    for line in lines:
        joined += [*line, None]
    return joined[:-1]
