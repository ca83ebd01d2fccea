"""Search spaces: Hydra's expressions become distributions, and what cannot be searched is told in a sentence."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.errors import UserError
from handpose.sweep.space import default_point, flattened, grid_points, load_space, probes

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
        ("lr: interval(2, 1)", r"lr: interval\(2, 1\) is upside down: its low end 2 is above its high end 1"),
        ("depth: range(3, 1)", r"depth: range\(3, 1\) is empty"),
        ("depth: range(1, 3, 0)", r"depth: range\(1, 3, 0\): range\(\) arg 3 must not be zero"),
        ("lr: tag(log, interval(0, 1))", r"lr: .* its low end must be above 0, not 0"),
        ("n: tag(int, log, interval(0, 8))", r"n: .* its low end must be at least 1, not 0"),
        ("n: tag(int, interval(0.5, 3))", r"n: .* whole numbers, but its ends are 0.5 and 3"),
        ("n: tag(log, range(0, 8))", r"n: .* must be of whole numbers from 1 on"),
        ("lr: tag(lgo, interval(1, 2))", r"tag lgo is not known; there are log and int"),
        ("lr: intervall(1, 2)", r"cannot read lr: intervall\(1, 2\) \(Unknown function 'intervall'"),
        ("lr: interval(1)", r"cannot read lr: interval\(1\) \(missing a required argument: 'end'\)"),
        ("lr: interval(a, b)", r"cannot read lr: interval\(a, b\)"),
        ("lr: choice(", r"cannot read lr: choice\("),
        ("lr: choice()", r"empty choice is not legal"),
        ("a b: choice(1, 2)", r"cannot read a b: choice\(1, 2\)"),
        ("lr: interval(1, .inf)\nn: interval(0, inf)", r"must have finite ends|cannot read"),
        ("- lr", r"must map configuration keys to ranges"),
        ("", r"must map configuration keys to ranges"),
        ("lr: 0.1", r"searches nothing"),
        ("lr: [0.1", r"is not valid YAML"),
        ("lr: interval(0, 1)\nn: 1\nlr: interval(0, 2)", r"the key lr stands twice, in lines 1 and 3; keep one"),
        ("optimizer:\n  lr: interval(0, 1)", r"optimizer has the value .*write nested keys with dots"),
        ("day: 2020-01-01\nlr: interval(0, 1)", r"day has the value datetime.date"),
        ("lr: interval(-1e308, 1e308)", r"lr: .* is too wide: high - low must be a finite number"),
        ("lr: interval(nan, 1)", r"lr: interval\(nan, 1\) must have finite ends"),
        ("lr: interval(0, -inf)", r"lr: .* must have finite ends"),
        ("lr: interval(0, 1" + 400 * "0" + ")", r"lr"),
        ("lr: range(0, inf)", r"lr: .* must have finite ends"),
        ("lr: range(nan, 3)", r"lr: .* must have finite ends"),
        ("lr: range(0, 1, nan)", r"lr: .*its step must have finite ends"),
        ("lr: range(-1e308, 1e308, 1e307)", r"lr: .* is too wide"),
        ("lr: range(0, 1, 0.0)", r"lr: .* must not be zero"),
        ("lr: range(0, 1, -0.1)", r"lr: .* is empty"),
        ("n: range(0, 9007199254740994)", r"n: .* goes beyond 9007199254740992"),
        ("n: range(-9223372036854775809, 9223372036854775809)", r"n: .* goes beyond 9007199254740992"),
        ("n: range(0, 1" + 400 * "0" + ")", r"n: .* goes beyond 9007199254740992"),
        ("n: int(interval(0, 1e17))", r"n: .* goes beyond 9007199254740992"),
        ("n: tag(int, range(0, 1, 0.5))", r"n: .* is for whole numbers"),
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
        list(probes(write_space(text, ".py")))
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
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert all(
        params["a"] == 3 and params["c"] == "word" and params["d"] is None and params["e"] == [5] for params in drawn
    )
    assert {tuple(params["b"]) for params in drawn} == {(1, 2), (3, 4)}
    assert list(drawn[0]) == ["a", "b", "c", "d", "e", "f"]


def test_the_default_is_found_in_a_space_that_holds_it(write_space):
    space = write_space("a: range(1, 4)\nb: choice([1], [2])\nc: tag(log, interval(0.1, 1))")
    inside = {"a": 2, "b": [2], "c": 0.5, "other": "x"}
    point = default_point(space, inside)
    assert space.suggest(optuna.trial.FixedTrial(point)) == {"a": 2, "b": [2], "c": 0.5}
    assert default_point(space, inside | {"a": 4}) is None
    assert default_point(space, inside | {"b": [3]}) is None
    assert default_point(space, {"a": 2}) is None


def test_the_default_is_found_in_a_space_that_is_defined_by_running(write_space):
    space = write_space(CONDITIONAL, ".py")
    defaults = {"model/decoder": "pyramid", "model.decoder.depth": 3, "optimizer.lr": 1.0}
    assert default_point(space, defaults) == {"model/decoder": "pyramid", "model.decoder.depth": 3}
    assert default_point(space, defaults | {"model/decoder": "effpose"}) == {"model/decoder": "effpose"}
    assert default_point(space, defaults | {"model.decoder.depth": 9}) is None


def test_probes_reach_both_ends_of_every_range_and_every_choice(write_space):
    points = list(probes(write_space("a: range(1, 6)\nb: tag(log, interval(0.1, 1))\nc: choice(x, y, z, w)")))
    assert {1, 5} <= {point["a"] for point in points}
    assert {0.1, 1.0} <= {point["b"] for point in points}
    assert {"x", "y", "z", "w"} == {point["c"] for point in points}


def test_probes_reach_conditional_parameters(write_space):
    points = list(probes(write_space(CONDITIONAL, ".py")))
    assert {point["model/decoder"] for point in points} == {"pyramid", "effpose", "third"}
    assert any("model.decoder.depth" in point for point in points)


def test_a_grid_has_every_point(write_space):
    points = grid_points(write_space("a: range(1, 3)\nb: choice(x, y)\nc: range(0, 1, 0.5)\nd: 7"))
    assert [tuple(point.values()) for point in points] == [
        (a, b, c) for a in (1, 2) for b in ("x", "y") for c in (0.0, 0.5)
    ]


def test_an_interval_has_no_grid(write_space):
    with pytest.raises(
        UserError, match=r"searcher=grid needs a list of values, but .*space.yaml has b: interval\(0, 1\)"
    ):
        grid_points(write_space("a: range(1, 3)\nb: interval(0, 1)"))
    with pytest.raises(UserError, match=r"searcher=grid cannot list the points of .*space.py"):
        grid_points(write_space(CONDITIONAL, ".py"))


def test_nested_values_are_flattened_to_dotted_keys():
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
