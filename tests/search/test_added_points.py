"""Configurations that a user adds to a running sweep: which are accepted, and what they leave of the plan."""

from functools import partial

import pytest
from optuna.samplers import RandomSampler, TPESampler

from handpose.errors import UserError
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.searcher import Searcher, TrialSnapshot
from tests.sweep.objectives import METRIC

SPACE = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel/decoder: choice(pyramid, effpose)\n"
FINITE = "optimizer.lr: choice(0.1, 0.2, 0.3)\n"
DEFAULTS = {"optimizer.lr": 1e-3, "model/decoder": "pyramid"}
RATE = "optimizer.lr"


@pytest.fixture
def make(tmp_path, write_space):
    made = []

    def build(space=SPACE, sampler=RandomSampler, *, resume=False, **changes):
        values = {"name": "test", "metric": METRIC, "mode": "min", "max_epochs": 3, "seed": 0, "defaults": DEFAULTS}
        values |= {"space": write_space(space), "folder": tmp_path / "study", "sampler": sampler, "resume": resume}
        made.append(OptunaSearcher(**values | changes))
        return made[-1]

    yield build
    for searcher in made:
        searcher.close()


@pytest.mark.parametrize("sampler", [RandomSampler, partial(TPESampler, n_startup_trials=1)])
def test_the_trial_has_the_values_that_were_given_and_the_defaults_of_the_others(make, sampler):
    searcher = make(sampler=sampler)
    searcher.check_point({RATE: 0.02})
    assert searcher.suggest_point(0, {RATE: 0.02}) == {RATE: 0.02, "model/decoder": "pyramid"}
    assert searcher.explain_suggestion(0) == "added by the user"


def test_points_to_try_first_are_still_tried(make):
    rates = [0.01, 0.02]
    searcher = make(points_to_evaluate=[{RATE: rate} for rate in rates])
    assert searcher.suggest(0) == DEFAULTS
    assert searcher.suggest_point(1, {RATE: 0.05})[RATE] == 0.05
    assert [searcher.suggest(number)[RATE] for number in (2, 3)] == rates
    assert searcher.explain_suggestion(3) == "point 2 of searcher.points_to_evaluate"


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_resumed_searcher_tries_them_too(make, is_recorded):
    """The events say which trial was added; the newest one may be missing there."""
    searcher = make(points_to_evaluate=[{RATE: 0.01}])
    added = searcher.suggest_point(0, {RATE: 0.05})
    searcher.close()
    again = make(resume=True, points_to_evaluate=[{RATE: 0.01}])
    again.restore_trials([TrialSnapshot(0, "waiting", added, {}, is_added=True)] if is_recorded else [])
    if not is_recorded:
        assert again.suggest_point(0, {RATE: 0.05}) == added
    assert [again.suggest(number)[RATE] for number in (1, 2)] == [1e-3, 0.01]


def test_a_proposal_from_before_a_crash_keeps_its_number(make):
    searcher = make()
    proposed = searcher.suggest(0)
    searcher.close()
    again = make(resume=True)
    again.restore_trials([])
    assert again.suggest_point(0, {RATE: 0.05}) is None
    assert again.suggest(0) == proposed
    assert again.suggest_point(1, {RATE: 0.05})[RATE] == 0.05


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({RATE: 1.0}, r"add: optimizer.lr=1.0 is out of range; .*interval\(1e-5, 1e-1\)"),
        ({"lr": 0.1}, "add: .*space.yaml does not search lr; did you mean optimizer.lr"),
        ({"model/decoder": "resnet"}, "model/decoder=resnet is out of range"),
        ({RATE: 1e-3}, "would give the same training again"),
        ({"model/decoder": "pyramid"}, "would give the same training again"),
    ],
)
def test_what_is_not_in_the_space_or_was_tried_is_refused(make, params, sentence):
    searcher = make()
    searcher.suggest(0)  # the default configuration
    with pytest.raises(UserError, match=sentence):
        searcher.check_point(params)


def test_a_population_may_repeat_a_configuration(make):
    searcher = make(repeats=True)
    searcher.suggest(0)
    searcher.check_point({RATE: 1e-3})


def test_a_finite_space_has_each_of_its_points_once(make):
    searcher = make(FINITE, defaults={RATE: 0.1})
    tried = [searcher.suggest(0)[RATE], searcher.suggest_point(1, {RATE: 0.3})[RATE], searcher.suggest(2)[RATE]]
    assert sorted(tried) == [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="same training"):
        searcher.check_point({RATE: 0.2})


def test_a_grid_refuses(make):
    with pytest.raises(UserError, match="tries every configuration"):
        make(FINITE, None).check_point({RATE: 0.3})


def test_a_searcher_that_does_not_say_otherwise_refuses():
    with pytest.raises(UserError, match="cannot try a configuration that is given while the sweep runs"):
        Searcher().check_point({RATE: 0.3})
