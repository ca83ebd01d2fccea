"""Candidates of a model: they are configurations that Optuna's own trials give as well."""

import numpy as np
import optuna
import pytest

from handpose.search.candidates import CandidatePool
from handpose.search.space import load_space


@pytest.mark.parametrize("name", ["default", "full", "recipe"])
def test_a_changed_candidate_is_what_a_trial_of_optuna_with_its_draws_gives(name):
    space = load_space(name)
    pool = CandidatePool(space)
    rng = np.random.default_rng(0)
    good = pool.draw(rng, num_random=5, good=[], num_changed=0)[0]
    candidates, vectors = pool.draw(rng, num_random=0, good=good, num_changed=30)
    assert len(candidates) == len(vectors) == 30
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for candidate in candidates:
        study.enqueue_trial(candidate.draws)
        trial = study.ask()
        assert space.sample(trial) == candidate.params
        assert (trial.params, trial.distributions) == (candidate.draws, candidate.distributions)


def test_a_draw_that_the_changed_candidate_does_not_have_is_left_out(write_space):
    space = write_space(
        "def space(trial):\n"
        "    kind = trial.suggest_categorical('a', ['x', 'y'])\n"
        "    return {'a': kind, **({'b': trial.suggest_float('b', 0.5, 1.0)} if kind == 'y' else {})}\n",
        suffix=".py",
    )
    pool = CandidatePool(space)
    rng = np.random.default_rng(0)
    good = [each for each in pool.draw(rng, num_random=50, good=[], num_changed=0)[0] if each.params["a"] == "x"]
    changed = pool.draw(rng, num_random=0, good=good, num_changed=40)[0]
    assert {each.params["a"] for each in changed} == {"x", "y"}
    assert all(("b" in each.draws) == (each.params["a"] == "y") for each in changed)
    assert all(0.5 <= each.draws["b"] <= 1.0 for each in changed if "b" in each.draws)
