"""Maps of the metric over two parameters: a smooth surface through the trials, and nothing where there are none."""

import itertools

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from handpose.report.figure import Figure, figure, rounded
from handpose.report.parameter_plots import axis, axis_value, by_importance
from handpose.report.record import Parameter, SweepRecord
from handpose.report.words import metric_label

_LEAST_POINTS = 15
_GRID = 31
_REACH = 0.15  # of both ranges: farther from any trial nothing is drawn


def contours(record: SweepRecord, most: int = 3) -> list[tuple[Figure, str]]:
    """Maps over pairs of number parameters, with a sentence each.

    Values of the highest epoch with enough trials, smoothed by a thin-plate spline; nothing is drawn where no trial is
    near.
    """
    epochs = record.compared_epochs(least=_LEAST_POINTS)
    numeric = [parameter for parameter in by_importance(record) if parameter.kind != "choice"][:3]
    made = []
    for pair in list(itertools.combinations(numeric, 2))[:most]:
        for epoch in reversed(epochs):
            drawn = _contour(record, pair, epoch)
            if drawn is not None:
                made.append(drawn)
                break
    return made


def _contour(record: SweepRecord, pair: tuple[Parameter, Parameter], epoch: int) -> tuple[Figure, str] | None:
    values = record.values_at(epoch)
    trials = [
        trial for trial in record.trials if trial.number in values and all(each.key in trial.params for each in pair)
    ]
    places = np.array([[each.place(trial.params[each.key]) for each in pair] for trial in trials]).reshape(-1, 2)
    if len(trials) < _LEAST_POINTS or len(np.unique(places, axis=0)) < _LEAST_POINTS:
        return None
    losses = record.sign * np.array([values[trial.number] for trial in trials])
    bounded = np.minimum(losses, np.quantile(losses, 0.9))  # the worst would bend the map everywhere
    spread = bounded.std() or 1.0
    spline = RBFInterpolator(places, (bounded - bounded.mean()) / spread, smoothing=0.1, neighbors=min(60, len(places)))
    ticks = np.linspace(0, 1, _GRID)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    surface = (spline(grid) * spread + bounded.mean()).clip(bounded.min(), bounded.max())
    far = cKDTree(places).query(grid)[0] > _REACH
    shown = [None if is_far else rounded(record.sign * value) for value, is_far in zip(surface, far, strict=True)]
    x, y = ([axis_value(each, each.value_at(tick)) for tick in ticks] for each in pair)
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
        "customdata": [[trial.number, rounded(values[trial.number])] for trial in trials],
        "mode": "markers",
        "marker": {"size": 6, "color": "@paper", "line": {"width": 1.2, "color": "@ink"}},
        "hovertemplate": "trial %{customdata[0]}: %{customdata[1]}<extra></extra>",
    }
    drawn = figure(
        [surface_trace, dots],
        x=pair[0].key,
        y=pair[1].key,
        height=340,
        xaxis=axis(pair[0]),
        yaxis=axis(pair[1]),
        showlegend=False,
    )
    sentence = (
        f"{metric_label(record.metric)} at epoch {epoch} over {pair[0].key} and {pair[1].key}, smoothed between "
        f"{len(trials)} trials (dots); where none is near, nothing is drawn."
    )
    return drawn, sentence
