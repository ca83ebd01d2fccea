"""The searcher without Ray: what it asks, and what it tells the study."""

import math
import warnings

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from handpose.errors import UserError
from tests.sweep.conftest import grid, random, tpe
from tests.sweep.objectives import METRIC

SPACE = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel/decoder: choice(pyramid, effpose)\n"


@pytest.fixture
def make(tmp_path):
    def made(space, searcher, *, folder="study", **changes):
        values = {"name": "test", "metric": METRIC, "mode": "min", "max_epochs": 3, "seed": 0} | changes
        return searcher(space=space, folder=tmp_path / folder, **values)

    return made


def result(params, epoch, value):
    return {f"config/params/{key}": item for key, item in params.items()} | {"epoch": epoch, METRIC: value}


def run_alone(searcher, num_trials):
    """One trial after the other; what is far from a rate of 1e-3 is stopped after the first of three epochs."""
    asked = []
    for number in range(num_trials):
        trial_id = f"id{number}"
        params = searcher.suggest(trial_id)["params"]
        value = abs(math.log10(params["optimizer.lr"]) + 3)
        epochs = 1 if value > 1 else 3
        for epoch in range(1, epochs + 1):
            searcher.on_trial_result(trial_id, result(params, epoch, value + 1 / epoch))
        searcher.on_trial_complete(trial_id, result(params, epochs, value + 1 / epochs))
        asked.append(params)
    return asked


@pytest.mark.parametrize("searcher", [tpe, random])
def test_the_same_seed_asks_for_the_same_configurations(make, write_space, searcher):
    space = write_space(SPACE)
    first = run_alone(make(space, searcher(5), folder="a"), 12)
    assert run_alone(make(space, searcher(5), folder="b"), 12) == first
    assert run_alone(make(space, searcher(6), folder="c"), 12) != first


def test_a_stopped_trial_is_pruned_with_its_fidelity_and_a_whole_one_complete(make, write_space):
    searcher = make(write_space(SPACE), random())
    run_alone(searcher, 10)
    states = {trial.state for trial in searcher.study.trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in searcher.study.trials:
        assert trial.last_step == (3 if trial.state == TrialState.COMPLETE else 1)
        assert len(trial.intermediate_values) == trial.last_step


@pytest.mark.parametrize(
    ("reports", "error", "state"),
    [
        ([1.0, math.nan], False, TrialState.FAIL),
        ([1.0, math.inf], False, TrialState.FAIL),
        ([1.0], True, TrialState.FAIL),
        ([], True, TrialState.FAIL),
        ([], False, TrialState.FAIL),
        ([2.0, 1.0], False, TrialState.PRUNED),
        ([3.0, 2.0, 1.0], False, TrialState.COMPLETE),
    ],
)
def test_every_end_is_told(make, write_space, reports, error, state):
    searcher = make(write_space(SPACE), random())
    params = searcher.suggest("id")["params"]
    for epoch, value in enumerate(reports[:-1], start=1):
        searcher.on_trial_result("id", result(params, epoch, value))
    # As Tune does: the last report comes with the end, and a trial that ends by itself repeats it.
    last = None if error or not reports else result(params, len(reports), reports[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if last:
            searcher.on_trial_result("id", last)
        searcher.on_trial_complete("id", last, error=error)
        searcher.on_trial_complete("id", last, error=error)
    (trial,) = searcher.study.trials
    assert trial.state == state
    if state == TrialState.COMPLETE:
        assert trial.value == reports[-1]


def test_trials_that_ended_without_a_word_are_told_at_the_end(make, write_space):
    searcher = make(write_space(SPACE), random())
    params = searcher.suggest("reported")["params"]
    searcher.on_trial_result("reported", result(params, 1, 2.0))
    searcher.suggest("silent")
    searcher.close()
    assert [trial.state for trial in searcher.study.trials] == [TrialState.PRUNED, TrialState.FAIL]


def test_values_of_changed_parameters_are_not_told(make, write_space):
    searcher = make(write_space(SPACE), random())
    params = searcher.suggest("id")["params"]
    searcher.on_trial_result("id", result(params, 1, 2.0))
    changed = params | {"optimizer.lr": params["optimizer.lr"] / 2}
    searcher.on_trial_result("id", result(changed, 2, 1.0))
    searcher.on_trial_complete("id", result(changed, 3, 0.5))
    (trial,) = searcher.study.trials
    assert trial.intermediate_values == {1: 2.0}
    assert trial.state == TrialState.PRUNED


def test_a_grid_gives_each_point_once_and_then_ends(make, write_space):
    space = write_space("optimizer.lr: choice(0.1, 0.01)\nmodel/decoder: choice(a, b, c)")
    searcher = make(space, grid(), first=[{"optimizer.lr": 0.01, "model/decoder": "b"}])
    assert searcher.num_points == 6
    points = [tuple(params.values()) for params in run_alone(searcher, 6)]
    assert points[0] == (0.01, "b")
    assert sorted(points) == [(lr, decoder) for lr in (0.01, 0.1) for decoder in "abc"]
    assert searcher.suggest("more") == Searcher.FINISHED


def test_first_points_are_asked_first(make, write_space):
    searcher = make(write_space(SPACE), tpe(), first=[{"optimizer.lr": 0.02, "model/decoder": "effpose"}])
    assert run_alone(searcher, 2)[0] == {"optimizer.lr": 0.02, "model/decoder": "effpose"}


def test_a_space_that_fails_leaves_no_trial_running(make, write_space):
    space = write_space(
        "def space(trial):\n    return {'a': trial.suggest_float('a', 0, 1)} if trial.number else 1", ".py"
    )
    searcher = make(space, random())
    with pytest.raises(UserError):
        searcher.suggest("id")
    assert [trial.state for trial in searcher.study.trials] == [TrialState.FAIL]


def test_conditional_spaces_are_searched(make, write_space):
    text = (
        "def space(trial):\n"
        "    lr = trial.suggest_float('optimizer.lr', 1e-5, 1e-1, log=True)\n"
        "    deep = {'model.decoder.depth': trial.suggest_int('model.decoder.depth', 1, 5)} if lr < 1e-3 else {}\n"
        "    return {'optimizer.lr': lr} | deep\n"
    )
    asked = run_alone(make(write_space(text, ".py"), tpe()), 20)
    assert {len(params) for params in asked} == {1, 2}
    assert all(("model.decoder.depth" in params) == (params["optimizer.lr"] < 1e-3) for params in asked)
