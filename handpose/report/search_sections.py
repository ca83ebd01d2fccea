"""The sections of a report about the search itself: curves, parameters, and how they act."""

from collections.abc import Sequence

from handpose.report.contours import contours
from handpose.report.effects import FALSE_ALARMS, ShownEffect
from handpose.report.html import BLOCKS, Page
from handpose.report.isolation import Isolation
from handpose.report.parameter_plots import (
    by_importance,
    importance_dots,
    isolation_dots,
    parallel_coordinates,
    pareto_dots,
    slice_dots,
)
from handpose.report.plots import best_so_far, learning_curves
from handpose.report.record import SweepRecord, TrialRecord
from handpose.report.table import short_names
from handpose.report.words import cost_label, cost_number, metric_label, metric_number, value_text

_MOST_SLICES = 6


def add_course(page: Page, record: SweepRecord) -> None:
    """Who led when, and every learning curve."""
    page.section(
        "best-so-far", "Best so far", "What the sweep would have picked, had it ended after so much slot-time."
    )
    page.chart(
        best_so_far([record]),
        f"{metric_label(record.metric)} of the best trial at the highest rung that any had reached by then, in the end "
        f"at epoch {record.max_epochs} (line), and of every trial trained to the end (dots). Slot-time is what trials "
        "held of CPUs and GPUs.",
    )
    rungs = f"; dotted lines are the rungs, epochs {', '.join(map(str, record.rungs))}" if record.rungs else ""
    page.section("curves", "Learning curves", "Every trial, by epoch, in the colour of what became of it.")
    page.chart(
        learning_curves(record),
        f"One line a trial, with a mark where it ended{rungs}. Values far outside are cut off. A click on a point "
        "leads to the trial in the table.",
    )


def add_parameters(page: Page, record: SweepRecord, shown: Sequence[ShownEffect]) -> None:
    """Importance, parallel coordinates, slices and contours."""
    if not record.parameters:
        return
    _importance(page, record, shown)
    page.section(
        "parallel",
        "Parallel coordinates",
        "One line a trial through the values of its parameters, the best ones in colour.",
    )
    page.chart(
        parallel_coordinates(record),
        "A row a parameter, from its lowest value on the left to its highest; a line that breaks off does not have the "
        "next parameter. Best are those trained longest, by their last value.",
    )
    page.section("slices", "Slices", "Each trial's last value over one parameter.")
    page.charts(
        (
            slice_dots(record, parameter),
            f"Last value of each trial over {parameter.key}; the stronger its colour, the more epochs, and only dots "
            "of one colour compare.",
        )
        for parameter in by_importance(record)[:_MOST_SLICES]
    )
    maps = contours(record)
    if maps:
        page.section("contours", "Contours", "How two parameters act together.")
        page.charts(maps)


def _importance(page: Page, record: SweepRecord, shown: Sequence[ShownEffect]) -> None:
    if not record.importance:
        page.section(
            "importance",
            "Importance of parameters",
            "Fewer than 20 trials have a value at one epoch: too few to say which parameters matter.",
        )
        return
    epochs = ", ".join(str(at.epoch) for at in record.importance)
    page.section(
        "importance",
        "Importance of parameters",
        f"How much a parameter decides whether a trial is in the best tenth, by the values of epoch {epochs} (Optuna's "
        "PED-ANOVA; conditional parameters count where they are drawn).",
    )
    page.chart(
        importance_dots(record.importance),
        "Lines: where the share lies for 90 % of the halves of the trials. Black bar: the most that chance gave, with "
        "the values shuffled among the trials. A searcher that learns can exceed it in noise too; which effects are "
        "shown is said below. Trials of later epochs are those that were not stopped, so what stopped the others seems "
        "less important there.",
    )
    page.text(_shown_text(record, shown))


def _shown_text(record: SweepRecord, shown: Sequence[ShownEffect]) -> str:
    """Which effects are shown by tests that hold for this searcher and scheduler."""
    names = short_names([parameter.key for parameter in record.parameters])
    rate = f"In a sweep in which no parameter matters, any effect at all is shown with probability {FALSE_ALARMS:.0%}."
    if not shown:
        return f"No effect is shown yet, which does not mean that there is none. {rate}"
    effects = ", ".join(f"{names[each.key]} (epoch {each.epoch}, p = {each.p_value:.2g})" for each in shown)
    return f"Shown effects, corrected for all parameters and epochs: {effects}. {rate}"


def add_isolation(page: Page, record: SweepRecord, isolation: Isolation) -> None:
    """The scientific parameter, with the others optimised."""
    key = isolation.parameter.key
    page.section(
        "isolation", f"Isolated: {key}", f"What {key} is worth with all other parameters optimised by this sweep."
    )
    left_out = f" Too few trials: {', '.join(isolation.left_out)}." if isolation.left_out else ""
    page.chart(
        isolation_dots(isolation, record.metric),
        f"Values of epoch {isolation.epoch}. A value that was tried more often has a better best trial by luck alone; "
        f"the diamonds show what the best of {isolation.num_drawn} of its trials would be on average. They compare "
        "fairly if the trials were drawn at random. A searcher that learns also tunes the other parameters better for "
        "the values that it tries often."
        f"{left_out}",
    )


def param_text(trial: TrialRecord, key: str) -> str:
    """A trial's value under a key; nothing where it has none."""
    return value_text(trial.params[key]) if key in trial.params else ""


def add_front(page: Page, record: SweepRecord) -> None:
    """The Pareto front, drawn and listed."""
    assert record.objective is not None
    name = record.objective.name
    page.section("front", "Pareto front", f"{metric_label(record.metric)} against {cost_label(name)}.")
    page.chart(
        pareto_dots(record),
        "The front (diamonds) are the trials that no other one beats in both; it is made of those that were trained "
        "the longest. Every point of it can be retrained: python train.py best=FOLDER/front/trial_NUMBER.yaml.",
    )
    front = [record.trial(number) for number in record.objective.front]
    keys = [parameter.key for parameter in record.parameters]
    rows = [
        [
            trial.number,
            metric_number(record.metric, trial.value),
            cost_number(name, trial.costs[name]),
            *(param_text(trial, key) for key in keys),
        ]
        for trial in front
    ]
    head = ["trial", metric_label(record.metric), cost_label(name), *short_names(keys).values()]
    page.add(BLOCKS.table(head, rows, numeric=range(len(head))))
