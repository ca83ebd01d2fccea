"""The front of a sweep as text, and in the live view."""

import io
from itertools import pairwise

from rich.console import Console

from handpose.report.pareto_front import format_front
from handpose.report.terminal import SweepClock, format_trial, render_sweep
from handpose.report.trial_table import TrialRow, TrialTable, make_second_objectives

METRIC = "val/pa_mpjpe_mm"


def make_table(num, *, name="num_parameters"):
    """Trials of which none is better in both; the last one has no cost."""
    made = TrialTable(METRIC, "min", num_trials=num + 1, max_epochs=6, objectives=make_second_objectives(name))
    for number in range(num):
        params, metrics = {"model.decoder.depth": number}, {METRIC: 20.0 - number}
        made.rows[number] = TrialRow(number, params, "complete", 6, metrics, costs={name: 1.5e5 * (number + 1)})
    made.rows[num] = TrialRow(num, {"model.decoder.depth": 1}, "running", 0)
    return made


def test_the_front_has_a_line_a_trial_the_best_first():
    assert format_front(make_table(3)).splitlines() == [
        "front       3 of 4 trials, after 6 epochs",
        "            trial 2     PA-MPJPE 18.00 mm  parameters 0.45 M  depth 2",
        "            trial 1     PA-MPJPE 19.00 mm  parameters 0.3 M   depth 1",
        "            trial 0     PA-MPJPE 20.00 mm  parameters 0.15 M  depth 0",
    ]


def test_a_long_front_is_shown_evenly_with_both_its_ends():
    first, *lines = format_front(make_table(100), max_trials=12).splitlines()
    assert "100 of 101 trials, after 6 epochs, 12 of them shown" in first
    numbers = [int(line.split()[1]) for line in lines]
    assert (numbers[0], numbers[-1], len(numbers)) == (99, 0, 12)
    assert {before - after for before, after in pairwise(numbers)} == {9}


def test_with_one_objective_or_no_trial_there_is_no_front():
    one = make_table(3)
    one.objectives = ()
    assert format_front(one) == ""
    assert format_front(make_table(0)) == ""


def test_the_live_view_and_the_lines_have_the_second_objective_and_mark_the_front():
    table, clock = make_table(3, name="latency_ms"), SweepClock(time_budget_s=None)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_sweep("sweep", table, clock, width=100))
    shown = console.export_text()
    assert "latency ms" in shown
    assert "on a front of 3 (*)" in shown
    assert sum(line.rstrip().count("*") for line in shown.splitlines() if " complete " in line) == 3
    assert "PA-MPJPE 18.00 mm *  latency 450000 ms" in format_trial(table, table.rows[2], clock)
    assert "*" not in format_trial(table, table.rows[3], clock)
