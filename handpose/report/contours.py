"""Contour plots of the metric over two parameters, only in regions where there are trials."""

import itertools

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from handpose.report.figure import Figure, make_figure, round_for_plot
from handpose.report.formatting import format_metric_name
from handpose.report.parameter_plots import make_axis, sort_by_importance, to_axis_value
from handpose.report.sweep_record import Parameter, SweepRecord

_MIN_POINTS = 15
_GRID = 31
_MAX_DISTANCE = 0.15  # to the nearest trial, as a fraction of the ranges; nothing is drawn farther away


def draw_contours(record: SweepRecord, max_figures: int = 3) -> list[tuple[Figure, str]]:
    """Draw contour plots over pairs of the first three numeric parameters in the order of `sort_by_importance`.

    Each shows the values at the highest epoch with enough trials, smoothed by a thin-plate spline. Nothing is drawn
    where no trial is near.

    Args:
        record: the sweep.
        max_figures: the highest number of figures.

    Returns:
        The figures, each with a sentence that describes it.
    """
    epochs = record.list_compared_epochs(min_trials=_MIN_POINTS)
    numeric = [parameter for parameter in sort_by_importance(record) if parameter.kind != "choice"][:3]
    figures = []
    for pair in list(itertools.combinations(numeric, 2))[:max_figures]:
        for epoch in reversed(epochs):
            drawn = _draw_contour(record, pair, epoch)
            if drawn is not None:
                figures.append(drawn)
                break
    return figures


def _draw_contour(record: SweepRecord, pair: tuple[Parameter, Parameter], epoch: int) -> tuple[Figure, str] | None:
    values = record.get_values_at(epoch)
    trials = [
        trial for trial in record.trials if trial.number in values and all(each.key in trial.params for each in pair)
    ]
    places = np.array([[each.to_place(trial.params[each.key]) for each in pair] for trial in trials]).reshape(-1, 2)
    if len(trials) < _MIN_POINTS or len(np.unique(places, axis=0)) < _MIN_POINTS:
        return None
    losses = record.sign * np.array([values[trial.number] for trial in trials])
    bounded = np.minimum(losses, np.quantile(losses, 0.9))  # the worst values would distort the whole surface
    spread = bounded.std() or 1.0
    spline = RBFInterpolator(places, (bounded - bounded.mean()) / spread, smoothing=0.1, neighbors=min(60, len(places)))
    ticks = np.linspace(0, 1, _GRID)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    surface = (spline(grid) * spread + bounded.mean()).clip(bounded.min(), bounded.max())
    far = cKDTree(places).query(grid)[0] > _MAX_DISTANCE
    shown = [
        None if is_far else round_for_plot(record.sign * value) for value, is_far in zip(surface, far, strict=True)
    ]
    x, y = ([to_axis_value(each, each.to_value(tick)) for tick in ticks] for each in pair)
    surface_trace = {
        "type": "contour",
        "x": x,
        "y": y,
        "z": [shown[row * _GRID : (row + 1) * _GRID] for row in range(_GRID)],
        "colorscale": "Cividis",
        "reversescale": record.sign < 0,
        "ncontours": 14,
        "line": {"width": 0.5},
        "colorbar": {"thickness": 10, "len": 0.9},
        "hoverinfo": "skip",
    }
    dots = {
        "x": [trial.params[pair[0].key] for trial in trials],
        "y": [trial.params[pair[1].key] for trial in trials],
        "customdata": [[trial.number, round_for_plot(values[trial.number])] for trial in trials],
        "mode": "markers",
        "marker": {"size": 6, "color": "@paper", "line": {"width": 1.2, "color": "@ink"}},
        "hovertemplate": "trial %{customdata[0]}: %{customdata[1]}<extra></extra>",
    }
    drawn = make_figure(
        [surface_trace, dots],
        x=pair[0].key,
        y=pair[1].key,
        height=340,
        xaxis=make_axis(pair[0]),
        yaxis=make_axis(pair[1]),
        showlegend=False,
    )
    sentence = (
        f"{format_metric_name(record.metric)} at epoch {epoch} over {pair[0].key} and {pair[1].key}, smoothed between "
        f"{len(trials)} trials (dots); areas without trials nearby are left blank."
    )
    return drawn, sentence
