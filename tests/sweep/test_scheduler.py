"""Schedulers as configured, and population based training with checkpoints that travel."""

import random
from functools import partial

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import AsyncHyperBandScheduler

from handpose.errors import UserError
from handpose.sweep.scheduler import PopulationBasedTraining, build_scheduler
from handpose.sweep.space import load_space
from tests.sweep.conftest import make_settings, start
from tests.sweep.objectives import METRIC, population
from tests.sweep.test_run import study_of

SPACE = "optimizer.lr: tag(log, interval(0.01, 1.0))\nmodel.decoder.depth: choice(1, 2, 4)\n"


def pbt(space, **changes):
    values = {
        "mutate": ["optimizer.lr"],
        "perturbation_interval": 2,
        "quantile_fraction": 0.5,
        "resample_probability": 0.0,
    }
    return PopulationBasedTraining(space=space, seed=0, **values | changes)


@pytest.fixture(scope="module")
def grown(ray_started, tmp_path_factory):
    """A population of four on two slots: its table, and its study's trials by number."""
    folder = tmp_path_factory.mktemp("population")
    (folder / "space.yaml").write_text(SPACE)
    space = load_space(str(folder / "space.yaml"))
    settings = make_settings(folder / "sweep", num_trials=4, max_epochs=8)
    table = start(settings, space, population, scheduler=pbt(space))
    return table, {trial.number: trial for trial in study_of(folder / "sweep").trials}


def test_a_population_goes_on_from_its_best_and_stays_in_the_range(grown):
    table, trials = grown
    assert all(row.state == "complete" and row.epochs == 8 for row in table.rows.values())
    changed = [row for row in table.rows.values() if row.params != trials[row.number].params]
    assert changed
    for row in changed:
        assert 0.01 <= row.params["optimizer.lr"] <= 1.0
        assert row.command == ""
        first = trials[row.number].params
        alone = 10.0 - 8 * first["optimizer.lr"] / first["model.decoder.depth"]
        assert row.metrics[METRIC] != pytest.approx(alone)


def test_the_study_hears_of_no_value_that_a_suggestion_did_not_earn(grown):
    for trial in grown[1].values():
        rate = trial.params["optimizer.lr"] / trial.params["model.decoder.depth"]
        earned = {epoch: 10.0 - epoch * rate for epoch in range(1, trial.last_step + 1)}
        assert trial.intermediate_values == pytest.approx(earned)
        assert trial.state == (TrialState.COMPLETE if trial.last_step == 8 else TrialState.PRUNED)


@pytest.mark.parametrize("seed", range(20))
def test_changed_parameters_are_values_of_the_space(write_space, seed):
    space = write_space(
        "a: tag(log, interval(0.1, 1))\nb: range(0, 10, 3)\nc: choice(x, y)\n"
        "d: range(0.0, 1.0, 0.25)\ne: choice([1], [2])\n"
    )
    explore = pbt(space, mutate=list("abcde"), resample_probability=0.5)._custom_explore_fn
    explore._rng = random.Random(seed)
    params = explore({"params": {"a": 1.0, "b": 9, "c": "x", "d": 0.0, "e": [2]}})["params"]
    assert 0.1 <= params["a"] <= 1
    assert params["b"] in (0, 3, 6, 9)
    assert params["c"] in ("x", "y")
    assert params["d"] in (0.0, 0.25, 0.5, 0.75)
    assert params["e"] in ([1], [2])


def test_keys_to_change_that_are_not_searched_are_told(write_space):
    with pytest.raises(UserError, match=r"scheduler.mutate names lr, but search_space=space searches optimizer.lr"):
        pbt(write_space(SPACE), mutate=["lr"])


def test_a_define_by_run_space_has_no_population(write_space):
    space = write_space("def space(trial):\n    return {}\n", ".py")
    with pytest.raises(UserError, match="scheduler=pbt needs a search space in YAML"):
        pbt(space)


def test_values_that_do_not_go_together_are_told_in_the_schedulers_words(write_space):
    scheduler = partial(AsyncHyperBandScheduler, max_t=3, grace_period=5)
    with pytest.raises(UserError, match=r"grace_period must be <= max_t"):
        build_scheduler(scheduler, write_space(SPACE))
