"""Charts of the searched parameters: importance, parallel coordinates, slices, Pareto front, and isolation plots."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from handpose.report.figure import (
    COLOURS,
    Figure,
    Trace,
    dots_of_trials,
    error_bars,
    join_with_gaps,
    make_figure,
    range_without_outliers,
    round_for_plot,
)
from handpose.report.formatting import cost_value, format_cost_name, format_metric_name, format_value
from handpose.report.isolation import IsolationResult
from handpose.report.sweep_record import Importance, Parameter, ParameterEffect, SweepRecord, TrialRecord
from handpose.report.trial_table import shorten_names

PREFERRED = ("model.decoder.depth", "heatmap.sigma", "optimizer.lr")
"""Parameters that are shown first if they are searched."""

_NUM_BEST = 10
_MAX_PARAMETERS = 12  # in the parallel coordinates plot


def sort_by_importance(record: SweepRecord) -> list[Parameter]:
    """Sort the parameters: first those in `PREFERRED`, then the others by importance."""
    shares = {effect.key: effect.share for effect in record.importance[-1].effects} if record.importance else {}

    def place(parameter: Parameter) -> tuple[int, float]:
        is_preferred = parameter.key in PREFERRED
        return PREFERRED.index(parameter.key) if is_preferred else len(PREFERRED), -shares.get(parameter.key, 0.0)

    return sorted(record.parameters, key=place)


def plot_importance(found: Sequence[Importance]) -> Figure:
    """Plot one row per parameter: for each epoch, its share with the spread, and a bar for the noise level."""
    names = shorten_names([effect.key for effect in found[-1].effects])
    rows = {key: row for row, key in enumerate(names)}
    data: list[Trace] = []
    for place, (at, colour) in enumerate(zip(found, COLOURS, strict=False)):
        offset = 0.22 * (place - (len(found) - 1) / 2)
        data += _trace_effects(
            [each for each in at.effects if each.key in names], at, colour, rows, offset, is_first=not place
        )
    return make_figure(
        data,
        x="share of the importance",
        y="",
        height=150 + 38 * len(rows),
        xaxis={"range": [-0.02, 1.02], "tickformat": ".0%"},
        yaxis={"tickvals": list(rows.values()), "ticktext": list(names.values()), "range": [len(rows) - 0.4, -0.6]},
    )


def _trace_effects(
    effects: Sequence[ParameterEffect],
    at: Importance,
    colour: str,
    rows: dict[str, int],
    offset: float,
    *,
    is_first: bool,
) -> list[Trace]:
    """Make the traces of one epoch: the shares, and a bar for each noise level."""
    y = [round_for_plot(rows[effect.key] + offset) for effect in effects]
    middles, ends = [effect.share for effect in effects], [(effect.low, effect.high) for effect in effects]
    shares = {
        "x": [round_for_plot(share) for share in middles],
        "y": y,
        "error_x": error_bars(middles, ends, color=colour),
        "mode": "markers",
        "marker": {"size": 9, "color": colour},
        "name": f"epoch {at.epoch} ({at.num_trials} trials)",
        "hovertemplate": f"epoch {at.epoch}: %{{x:.0%}}<extra></extra>",
    }
    chance = {
        "x": [round_for_plot(min(1.0, effect.noise_level)) for effect in effects],
        "y": y,
        "mode": "markers",
        "marker": {"symbol": "line-ns-open", "size": 12, "color": "@ink", "line": {"width": 3, "color": "@ink"}},
        "name": "largest share by chance",
        "showlegend": is_first,
        "hovertemplate": "by chance up to %{x:.0%}<extra></extra>",
    }
    return [shares, chance]


def plot_parallel_coordinates(record: SweepRecord) -> Figure:
    """Plot one row per parameter, and one line per trial through the places of its values; the best are coloured."""
    parameters = sort_by_importance(record)[:_MAX_PARAMETERS]
    best = record.list_leading_trials(_NUM_BEST)
    numbers = {trial.number for trial in best}
    others = [trial for trial in record.trials if trial.number not in numbers]
    data = [_trace_lines(others, parameters, "@muted", f"other trials ({len(others)})", width=0.8)] if others else []
    data += [_trace_lines(best[3:], parameters, "@sky", f"best {len(best)}", width=1.8)] if best[3:] else []
    data += [_trace_lines(best[:3], parameters, "@vermillion", f"best {len(best[:3])}", width=2.8)] if best else []
    names = shorten_names([parameter.key for parameter in parameters])
    notes = [note for row, parameter in enumerate(parameters) for note in _make_ticks(parameter, row)]
    return make_figure(
        data,
        x="",
        y="",
        height=110 + 62 * len(parameters),
        xaxis={"range": [-0.04, 1.04], "showticklabels": False, "showgrid": False, "zeroline": False},
        yaxis={
            "tickvals": list(range(len(parameters))),
            "ticktext": [names[parameter.key] for parameter in parameters],
            "range": [len(parameters) - 0.45, -0.4],
            "zeroline": False,
        },
        annotations=notes,
    )


def _trace_lines(
    trials: Sequence[TrialRecord], parameters: Sequence[Parameter], colour: str, name: str, *, width: float
) -> Trace:
    places = [[_get_place(parameter, trial) for parameter in parameters] for trial in trials]
    rows = list(range(len(parameters)))
    return {
        "x": join_with_gaps(places),
        "y": join_with_gaps([rows] * len(trials)),
        "customdata": join_with_gaps([[trial.number] * len(rows) for trial in trials]),
        "mode": "lines+markers",
        "line": {"width": width, "color": colour},
        "marker": {"size": 2 + 2 * width, "color": colour},
        "opacity": 1.0 if width > 1 else max(0.15, min(0.6, 40 / len(trials))),
        "name": name,
        "hovertemplate": "trial %{customdata}<extra></extra>",
    }


def _get_place(parameter: Parameter, trial: TrialRecord) -> float | None:
    if parameter.key not in trial.params:
        return None
    return round_for_plot(parameter.to_place(trial.params[parameter.key]))


def _make_ticks(parameter: Parameter, row: int) -> list[dict[str, Any]]:
    """Make the tick labels of a row: all values if there are few; otherwise both ends, and the middle of a range."""
    if parameter.kind == "choice":
        last = max(1, len(parameter.choices) - 1)
        marks = [(index / last, format_value(choice)) for index, choice in enumerate(parameter.choices)]
        marks = marks if len(marks) <= 5 else [marks[0], marks[-1]]
    elif parameter.num_values is not None and parameter.num_values <= 7:
        num = parameter.num_values
        values = [parameter.to_value(index / max(1, num - 1)) for index in range(num)]
        marks = [(index / max(1, num - 1), format_value(value)) for index, value in enumerate(values)]
    else:
        marks = [(place, format_value(float(parameter.to_value(place)))) for place in (0.0, 0.5, 1.0)]
    anchors = {0.0: "left", 1.0: "right"}
    return [
        {
            "x": place,
            "y": row,
            "yshift": -13,
            "text": text if len(text) <= 16 else f"{text[:15]}…",
            "showarrow": False,
            "font": {"size": 11, "color": "@muted"},
            "xanchor": anchors.get(place, "center"),
        }
        for place, text in marks
    ]


def plot_slice(record: SweepRecord, parameter: Parameter) -> Figure:
    """Plot the last value of every trial over a parameter. The stronger the colour, the more epochs."""
    trials = [trial for trial in record.trials if parameter.key in trial.params and trial.reports]
    trials = sorted((trial for trial in trials if np.isfinite(trial.value)), key=lambda trial: trial.epochs)
    x = [to_axis_value(parameter, trial.params[parameter.key]) for trial in trials]
    marker = _make_epoch_markers(record, trials, size=9 if len(trials) < 200 else 6)
    dots = dots_of_trials(trials, x, at=" at %{x}", marker=marker)
    shown = range_without_outliers([trial.value for trial in trials], record.sign, num=20, share=0.95)
    return make_figure(
        [dots],
        x=parameter.key,
        y=format_metric_name(record.metric),
        height=300,
        xaxis=make_axis(parameter),
        yaxis=shown,
        showlegend=False,
    )


def _make_epoch_markers(record: SweepRecord, trials: Sequence[TrialRecord], *, size: int) -> dict[str, Any]:
    """Make markers whose colour is stronger for trials with more epochs."""
    return {
        "size": size,
        "color": [trial.epochs for trial in trials],
        "colorscale": [[0, "@faint"], [1, "@strong"]],
        "cmin": 0,
        "cmax": record.max_epochs,
        "line": {"width": 0.5, "color": "@ink"},
        "colorbar": {"title": {"text": "epochs"}, "thickness": 10, "len": 0.9},
    }


def plot_pareto_front(record: SweepRecord) -> Figure:
    """Plot both objectives of every trial that has them, with the Pareto front as a line."""
    assert record.second_objective is not None
    name = record.second_objective.name
    front = sorted(map(record.get_trial, record.second_objective.front), key=lambda trial: trial.costs[name])
    measured = [trial for trial in record.trials if name in trial.costs and np.isfinite(trial.value)]
    others = [trial for trial in measured if trial.number not in record.second_objective.front]
    costs = [[round_for_plot(cost_value(name, trial.costs[name])) for trial in trials] for trials in (others, front)]
    line = {"shape": "hv", "width": 2, "color": "@vermillion"}
    marker = {"size": 10, "color": "@vermillion", "symbol": "diamond"}
    data = [
        dots_of_trials(
            others, costs[0], at=" at %{x}", marker=_make_epoch_markers(record, others, size=7), name="other trials"
        ),
        dots_of_trials(front, costs[1], at=" at %{x}", mode="lines+markers", line=line, marker=marker, name="front"),
    ]
    shown = range_without_outliers([trial.value for trial in measured], record.sign, num=20, share=0.95)
    return make_figure(data, x=format_cost_name(name), y=format_metric_name(record.metric), height=380, yaxis=shown)


def plot_isolation(isolation: IsolationResult, metric: str) -> Figure:
    """Plot each value of the scientific parameter: its best trial, and the expected best of equally many trials."""
    values = list(isolation.values)
    labels, middles = [each.label for each in values], [each.expected for each in values]
    expected = {
        "x": labels,
        "y": [round_for_plot(middle) for middle in middles],
        "error_y": error_bars(middles, [(each.low, each.high) for each in values], color="@blue"),
        "mode": "markers",
        "marker": {"size": 10, "color": "@blue", "symbol": "diamond"},
        "name": f"best of {isolation.num_drawn} trials, on average (10 to 90 %)",
        "hovertemplate": "%{x}: %{y}<extra></extra>",
    }
    best = {
        "x": labels,
        "y": [round_for_plot(each.best) for each in values],
        "customdata": [[each.best_trial, each.num_trials] for each in values],
        "mode": "markers",
        "marker": {"size": 9, "color": "@orange", "symbol": "circle-open", "line": {"width": 2}},
        "name": "best of all its trials",
        "hovertemplate": "%{x}: trial %{customdata[0]}, the best of %{customdata[1]}: %{y}<extra></extra>",
    }
    y = format_metric_name(metric)
    return make_figure([expected, best], x=isolation.parameter.key, y=y, height=340, xaxis={"type": "category"})


def make_axis(parameter: Parameter) -> dict[str, Any]:
    """Make the plotly attributes of a parameter's axis."""
    if parameter.kind == "choice":
        order = [to_axis_value(parameter, choice) for choice in parameter.choices]
        return {"type": "category", "categoryorder": "array", "categoryarray": order}
    if parameter.log:
        ticks = _list_log_ticks(parameter.low, parameter.high)
        return {"type": "log", "tickangle": 0, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"dtick": parameter.step or 1} if parameter.kind == "int" and parameter.high - parameter.low <= 12 else {}


def _list_log_ticks(low: float, high: float) -> list[float]:
    """List 1, 2 and 5 times the powers of ten within a range, or only the powers of ten if these are more than 6.

    If there are fewer than two, list the ends of the range.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladder = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    within = [tick for tick in ladder if 0.999 * low <= tick <= 1.001 * high]
    if len(within) < 2:
        return [low, high]
    return within if len(within) <= 6 else [tick for tick in within if f"{tick:e}".startswith("1.0")]


def to_axis_value(parameter: Parameter, value: Any) -> Any:
    """Convert a value to a coordinate on the axis of `make_axis`."""
    return format_value(value) if parameter.kind == "choice" else round_for_plot(float(value))
