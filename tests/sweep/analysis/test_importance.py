"""Importance of parameters, where the truth is known."""

import random

from optuna.distributions import CategoricalDistribution, FloatDistribution

from handpose.sweep.analysis.importance import MIN_TRIALS, TrialDraws, compute_importance

RANGE = FloatDistribution(0.0, 1.0)
KIND = CategoricalDistribution(["a", "b"])


def draw_points(num, *, seed=0):
    draws = random.Random(seed)
    return {number: {"main": draws.random(), "idle": draws.random()} for number in range(num)}


def judge_importance(points, values, distributions=None):
    kinds = {"main": RANGE, "idle": RANGE} | (distributions or {})
    made = {number: TrialDraws(params, {key: kinds[key] for key in params}) for number, params in points.items()}
    return compute_importance(made, values, sign=1.0)


def test_the_parameter_that_matters_is_seen_and_the_other_is_not():
    points = draw_points(60)
    (found,) = judge_importance(points, {9: {number: abs(params["main"] - 0.3) for number, params in points.items()}})
    main, idle = found.effects
    assert (found.epoch, found.num_trials) == (9, 60)
    assert main.key == "main"
    assert main.low > main.noise_level
    assert main.share > 0.7
    assert main.low <= main.high
    assert idle.low < idle.noise_level


def test_more_may_be_better():
    points = draw_points(60)
    kinds = {number: TrialDraws(params, {"main": RANGE, "idle": RANGE}) for number, params in points.items()}
    values = {9: {number: params["main"] > 0.9 for number, params in points.items()}}
    (found,) = compute_importance(kinds, values, sign=-1.0)
    assert found.effects[0].key == "main"


def test_what_only_some_trials_have_counts_too():
    points = draw_points(80)
    for number, params in points.items():
        params["kind"] = "a" if number % 2 else "b"
        if number % 2:
            params["extra"] = params.pop("idle")
    values = {number: abs(params.get("extra", 2.0) - 0.5) for number, params in points.items()}
    (found,) = judge_importance(points, {1: values}, {"kind": KIND, "extra": RANGE})
    assert {effect.key for effect in found.effects} == {"main", "kind", "extra", "idle"}
    by_key = {effect.key: effect for effect in found.effects}
    assert found.effects[0].key == "extra"
    assert by_key["kind"].share > by_key["kind"].noise_level


def test_few_trials_say_nothing_and_many_epochs_are_judged_at_three():
    points = draw_points(MIN_TRIALS)
    values = {number: params["main"] for number, params in points.items()}
    fewer = dict(list(values.items())[:-1])
    assert judge_importance(points, {1: fewer}) == []
    assert [each.epoch for each in judge_importance(points, dict.fromkeys(range(1, 8), values))] == [1, 4, 7]
