"""What is proposed, and what the study holds of it: also after a crash at any moment, and for other processes."""

import json
import math
import statistics
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import optuna
import pytest
from hydra.utils import instantiate
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import CmaEsSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from handpose.config import compose
from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.plain_values import is_same, to_json_text
from handpose.search import study as study_module
from handpose.search.curve_sampler import CurveSampler
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.points import place_values
from handpose.search.searcher import TrialSnapshot
from handpose.search.space import load_space
from handpose.search.study import COST_NAMES, ORIGIN_ATTRIBUTE, get_trial_params
from handpose.search.warm_start import InitialTrials
from tests.search.trial_feed import TrialFeed, killed_after_trials

METRIC = "val/pa_mpjpe_mm"
SPACE = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel/decoder: choice(pyramid, effpose)\n"
NUMBERS = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel.decoder.depth: range(1, 6)\n"
GRID = "optimizer.lr: choice(0.1, 0.01)\nmodel/decoder: choice(a, b, c)"
TPE = partial(TPESampler, n_startup_trials=4, multivariate=True, group=True, constant_liar=True)
SAMPLERS = {
    "tpe": TPE,
    "gp": partial(GPSampler, n_startup_trials=3),
    "cmaes": partial(CmaEsSampler, popsize=4),
    "qmc": partial(QMCSampler, scramble=True, warn_independent_sampling=False),
    "nsga": partial(NSGAIISampler, population_size=4),
    "random": RandomSampler,
}
FILES = sorted(
    file.stem
    for file in (CONFIGS / "searcher").glob("*.yaml")
    if compose("tune", [f"searcher={file.stem}"]).searcher._target_.endswith(f".{OptunaSearcher.__name__}")
)


@pytest.fixture
def make(tmp_path):
    """Makes a searcher, which is closed at the end."""
    made = []

    def build(space, sampler=RandomSampler, *, folder="study", **changes):
        values = {"name": "test", "metric": METRIC, "mode": "min", "max_epochs": 3, "seed": 0, "defaults": {}}
        searcher = OptunaSearcher(space=space, folder=tmp_path / folder, sampler=sampler, **values | changes)
        made.append(TrialFeed(searcher))
        return made[-1]

    yield build
    for searcher in made:
        searcher.close()


def compute_value(params):
    """Least at a rate of 1e-3."""
    return abs(math.log10(params["optimizer.lr"]) + 3)


def run_alone(searcher, num_trials):
    """One trial after the other; what is far from a rate of 1e-3 is stopped after the first of three epochs."""
    asked = []
    for number in range(searcher.first_number, searcher.first_number + num_trials):
        params = searcher.suggest(number)
        searcher.on_segment_start(number)
        epochs = 1 if compute_value(params) > 1 else 3
        for epoch in range(1, epochs + 1):
            searcher.on_trial_result(number, epoch, compute_value(params) + 1 / epoch)
        searcher.on_trial_end(number, "stopped" if epochs == 1 else "complete")
        asked.append(params)
    return asked


def list_states(searcher):
    return [trial.state.name for trial in searcher.study.trials]


def read_study(searcher):
    """What the study holds, but for its times."""
    kept = ("state", "params", "distributions", "values", "intermediate_values", "system_attrs", "user_attrs")
    return [{name: getattr(trial, name) for name in kept} for trial in searcher.study.trials]


@contextmanager
def silence_optuna():
    """Optuna without its warnings of what is new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


# --- proposals --------------------------------------------------------------------------------------------------------


@cache
def make_configured(name):
    return instantiate(compose("tune", [f"searcher={name}"]).searcher)


def compose_searcher(name):
    return lambda **values: TrialFeed(make_configured(name)(**values))


@pytest.mark.parametrize("space", ["default", "decoder_family"])
@pytest.mark.parametrize("name", [name for name in FILES if name != "grid"])
def test_every_configured_sampler_proposes_points_of_the_space_without_noise(name, space, tmp_path, capfd):
    space, asked = load_space(space), []
    searcher = compose_searcher(name)(
        space=space, folder=tmp_path, name="test", metric=METRIC, mode="min", max_epochs=1, seed=3, defaults={}
    )
    for number in range(14):
        asked.append(searcher.suggest(number))
        if number >= 2:  # three run at a time
            searcher.on_trial_result(number - 2, 1, compute_value(asked[number - 2]))
            searcher.on_trial_end(number - 2, "complete")
    searcher.close()
    for params in asked:
        placed = place_values(space, params)
        assert (placed.out_of_range, placed.missing) == ((), ())
        assert placed.params == params
    assert len({json.dumps(params) for params in asked}) == len(asked)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_asks_for_the_same_configurations(make, write_space, name):
    space, num = write_space(NUMBERS), 6 if name == "gp" else 12
    asked = run_alone(make(space, SAMPLERS[name], folder="a", seed=5), num)
    assert run_alone(make(space, SAMPLERS[name], folder="b", seed=5), num) == asked
    assert run_alone(make(space, SAMPLERS[name], folder="c", seed=6), num) != asked


@pytest.mark.parametrize("constraints", [{}, {"num_parameters": 1e6}])
@pytest.mark.parametrize("name", ["tpe", "gp", "nsga", "random"])
def test_a_proposal_is_what_optuna_draws_from_the_study_with_waiting_trials_as_stopped_ones(
    make, write_space, name, constraints
):
    space, number = write_space(NUMBERS), 8 if name == "gp" else 16
    searcher = make(space, SAMPLERS[name], seed=5, constraints=constraints)
    plain, trials = optuna.create_study(), []
    for done in range(number):
        params = searcher.suggest(done)
        excess = params["model.decoder.depth"] / 4 - 1
        trial = searcher.study.trials[-1]
        searcher.on_trial_cost(done, {"num_parameters": (1 + excess) * 1e6})
        if constraints:
            trial.set_constraint("num_parameters", excess)
        trial.intermediate_values = {1: compute_value(params)}
        trial.state, trial.value = [(TrialState.COMPLETE, 1.0 * done), (TrialState.PRUNED, 0.1 * done)][done % 3 == 2]
        if done == number - 1:
            trial.state, trial.value, trial.intermediate_values = TrialState.RUNNING, None, {}
        elif trial.state == TrialState.PRUNED:
            trial.intermediate_values = {1: 0.2, 2: 0.1 * done}
            searcher.on_trial_result(done, 1, 0.2)
            searcher.on_trial_result(done, 2, 0.1 * done)
            searcher.on_trial_wait(done)
        else:
            searcher.on_trial_result(done, 1, 1.0 * done)
            searcher.on_trial_end(done, "complete")
        trial.datetime_complete = trial.datetime_start if trial.state.is_finished() else None
        trials.append(trial)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    median = statistics.median(trial.value for trial in complete)
    for trial in complete:
        if name in ("gp", "nsga") and sum(trial.constraints.values()) > 0:
            trial.value = median
    plain.add_trials(trials)
    seed = int(np.random.SeedSequence([5, number]).generate_state(1)[0])
    with silence_optuna():
        plain.sampler = SAMPLERS[name](seed=seed)
    assert searcher.suggest(number) == space.sample(plain.ask())


@pytest.fixture
def visible_trials(monkeypatch):
    """The trials that the sampler saw when it was last asked."""
    trials = []
    suggest = optuna.Trial.suggest_float

    def look(trial, *args, **kwargs):
        trials[:] = trial.study.trials
        return suggest(trial, *args, **kwargs)

    monkeypatch.setattr(optuna.Trial, "suggest_float", look)
    return trials


def test_a_trial_that_waits_is_seen_as_stopped_with_its_last_value_or_as_running_without_one(
    make, write_space, visible_trials
):
    searcher = make(write_space(SPACE))
    for number, values in enumerate([{}, {1: 5.0, 3: 7.0}]):
        searcher.suggest(number)
        for epoch, value in values.items():
            searcher.on_trial_result(number, epoch, value)
        searcher.on_trial_wait(number)
    searcher.suggest(2)
    assert [(trial.state.name, trial.value) for trial in visible_trials] == [
        ("RUNNING", None),
        ("PRUNED", 7.0),
        ("RUNNING", None),
    ]
    assert list_states(searcher) == ["WAITING", "WAITING", "RUNNING"]


def test_qmc_gives_the_points_of_one_sequence(make, write_space):
    """Of Sobol's sequence the first 2^k points have one in each of 2^k equal parts of an axis."""
    searcher = make(write_space("a: interval(0.0, 1.0)\nb: interval(0.0, 1.0)"), SAMPLERS["qmc"])
    asked = []
    for number in range(17):
        asked.append(searcher.suggest(number))
        searcher.on_trial_result(number, 1, 1.0)
        searcher.on_trial_end(number, "stopped")
    for axis in "ab":
        assert sorted(int(16 * params[axis]) for params in asked[1:]) == list(range(16))  # the first one is random


def test_tpe_learns_from_what_it_is_told(make, write_space):
    """Of twenty random rates from four decades two lie within 0.2 of the best, on average."""
    asked = run_alone(make(write_space(NUMBERS), TPE), 40)
    assert sum(compute_value(params) < 0.2 for params in asked[-20:]) >= 6


def test_conditional_spaces_are_searched(make, write_space):
    text = (
        "def space(trial):\n"
        "    lr = trial.suggest_float('optimizer.lr', 1e-5, 1e-1, log=True)\n"
        "    deep = {'model.decoder.depth': trial.suggest_int('model.decoder.depth', 1, 5)} if lr < 1e-3 else {}\n"
        "    return {'optimizer.lr': lr} | deep\n"
    )
    searcher = make(write_space(text, ".py"), TPE)
    asked = run_alone(searcher, 20)
    # Optuna draws the depth in advance; were it kept where it is not used, a running trial would count as having it.
    assert not any(trial.system_attrs for trial in searcher.study.trials)
    assert {len(params) for params in asked} == {1, 2}
    assert all(("model.decoder.depth" in params) == (params["optimizer.lr"] < 1e-3) for params in asked)


def test_a_space_that_fails_leaves_nothing_and_the_number_free(make, write_space):
    text = "def space(trial):\n    {}\n    return {{'optimizer.lr': trial.suggest_float('optimizer.lr', 0.1, 1)}}"
    searcher = make(write_space(text.format("assert trial.number < 1"), ".py"))
    assert searcher.suggest(0)
    with pytest.raises(UserError, match="AssertionError"):
        searcher.suggest(1)
    assert len(searcher.study.trials) == 1
    searcher.close()
    mended = make(write_space(text.format("pass"), ".py"), resume=True)
    mended.restore_trials([TrialSnapshot(0, "running", {"optimizer.lr": 0.2}, {})])
    assert mended.suggest(1)


# --- the same parameters twice ----------------------------------------------------------------------------------------

SMALL = "a: range(0, 5)\nb: choice(x, y)\n"
SMALL_PYTHON = """
def space(trial):
    kind = trial.suggest_categorical("kind", ["u", "v"])
    if kind == "u":
        return {"kind": kind, "n": trial.suggest_int("n", 0, 6)}
    return {"kind": kind, "w": trial.suggest_float("w", 0, 0.5, step=0.25)}
"""


def run_all_trials(searcher, num):
    """The parameters of so many trials, each of which ends well but every third, which diverges."""
    asked = []
    for number in range(searcher.first_number, searcher.first_number + num):
        asked.append(to_json_text(searcher.suggest(number)))
        searcher.on_trial_result(number, 1, float(len(asked[-1])))
        searcher.on_trial_end(number, "diverged" if number % 3 == 2 else "complete")
    return asked


@pytest.mark.parametrize(("text", "suffix"), [(SMALL, ".yaml"), (SMALL_PYTHON, ".py")])
@pytest.mark.parametrize("name", FILES)
def test_no_searcher_tries_a_point_twice_before_it_has_tried_all(write_space, tmp_path, name, text, suffix):
    if (name, suffix) == ("grid", ".py"):
        pytest.skip("a grid needs a list")
    space, orders = write_space(text, suffix), []
    for seed in range(2):
        searcher = compose_searcher(name)(
            space=space,
            folder=tmp_path / str(seed),
            name="test",
            metric=METRIC,
            mode="min",
            max_epochs=1,
            seed=seed,
            defaults={"a": 2, "b": "y", "kind": "v", "w": 0.25},
            points_to_evaluate=[{"b": "x"}] if suffix == ".yaml" else [{"kind": "u", "n": 3}],
        )
        assert searcher.num_points == 10
        orders.append(run_all_trials(searcher, 10))
        searcher.close()
        assert len(set(orders[-1])) == 10
    assert orders[0] != orders[1]


@pytest.mark.parametrize("name", ["tpe", "qmc", "random"])
def test_points_that_are_not_tried_twice_are_the_same_after_restarts(make, write_space, name):
    space = write_space(SMALL)
    whole = run_all_trials(make(space, SAMPLERS[name], folder="whole"), 10)
    searcher, known = make(space, SAMPLERS[name], folder="restarted"), []
    for number in range(10):
        params = searcher.suggest(number)
        searcher.close()
        searcher = make(space, SAMPLERS[name], folder="restarted", resume=True)
        searcher.restore_trials(known)
        assert is_same(searcher.suggest(number), params)
        value = float(len(to_json_text(params)))
        searcher.on_trial_result(number, 1, value)
        searcher.on_trial_end(number, "diverged" if number % 3 == 2 else "complete")
        known.append(TrialSnapshot(number, "diverged" if number % 3 == 2 else "complete", params, {1: value}))
    assert [to_json_text(each.params) for each in known] == whole
    assert len(set(whole)) == 10


def test_a_point_that_an_interval_gives_twice_is_drawn_again(make, write_space):
    """As GP gives the corners of its ranges."""

    class Corner(RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return distribution.low

    searcher = make(write_space("a: interval(0.0, 1.0)\nb: interval(0.0, 1.0)"), Corner)
    asked = run_all_trials(searcher, 4)
    assert searcher.num_points is None
    assert asked[0] == to_json_text({"a": 0.0, "b": 0.0})
    assert len(set(asked)) == 4


def test_draws_that_make_the_same_parameters_are_the_same_point(make, write_space):
    text = "def space(trial):\n    return {'n': 2 ** round(trial.suggest_float('x', -0.4, 2.4))}"
    searcher = make(write_space(text, ".py"), TPE)
    assert set(run_all_trials(searcher, 3)) == {'{"n": 1}', '{"n": 2}', '{"n": 4}'}
    assert searcher.suggest(3)  # nobody knows that there are no more, since the draws cannot be listed


def test_points_of_earlier_sweeps_are_tried_again_only_when_no_others_are_left(make, write_space, monkeypatch):
    space = write_space(SMALL)
    first = make(space, folder="first")
    before = run_all_trials(first, 4)
    imported = [(trial.params, trial.distributions) for trial in first.study.trials]

    def begin(*args, **kwargs):
        trials = [
            create_trial(state=TrialState.COMPLETE, value=1.0, params=params, distributions=distributions)
            for params, distributions in imported
        ]
        return InitialTrials(points=[imported[0][0]], trials=trials)

    monkeypatch.setattr("handpose.search.optuna_searcher.prepare_initial_trials", begin)
    searcher = make(space, TPE, folder="second")
    asked = run_all_trials(searcher, 10)
    assert asked[0] == before[0]  # it is to be tried first
    assert len(set(asked)) == 10
    assert set(asked[1:7]).isdisjoint(before)
    assert set(asked[7:]) < set(before)


def test_where_the_seed_is_searched_a_point_with_another_seed_is_another_one(make, write_space):
    searcher = make(write_space("a: choice(1)\nseed: range(0, 2147483647)"), TPE)
    assert searcher.num_points == 2147483647
    assert len({json.loads(text)["seed"] for text in run_all_trials(searcher, 12)}) == 12


def test_trials_that_change_on_the_way_may_begin_alike(make, write_space):
    searcher = make(write_space("a: choice(1, 2)"), repeats=True)
    assert searcher.num_points is None
    asked = run_all_trials(searcher, 4)
    assert len(set(asked[:2])) == 2
    assert set(asked[2:]) <= set(asked[:2])


@pytest.mark.parametrize("name", [*SAMPLERS, "grid"])
def test_the_study_has_the_parameters_that_are_trained(make, write_space, name):
    text = "a: choice(0, false)\nb: choice(1, true, 1.0)\nc: choice('1', [1], [true])\nd: range(0, 0.05, 0.01)"
    space, sampler = write_space(text), SAMPLERS.get(name)
    first = [{"a": False, "b": 1.0, "c": [True]}]
    searcher = make(space, sampler, points_to_evaluate=first, defaults={"a": 0, "b": 1, "c": "1", "d": 0.03})
    asked = run_all_trials(searcher, 12)
    assert asked[:2] == [
        to_json_text({"a": 0, "b": 1, "c": "1", "d": 0.03}),
        to_json_text({"a": False, "b": 1.0, "c": [True], "d": 0.03}),
    ]
    searcher.close()
    again = make(space, sampler, resume=True)
    assert [to_json_text(get_trial_params(trial)) for trial in again.study.trials] == asked
    assert {json.loads(each)["d"] for each in asked} <= {0.0, 0.01, 0.02, 0.03, 0.04}


def test_parameters_beside_the_draws_are_kept_where_python_considers_them_equal(make, write_space):
    text = "def space(trial):\n    return {'a': bool(trial.suggest_int('a', 0, 1))}"
    searcher = make(write_space(text, ".py"))
    asked = run_all_trials(searcher, 2)
    assert set(asked) == {'{"a": false}', '{"a": true}'}
    assert [to_json_text(get_trial_params(trial)) for trial in searcher.study.trials] == asked


def test_gp_is_given_no_range_whose_values_fill_the_memory(make, write_space):
    with pytest.raises(UserError, match="searcher=gp lists the 2147483647 values of seed, and takes at most 100000"):
        make(write_space("seed: range(0, 2147483647)\na: interval(0, 1)"), SAMPLERS["gp"])


# --- what is tried first ----------------------------------------------------------------------------------------------

DEFAULTS = {"optimizer.lr": 1e-3, "model/decoder": "pyramid", "data.batch_size": 16}


def test_the_default_is_tried_first_and_then_what_the_user_gives(make, write_space):
    first = [{"optimizer.lr": 0.02, "model/decoder": "effpose"}, {"model/decoder": "effpose"}]
    searcher = make(write_space(SPACE), TPE, points_to_evaluate=first, defaults=DEFAULTS)
    assert run_alone(searcher, 3) == [
        {"optimizer.lr": 1e-3, "model/decoder": "pyramid"},
        {"optimizer.lr": 0.02, "model/decoder": "effpose"},
        {"optimizer.lr": 1e-3, "model/decoder": "effpose"},
    ]


def test_what_neither_the_user_nor_the_default_gives_is_drawn(make, write_space):
    first = [{"model/decoder": "effpose"}]
    for seed in range(3):
        folder, defaults = str(seed), {"optimizer.lr": 5.0}
        searcher = make(write_space(SPACE), folder=folder, seed=seed, points_to_evaluate=first, defaults=defaults)
        params = searcher.suggest(0)
        assert params["model/decoder"] == "effpose"
        assert 1e-5 <= params["optimizer.lr"] <= 1e-1


def test_lists_and_fixed_values_can_be_tried_first(make, write_space):
    space = write_space(
        "data.scale: choice([0.5, 1], [1, 2])\noptimizer.lr: interval(0, 1)\ntrainer.precision: 16-mixed"
    )
    first = {"data.scale": [1, 2], "optimizer.lr": 1, "trainer.precision": "16-mixed"}
    searcher = make(space, points_to_evaluate=[first])
    assert searcher.suggest(0) == first
    searcher.close()
    assert make(space, resume=True).suggest(0) == first


@pytest.mark.parametrize("seed", range(3))
def test_a_grid_gives_each_point_once_and_then_ends(make, write_space, seed):
    first = [{"model/decoder": "b"}]
    searcher = make(write_space(GRID), None, points_to_evaluate=first, defaults={"optimizer.lr": 0.01}, seed=seed)
    assert searcher.num_points == 6
    points = [tuple(params.values()) for params in run_alone(searcher, 6)]
    assert points[0] == (0.01, "b")
    assert sorted(points) == [(lr, decoder) for lr in (0.01, 0.1) for decoder in "abc"]
    assert searcher.suggest(6) is None


# --- where proposals come from ----------------------------------------------------------------------------------------

STARTUP = "a random start-up trial of TPESampler, which needs 4 results"


def list_origins(searcher, num_trials):
    return [searcher.explain_suggestion(number) for number in range(num_trials)]


def test_the_origins_are_the_default_the_points_of_the_user_and_the_sampler(make, write_space):
    first = {"optimizer.lr": 0.02, "model/decoder": "effpose"}
    defaults = {"optimizer.lr": 1e-3, "model/decoder": "pyramid"}
    searcher = make(write_space(SPACE), RandomSampler, points_to_evaluate=[first], defaults=defaults)
    run_alone(searcher, 3)
    assert list_origins(searcher, 3) == [
        "the default configuration",
        "point 1 of searcher.points_to_evaluate",
        "RandomSampler",
    ]


def test_trials_are_random_start_up_trials_until_tpe_has_its_results(make, write_space):
    searcher = make(write_space(SPACE), TPE)
    run_alone(searcher, 5)
    assert list_origins(searcher, 5) == [STARTUP] * 4 + ["TPESampler"]
    unreported = make(write_space(SPACE), TPE, folder="parallel")  # as long as nothing ends, all are random
    for number in range(5):
        unreported.suggest(number)
    assert list_origins(unreported, 5) == [STARTUP] * 5


def test_a_grid_says_that_its_points_are_those_of_a_grid(make, write_space):
    searcher = make(write_space(GRID), None)
    run_alone(searcher, 2)
    assert list_origins(searcher, 2) == ["the next point of the grid"] * 2


@pytest.mark.parametrize(
    ("space", "origin"),
    [
        ("a: choice(1, 2)", "a point that no trial has tried, because Corner repeated earlier trials"),
        ("a: interval(0.0, 1.0)", "a random draw, because Corner repeated earlier trials"),
    ],
)
def test_a_repeated_draw_is_replaced_and_says_so(make, write_space, space, origin):
    class Corner(RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return getattr(distribution, "low", 1)

    searcher = make(write_space(space), Corner)
    run_all_trials(searcher, 2)
    assert list_origins(searcher, 2) == ["Corner", origin]


def test_a_proposal_that_is_asked_for_again_has_the_same_origin(make, write_space):
    make(write_space(SPACE), TPE).suggest(0)
    resumed = make(write_space(SPACE), TPE, resume=True)
    resumed.restore_trials([])
    resumed.suggest(0)
    assert resumed.explain_suggestion(0) == STARTUP


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    return None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


@pytest.mark.parametrize(
    ("reports", "ended", "state", "value"),
    [
        ([3.0, 2.0, 1.0], "complete", "COMPLETE", 1.0),
        ([1.0, 2.0], "stopped", "PRUNED", 2.0),
        ([1.0, math.nan], "diverged", "FAIL", None),
        ([1.0, -math.inf], "diverged", "FAIL", None),
        ([1.0], "failed", "FAIL", None),
        ([], "failed", "FAIL", None),
        ([], "stopped", "FAIL", None),
        ([math.nan], "stopped", "FAIL", None),
        ([], "infeasible", "PRUNED", None),
    ],
)
def test_every_end_is_told_and_telling_it_again_changes_nothing(make, write_space, reports, ended, state, value):
    searcher = make(write_space(SPACE))
    searcher.suggest(0)
    for _ in range(2):
        searcher.on_segment_start(0)
        for epoch, reported in enumerate(reports, start=1):
            searcher.on_trial_result(0, epoch, reported)
        searcher.on_trial_end(0, ended)
        (trial,) = searcher.study.trials
        assert (trial.state.name, trial.value) == (state, value)
        assert list(trial.intermediate_values.values()) == [value for value in reports if math.isfinite(value)]


def test_the_file_is_json_that_other_languages_read(make, write_space, tmp_path):
    searcher = make(write_space(SPACE), constraints={"latency_ms": 1.0})
    searcher.suggest(0)
    searcher.on_trial_result(0, 1, math.nan)
    searcher.on_trial_cost(0, {"latency_ms": math.inf, "memory_mb": math.nan})
    searcher.on_trial_end(0, "diverged")

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "study" / "journal.log").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_trial_runs_waits_and_runs_again(make, write_space, storage):
    searcher = make(write_space(SPACE), storage=storage)
    searcher.suggest(0)
    for epoch in (1, 2):
        searcher.on_segment_start(0)
        assert list_states(searcher) == ["RUNNING"]
        searcher.on_trial_result(0, epoch, 5.0 - epoch)
        searcher.on_trial_wait(0)
        searcher.on_trial_wait(0)
        assert list_states(searcher) == ["WAITING"]
    searcher.on_segment_start(0)
    searcher.on_trial_end(0, "stopped")
    (trial,) = searcher.study.trials
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.PRUNED, 3.0, {1: 4.0, 2: 3.0})


def test_a_report_samples_nothing_again(make, write_space):
    searcher = make(write_space(SPACE), TPE)
    run_alone(searcher, 8)
    before = searcher.study.trials[-1]
    params = searcher.suggest(8)
    searcher.on_segment_start(8)
    searcher.on_trial_result(8, 1, 1.0)
    searcher.on_trial_wait(8)
    after = searcher.study.trials
    assert after[8].params == params
    assert after[7] == before


def test_nothing_runs_in_the_study_of_a_sweep_that_is_over(make, write_space):
    searcher = make(write_space(SPACE))
    for number in range(3):
        searcher.suggest(number)
    searcher.on_trial_result(0, 1, 1.0)
    searcher.on_trial_end(0, "stopped")
    searcher.close()
    assert list_states(searcher) == ["PRUNED", "WAITING", "WAITING"]


READER = """
import json, sys, optuna
study = optuna.load_study(study_name=sys.argv[1], storage=eval(sys.argv[2]))
print(json.dumps([[t.state.name, t.params, t.value, t.intermediate_values, t.constraints] for t in study.trials]))
"""


def test_another_process_reads_the_study_while_the_sweep_runs(make, write_space, storage, tmp_path):
    searcher = make(write_space(SPACE), storage=storage, constraints={"num_parameters": 1e6})
    asked = [searcher.suggest(number) for number in range(3)]
    searcher.on_trial_cost(0, {"num_parameters": 1.5e6})
    searcher.on_trial_end(0, "infeasible")
    searcher.on_trial_result(1, 2, 7.5)
    searcher.on_trial_wait(1)
    backend = "optuna.storages.journal.JournalFileBackend"
    journal = f"optuna.storages.JournalStorage({backend}({str(tmp_path / 'study' / 'journal.log')!r}))"
    command = [sys.executable, "-c", READER, "test", repr(storage) if storage else journal]
    read = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert read == [
        ["PRUNED", asked[0], None, {}, {"num_parameters": 0.5}],
        ["WAITING", asked[1], None, {"2": 7.5}, {}],
        ["RUNNING", asked[2], None, {}, {}],
    ]


# --- crashes ----------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for SIGKILL: what is not on the disk is lost."""


class WriteKiller:
    """Kills at some writes to the journal. how: before the write, after it, or in the middle, holding the lock."""

    def __init__(self, monkeypatch, how, is_due):
        self.num_writes, self.num_kills = 0, 0
        write = study_module._Journal.append_logs

        def append_logs(journal, logs):
            self.num_writes += 1
            if not is_due(self.num_writes):
                return write(journal, logs)
            self.num_kills += 1
            if how == "after":
                write(journal, logs)
            if how == "within":
                line = json.dumps(logs[0])
                with journal._file.open("a") as file:
                    file.write(line[: len(line) // 2])
                for suffix in (".lock", ".lock1f.rename"):
                    Path(f"{journal._file}{suffix}").symlink_to(journal._file)
            raise KilledError

        monkeypatch.setattr(study_module._Journal, "append_logs", append_logs)


def make_script(num_trials):
    """Steps of a sweep whose trials overlap: each is asked for, measured, pauses after epoch 1, and goes on later."""
    for turn in range(num_trials + 3):
        if turn < num_trials:
            yield from ((kind, turn) for kind in ("asked", "began", "measured"))
        if 0 <= turn - 1 < num_trials:
            yield from (("reported", turn - 1, 1), ("waits", turn - 1))
        if 0 <= turn - 3 < num_trials:
            yield from (("began", turn - 3), ("reported", turn - 3, 3), ("ended", turn - 3))


class Sweep:
    """Performs the script; its events outlive a kill, and the study is made to agree with them."""

    def __init__(self, open_searcher, num_trials):
        self.events, self.params = [], {}
        self.open = open_searcher
        steps = list(make_script(num_trials))
        searcher = None
        while searcher is None or len(self.events) < len(steps):
            try:
                if searcher is None:
                    searcher = self.open()
                    searcher.restore_trials(self.known())
                    for event in self.events[-1:]:
                        self.tell(searcher, *event)
                else:
                    self.perform(searcher, *steps[len(self.events)])
            except KilledError:
                searcher = None
                self.open = partial(open_searcher, resume=True)
        self.searcher = searcher

    def perform(self, searcher, *step):
        if step[0] == "asked":
            self.params[step[1]] = searcher.suggest(step[1])
            self.events.append(step)
        else:
            self.events.append(step)
            self.tell(searcher, *step)

    def tell(self, searcher, kind, number, *epoch):
        if self.is_over(number, kind):
            return
        if kind == "measured":
            searcher.on_trial_cost(number, self.costs(number))
            if self.is_infeasible(number):
                searcher.on_trial_end(number, "infeasible")
        elif kind == "reported":
            searcher.on_trial_result(number, *epoch, self.value(number, *epoch))
        elif kind == "ended":
            searcher.on_trial_end(number, self.end(number))
        elif kind != "asked":
            {"began": searcher.on_segment_start, "waits": searcher.on_trial_wait}[kind](number)

    def is_over(self, number, kind):
        measured = ("measured", number) in self.events and self.is_infeasible(number)
        return measured and kind != "measured"

    def is_infeasible(self, number):
        return self.costs(number)["num_parameters"] > 1e6

    def costs(self, number):
        return {"num_parameters": 3e5 * self.params[number]["model.decoder.depth"], "latency_ms": 1.0}

    def value(self, number, epoch):
        return compute_value(self.params[number]) + 1 / epoch

    def end(self, number):
        return ("complete", "stopped", "failed")[number % 3] if number > 3 else "complete"

    def known(self):
        kinds = {"asked": "running", "began": "running", "waits": "paused"}
        for number, params in self.params.items():
            mine = [event for event in self.events if event[1] == number]
            state = [kinds.get(kind, self.end(number)) for kind, *_ in mine if kind in (*kinds, "ended")][-1]
            measured = ("measured", number) in mine
            values = {event[2]: self.value(number, event[2]) for event in mine if event[0] == "reported"}
            if measured and self.is_infeasible(number):
                state, values = "infeasible", {}
            yield TrialSnapshot(number, state, params, values, self.costs(number) if measured else {})


@pytest.mark.parametrize(
    ("name", "how", "second"),
    [
        *((name, "within", None) for name in [*SAMPLERS, "grid"]),
        ("tpe", "before", None),
        ("tpe", "after", None),
        *((name, "within", "num_parameters") for name in ("tpe", "nsga")),
    ],
)
def test_a_sweep_that_is_killed_again_and_again_proposes_and_records_the_same(
    make, write_space, monkeypatch, tmp_path, name, how, second
):
    grid = "optimizer.lr: choice(0.1, 0.01, 0.001, 0.0001)\nmodel.decoder.depth: choice(1, 2, 4)"
    space, sampler = write_space(grid if name == "grid" else NUMBERS), SAMPLERS.get(name)
    first = [{"optimizer.lr": 0.01, "model.decoder.depth": 2}]
    settings = {"constraints": {"num_parameters": 1e6}, "seed": 2, "second_objective": second}
    settings |= {"points_to_evaluate": first}
    if isinstance(sampler, partial) and sampler.func is CmaEsSampler:
        settings.pop("constraints")
    whole = Sweep(partial(make, space, sampler, folder="whole", **settings), 11)
    kills = WriteKiller(monkeypatch, how, lambda write: write > 8 and write % 5 == 0)
    killed = Sweep(partial(make, space, sampler, folder="killed", **settings), 11)
    assert kills.num_kills > 15
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["journal.log"]
    assert killed.params == whole.params
    assert read_study(killed.searcher) == read_study(whole.searcher)


@pytest.mark.parametrize("how", ["before", "within", "after"])
@pytest.mark.parametrize("write", range(1, 7))
def test_a_sweep_that_is_killed_while_its_study_is_made_begins_again(make, write_space, monkeypatch, how, write):
    space = write_space(NUMBERS)
    whole = Sweep(partial(make, space, folder="whole"), 3)
    kills = WriteKiller(monkeypatch, how, lambda number: number == write)
    killed = Sweep(partial(make, space, folder="killed"), 3)
    assert kills.num_kills == 1
    assert killed.params == whole.params
    assert read_study(killed.searcher) == read_study(whole.searcher)


def damage_journal(how, file):
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    else:
        lines = content.splitlines(keepends=True)
        file.write_bytes(
            {
                "half a line": content[:-20],
                "no end of a line": content[:-1],
                "zeros": content + bytes(4096),
                "zeros in place of lines": b"".join(lines[:-6]) + bytes(sum(map(len, lines[-6:]))),
                "half the lines": b"".join(lines[: len(lines) // 2]) + b'{"op_code":6,\n',
                "a line in the middle": b"".join([*lines[:15], lines[15][:9] + b"\n", *lines[16:]]),
            }[how]
        )


@pytest.mark.parametrize(
    "how",
    [
        "half a line",
        "no end of a line",
        "zeros",
        "zeros in place of lines",
        "half the lines",
        "a line in the middle",
        "empty",
        "gone",
    ],
)
def test_what_a_damaged_file_lost_is_taken_from_the_events(make, write_space, tmp_path, how):
    space = write_space(NUMBERS)
    whole = Sweep(partial(make, space, TPE, constraints={"num_parameters": 1e6}), 8)
    known, before = list(whole.known()), read_study(whole.searcher)
    whole.searcher.close()
    damage_journal(how, tmp_path / "study" / "journal.log")
    searcher = make(space, TPE, constraints={"num_parameters": 1e6}, resume=True)
    searcher.restore_trials(known)
    lost = ("user_attrs", "system_attrs")  # where a point comes from, and the parameters beside the draws
    for found, expected in zip(read_study(searcher), before, strict=True):
        assert {**found, **dict.fromkeys(lost)} == {**expected, **dict.fromkeys(lost)}
        kept = {name: value for name, value in expected["user_attrs"].items() if name != ORIGIN_ATTRIBUTE}
        assert found["user_attrs"].items() >= kept.items()
    assert searcher.suggest(8)


@pytest.mark.parametrize("also", ["pass", "assert x > -5"])  # which fails for a draw that is not known
def test_lost_trials_of_a_space_that_names_its_draws_otherwise_keep_their_values(make, write_space, tmp_path, also):
    draw = "x = trial.suggest_float('log_lr', -5, -1)"
    text = f"def space(trial):\n    {draw}\n    {also}\n    return {{'optimizer.lr': 10**x}}\n"
    searcher = make(write_space(text, ".py"))
    params = searcher.suggest(0)
    searcher.close()
    (tmp_path / "study" / "journal.log").unlink()
    searcher = make(write_space(text, ".py"), resume=True)
    searcher.restore_trials([TrialSnapshot(0, "stopped", params, {2: 5.0, 3: math.nan})])
    (trial,) = searcher.study.trials
    assert (trial.state, trial.value, trial.params) == (TrialState.PRUNED, 5.0, {})
    assert trial.user_attrs["params"] == params
    assert searcher.suggest(1)


def test_trials_that_the_events_do_not_know_fail_but_for_the_next(make, write_space):
    space = write_space(SPACE)
    asked = make(space)
    params = [asked.suggest(number) for number in range(4)]
    searcher = make(space, resume=True)
    searcher.restore_trials(
        [TrialSnapshot(0, "running", params[0], {}), TrialSnapshot(1, "waiting", params[1], {1: 2.0})]
    )
    assert list_states(searcher) == ["RUNNING", "WAITING", "RUNNING", "FAIL"]
    assert searcher.suggest(2) == params[2]
    assert searcher.study.trials[1].intermediate_values == {1: 2.0}


def test_the_next_trial_that_was_never_asked_for_again_does_not_run_for_ever(make, write_space):
    asked = make(write_space(SPACE))
    params = [asked.suggest(number) for number in range(2)]
    searcher = make(write_space(SPACE), resume=True)
    searcher.restore_trials([TrialSnapshot(0, "complete", params[0], {3: 1.0})])
    searcher.close()
    assert list_states(searcher) == ["COMPLETE", "FAIL"]


def test_a_sweep_that_cannot_go_on_leaves_the_study_as_it_is(make, write_space):
    asked = make(write_space(SPACE))
    asked.suggest(0)
    make(write_space(SPACE), resume=True).close()  # killed before it knew what runs
    assert list_states(asked) == ["RUNNING"]


def test_a_full_disk_leaves_no_half_line(make, write_space, tmp_path, monkeypatch):
    searcher = make(write_space(SPACE))
    searcher.suggest(0)
    file = tmp_path / "study" / "journal.log"
    before = file.read_bytes()
    path_open = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, data):
            return self.file.write(data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **kwargs: Full(path_open(path, *args, **kwargs)))
        with pytest.raises(OSError, match="is the disk full"):
            searcher.on_trial_result(0, 1, 2.0)
    assert file.read_bytes() == before
    searcher.on_trial_result(0, 1, 2.0)
    assert searcher.study.trials[0].intermediate_values == {1: 2.0}


# --- constraints ------------------------------------------------------------------------------------------------------


def test_a_constraint_is_kept_as_optuna_keeps_it(make, write_space):
    searcher = make(write_space(SPACE), constraints={"num_parameters": 2e6, "memory_mb": None})
    assert searcher.constraints == {"num_parameters": 2e6}
    searcher.suggest(0)
    searcher.on_trial_cost(0, {"num_parameters": 1e6, "latency_ms": 3.5})
    searcher.on_trial_cost(0, {"num_parameters": 1e6, "latency_ms": 4.5})
    plain = optuna.create_study()
    plain.ask().set_constraint("num_parameters", -0.5)
    (trial,) = searcher.study.trials
    assert trial.system_attrs == plain.trials[0].system_attrs
    assert trial.constraints == {"num_parameters": -0.5}
    costs = {name: trial.user_attrs[name] for name in COST_NAMES if name in trial.user_attrs}
    assert costs == {"num_parameters": 1e6, "latency_ms": 3.5}


NUM_TRIALS = {"tpe": 30, "gp": 15}
"""How many trials a sampler needs to find a valley."""


def search_two_valleys(searcher, num_trials, *, is_trained=True):
    """The deeper valley, at 0.2, costs too much and the other one, at 0.8, does not.

    Returns:
        What it tried in the last two fifths of the trials.
    """
    asked = []
    for number in range(num_trials):
        (x,) = searcher.suggest(number).values()
        searcher.on_trial_cost(number, {"num_parameters": 2.5e6 - 2e6 * x})
        is_feasible = x >= 0.5 or not searcher.constraints
        if is_trained or is_feasible:
            searcher.on_trial_result(number, 3, abs(x - 0.2) if x < 0.5 else 0.5 + abs(x - 0.8))
        searcher.on_trial_end(number, "complete" if is_feasible else "infeasible")
        asked.append(x)
    return np.array(asked[-2 * num_trials // 5 :])


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_samplers_go_where_it_is_feasible_though_it_is_better_elsewhere(make, write_space, name, is_trained):
    space = write_space("x: interval(0.0, 1.0)")
    searcher = make(space, SAMPLERS[name], constraints={"num_parameters": 1.5e6}, seed=1)
    searched = search_two_valleys(searcher, NUM_TRIALS[name], is_trained=is_trained)
    assert (searched >= 0.5).mean() >= 0.75
    assert (abs(searched - 0.8) < 0.15).mean() >= 0.5


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_without_the_constraint_they_go_where_it_is_better(make, write_space, name):
    """Else the test above would say nothing."""
    searcher = make(write_space("x: interval(0.0, 1.0)"), SAMPLERS[name], seed=1)
    assert (search_two_valleys(searcher, NUM_TRIALS[name]) < 0.5).mean() >= 0.75


@pytest.mark.parametrize(("name", "state"), [("tpe", "PRUNED"), ("gp", "COMPLETE"), ("nsga", "COMPLETE")])
def test_what_was_never_trained_shows_its_constraint_to_those_who_look_at_complete_trials_only(
    make, write_space, visible_trials, name, state
):
    searcher = make(write_space("x: interval(0.0, 1.0)"), SAMPLERS[name], constraints={"num_parameters": 1e6})
    for number, value in enumerate([3.0, 9.0, 4.0]):
        searcher.suggest(number)
        searcher.on_trial_cost(number, {"num_parameters": 1e6})
        searcher.on_trial_result(number, 3, value)
        searcher.on_trial_end(number, "complete")
    searcher.suggest(3)
    searcher.on_trial_cost(3, {"num_parameters": 2e6})
    searcher.on_trial_end(3, "infeasible")
    searcher.suggest(4)
    assert visible_trials[3].state.name == state
    assert visible_trials[3].value == (4.0 if state == "COMPLETE" else None)  # the median
    assert visible_trials[3].constraints == {"num_parameters": 1.0}
    assert list_states(searcher) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "RUNNING"]


def test_of_a_trial_that_was_not_measured_nothing_is_learnt_where_there_is_a_limit(make, write_space, visible_trials):
    searcher = make(write_space("x: interval(0.0, 1.0)"), constraints={"num_parameters": 1e6})
    searcher.suggest(0)
    searcher.on_trial_result(0, 3, 1.0)
    searcher.on_trial_end(0, "complete")
    searcher.suggest(1)
    assert [trial.state.name for trial in visible_trials] == ["FAIL", "RUNNING"]
    assert list_states(searcher) == ["COMPLETE", "RUNNING"]


# --- two objectives ---------------------------------------------------------------------------------------------------

TWO = {"second_objective": "num_parameters"}


def run_with_two_objectives(searcher, num_trials):
    """Rates of 1e-1 are cheap; every third trial is stopped after the first of three epochs, every fifth fails."""
    asked = []
    for number in range(num_trials):
        asked.append(searcher.suggest(number))
        searcher.on_trial_cost(number, {"num_parameters": compute_cost(asked[-1]), "latency_ms": 1.0})
        end = "failed" if number % 5 == 4 else "stopped" if number % 3 == 2 else "complete"
        for epoch in range(1, 2 if end == "stopped" else 4):
            searcher.on_trial_result(number, epoch, compute_value(asked[-1]) + 1 / epoch)
        searcher.on_trial_end(number, end)
    return asked


def compute_cost(params):
    return 1e6 * abs(math.log10(params["optimizer.lr"]) + 1)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_study_has_both_objectives_with_their_names_and_optuna_their_front(make, write_space, mode):
    searcher = make(write_space(NUMBERS), **TWO, mode=mode)
    asked = run_with_two_objectives(searcher, 30)
    study = searcher.study
    assert study.metric_names == [METRIC, "num_parameters"]
    assert [direction.name for direction in study.directions] == [f"{mode.upper()}IMIZE", "MINIMIZE"]
    sign = 1 if mode == "min" else -1
    points = {}
    for number, (trial, params) in enumerate(zip(study.trials, asked, strict=True)):
        assert trial.state.name == ("FAIL" if number % 5 == 4 else "PRUNED" if number % 3 == 2 else "COMPLETE")
        reached = [compute_value(params) + (1.0 if trial.state.name == "PRUNED" else 1 / 3), compute_cost(params)]
        assert trial.values == (None if trial.state.name == "FAIL" else pytest.approx(reached))
        if trial.state.name == "COMPLETE":
            points[number] = (sign * trial.values[0], trial.values[1])
    front = [n for n, p in points.items() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())]
    assert sorted(trial.number for trial in study.best_trials) == front
    assert len(front) > 1 or mode == "max"


@pytest.mark.parametrize("options", [{"n_startup_trials": 1}, {"n_startup_trials": 8, "unheard_of": 3}])
@pytest.mark.parametrize("objectives", [{}, TWO])
def test_the_options_of_curves_are_checked_though_with_two_objectives_tpe_proposes(
    make, write_space, options, objectives
):
    with pytest.raises(UserError, match=r"n_startup_trials=1 must be|unheard_of"):
        make(write_space(SPACE), partial(CurveSampler, **options), **objectives)


def test_with_two_objectives_stopped_trials_are_listed_by_epoch_and_front_and_without_reports(
    make, write_space, visible_trials
):
    """Neither of 4 and 0 is better, 3 is worse than both; 1 was trained further, and 2 has not been measured."""
    searcher = make(write_space(SPACE), TPE, **TWO)
    reports = [(1, 5.0, 1e6), (2, 9.0, 9e6), (1, 0.1, None), (1, 6.0, 3e6), (1, 4.0, 2e6)]
    for number, (epoch, value, cost) in enumerate(reports):
        searcher.suggest(number)
        if cost:
            searcher.on_trial_cost(number, {"num_parameters": cost})
        searcher.on_trial_result(number, epoch, value)
        (searcher.on_trial_wait if number == 3 else partial(searcher.on_trial_end, state="stopped"))(number)
    searcher.suggest(5)
    shown = [(trial.number, trial.values) for trial in visible_trials if trial.state == TrialState.PRUNED]
    assert shown == [(1, [9.0, 9e6]), (4, [4.0, 2e6]), (0, [5.0, 1e6]), (3, [6.0, 3e6])]
    assert not any(trial.intermediate_values for trial in visible_trials if trial.state == TrialState.PRUNED)
    assert searcher.study.trials[1].intermediate_values == {2: 9.0}  # in the study they are kept
    assert list_states(searcher)[:5] == ["PRUNED", "PRUNED", "FAIL", "WAITING", "PRUNED"]


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga", "random"])
def test_with_two_objectives_a_proposal_is_what_optuna_draws_from_what_is_complete(make, write_space, name):
    space, number = write_space(NUMBERS), 5 if name == "gp" else 12
    searcher = make(space, SAMPLERS[name], seed=5, **TWO)
    plain = optuna.create_study(directions=["minimize", "minimize"])
    for done in range(number):
        params = searcher.suggest(done)
        trial = searcher.study.trials[-1]
        searcher.on_trial_cost(done, {"num_parameters": compute_cost(params)})
        searcher.on_trial_result(done, 3, compute_value(params))
        searcher.on_trial_end(done, "complete")
        trial.state, trial.values = TrialState.COMPLETE, [compute_value(params), compute_cost(params)]
        trial.datetime_complete = trial.datetime_start
        plain.add_trial(trial)
    seed = int(np.random.SeedSequence([5, number]).generate_state(1)[0])
    with silence_optuna():
        plain.sampler = SAMPLERS[name](seed=seed)
    assert searcher.suggest(number) == space.sample(plain.ask())


@pytest.mark.parametrize("second", [None, "num_parameters"])
def test_tpe_models_parameters_together_for_one_objective_and_each_by_itself_for_two(make, write_space, second):
    asked = {}
    told = {None: run_alone, "num_parameters": run_with_two_objectives}[second]
    for name, changes in {
        "null": {"multivariate": None, "group": True},
        "together": {"multivariate": True, "group": True},
        "each": {"multivariate": False, "group": False},
    }.items():
        sampler = partial(TPESampler, n_startup_trials=4, **changes)
        asked[name] = told(make(write_space(NUMBERS), sampler, folder=name, second_objective=second), 10)
    assert asked["null"] == asked["together" if second is None else "each"]
    assert asked["together"] != asked["each"]


def test_with_two_objectives_the_default_sampler_is_tpe(make, write_space):
    space = write_space(NUMBERS)
    tpe = partial(TPESampler, n_startup_trials=4, constant_liar=True)
    expected = run_with_two_objectives(make(space, tpe, folder="tpe", **TWO), 10)
    sampler = instantiate(compose("tune", ["searcher.sampler.n_startup_trials=4"]).searcher.sampler)
    assert sampler.func is CurveSampler
    assert run_with_two_objectives(make(space, sampler, folder="default", **TWO), 10) == expected


@pytest.mark.parametrize("name", ["nsga", "tpe", "qmc"])
def test_with_two_objectives_the_same_seed_asks_for_the_same_configurations(make, write_space, name):
    space = write_space(NUMBERS)
    asked = run_with_two_objectives(make(space, SAMPLERS[name], folder="a", seed=5, **TWO), 14)
    assert run_with_two_objectives(make(space, SAMPLERS[name], folder="b", seed=5, **TWO), 14) == asked
    assert run_with_two_objectives(make(space, SAMPLERS[name], folder="c", seed=6, **TWO), 14) != asked


def test_tpe_learns_where_the_front_is_also_from_stopped_trials(make, write_space):
    """It lies between rates of 1e-3 and 1e-1, in half of the orders of magnitude, and at one depth of five."""
    searcher = make(write_space(NUMBERS), TPE, **TWO)
    asked = []
    for number in range(40):
        asked.append(searcher.suggest(number))
        loss = compute_value(asked[-1]) + asked[-1]["model.decoder.depth"]
        searcher.on_trial_cost(number, {"num_parameters": compute_cost(asked[-1])})
        searcher.on_trial_result(number, 1, loss)
        searcher.on_trial_end(number, "stopped")
    shallow = [params for params in asked[-20:] if params["model.decoder.depth"] == 1]
    assert len(shallow) >= 10  # by chance four
    assert sum(params["optimizer.lr"] > 1e-3 for params in shallow) >= 0.7 * len(shallow)


def test_a_sampler_of_one_objective_is_refused(make, write_space):
    with pytest.raises(UserError, match=r"second_objective=num_parameters: CmaEsSampler supports one objective"):
        make(write_space(NUMBERS), SAMPLERS["cmaes"], **TWO)


def test_what_was_never_trained_shows_its_cost_with_a_value_that_says_nothing(make, write_space, visible_trials):
    searcher = make(write_space("x: interval(0.0, 1.0)"), SAMPLERS["gp"], constraints={"num_parameters": 1e6}, **TWO)
    for number, value in enumerate([3.0, 9.0, 4.0, None]):
        searcher.suggest(number)
        searcher.on_trial_cost(number, {"num_parameters": 2e6 if value is None else 1e6})
        if value is not None:
            searcher.on_trial_result(number, 3, value)
        searcher.on_trial_end(number, "infeasible" if value is None else "complete")
    searcher.suggest(4)
    assert (visible_trials[3].state.name, visible_trials[3].values) == ("COMPLETE", [4.0, 2e6])


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"points_to_evaluate": [{"lr": 0.1}]},
            r"searcher.points_to_evaluate: .*space.yaml does not search lr; did you mean optimizer.lr\?",
        ),
        ({"points_to_evaluate": [{"x": 0.1}]}, "does not search x; it searches optimizer.lr, model/decoder there"),
        (
            {"points_to_evaluate": [{"optimizer.lr": 1.0}]},
            r"searcher.points_to_evaluate: optimizer.lr=1.0 is out of range; .*tag\(log, interval\(1e-5, 1e-1\)\)",
        ),
        ({"points_to_evaluate": [{"optimizer.lr": "fast"}]}, "optimizer.lr=fast is out of range"),
        ({"points_to_evaluate": [{"model/decoder": True}]}, "model/decoder=True is out of range"),
        ({"constraints": {"parameters": 1.0}}, "constraints.parameters: .* num_parameters, latency_ms, memory_mb"),
        ({"constraints": {"latency_ms": 0}}, "constraints.latency_ms must be a number above 0, or null, but it is 0"),
        ({"constraints": {"latency_ms": "fast"}}, "constraints.latency_ms must be a number above 0"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "searcher.storage=sqlite:////nowhere/at/all.db cannot be opened"),
        ({"storage": "sqlite:///study.db"}, "searcher.storage=sqlite:///study.db must have an absolute path"),
        ({"storage": "sqlite://"}, "searcher.storage=sqlite:// must have an absolute path"),
        ({"storage": "study.db"}, "searcher.storage=study.db cannot be opened"),
        ({"storage": "nonsense://me:secret@host/db"}, r"searcher.storage=nonsense://me:\*\*\*@host/db cannot be"),
        ({"seed": -1}, "sweep.seed must be at least 0, but it is -1"),
        ({"sampler": partial(TPESampler, group=True, multivariate=False)}, "searcher.sampler: .*multivariate"),
        ({"sampler": partial(TPESampler, n_startup_trials="x")}, "searcher.sampler: .*'<' not supported"),
        ({"sampler": partial(TPESampler, n_start=1)}, "searcher.sampler: .*n_start"),
        ({"sampler": None}, "searcher=grid needs a list of values"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(make, write_space, tmp_path, changes, sentence):
    space = write_space(SPACE)
    with pytest.raises(UserError, match=sentence) as told:
        make(space, **changes)
    assert "\n" not in str(told.value)
    assert "secret" not in str(told.value)
    assert [file.name for file in tmp_path.iterdir()] == ["space.yaml"]


def test_a_value_out_of_the_range_of_a_python_space_is_told_with_the_range(make, write_space):
    text = (
        "def space(trial):\n    return {'a': trial.suggest_int('a', 1, 5), 'b': trial.suggest_categorical('b', ['x'])}"
    )
    with pytest.raises(UserError, match=r"a=6 is out of range; .*space.py has 1 to 5"):
        make(write_space(text, ".py"), points_to_evaluate=[{"a": 6}])
    with pytest.raises(UserError, match=r"b=y is out of range; .*space.py has x"):
        make(write_space(text, ".py"), points_to_evaluate=[{"b": "y"}])


def test_a_grid_takes_no_earlier_results(make, write_space):
    with pytest.raises(UserError, match=r"leave out searcher\.warm_start"):
        make(write_space(GRID), None, warm_start=["sweeps/a"])


def test_two_sweeps_share_a_database_but_not_a_name(make, write_space, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    space = write_space(SPACE)
    run_alone(make(space, folder="a", name="a", storage=storage), 2)
    other = make(space, folder="b", name="b", storage=storage)
    assert run_alone(other, 3) == run_alone(make(space, folder="c"), 3)
    with pytest.raises(UserError, match=r"searcher.storage=sqlite:.* already has a study a; choose another"):
        make(space, folder="d", name="a", storage=storage)
    other.close()
    again = make(space, folder="b", name="b", storage=storage, resume=True)
    again.restore_trials([])
    assert len(again.study.trials) == 3


def test_settings_of_the_sampler_are_configuration():
    made = instantiate(compose("tune", ["searcher.sampler.n_startup_trials=7"]).searcher)
    assert made.keywords["sampler"].keywords["n_startup_trials"] == 7
    first = compose(
        "tune", ["searcher.points_to_evaluate=[{optimizer.lr:0.01,model/decoder:effpose}]", "searcher=gp"]
    ).searcher
    assert instantiate(first).keywords["points_to_evaluate"] == [{"optimizer.lr": 0.01, "model/decoder": "effpose"}]


# --- more epochs ------------------------------------------------------------------------------------------------------


def raise_epochs(searcher, max_epochs):
    """What the sweep does when the user raises the number of epochs: complete trials go on."""
    searcher.on_max_epochs(max_epochs)
    snapshots = [
        trial._replace(state="paused") if trial.state == "complete" else trial for trial in searcher.snapshots.values()
    ]
    searcher.restore_trials(snapshots)


def without_state(trials):
    return [{key: value for key, value in trial.items() if key not in ("state", "values")} for trial in trials]


def test_complete_trials_go_on_in_a_study_of_their_own(make, write_space, storage):
    searcher = make(write_space(NUMBERS), TPE, storage=storage)
    run_alone(searcher, 8)
    before, states = read_study(searcher), list_states(searcher)
    attributes = searcher.study.user_attrs
    raise_epochs(searcher, 9)
    assert searcher.study.study_name == "test (9 epochs)"
    assert {"COMPLETE", "PRUNED"} == set(states)
    assert list_states(searcher) == ["WAITING" if state == "COMPLETE" else state for state in states]
    assert without_state(read_study(searcher)) == without_state(before)
    assert searcher.study.user_attrs == {**attributes, "sweep": "test", "max_epochs": 9}
    assert searcher.study.metric_names == [METRIC]
    first = optuna.load_study(study_name="test", storage=searcher._storage)
    assert [trial.state.name for trial in first.trials] == states
    searcher.on_segment_start(states.index("COMPLETE"))
    for epoch in range(4, 10):
        searcher.on_trial_result(states.index("COMPLETE"), epoch, 0.5)
    searcher.on_trial_end(states.index("COMPLETE"), "complete")
    assert searcher.study.trials[states.index("COMPLETE")].values == [0.5]


@pytest.mark.parametrize("raises", [(9,), (9, 27)])
def test_a_sweep_with_more_epochs_proposes_the_same_after_a_restart(make, write_space, raises):
    space = write_space(NUMBERS)
    whole, begun = (make(space, TPE, folder=folder) for folder in ("whole", "begun"))
    for searcher in (whole, begun):
        run_alone(searcher, 8)
        for max_epochs in raises:
            raise_epochs(searcher, max_epochs)
    begun.close()
    resumed = make(space, TPE, folder="begun", resume=True)
    for max_epochs in raises:
        resumed.on_max_epochs(max_epochs)
    resumed.restore_trials(list(begun.snapshots.values()))
    assert resumed.suggest(8) == whole.suggest(8)
    assert read_study(resumed) == read_study(whole)


def test_a_sweep_that_is_killed_while_its_study_is_copied_copies_it_again(make, write_space):
    space = write_space(NUMBERS)
    whole, killed = (make(space, TPE, folder=folder) for folder in ("whole", "killed"))
    for searcher in (whole, killed):
        run_alone(searcher, 8)
    raise_epochs(whole, 9)
    with killed_after_trials(killed, 3):
        killed.on_max_epochs(9)
    resumed = make(space, TPE, folder="killed", resume=True)
    resumed.snapshots = dict(killed.snapshots)
    raise_epochs(resumed, 9)
    assert read_study(resumed) == read_study(whole)
