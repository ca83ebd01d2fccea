"""Charts: what they show, and that plotly knows every property they set."""

import json
import math

import pytest
from plotly import graph_objects

from handpose.report import figure as figures
from handpose.report.contours import draw_contours
from handpose.report.isolation import isolate_parameter
from handpose.report.parameter_plots import (
    make_axis,
    plot_importance,
    plot_isolation,
    plot_parallel_coordinates,
    plot_pareto_front,
    plot_slice,
    sort_by_importance,
)
from handpose.report.plots import (
    find_incumbents,
    plot_best_so_far,
    plot_confirmation,
    plot_learning_curves,
    plot_slot_time,
)
from handpose.report.slot_time import account_slot_time
from handpose.report.sweep_record import (
    Candidate,
    Confirmation,
    Importance,
    Interval,
    Parameter,
    ParameterEffect,
    SecondObjective,
)
from tests.report.fabricated_records import DEPTH, HEAD, METRIC, RATE, SCALE, make_record, make_swept_record, make_trial


@pytest.fixture(scope="module")
def made():
    whole = make_swept_record(
        lambda params: abs(math.log10(params["optimizer.lr"]) + 3), [RATE, DEPTH, SCALE, HEAD], num_trials=40
    )
    lost = [
        make_trial(40, {"optimizer.lr": 0.1}, [5.0, math.nan], state="diverged"),
        make_trial(41, {"optimizer.lr": 0.1}, [], state="failed"),
        make_trial(42, {"optimizer.lr": 0.01, "model.decoder.depth": 2}, [6.0], state="stopped"),
    ]
    trials = [
        *(
            make_trial(
                each.number,
                each.params,
                [report.value for report in each.reports],
                costs={"latency_ms": float(each.number)},
            )
            for each in whole.trials
        ),
        *lost,
    ]
    effects = [
        ParameterEffect("optimizer.lr", 0.8, 0.5, 0.9, 0.1),
        ParameterEffect("augment.scale", 0.2, 0.0, 0.3, 0.1),
    ]
    between = Interval(1.0, 0.9, 1.1)
    candidates = [
        Candidate("trial 1", 1, {}, {1: 1.0, 2: 1.1}, between, None, None),
        Candidate("default", None, {}, {1: math.nan}, Interval(math.nan, math.nan, math.nan), None, None, "diverged"),
    ]
    return make_record(
        trials,
        [RATE, DEPTH, SCALE, HEAD],
        rungs=(1, 2),
        importance=[Importance(1, 43, 5, effects), Importance(4, 40, 5, effects)],
        second_objective=SecondObjective("latency_ms", "min", [0, 1]),
        confirmation=Confirmation(4, [1, 2], candidates, candidates[0], between, "as said"),
    )


def draw_all(made):
    return {
        "best so far": plot_best_so_far([made, made]),
        "curves": plot_learning_curves(made),
        "slot-time": plot_slot_time(account_slot_time(made)),
        "confirmed": plot_confirmation(made.confirmation, METRIC),
        "importance": plot_importance(made.importance),
        "parallel": plot_parallel_coordinates(made),
        "front": plot_pareto_front(made),
        "isolated": plot_isolation(isolate_parameter(made, "model.decoder.depth"), METRIC),
        **{f"slice of {each.key}": plot_slice(made, each) for each in made.parameters},
        **{sentence: each for each, sentence in draw_contours(made)},
    }


def test_plotly_knows_every_property(made):
    shown = draw_all(made)
    assert len(shown) == 15
    for drawing in shown.values():
        text = json.dumps(drawing, allow_nan=False)
        for name in (
            "blue",
            "orange",
            "green",
            "vermillion",
            "purple",
            "sky",
            "ink",
            "muted",
            "paper",
            "faint",
            "strong",
        ):
            text = text.replace(f'"@{name}"', '"#123456"')
        assert "@" not in text
        plain = json.loads(text)
        graph_objects.Figure({"data": plain["data"], "layout": plain["layout"]})


def test_every_trial_with_a_report_is_a_curve(made):
    curves = plot_learning_curves(made)["data"]
    numbers = {number for trace in curves for number in trace["customdata"]} - {None}
    assert numbers == {each.number for each in made.trials if each.reports}


def test_every_trial_crosses_the_parallel_coordinates(made):
    numbers = {number for trace in plot_parallel_coordinates(made)["data"] for number in trace["customdata"]} - {None}
    assert numbers == {each.number for each in made.trials}


def test_a_diverged_trial_ends_with_a_gap_and_no_number():
    lost = make_trial(0, {}, [5.0, math.nan], state="diverged")
    line, mark, *_ = plot_learning_curves(make_record([lost]))["data"]
    assert line["y"] == [5.0, None]
    assert (mark["x"], mark["y"]) == ([1], [5.0])


def test_leaders_are_compared_at_rungs_only():
    # Trial 1 begins later and is better; at epoch 3, no rung, trial 0 is ahead of all others and counts for nothing.
    early = make_trial(0, {}, [9.0, 8.0, 7.5, 7.0], began=0.0)
    late = make_trial(1, {}, [8.5, 6.0, 5.5, 5.0], began=1.5)
    found = find_incumbents(make_record([early, late], rungs=(1, 2)))
    assert [(each.trial, each.epoch, each.value) for each in found] == [
        (0, 1, 9.0),
        (0, 2, 8.0),
        (1, 2, 6.0),
        (0, 4, 7.0),
        (1, 4, 5.0),
    ]
    assert [each.at_s for each in found] == [1.0, 2.0, 3.5, 4.0, 5.5]


def test_the_last_leader_is_the_first_of_the_ranking(made):
    assert find_incumbents(made)[-1].trial == made.ranked[0]


def test_the_projects_three_parameters_come_first(made):
    assert [each.key for each in sort_by_importance(made)] == [
        "model.decoder.depth",
        "optimizer.lr",
        "augment.scale",
        "model.decoder.head",
    ]


def test_long_curves_are_thinned_and_keep_rungs_and_ends():
    trials = [make_trial(number, {}, [1.0] * 500) for number in range(100)]
    lines = plot_learning_curves(make_record(trials, rungs=(7,), max_epochs=500))["data"][0]
    first = lines["x"][: lines["x"].index(None)]
    assert len(lines["x"]) < 41_000
    assert {7, 500} <= set(first)


def test_numbers_are_as_short_as_a_screen_needs_them():
    assert figures.round_for_plot(1 / 3) == 0.33333
    assert figures.round_for_plot(math.nan) is None
    assert figures.join_with_gaps([[1, 2], [3]]) == [1, 2, None, 3]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.01, 0.08, [0.01, 0.02, 0.05]),
        (2e-4, 1e-2, [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2]),
        (0.021, 0.049, [0.021, 0.049]),
        (1e-5, 1.0, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
    ],
)
def test_a_logarithmic_axis_has_few_ticks_at_round_numbers(low, high, ticks):
    drawn = make_axis(Parameter("optimizer.lr", "float", low, high, log=True, expression=""))
    assert drawn["tickvals"] == ticks
    assert drawn["ticktext"] == [f"{tick:g}" for tick in ticks]
