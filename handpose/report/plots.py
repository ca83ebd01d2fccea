"""Charts of the course of a sweep: learning curves, best trial so far, use of slot-time, and confirmation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from handpose.report.figure import (
    COLOURS,
    STATE_COLOURS,
    STATE_SYMBOLS,
    Figure,
    Trace,
    choose_time_unit,
    dots_of_trials,
    error_bars,
    join_with_gaps,
    make_figure,
    range_without_outliers,
    round_for_plot,
)
from handpose.report.formatting import format_metric_name
from handpose.report.slot_time import SlotTime, compute_spent
from handpose.report.sweep_record import Confirmation, SweepRecord, TrialRecord
from handpose.report.trial_table import STATES

_MAX_POINTS = 40_000
"""Number of points of all curves together, above which some epochs between the rungs are left out."""


class Incumbent(NamedTuple):
    """The trial that was the best one from some time on.

    Attributes:
        at_s: that time, in the sweep's own seconds.
        spent_s: slot-seconds that the sweep had used by then.
        trial: number of the trial.
        epoch: the epoch at which it was compared.
        value: its value at that epoch.
    """

    at_s: float
    spent_s: float
    trial: int
    epoch: int
    value: float


def find_incumbents(record: SweepRecord) -> list[Incumbent]:
    """Find which trial was the best one at which time.

    The best trial is that with the best value at the highest rung that any trial had reached by then, or at the last
    epoch. Between rungs, trials are not compared. Otherwise, the first trial to reach an epoch would always be the best
    one for a moment.
    """
    compared = {*record.rungs, record.max_epochs}
    sound = [trial for trial in record.trials if trial.state not in ("diverged", "infeasible", "failed")]
    reports = sorted(
        (report.at_s, trial.number, report)
        for trial in sound
        for report in trial.reports
        if report.epoch in compared and np.isfinite(report.value)
    )
    found: list[tuple[float, int, int, float]] = []
    for at_s, number, report in reports:
        place = (-report.epoch, record.sign * report.value)
        if not found or place < (-found[-1][2], record.sign * found[-1][3]):
            found.append((at_s, number, report.epoch, report.value))
    moments = compute_spent(record, [each[0] for each in found])
    return [
        Incumbent(at_s, float(moment), number, epoch, value)
        for (at_s, number, epoch, value), moment in zip(found, moments, strict=True)
    ]


def plot_best_so_far(records: Sequence[SweepRecord]) -> Figure:
    """Plot the value of the best trial so far over slot-time, one line per sweep. Dots are complete trials."""
    seconds, unit = choose_time_unit(max((record.num_slots * record.seconds for record in records), default=0.0))
    data: list[Trace] = []
    for record, colour in zip(records, _cycle_colours(len(records)), strict=True):
        data += _trace_best_so_far(record, colour, seconds, is_one=len(records) == 1)
    return make_figure(data, x=f"slot-{unit}", y=format_metric_name(records[0].metric), xaxis={"rangemode": "tozero"})


def _trace_best_so_far(record: SweepRecord, colour: str, seconds: float, *, is_one: bool) -> list[Trace]:
    leaders = find_incumbents(record)
    whole = [trial for trial in record.trials if trial.state == "complete"]
    ends = compute_spent(record, [trial.reports[-1].at_s for trial in whole])
    total = float(compute_spent(record, [record.seconds])[0])
    line = {
        "x": [round_for_plot(each.spent_s / seconds) for each in leaders] + [round_for_plot(total / seconds)],
        "y": [round_for_plot(each.value) for each in [*leaders, *leaders[-1:]]],
        "customdata": [[each.trial, each.epoch] for each in [*leaders, *leaders[-1:]]],
        "mode": "lines",
        "line": {"shape": "hv", "width": 2.5, "color": colour},
        "name": "best so far" if is_one else record.name,
        "hovertemplate": "trial %{customdata[0]} at epoch %{customdata[1]}: %{y}<extra></extra>",
    }
    marker = {"size": 7, "color": colour, "opacity": 0.6}
    at_end = [round_for_plot(each / seconds) for each in ends]
    dots = dots_of_trials(whole, at_end, marker=marker, name="trained to the end", showlegend=is_one)
    return [line, dots] if leaders else []


def plot_learning_curves(record: SweepRecord) -> Figure:
    """Plot all learning curves in the colours of the trials' states, with a mark at their ends.

    The rungs are vertical lines, and the winner is drawn bold.
    """
    winner = record.find_winner()
    kept = _choose_epochs(record)
    data: list[Trace] = []
    for state in STATES:
        trials = [trial for trial in record.trials if trial.state == state and trial.reports]
        if trials:
            data += [_trace_curves(trials, kept), _trace_ends(trials)]
    if winner is not None and winner.reports:
        bold = _trace_curves([winner], kept) | {"name": f"winner, trial {winner.number}", "opacity": 1.0}
        data.append(bold | {"line": {"width": 3, "color": "@ink"}, "showlegend": True})
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot", "width": 1, "color": "@muted"}}
    lines: list[dict[str, Any]] = [line | {"x0": rung, "x1": rung} for rung in record.rungs]
    values = np.array([report.value for trial in record.trials for report in trial.reports])
    most = record.max_epochs + 0.5
    return make_figure(
        data,
        x="epoch",
        y=format_metric_name(record.metric),
        height=420,
        xaxis={"range": [0.5, most]},
        yaxis=range_without_outliers(values[np.isfinite(values)], record.sign, num=10, share=0.97),
        shapes=lines,
    )


def _trace_curves(trials: Sequence[TrialRecord], kept_epochs: set[int] | None) -> Trace:
    lines = [
        [
            each
            for each in trial.reports
            if kept_epochs is None or each.epoch in kept_epochs or each is trial.reports[-1]
        ]
        for trial in trials
    ]
    state = trials[0].state
    return {
        "x": join_with_gaps([[report.epoch for report in line] for line in lines]),
        "y": join_with_gaps([[round_for_plot(report.value) for report in line] for line in lines]),
        "customdata": join_with_gaps([[trial.number] * len(line) for trial, line in zip(trials, lines, strict=True)]),
        "mode": "lines",
        "line": {"width": 1.2, "color": STATE_COLOURS[state]},
        "opacity": max(0.25, min(0.8, 12 / len(trials))),
        "legendgroup": state,
        "showlegend": False,
        "hovertemplate": "trial %{customdata}, epoch %{x}: %{y}<extra></extra>",
    }


def _trace_ends(trials: Sequence[TrialRecord]) -> Trace:
    """Make a trace of the last points of the curves: the last finite value, if there is one."""
    state = trials[0].state
    last = [
        next((each for each in reversed(trial.reports) if np.isfinite(each.value)), trial.reports[-1])
        for trial in trials
    ]
    return {
        "x": [each.epoch for each in last],
        "y": [round_for_plot(each.value) for each in last],
        "customdata": [trial.number for trial in trials],
        "mode": "markers",
        "marker": {
            "size": 8 if len(trials) < 100 else 5,
            "symbol": STATE_SYMBOLS[state],
            "color": STATE_COLOURS[state],
            "line": {"width": 1.5, "color": STATE_COLOURS[state]},
        },
        "name": f"{state} ({len(trials)})",
        "legendgroup": state,
        "hovertemplate": "trial %{customdata}, " + state + " at epoch %{x}: %{y}<extra></extra>",
    }


def _choose_epochs(record: SweepRecord) -> set[int] | None:
    """Choose the epochs to draw; None means all."""
    num = sum(len(trial.reports) for trial in record.trials)
    if num <= _MAX_POINTS:
        return None
    return {*record.rungs, record.max_epochs, *range(1, record.max_epochs + 1, -(-num // _MAX_POINTS))}


def plot_slot_time(account: SlotTime) -> Figure:
    """Plot one bar for each use of slot-time, and one for the time that early stopping saved."""
    names = {"complete": "trained to the end", "stopped": "trained, then stopped", "running": "training now"}
    uses = [
        (names.get(state, f"trained, {state}"), account.trained[state], STATE_COLOURS[state])
        for state in STATES
        if state in account.trained
    ]
    uses += [
        ("start-up, measuring", account.startup, "@orange"),
        ("lost to failures", account.lost, "@vermillion"),
        ("idle slots", account.idle, "@muted"),
    ]
    seconds, unit = choose_time_unit(max([each[1] for each in uses] + [account.saved]))
    rows = [*uses, ("saved by stopping", account.saved, "@sky")]
    total = account.total or 1.0
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, _, _ in rows],
        "x": [round_for_plot(each / seconds) for _, each, _ in rows],
        "text": [f"{each / total:.0%}" for _, each, _ in rows],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {
            "color": [colour for _, _, colour in rows],
            "pattern": {"shape": [""] * len(uses) + ["/"], "fgcolor": "@paper", "size": 6},
        },
        "hovertemplate": f"%{{y}}: %{{x}} slot-{unit}, %{{text}} of what was spent<extra></extra>",
    }
    most = max(each for _, each, _ in rows) / seconds
    return make_figure(
        [bars],
        x=f"slot-{unit}",
        y="",
        height=80 + 34 * len(rows),
        xaxis={"range": [0, round_for_plot(1.15 * most or 1.0)]},  # room for the percentages
        yaxis={"autorange": "reversed"},
        showlegend=False,
    )


def plot_confirmation(confirmation: Confirmation, metric: str) -> Figure:
    """Plot the runs of each candidate as dots, and its mean with the 95 % interval."""
    candidates = list(confirmation.candidates)
    runs = [(each.label, seed, value) for each in candidates for seed, value in each.values.items()]
    finished = [each for each in candidates if np.isfinite(each.mean.mean)]
    middles = [each.mean.mean for each in finished]
    means = {
        "x": [round_for_plot(middle) for middle in middles],
        "y": [each.label for each in finished],
        "error_x": error_bars(middles, [each.mean[1:] for each in finished], color="@blue", thickness=2),
        "mode": "markers",
        "marker": {"size": 11, "color": "@blue", "symbol": "diamond"},
        "name": "mean, 95 % interval",
        "hovertemplate": "%{y}: %{x}<extra></extra>",
    }
    dots = {
        "x": [round_for_plot(value) for _, _, value in runs],
        "y": [label for label, _, _ in runs],
        "customdata": [seed for _, seed, _ in runs],
        "mode": "markers",
        "marker": {"size": 7, "color": "@orange", "symbol": "circle-open", "line": {"width": 1.5}},
        "name": "one run",
        "hovertemplate": "%{y}, seed %{customdata}: %{x}<extra></extra>",
    }
    return make_figure(
        [means, dots],
        x=format_metric_name(metric),
        y="",
        height=130 + 44 * len(candidates),
        yaxis={"autorange": "reversed", "type": "category"},
    )


def _cycle_colours(num: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(num)]
