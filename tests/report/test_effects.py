"""Which effects are shown, and where best values lie, on sweeps whose truth is known."""

import math
import random

import numpy as np
import pytest

from handpose.report.effects import (
    drop_repeated_trials,
    find_best_range,
    find_shown_effects,
    find_small_effects,
    find_worse_options,
)
from handpose.report.sweep_record import Parameter
from tests.report.fabricated_records import (
    DEPTH,
    HEAD,
    RATE,
    SCALE,
    draw_value,
    make_record,
    make_swept_record,
    make_trial,
)

KIND = Parameter("kind", "choice", choices=["a", "b", "c"])


def make_noisy_record(loss, parameters, *, seed=0, num_trials=60, noise=0.3, **rest):
    draws = random.Random(1000 + seed)
    return make_swept_record(
        lambda params: loss(params) + draws.gauss(0, noise), parameters, seed=seed, num_trials=num_trials, **rest
    )


def make_learning_record(loss, parameters, *, seed, num_trials=40, noise=1.0):
    """A sweep whose searcher draws most points close to the best ones so far, as TPE does."""
    draws, trials = random.Random(seed), []
    for number in range(num_trials):
        params = {each.key: draw_value(each, draws) for each in parameters}
        if number >= 5:
            best = min(trials, key=lambda each: each.value).params
            params = {
                each.key: _near(each, best[each.key], draws) if draws.random() < 0.8 else params[each.key]
                for each in parameters
            }
        value = loss(params) + draws.gauss(0, noise)
        trials.append(make_trial(number, params, [value + 3, value + 1, value + 0.1, value]))
    return make_record(trials, parameters)


def _near(parameter, value, draws):
    if parameter.kind == "choice":
        return value
    place = min(1.0, max(0.0, parameter.to_place(value) + draws.gauss(0, 0.1)))
    return round(parameter.to_value(place)) if parameter.kind == "int" else parameter.to_value(place)


def list_keys(made):
    return [effect.key for effect in find_shown_effects(made)]


def test_no_effect_is_shown_in_noise_of_a_searcher_that_follows_the_luck():
    made = [make_learning_record(lambda params: 0.0, [RATE, SCALE, DEPTH, HEAD], seed=seed) for seed in range(60)]
    assert sum(bool(find_shown_effects(each)) for each in made) <= 3  # 5 %, at a level of 1 %


def test_many_parameters_make_no_more_false_alarms_than_few():
    """Taking out the parts of the other parameters takes noise out, too, on which the ranks are measured then."""
    parameters = [Parameter(f"p{number}", "float", 0.0, 1.0) for number in range(14)]
    alarms = 0
    for seed in range(60):
        draws = random.Random(seed + 1000)
        made = make_swept_record(lambda params: draws.gauss(0, 1), parameters, seed=seed, num_trials=40)  # noqa: B023
        alarms += bool(find_shown_effects(made))
    assert alarms <= 3  # 1 % are meant; four or more of 60 have a probability of 0.003 then


def test_the_effects_are_shown_and_the_clearest_comes_first():
    made = make_noisy_record(
        lambda params: 3 * abs(RATE.to_place(params["optimizer.lr"]) - 0.4) + (params["kind"] != "a"),
        [RATE, KIND, SCALE],
    )
    assert list_keys(made) == ["kind", "optimizer.lr"]
    assert all(effect.p_value <= 0.01 for effect in find_shown_effects(made))


def test_a_parameter_that_only_goes_along_with_a_cause_is_not_shown():
    """The searcher learns the rate, and the scale of its followers is that of the best trial."""
    made = [
        make_learning_record(
            lambda params: 6 * abs(RATE.to_place(params["optimizer.lr"]) - 0.7), [RATE, SCALE], seed=seed, num_trials=60
        )
        for seed in range(30)
    ]
    assert sum("optimizer.lr" in list_keys(each) for each in made) >= 10
    assert sum("augment.scale" in list_keys(each) for each in made) <= 2


def test_more_may_be_better():
    made = make_noisy_record(lambda params: RATE.to_place(params["optimizer.lr"]), [RATE, SCALE], noise=0.1)
    other = make_record(made.trials, made.parameters, mode="max")
    assert list_keys(made) == list_keys(other) == ["optimizer.lr"]
    assert find_best_range(made, RATE, find_shown_effects(made)).high < 0.5
    assert find_best_range(other, RATE, find_shown_effects(other)).low > 0.5


def test_equal_trainings_count_once():
    """20 trials of 4 points: four trainings are too few to show anything, however often they were repeated."""
    points = [{"optimizer.lr": 10.0**-power} for power in (1, 2, 3, 4)]
    trials = [make_trial(number, points[number % 4], [float(number % 4)] * 4) for number in range(20)]
    assert [each.number for each in drop_repeated_trials(trials)] == [0, 1, 2, 3]
    assert drop_repeated_trials([make_trial(0, {"x": 1}, [1.0]), make_trial(1, {"x": True}, [1.0])])[1:]
    assert list_keys(make_record(trials, [RATE])) == []


def test_a_parameter_that_only_some_trials_have_is_judged_by_these():
    extra = Parameter("extra", "float", 0.0, 1.0, is_conditional=True)
    draws, trials = random.Random(0), []
    for number in range(80):
        params = {"kind": draws.choice("abc")}
        if params["kind"] == "a":
            params["extra"] = draws.random()
        value = 4 * params.get("extra", 0.5) + draws.gauss(0, 0.3)
        trials.append(make_trial(number, params, [value + 1] * 3 + [value]))
    made = make_record(trials, [KIND, extra])
    assert list_keys(made) == ["extra"]
    assert find_best_range(made, extra, find_shown_effects(made)).high < 0.6


@pytest.mark.parametrize("best", [0.0, 0.3, 0.7, 1.0])
def test_the_interval_holds_the_best_value_and_rules_out_a_part_of_the_range(best):
    held, part = [], []
    for seed in range(25):
        made = make_learning_record(
            lambda params: 4 * abs(RATE.to_place(params["optimizer.lr"]) - best),
            [RATE],
            seed=seed,
            num_trials=60,
            noise=0.5,
        )
        shown = find_shown_effects(made)
        if shown:
            found = find_best_range(made, RATE, shown)
            held.append(found.low - 1e-9 <= best <= found.high + 1e-9)
            part.append(found.high - found.low)
    assert len(held) >= 15
    assert np.mean(held) >= 0.8  # 95 % less three standard errors of 20
    assert np.mean(part) < 0.8


def test_of_two_optima_no_interval_is_made():
    made = make_noisy_record(
        lambda params: -abs(RATE.to_place(params["optimizer.lr"]) - 0.5), [RATE], noise=0.02, num_trials=120
    )
    assert find_best_range(made, RATE, find_shown_effects(made)) == (0.0, 1.0, None, None)


def test_whole_numbers_are_bounded_by_their_values():
    made = make_noisy_record(lambda params: abs(params["model.decoder.depth"] - 4), [DEPTH, RATE], num_trials=80)
    found = find_best_range(made, DEPTH, find_shown_effects(made))
    assert DEPTH.to_value(found.low) == DEPTH.to_value(found.high) == 4


def test_the_worse_options_are_named_and_the_best_one_never():
    wrong = 0
    for seed in range(30):
        made = make_learning_record(
            lambda params: {"a": 0, "b": 2, "c": 0}[params["kind"]], [KIND, RATE], seed=seed, noise=0.5
        )
        worse = find_worse_options(made, KIND, find_shown_effects(made))
        wrong += any(KIND.choices[each.option] != "b" for each in worse)
    assert wrong <= 4
    made = make_noisy_record(lambda params: {"a": 0, "b": 2, "c": 0}[params["kind"]], [KIND, RATE])
    (only,) = find_worse_options(made, KIND, find_shown_effects(made))
    assert KIND.choices[only.option] == "b"


def test_the_parameter_that_matters_most_is_never_called_unimportant():
    """Loss = {a: 0, b: 1, c: 2}[kind] + |log10 lr + 2|, where `kind` was once said to have no effect."""
    for seed in range(12):
        made = make_learning_record(
            lambda params: {"a": 0, "b": 1, "c": 2}[params["kind"]] + abs(math.log10(params["optimizer.lr"]) + 2),
            [KIND, RATE],
            seed=seed,
            num_trials=60,
            noise=0.1,
        )
        assert "kind" not in [each.key for each in find_small_effects(made, find_shown_effects(made))]


def test_a_small_effect_needs_tried_alternatives_and_an_equivalence_test():
    idle = make_noisy_record(lambda params: RATE.to_place(params["optimizer.lr"]) * 4, [RATE, SCALE], num_trials=120)
    (found,) = find_small_effects(idle, find_shown_effects(idle))
    assert found.key == "augment.scale"
    assert 0 < found.bound < found.margin
    few = make_noisy_record(lambda params: RATE.to_place(params["optimizer.lr"]) * 4, [RATE, SCALE], num_trials=16)
    assert find_small_effects(few, find_shown_effects(few)) == []
    trials = [make_trial(each.number, {**each.params, "kind": "a"}, [each.value] * 4) for each in idle.trials]
    untried = make_record(trials, [RATE, KIND])
    assert find_small_effects(untried, find_shown_effects(untried)) == []


def test_effects_as_large_as_the_margin_are_seldom_called_small():
    """Two groups that differ by half of what the best gained over the median."""
    wrong = 0
    for seed in range(40):
        made = make_noisy_record(
            lambda params: 1.2 * (params["model.decoder.head"] == "axes"), [HEAD, RATE], seed=seed, noise=1.0
        )
        margins = [each for each in find_small_effects(made, find_shown_effects(made)) if each.key == HEAD.key]
        wrong += any(each.margin <= 1.2 for each in margins)
    assert wrong <= 6
