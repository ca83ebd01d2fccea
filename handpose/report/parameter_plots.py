"""Charts of what was searched: importance, parallel coordinates, slices, the Pareto front, isolation."""

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
    figure,
    range_without_outliers,
    rounded,
    with_gaps,
)
from handpose.report.isolation import Isolation
from handpose.report.record import Effect, Importance, Parameter, SweepRecord, TrialRecord
from handpose.report.table import short_names
from handpose.report.words import cost_label, cost_value, metric_label, value_text

PREFERRED = ("model.decoder.depth", "heatmap.sigma", "optimizer.lr")
"""Shown first where they are searched."""

_NUM_BEST = 10
_MOST_PARAMETERS = 12  # of parallel coordinates


def by_importance(record: SweepRecord) -> list[Parameter]:
    """The parameters, the project's three first, then the most important ones."""
    shares = {effect.key: effect.share for effect in record.importance[-1].effects} if record.importance else {}

    def place(parameter: Parameter) -> tuple[int, float]:
        is_preferred = parameter.key in PREFERRED
        return PREFERRED.index(parameter.key) if is_preferred else len(PREFERRED), -shares.get(parameter.key, 0.0)

    return sorted(record.parameters, key=place)


def importance_dots(found: Sequence[Importance]) -> Figure:
    """A row a parameter, with a dot and its spread for each epoch, and a bar for what chance reaches there."""
    names = short_names([effect.key for effect in found[-1].effects])
    rows = {key: row for row, key in enumerate(names)}
    data: list[Trace] = []
    for place, (at, colour) in enumerate(zip(found, COLOURS, strict=False)):
        offset = 0.22 * (place - (len(found) - 1) / 2)
        data += _effects(
            [each for each in at.effects if each.key in names], at, colour, rows, offset, is_first=not place
        )
    return figure(
        data,
        x="share of the importance",
        y="",
        height=150 + 38 * len(rows),
        xaxis={"range": [-0.02, 1.02], "tickformat": ".0%"},
        yaxis={"tickvals": list(rows.values()), "ticktext": list(names.values()), "range": [len(rows) - 0.4, -0.6]},
    )


def _effects(
    effects: Sequence[Effect], at: Importance, colour: str, rows: dict[str, int], offset: float, *, is_first: bool
) -> list[Trace]:
    """Of one epoch: the shares, and a bar each for what chance reaches."""
    y = [rounded(rows[effect.key] + offset) for effect in effects]
    middles, ends = [effect.share for effect in effects], [(effect.low, effect.high) for effect in effects]
    shares = {
        "x": [rounded(share) for share in middles],
        "y": y,
        "error_x": error_bars(middles, ends, color=colour),
        "mode": "markers",
        "marker": {"size": 9, "color": colour},
        "name": f"epoch {at.epoch} ({at.num_trials} trials)",
        "hovertemplate": f"epoch {at.epoch}: %{{x:.0%}}<extra></extra>",
    }
    chance = {
        "x": [rounded(min(1.0, effect.chance)) for effect in effects],
        "y": y,
        "mode": "markers",
        "marker": {"symbol": "line-ns-open", "size": 12, "color": "@ink", "line": {"width": 3, "color": "@ink"}},
        "name": "what chance reaches",
        "showlegend": is_first,
        "hovertemplate": "chance reaches %{x:.0%}<extra></extra>",
    }
    return [shares, chance]


def parallel_coordinates(record: SweepRecord) -> Figure:
    """A row a parameter, a line a trial, from the first row down to its place in the ranking; the best in colour."""
    parameters = by_importance(record)[:_MOST_PARAMETERS]
    best = record.leading(_NUM_BEST)
    numbers = {trial.number for trial in best}
    others = [trial for trial in record.trials if trial.number not in numbers]
    data = [_lines(others, parameters, "@muted", f"other trials ({len(others)})", width=0.8)] if others else []
    data += [_lines(best[3:], parameters, "@sky", f"best {len(best)}", width=1.8)] if best[3:] else []
    data += [_lines(best[:3], parameters, "@vermillion", f"best {len(best[:3])}", width=2.8)] if best else []
    names = short_names([parameter.key for parameter in parameters])
    notes = [note for row, parameter in enumerate(parameters) for note in _ticks(parameter, row)]
    return figure(
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


def _lines(
    trials: Sequence[TrialRecord], parameters: Sequence[Parameter], colour: str, name: str, *, width: float
) -> Trace:
    places = [[_place(parameter, trial) for parameter in parameters] for trial in trials]
    rows = list(range(len(parameters)))
    return {
        "x": with_gaps(places),
        "y": with_gaps([rows] * len(trials)),
        "customdata": with_gaps([[trial.number] * len(rows) for trial in trials]),
        "mode": "lines+markers",
        "line": {"width": width, "color": colour},
        "marker": {"size": 2 + 2 * width, "color": colour},
        "opacity": 1.0 if width > 1 else max(0.15, min(0.6, 40 / len(trials))),
        "name": name,
        "hovertemplate": "trial %{customdata}<extra></extra>",
    }


def _place(parameter: Parameter, trial: TrialRecord) -> float | None:
    if parameter.key not in trial.params:
        return None
    return rounded(parameter.place(trial.params[parameter.key]))


def _ticks(parameter: Parameter, row: int) -> list[dict[str, Any]]:
    """The values under a row: all of a few, else both ends and the middle."""
    if parameter.kind == "choice":
        last = max(1, len(parameter.choices) - 1)
        marks = [(index / last, value_text(choice)) for index, choice in enumerate(parameter.choices)]
        marks = marks if len(marks) <= 5 else [marks[0], marks[-1]]
    elif parameter.num_values is not None and parameter.num_values <= 7:
        num = parameter.num_values
        values = [parameter.value_at(index / max(1, num - 1)) for index in range(num)]
        marks = [(index / max(1, num - 1), value_text(value)) for index, value in enumerate(values)]
    else:
        marks = [(place, value_text(float(parameter.value_at(place)))) for place in (0.0, 0.5, 1.0)]
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


def slice_dots(record: SweepRecord, parameter: Parameter) -> Figure:
    """Every trial's last value over a parameter; the stronger its colour, the longer it was trained."""
    trials = [trial for trial in record.trials if parameter.key in trial.params and trial.reports]
    trials = sorted((trial for trial in trials if np.isfinite(trial.value)), key=lambda trial: trial.epochs)
    x = [axis_value(parameter, trial.params[parameter.key]) for trial in trials]
    marker = _by_epochs(record, trials, size=9 if len(trials) < 200 else 6)
    dots = dots_of_trials(trials, x, at=" at %{x}", marker=marker)
    shown = range_without_outliers([trial.value for trial in trials], record.sign, num=20, share=0.95)
    return figure(
        [dots],
        x=parameter.key,
        y=metric_label(record.metric),
        height=300,
        xaxis=axis(parameter),
        yaxis=shown,
        showlegend=False,
    )


def _by_epochs(record: SweepRecord, trials: Sequence[TrialRecord], *, size: int) -> dict[str, Any]:
    """Dots, the stronger in colour the more epochs."""
    return {
        "size": size,
        "color": [trial.epochs for trial in trials],
        "colorscale": [[0, "@faint"], [1, "@strong"]],
        "cmin": 0,
        "cmax": record.max_epochs,
        "line": {"width": 0.5, "color": "@ink"},
        "colorbar": {"title": {"text": "epochs"}, "thickness": 10, "len": 0.9},
    }


def pareto_dots(record: SweepRecord) -> Figure:
    """Both objectives of every trial that was measured; the front as a line through its trials."""
    assert record.objective is not None
    name = record.objective.name
    front = sorted(map(record.trial, record.objective.front), key=lambda trial: trial.costs[name])
    measured = [trial for trial in record.trials if name in trial.costs and np.isfinite(trial.value)]
    others = [trial for trial in measured if trial.number not in record.objective.front]
    costs = [[rounded(cost_value(name, trial.costs[name])) for trial in trials] for trials in (others, front)]
    line = {"shape": "hv", "width": 2, "color": "@vermillion"}
    marker = {"size": 10, "color": "@vermillion", "symbol": "diamond"}
    data = [
        dots_of_trials(others, costs[0], at=" at %{x}", marker=_by_epochs(record, others, size=7), name="other trials"),
        dots_of_trials(front, costs[1], at=" at %{x}", mode="lines+markers", line=line, marker=marker, name="front"),
    ]
    shown = range_without_outliers([trial.value for trial in measured], record.sign, num=20, share=0.95)
    return figure(data, x=cost_label(name), y=metric_label(record.metric), height=380, yaxis=shown)


def isolation_dots(isolation: Isolation, metric: str) -> Figure:
    """Each value of the scientific parameter: its best trial, and what the best of as many trials would be."""
    values = list(isolation.values)
    labels, middles = [each.label for each in values], [each.expected for each in values]
    expected = {
        "x": labels,
        "y": [rounded(middle) for middle in middles],
        "error_y": error_bars(middles, [(each.low, each.high) for each in values], color="@blue"),
        "mode": "markers",
        "marker": {"size": 10, "color": "@blue", "symbol": "diamond"},
        "name": f"best of {isolation.num_drawn} trials, on average (10 to 90 %)",
        "hovertemplate": "%{x}: %{y}<extra></extra>",
    }
    best = {
        "x": labels,
        "y": [rounded(each.best) for each in values],
        "customdata": [[each.best_trial, each.num_trials] for each in values],
        "mode": "markers",
        "marker": {"size": 9, "color": "@orange", "symbol": "circle-open", "line": {"width": 2}},
        "name": "best of all its trials",
        "hovertemplate": "%{x}: trial %{customdata[0]}, the best of %{customdata[1]}: %{y}<extra></extra>",
    }
    y = metric_label(metric)
    return figure([expected, best], x=isolation.parameter.key, y=y, height=340, xaxis={"type": "category"})


def axis(parameter: Parameter) -> dict[str, Any]:
    """How plotly draws a parameter's axis."""
    if parameter.kind == "choice":
        order = [axis_value(parameter, choice) for choice in parameter.choices]
        return {"type": "category", "categoryorder": "array", "categoryarray": order}
    if parameter.log:
        ticks = _log_ticks(parameter.low, parameter.high)
        return {"type": "log", "tickangle": 0, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"dtick": parameter.step or 1} if parameter.kind == "int" and parameter.high - parameter.low <= 12 else {}


def _log_ticks(low: float, high: float) -> list[float]:
    """Of the numbers 1, 2, 5 in each decade those within the range; the powers of ten where these are too many.

    A range that holds fewer than two of them has its ends.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladder = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    within = [tick for tick in ladder if 0.999 * low <= tick <= 1.001 * high]
    if len(within) < 2:
        return [low, high]
    return within if len(within) <= 6 else [tick for tick in within if f"{tick:e}".startswith("1.0")]


def axis_value(parameter: Parameter, value: Any) -> Any:
    """A value as that axis has it."""
    return value_text(value) if parameter.kind == "choice" else rounded(float(value))
