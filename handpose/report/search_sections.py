"""Sections of a report about the search: learning curves, parameters and their effects, and the Pareto front."""

from collections.abc import Sequence

from handpose.report.contours import draw_contours
from handpose.report.effects import FALSE_ALARM_RATE, ShownEffect
from handpose.report.formatting import (
    format_cost_name,
    format_cost_value,
    format_metric_name,
    format_metric_value,
    format_value,
)
from handpose.report.html import BLOCKS, HtmlPage
from handpose.report.isolation import IsolationResult
from handpose.report.parameter_plots import (
    plot_importance,
    plot_isolation,
    plot_parallel_coordinates,
    plot_pareto_front,
    plot_slice,
    sort_by_importance,
)
from handpose.report.plots import plot_best_so_far, plot_learning_curves
from handpose.report.sweep_record import SweepRecord, TrialRecord
from handpose.report.trial_table import shorten_names

_MAX_SLICES = 6


def add_progress_section(page: HtmlPage, record: SweepRecord) -> None:
    """Add the best trial over time, and all learning curves."""
    page.add_section(
        "best-so-far",
        "Best so far",
        "The trial that the sweep would have chosen if it had ended after a given slot-time.",
    )
    page.add_chart(
        plot_best_so_far([record]),
        f"Line: {format_metric_name(record.metric)} of the best trial at the highest rung that any trial had reached "
        f"by then; at the end this is epoch {record.max_epochs}. Dots: the trials that were trained to the end. "
        "Slot-time is the time for which trials held CPUs or GPUs.",
    )
    rungs = f"; dotted lines are the rungs, epochs {', '.join(map(str, record.rungs))}" if record.rungs else ""
    page.add_section("curves", "Learning curves", "Every trial by epoch, coloured by how it ended.")
    page.add_chart(
        plot_learning_curves(record),
        f"One line per trial, with a mark where it ended{rungs}. Values far outside are cut off. A click on a point "
        "leads to the trial in the table.",
    )


def add_parameter_sections(page: HtmlPage, record: SweepRecord, shown: Sequence[ShownEffect]) -> None:
    """Add importance, parallel coordinates, slices and contours."""
    if not record.parameters:
        return
    _add_importance(page, record, shown)
    page.add_section(
        "parallel",
        "Parallel coordinates",
        "One line per trial through the values of its parameters. The best trials are coloured.",
    )
    page.add_chart(
        plot_parallel_coordinates(record),
        "One row per parameter, with its lowest value on the left. A line breaks off if the trial does not have the "
        "next parameter. The best trials are those with the best last value among the trials trained longest.",
    )
    page.add_section("slices", "Slices", "Each trial's last value over one parameter.")
    page.add_charts(
        (
            plot_slice(record, parameter),
            f"Last value of each trial over {parameter.key}. A stronger colour means more epochs; only dots of the "
            "same colour can be compared.",
        )
        for parameter in sort_by_importance(record)[:_MAX_SLICES]
    )
    maps = draw_contours(record)
    if maps:
        page.add_section("contours", "Contours", "The combined effect of two parameters.")
        page.add_charts(maps)


def _add_importance(page: HtmlPage, record: SweepRecord, shown: Sequence[ShownEffect]) -> None:
    if not record.importance:
        page.add_section(
            "importance",
            "Importance of parameters",
            "Fewer than 20 trials have a value at one epoch: too few to say which parameters matter.",
        )
        return
    epochs = ", ".join(str(at.epoch) for at in record.importance)
    page.add_section(
        "importance",
        "Importance of parameters",
        f"How much a parameter decides whether a trial is in the best tenth, by the values of epoch {epochs} (Optuna's "
        "PED-ANOVA; conditional parameters count where they are drawn).",
    )
    page.add_chart(
        plot_importance(record.importance),
        "Lines: the range of the share in 90 % of random halves of the trials. Black bar: the largest share that "
        "chance gave after the values were shuffled among the trials. With a searcher that learns, a share can exceed "
        "this bar even if the parameter has no effect; the effects that are shown to exist are listed below. Only "
        "trials that were not stopped have values at later epochs, so the parameters that decided about stopping seem "
        "less important there.",
    )
    page.add_text(_format_shown_effects(record, shown))


def _format_shown_effects(record: SweepRecord, shown: Sequence[ShownEffect]) -> str:
    """Format which effects are shown, by tests that are valid for every searcher and scheduler."""
    names = shorten_names([parameter.key for parameter in record.parameters])
    rate = (
        f"In a sweep in which no parameter matters, any effect at all is shown with probability {FALSE_ALARM_RATE:.0%}."
    )
    if not shown:
        return f"No effect is shown yet, which does not mean that there is none. {rate}"
    effects = ", ".join(f"{names[each.key]} (epoch {each.epoch}, p = {each.p_value:.2g})" for each in shown)
    return f"Shown effects, corrected for all parameters and epochs: {effects}. {rate}"


def add_isolation_section(page: HtmlPage, record: SweepRecord, isolation: IsolationResult) -> None:
    """Add the isolation plot of the scientific parameter."""
    key = isolation.parameter.key
    page.add_section(
        "isolation",
        f"Isolated: {key}",
        f"The results for each value of {key}, with all other parameters optimised by this sweep.",
    )
    left_out = f" Too few trials: {', '.join(isolation.left_out)}." if isolation.left_out else ""
    page.add_chart(
        plot_isolation(isolation, record.metric),
        f"Values of epoch {isolation.epoch}. The best trial of a value that was tried more often is better by chance "
        f"alone. So the diamonds show the average best of {isolation.num_drawn} of its trials. This comparison is fair "
        "if the trials were drawn at random; a searcher that learns also tunes the other parameters better for the "
        f"values that it tries often.{left_out}",
    )


def format_param(trial: TrialRecord, key: str) -> str:
    """Format the value of a trial's parameter; empty if the trial does not have it."""
    return format_value(trial.params[key]) if key in trial.params else ""


def add_front_section(page: HtmlPage, record: SweepRecord) -> None:
    """Add a chart and a table of the Pareto front. The sweep must have a second objective."""
    assert record.second_objective is not None
    name = record.second_objective.name
    page.add_section("front", "Pareto front", f"{format_metric_name(record.metric)} against {format_cost_name(name)}.")
    page.add_chart(
        plot_pareto_front(record),
        "The front (diamonds) consists of the trials trained longest for which no other one is better in both. Each "
        "of them can be retrained: python train.py best=FOLDER/front/trial_NUMBER.yaml.",
    )
    front = [record.get_trial(number) for number in record.second_objective.front]
    keys = [parameter.key for parameter in record.parameters]
    rows = [
        [
            trial.number,
            format_metric_value(record.metric, trial.value),
            format_cost_value(name, trial.costs[name]),
            *(format_param(trial, key) for key in keys),
        ]
        for trial in front
    ]
    head = ["trial", format_metric_name(record.metric), format_cost_name(name), *shorten_names(keys).values()]
    page.add_markup(BLOCKS.table(head, rows, numeric=range(len(head))))
