"""The sampler that knows learning curves, on a loss with a known optimum."""

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from handpose.search.candidates import CandidatePool
from handpose.search.curve_sampler import CurveSampler
from handpose.search.distributions import count_values

MAX_EPOCHS = 9
SPACE = """
optimizer.lr: tag(log, interval(1e-4, 1e-1))
model.decoder.depth: range(1, 6)
loss.divergence: choice(kl, jsd)
"""
CONDITIONAL = """
def space(trial):
    kind = trial.suggest_categorical("kind", ["a", "b"])
    rest = {"x": trial.suggest_float("x", 0, 1)} if kind == "a" else {"y": trial.suggest_int("y", 1, 9)}
    return {"kind": kind} | rest
"""


def compute_loss(params, epoch):
    """Least, 10 at the end, for lr = 0.01, depth 4 and kl."""
    distance = (np.log10(params["optimizer.lr"]) + 2) ** 2 + 0.1 * (params["model.decoder.depth"] - 4) ** 2
    return (10 + 5 * distance + 2 * (params["loss.divergence"] != "kl")) * (1 + 1 / epoch)


def run_search(
    space, sampler_of, num, *, compute=compute_loss, direction="minimize", num_epochs=MAX_EPOCHS, fail=None, note=None
):
    """Search with one trial at a time; a function of its number makes the sampler. Returns the trials."""
    study = optuna.create_study(direction=direction)
    for number in range(num):
        study.sampler = sampler_of(number)
        trial = study.ask()
        params = space.sample(trial)
        if note is not None:
            note(number, params)
        if fail is not None and fail(params):
            study.tell(trial, state=TrialState.FAIL)
            continue
        for epoch in range(1, num_epochs + 1):
            trial.report(compute(params, epoch), epoch)
        if num_epochs < MAX_EPOCHS:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, compute(params, MAX_EPOCHS))
    return study.trials


@pytest.fixture
def make_sampler(write_space):
    def make(text=SPACE, suffix=".yaml", *, seconds=None):
        space = write_space(text, suffix)
        pool = CandidatePool(space)
        return space, lambda number: CurveSampler(
            pool=pool, max_epochs=MAX_EPOCHS, epoch_seconds=seconds or {}, n_startup_trials=5, seed=number
        )

    return make


def list_values(trials):
    return [trial.intermediate_values[max(trial.intermediate_values)] for trial in trials if trial.intermediate_values]


def test_it_comes_nearer_to_the_optimum_than_random_search(make_sampler):
    space, sampler_of = make_sampler()
    found = min(list_values(run_search(space, sampler_of, 25)))
    drawn = min(list_values(run_search(space, lambda number: optuna.samplers.RandomSampler(seed=number), 100)))
    optimum = 10 * (1 + 1 / MAX_EPOCHS)
    assert found - optimum < 0.2 * (drawn - optimum)


def test_it_learns_from_trials_that_were_stopped_early(make_sampler):
    space, sampler_of = make_sampler()
    newest = run_search(space, sampler_of, 25, num_epochs=1)[-5:]
    assert all(abs(np.log10(trial.params["optimizer.lr"]) + 2) < 0.5 for trial in newest)


@pytest.mark.slow
def test_a_metric_that_is_better_the_larger_it_is(make_sampler):
    space, sampler_of = make_sampler()
    trials = run_search(space, sampler_of, 25, compute=lambda *a: 1 - compute_loss(*a) / 100, direction="maximize")
    assert max(list_values(trials)) > 1 - 0.115


@pytest.mark.slow
def test_what_takes_long_must_be_worth_it(make_sampler):
    """Deep decoders are as good as others. They are tried less often if they take ten times as long.

    Only until the optimum is found: afterwards what is left to gain is where little has been tried.
    """

    def compute(params, epoch):
        return 10 + (np.log10(params["optimizer.lr"]) + 2) ** 2 + 1 / epoch

    seconds = {}
    space, sampler_of = make_sampler(seconds=seconds)
    shares = []
    for slow in (1.0, 10.0):

        def note(number, params, slow=slow):
            seconds[number] = slow if params["model.decoder.depth"] > 3 else 1.0

        trials = []
        for seed in (0, 1000, 2000):
            seconds.clear()
            sampler = lambda number, seed=seed: sampler_of(number + seed)  # noqa: E731
            trials += run_search(space, sampler, 15, compute=compute, note=note)[5:]
        shares.append(np.mean([trial.params["model.decoder.depth"] > 3 for trial in trials]))
    assert shares[1] < shares[0] / 2


@pytest.mark.slow
def test_it_keeps_away_from_where_trials_fail(make_sampler):
    """Though it is better there, and half of the space fails. The best that does not fail is 12.63."""
    space, sampler_of = make_sampler()
    fails = lambda params: params["optimizer.lr"] > 3e-3  # noqa: E731
    best = []
    for seed in (1000, 2000, 3000):
        trials = run_search(space, lambda number, seed=seed: sampler_of(number + seed), 40, fail=fails)
        assert sum(trial.state == TrialState.FAIL for trial in trials[20:]) <= 8
        assert sum(trial.state == TrialState.FAIL for trial in trials[:10]) >= 3
        best.append(min(list_values(trials)))
    assert np.median(best) < 12.8


def test_a_proposal_is_the_same_for_the_same_trials_and_seed(make_sampler):
    space, sampler_of = make_sampler()
    once, again = (run_search(space, sampler_of, 12) for _ in range(2))
    assert [trial.params for trial in once] == [trial.params for trial in again]
    assert len({str(trial.params) for trial in once}) == 12


@pytest.mark.slow
def test_conditional_parameters_are_proposed_together(make_sampler):
    space, sampler_of = make_sampler(CONDITIONAL, ".py")
    loss = lambda params, epoch: 1 + (params["x"] - 0.5) ** 2 if "x" in params else 3.0  # noqa: E731
    trials = run_search(space, sampler_of, 25, compute=loss)
    assert all(set(trial.params) in ({"kind", "x"}, {"kind", "y"}) for trial in trials)
    assert min(list_values(trials)) < 1.001


def test_it_says_where_a_proposal_comes_from(make_sampler):
    space, sampler_of = make_sampler()
    study = optuna.create_study()
    study.sampler = sampler_of(0)
    space.sample(study.ask())
    assert study.sampler.explain_choice() == "a random start-up trial of CurveSampler, which needs 5 results"
    trials = run_search(space, sampler_of, 12)
    study = optuna.create_study()
    study.add_trials(trials)
    study.sampler = sampler_of(12)
    space.sample(study.ask())
    words, expected = study.sampler.explain_choice().split(" expects ")
    assert words == "CurveSampler, which"
    assert float(expected.split()[0]) == pytest.approx(10 * (1 + 1 / 9), rel=0.1)


@pytest.mark.parametrize("number", [1, 2.5, None, "5", float("nan")])
def test_the_number_of_start_up_trials_is_checked(number):
    with pytest.raises(ValueError, match=f"n_startup_trials={number} must be an integer of at least 2"):
        CurveSampler(pool=None, max_epochs=9, epoch_seconds={}, n_startup_trials=number)


def test_it_finds_the_few_good_trials_among_equally_bad_ones(make_sampler):
    """Four fifths of the space have the value 0, which is the worst one; the good trials are all that differs."""
    space, sampler_of = make_sampler("a: interval(0, 1)\nb: range(1, 6)\n")
    value = lambda params, epoch: 0.1 * params["a"] * params["b"] * (params["a"] > 0.8)  # noqa: E731
    trials = run_search(
        space, lambda number: sampler_of(number + 100), 25, compute=value, direction="maximize", num_epochs=MAX_EPOCHS
    )
    assert sum(trial.params["a"] > 0.8 for trial in trials[10:]) > 7
    assert max(list_values(trials)) > 0.45


def test_candidates_are_points_of_the_space_and_changed_ones_stay_near(write_space):
    space = write_space(SPACE)
    pool = CandidatePool(space)
    rng = np.random.default_rng(0)
    (good,), _ = pool.draw(rng, num_random=1, good=[], num_changed=0)
    candidates, vectors = pool.draw(rng, num_random=50, good=[good], num_changed=40)
    assert len(candidates) == 90
    np.testing.assert_array_equal(vectors, pool.encoder.encode([each.params for each in candidates]))
    for each in candidates:
        assert all(
            each.distributions[name]._contains(each.distributions[name].to_internal_repr(value))
            for name, value in each.draws.items()
        )
        assert each.params["model.decoder.depth"] in range(1, 6)
        assert count_values(each.distributions["loss.divergence"]) == 2
    num_kept = [sum(each.draws[name] == value for name, value in good.draws.items()) for each in candidates[50:]]
    assert min(num_kept) >= 0
    assert np.mean(num_kept) > 1
