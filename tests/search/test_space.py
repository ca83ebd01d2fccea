"""Search spaces: Hydra's expressions become distributions, and what cannot be searched is told in a sentence."""

import math
import os
import sys
import warnings
from fractions import Fraction

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.errors import UserError
from handpose.plain_values import is_same
from handpose.search.distributions import (
    count_values,
    get_value_at,
    make_labels,
    make_stepped_distribution,
    parse_label,
)
from handpose.search.space import (
    count_grid_points,
    find_default_point,
    fix_params,
    flatten_config,
    generate_probe_params,
    list_grid_points,
    list_keys,
    load_space,
)

CONDITIONAL = """
def space(trial):
    decoder = trial.suggest_categorical("model/decoder", ["pyramid", "effpose", "third"])
    params = {"model/decoder": decoder}
    if decoder == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 5)
    return params
"""


@pytest.mark.parametrize(
    ("expression", "distribution"),
    [
        ("range(1, 6)", IntDistribution(1, 5)),
        ("range(6, 1, -1)", IntDistribution(2, 6)),
        ("range(0, 10, 3)", IntDistribution(0, 9, step=3)),
        ("range(0, 1, 0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("float(range(1, 4))", FloatDistribution(1.0, 3.0, step=1.0)),
        ("tag(log, range(1, 65))", IntDistribution(1, 64, log=True)),
        ("interval(0, 1)", FloatDistribution(0.0, 1.0)),
        ("tag(log, interval(5e-5, 3e-3))", FloatDistribution(5e-5, 3e-3, log=True)),
        ("tag(int, interval(16, 256))", IntDistribution(16, 256)),
        ("tag(int, log, interval(16, 256))", IntDistribution(16, 256, log=True)),
        ("int(interval(1, 5))", IntDistribution(1, 5)),
        ("choice(a, b)", CategoricalDistribution(("a", "b"))),
        ("a, b, c", CategoricalDistribution(("a", "b", "c"))),
        ("choice(2, 2.5, true)", CategoricalDistribution((2, 2.5, True))),
        ("choice('with space')", CategoricalDistribution(("with space",))),
    ],
)
def test_an_expression_of_hydra_is_searched(write_space, expression, distribution):
    assert write_space(f"key: {expression}").parameters == {"key": distribution}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr: interval(2, 1)", r"lr: interval\(2, 1\): low must be <= high, but low=2 and high=1"),
        ("depth: range(3, 1)", r"depth: range\(3, 1\) is empty"),
        ("depth: range(1, 3, 0)", r"depth: range\(1, 3, 0\): the step must not be 0"),
        ("lr: tag(log, interval(0, 1))", r"lr: .* its low end must be above 0, not 0"),
        ("n: tag(int, log, interval(0, 8))", r"n: .* its low end must be at least 1, not 0"),
        ("n: tag(int, interval(0.5, 3))", r"n: .* has the tag int, so its ends must be whole numbers, not 0.5 and 3"),
        ("n: tag(log, range(0, 8))", r"n: .* must contain whole numbers from 1, in steps of 1"),
        ("lr: tag(lgo, interval(1, 2))", r"the tag lgo is unknown; use log or int"),
        ("lr: intervall(1, 2)", r"cannot read lr: intervall\(1, 2\) \(Unknown function 'intervall'"),
        ("lr: interval(1)", r"cannot read lr: interval\(1\) \(missing a required argument: 'end'\)"),
        ("lr: interval(a, b)", r"cannot read lr: interval\(a, b\)"),
        ("lr: choice(", r"cannot read lr: choice\("),
        ("lr: choice()", r"empty choice is not legal"),
        ("a b: choice(1, 2)", r"cannot read a b: choice\(1, 2\)"),
        ("lr: interval(1, .inf)\nn: interval(0, inf)", r"must have finite ends|cannot read"),
        ("- lr", r"must map configuration keys to ranges"),
        ("", r"must map configuration keys to ranges"),
        ("lr: 0.1", r"has nothing to search"),
        ("lr: [0.1", r"is not valid YAML"),
        ("lr: interval(0, 1)\nn: 1\nlr: interval(0, 2)", r"the key lr is given twice, in lines 1 and 3; keep one"),
        ("optimizer:\n  lr: interval(0, 1)", r"optimizer has the value .*write nested keys with dots"),
        ("day: 2020-01-01\nlr: interval(0, 1)", r"day has the value datetime.date"),
        ("lr: interval(-1e308, 1e308)", r"lr: .* is too wide: high - low must be a finite number"),
        ("lr: interval(0, 5e-324)", r"lr: .* is too narrow: high - low is 4.94066e-324"),
        ("lr: tag(log, interval(5e-324, 1e-323))", r"lr: .* is too narrow"),
        ("lr: interval(nan, 1)", r"lr: interval\(nan, 1\) must have finite ends"),
        ("lr: interval(0, -inf)", r"lr: .* must have finite ends"),
        ("lr: interval(0, 1" + 400 * "0" + ")", r"lr"),
        ("lr: range(0, inf)", r"lr: .* must have finite ends"),
        ("lr: range(nan, 3)", r"lr: .* must have finite ends"),
        ("lr: range(0, 1, nan)", r"lr: .*a finite step"),
        ("lr: range(-1e308, 1e308, 1e307)", r"lr: .* is too wide"),
        ("lr: range(0, 1, 0.0)", r"lr: .* the step must not be 0"),
        ("lr: range(0, 1, -0.1)", r"lr: .* is empty"),
        ("n: range(0, 9007199254740994)", r"n: .* goes beyond 9007199254740992"),
        ("n: range(-9223372036854775809, 9223372036854775809)", r"n: .* goes beyond 9007199254740992"),
        ("n: range(0, 1" + 400 * "0" + ")", r"n: .* goes beyond 9007199254740992"),
        ("n: int(interval(0, 1e17))", r"n: .* goes beyond 9007199254740992"),
        ("n: tag(int, range(0, 1, 0.5))", r"n: .* has the tag int, so its ends and its step must be whole numbers"),
        ("n: tag(log, choice(1, 10))", r"tag log is for interval and range, not for choice"),
        ("n: tag(log, interval(-2, -1))", r"its low end must be above 0, not -2"),
    ],
)
def test_what_cannot_be_searched_is_told_with_key_value_and_file(write_space, text, reason):
    with pytest.raises(UserError, match=reason) as told:
        write_space(text)
    assert "space.yaml" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_that_name", r"cannot be read: ModuleNotFoundError"),
        ("x = 1", r"must define a function space\(trial\)"),
        ("def space(trial):\n    return [1]", r"must return a dict of configuration keys, but gave \[1\]"),
        ("def space(trial):\n    return {'a': object()}", r"space\(trial\) gave 'a': <object"),
        ("def space(trial):\n    return {'a': trial.nothing}", r"space\(trial\) raised AttributeError"),
    ],
)
def test_what_a_python_space_gets_wrong_is_told_with_its_file(write_space, text, reason):
    with pytest.raises(UserError, match=reason) as told:
        list(generate_probe_params(write_space(text, ".py")))
    assert "space.py" in str(told.value)


def test_a_space_is_found_by_name_and_by_path(tmp_path):
    (tmp_path / "small.yaml").write_text("a: choice(1, 2)")
    assert load_space("small", folder=tmp_path) == load_space(str(tmp_path / "small.yaml"))


def test_an_unknown_space_is_told_with_the_nearest_name_and_all_there_are(tmp_path):
    for name in ("default.yaml", "wide.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"search_space=defualt: did you mean default\? .* has default, wide"):
        load_space("defualt", folder=tmp_path)
    with pytest.raises(UserError, match=r"search_space=some/where.yaml: there is no such file"):
        load_space("some/where.yaml", folder=tmp_path)


def test_a_plain_value_is_in_every_trial_and_lists_may_be_chosen(write_space):
    space = write_space("a: 3\nb: choice([1, 2], [3, 4])\nc: word\nd: null\ne: [5]\nf: interval(0, 1)")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.sample(study.ask()) for _ in range(20)]
    assert all(
        params["a"] == 3 and params["c"] == "word" and params["d"] is None and params["e"] == [5] for params in drawn
    )
    assert {tuple(params["b"]) for params in drawn} == {(1, 2), (3, 4)}
    assert list(drawn[0]) == ["a", "b", "c", "d", "e", "f"]


def test_the_default_is_found_in_a_space_that_holds_it(write_space):
    space = write_space("a: range(1, 4)\nb: choice([1], [2])\nc: tag(log, interval(0.1, 1))")
    inside = {"a": 2, "b": [2], "c": 0.5, "other": "x"}
    point = find_default_point(space, inside)
    assert space.sample(optuna.trial.FixedTrial(point)) == {"a": 2, "b": [2], "c": 0.5}
    assert find_default_point(space, inside | {"a": 4}) is None
    assert find_default_point(space, inside | {"b": [3]}) is None
    assert find_default_point(space, {"a": 2}) is None


def test_the_default_is_found_in_a_space_that_is_defined_by_running(write_space):
    space = write_space(CONDITIONAL, ".py")
    defaults = {"model/decoder": "pyramid", "model.decoder.depth": 3, "optimizer.lr": 1.0}
    assert find_default_point(space, defaults) == {"model/decoder": "pyramid", "model.decoder.depth": 3}
    assert find_default_point(space, defaults | {"model/decoder": "effpose"}) == {"model/decoder": "effpose"}
    assert find_default_point(space, defaults | {"model.decoder.depth": 9}) is None


def test_a_python_space_is_read_from_its_source_and_leaves_no_bytecode(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "space.py"
    text = "def space(trial):\n    return {'optimizer.lr': trial.suggest_float('lr', 0, LIMIT)}\n"
    for limit in (1, 2):  # two texts of one size, written within one second
        file.write_text(text.replace("LIMIT", str(limit)))
        os.utime(file, (1, 1))
        assert load_space(str(file)).sample(optuna.trial.FixedTrial({"lr": limit})) == {"optimizer.lr": limit}
    assert os.listdir(tmp_path) == ["space.py"]


def test_a_warning_within_a_python_space_does_not_lose_the_default(write_space):
    text = """
import warnings

def space(trial):
    warnings.warn("this space is old")
    return {
        "a": trial.suggest_float("a", 0, 1, step=0.3),  # of which Optuna warns, since 1 is not 0 + k * 0.3
        "b": trial.suggest_categorical("b", [[1], [2]]),  # of which Optuna warns, since it stores scalars only
    }
"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = write_space(text, ".py")
        point = find_default_point(space, {"a": 0.3, "b": [2]})
        assert space.sample(optuna.trial.FixedTrial(point)) == {"a": 0.3, "b": [2]}
        assert find_default_point(space, {"a": 0.4, "b": [2]}) is None


def test_a_python_space_that_fails_at_the_default_is_told_and_elsewhere_the_default_is_outside(write_space):
    text = "def space(trial):\n    a = trial.suggest_int('a', 1, 5)\n    assert a != {}\n    return {{'a': a}}"
    with pytest.raises(UserError, match="AssertionError"):
        find_default_point(write_space(text.format(3), ".py"), {"a": 3})
    assert find_default_point(write_space(text.format(1), ".py"), {"a": 9}) is None


# --- values that Python considers equal -------------------------------------------------------------------------------

ALIKE = [0, False, 0.0, -0.0, 1, True, 1.0, "1", "true", None, "null", "", [], [0], [False], [0.0], [[1]], [[True]]]
LABELS = ["bool false", "int 1", "float 1.0", "list [1]", 'str "a"', "list of things", "bool maybe", "int 1.0"]


def draw_again(space, num=200):
    """Parameters of random trials, and those that a study in a file has of them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.sample(study.ask()) for _ in range(num)]
    return drawn, [{key: parse_label(value) for key, value in trial.params.items()} for trial in study.trials]


@pytest.mark.parametrize(
    ("expression", "values"),
    [
        ("choice(0, false)", [0, False]),
        ("choice(1, true, 1.0)", [1, True, 1.0]),
        ("choice(0.0, -0.0)", [0.0, -0.0]),
        ("choice(false, 0.0, 0, -0.0)", [False, 0.0, 0, -0.0]),
        ("choice('1', 1, 'true', true)", ["1", 1, "true", True]),
        ("choice(null, 'null', none)", [None, "null", "none"]),
        ("choice([0], [false], [0.0], [[1]], [[true]])", [[0], [False], [0.0], [[1]], [[True]]]),
        ("choice('list [1]', [1], 'bool true', true, 1)", ["list [1]", [1], "bool true", True, 1]),
        ("choice(nan, inf, 1)", [math.nan, math.inf, 1]),
        ("shuffle(choice(0, false))", [0, False]),
    ],
)
def test_choices_that_python_considers_equal_stay_different_in_the_study(write_space, expression, values):
    space = write_space(f"key: {expression}")
    drawn, stored = draw_again(space)
    assert all(map(is_same, drawn, stored))
    assert {repr(params["key"]) for params in drawn} == {repr(value) for value in values}
    for value in values:
        point = find_default_point(space, {"key": value})
        assert is_same(space.sample(optuna.trial.FixedTrial(point)), {"key": value})
    assert [repr(parse_label(point["key"])) for point in list_grid_points(space)] == [repr(value) for value in values]


@pytest.mark.parametrize("choices", [ALIKE, list(reversed(ALIKE)), LABELS, [*LABELS, *ALIKE]])
def test_labels_are_different_scalars_for_different_values_and_are_read_back(choices):
    found = make_labels(choices)
    assert len(set(found)) == len(choices)
    assert all(is_same(parse_label(label), value) for label, value in zip(found, choices, strict=True))
    distribution = CategoricalDistribution(found)
    assert [distribution.to_internal_repr(label) for label in found] == list(range(len(choices)))
    assert make_labels([*choices, *choices]) == [*found, *found]


def test_plain_choices_stand_in_the_study_as_they_are(write_space):
    choices = ("a", 1, 0.5, True, None, "with space", "list")
    assert make_labels(choices[1:3]) == [1, 0.5]
    assert make_labels(["a", 2, True, None]) == ["a", 2, True, None]


def test_a_python_space_is_given_its_own_choices_back(write_space):
    text = """
CHOICES = [(1, 2), [1, 2.0], 0, False, 1.0, True, "1"]

def space(trial):
    chosen = trial.suggest_categorical("key", CHOICES)
    assert any(chosen is choice for choice in CHOICES)
    return {"key": chosen}
"""
    space = write_space(text, ".py")
    drawn, stored = draw_again(space)
    assert all(map(is_same, drawn, stored))
    assert {repr(params["key"]) for params in drawn} == {"[1, 2]", "[1, 2.0]", "0", "False", "1.0", "True", "'1'"}


def test_numbers_of_numpy_and_tuples_are_taken_from_a_python_space(write_space):
    text = """
import numpy as np

def space(trial):
    return {
        "a": np.float32(0.5),
        "b": trial.suggest_categorical("b", np.array([16, 32])),
        "c": trial.suggest_categorical("c", [np.float64(0.25), np.bool_(True), np.str_("x")]),
        "d": (np.int64(trial.suggest_int("d", np.int64(1), np.int32(4), step=np.int8(1))), [np.arange(2)]),
        "e": trial.suggest_float("e", np.float32(0), np.float64(1), step=np.float64(0.25)),
        "f": np.log2(trial.suggest_int("f", 1, 1)),
        "g": np.array(3),
    }
"""
    space = write_space(text, ".py")
    drawn, stored = draw_again(space, 20)
    for params, draws in zip(drawn, stored, strict=True):
        assert (params["a"], params["f"], params["g"]) == (0.5, 0.0, 3)
        assert params["d"] == [draws["d"], [[0, 1]]]
        assert {key: params[key] for key in "bce"} == {key: draws[key] for key in "bce"}
        kinds = {type(value) for value in (*params.values(), *params["d"])}
        assert kinds <= {int, float, bool, str, list}
    assert {params["b"] for params in drawn} == {16, 32}
    point = find_default_point(space, {"b": 32, "c": "x", "d": 2, "e": 0.5, "f": 1})
    assert point == {"b": 32, "c": "x", "d": 2, "e": 0.5, "f": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("trial.suggest_categorical('a', [1, object()])", r"the choices of a must be numbers, text or lists of them"),
        ("trial.suggest_float('a', -1e308, 1e308)", r"a from -1e\+308 to 1e\+308 is too wide"),
        ("trial.suggest_float('a', 0, 5e-324)", r"a from 0 to 5e-324 is too narrow"),
        ("exit(3)", r"space\(trial\) raised SystemExit: 3"),
        ("trial.suggest_float('a', 0, float('nan'))", r"a from 0 to nan must have finite ends"),
        ("trial.suggest_float('a', 2, 1)", r"a from 2 to 1: low must be <= high"),
        ("trial.suggest_int('a', 0, 2**63)", r"a from 0 to 9223372036854775808 goes beyond 9007199254740992"),
        ("trial.suggest_float('a', 0, 1, log=True)", r"space\(trial\) raised ValueError: .*low"),
    ],
)
def test_what_optuna_cannot_draw_in_a_python_space_is_told(write_space, line, reason):
    space = write_space(f"def space(trial):\n    return {{'a': {line}}}", ".py")
    with pytest.raises(UserError, match=reason) as told:
        list(generate_probe_params(space))
    assert "space.py" in str(told.value)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "values"),
    [
        ("range(0, 0.05, 0.01)", [0.0, 0.01, 0.02, 0.03, 0.04]),
        ("range(0.1, 0.4, 0.1)", [0.1, 0.2, 0.3]),
        ("range(0.4, 0.1, -0.1)", [0.2, 0.3, 0.4]),
        ("range(0, 1, 0.3)", [0.0, 0.3, 0.6, 0.9]),
        ("range(0.5, 3)", [0.5, 1.5, 2.5]),
        ("range(0, 0.3, 0.5)", [0.0]),
        ("range(1e-05, 4e-05, 1e-05)", [1e-05, 2e-05, 3e-05]),
        ("range(7, 0, -3)", [1, 4, 7]),
    ],
)
def test_a_range_has_exactly_its_values_without_the_end(write_space, expression, values):
    space = write_space(f"key: {expression}")
    assert [point["key"] for point in list_grid_points(space)] == values
    drawn, _ = draw_again(space)
    assert {params["key"] for params in drawn} == set(values)
    for value in values:
        assert find_default_point(space, {"key": value}) == {"key": value}
    assert find_default_point(space, {"key": 2 * max(values) + 1}) is None


@settings(deadline=None)
@given(start=st.integers(-50, 50), count=st.integers(1, 30), step=st.integers(1, 40), part=st.fractions(0, 1))
def test_the_steps_of_a_range_are_counted_as_decimals(start, count, step, part):
    """Of hundredths, where the end is a part of a step above the last value, as far as that has few digits."""
    last = start + (count - 1) * step
    stop = float(Fraction(last, 100) + Fraction(max(1, round(part * step)), 100))
    distribution = make_stepped_distribution(start / 100, stop, step / 100)
    expected = [(start + index * step) / 100 for index in range(count)]
    assert [get_value_at(distribution, index) for index in range(count_values(distribution))] == expected
    assert distribution.high == expected[-1]  # Optuna has cut nothing back


def test_a_huge_range_is_not_listed(write_space):
    space = write_space("seed: range(0, 2147483647)\na: tag(log, range(1, 9007199254740993))\nb: range(0, 1e6, 1e-6)")
    assert space.parameters["seed"] == IntDistribution(0, 2147483646)
    assert [count_values(each) for each in space.parameters.values()] == [2147483647, 2**53, 10**12]
    assert {params["seed"] for params in generate_probe_params(space)} > {0, 2147483646}


def test_a_grid_is_counted_before_it_is_listed(write_space):
    space = write_space("a: range(0, 6000)\nb: range(0, 6000)\nc: choice(x, y)")
    with pytest.raises(UserError, match=r"searcher=grid would list 72000000 points of .*\(6000 x 6000 x 2\)"):
        list_grid_points(space)
    assert count_grid_points(write_space("a: range(0, 100)\nb: range(0, 1, 0.01)")) == 10_000


# --- what the command line fixes --------------------------------------------------------------------------------------


def test_a_key_that_is_held_is_the_same_in_all_trials_and_not_searched(write_space):
    space = fix_params(write_space("a: range(1, 6)\nb: interval(0, 1)\nc: 7"), {"a": 9, "c": 8})
    drawn, stored = draw_again(space, 20)
    assert {(params["a"], params["c"]) for params in drawn} == {(9, 8)}
    assert all(draws.keys() == {"b"} for draws in stored)
    assert list(drawn[0]) == ["a", "b", "c"]
    assert find_default_point(space, {"a": 1, "b": 0.5}) == {"b": 0.5}


def test_what_a_python_space_draws_under_a_held_key_is_that_value(write_space):
    space = write_space(CONDITIONAL, ".py")
    assert list_keys(space) == ["model/decoder", "model.decoder.depth"]
    drawn, stored = draw_again(fix_params(space, {"model/decoder": "pyramid"}), 30)
    assert {params["model/decoder"] for params in drawn} == {"pyramid"}
    assert {params["model.decoder.depth"] for params in drawn} == {1, 2, 3, 4, 5}
    assert all(draws.keys() == {"model.decoder.depth"} for draws in stored)
    drawn, _ = draw_again(fix_params(space, {"model.decoder.depth": 9}), 30)
    assert {params.get("model.decoder.depth", 9) for params in drawn} == {9}
    assert {params["model/decoder"] for params in drawn} == {"pyramid", "effpose", "third"}


@pytest.mark.parametrize(("text", "suffix"), [("a: range(1, 6)\nb: 3", ".yaml"), (CONDITIONAL, ".py")])
def test_a_space_with_nothing_left_to_search_is_told(write_space, text, suffix):
    space = write_space(text, suffix)
    with pytest.raises(UserError, match=r"every key that .*space.* searches is given on the command line"):
        fix_params(space, {"a": 1, "model/decoder": "effpose"})


def test_probes_reach_both_ends_of_every_range_and_every_choice(write_space):
    points = list(
        generate_probe_params(write_space("a: range(1, 6)\nb: tag(log, interval(0.1, 1))\nc: choice(x, y, z, w)"))
    )
    assert {1, 5} <= {point["a"] for point in points}
    assert {0.1, 1.0} <= {point["b"] for point in points}
    assert {"x", "y", "z", "w"} == {point["c"] for point in points}


def test_probes_reach_conditional_parameters(write_space):
    points = list(generate_probe_params(write_space(CONDITIONAL, ".py")))
    assert {point["model/decoder"] for point in points} == {"pyramid", "effpose", "third"}
    assert any("model.decoder.depth" in point for point in points)


def test_a_grid_has_every_point(write_space):
    points = list_grid_points(write_space("a: range(1, 3)\nb: choice(x, y)\nc: range(0, 1, 0.5)\nd: 7"))
    assert [tuple(point.values()) for point in points] == [
        (a, b, c) for a in (1, 2) for b in ("x", "y") for c in (0.0, 0.5)
    ]


def test_an_interval_has_no_grid(write_space):
    with pytest.raises(
        UserError, match=r"searcher=grid needs a list of values, but .*space.yaml has b: interval\(0, 1\)"
    ):
        list_grid_points(write_space("a: range(1, 3)\nb: interval(0, 1)"))
    with pytest.raises(UserError, match=r"searcher=grid cannot list the points of .*space.py"):
        list_grid_points(write_space(CONDITIONAL, ".py"))


def test_nested_values_are_flattened_to_dotted_keys():
    assert flatten_config({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


@pytest.mark.parametrize("text", ["range(0.0, 1e308, 1.0)", "range(0, 1, 1e-300)", "range(1, 0, -1e-300)"])
def test_a_range_of_more_values_than_can_be_counted_is_refused(tmp_path, text):
    file = tmp_path / "space.yaml"
    file.write_text(f"x: {text}\n")
    with pytest.raises(UserError, match="give a larger step"):
        load_space(str(file))


def test_a_python_space_with_more_values_than_can_be_counted_is_refused(tmp_path):
    file = tmp_path / "space.py"
    file.write_text('def space(trial):\n    return {"x": trial.suggest_float("x", 0, 1, step=1e-300)}\n')
    with pytest.raises(UserError, match="give a larger step"):
        list(generate_probe_params(load_space(str(file))))
