"""The expected gain of further trials against closed forms, and in searches whose optimum is known."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from handpose.search.candidates import Candidate, CandidatePool
from handpose.search.curve_model import CurveModel, CurvePoints
from handpose.search.curve_worth import ObservedCurve
from handpose.search.expected_gain import _choose_set, estimate_gain
from handpose.search.points import place_values

MAX_EPOCHS = 9


def test_the_options_that_are_chosen_complement_each_other():
    """Two options that are good together beat the two that are good alone; an option that never gains is not chosen."""
    gains = np.array([[3.0, 3.0, 0.0, 0.0], [2.9, 2.9, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    assert _choose_set(gains, 1) == [0]
    assert _choose_set(gains, 2) == [0, 2]
    assert _choose_set(gains, 4) == [0, 2]


def test_the_gain_of_several_options_is_that_of_independent_normal_values():
    gains = np.random.default_rng(0).standard_normal((3, 40_000))
    for num in (1, 2, 3):
        chosen = _choose_set(gains, num)
        expected = quad(lambda t, num=num: 1 - norm.cdf(t) ** num, 0, 8)[0]
        assert np.maximum(gains[chosen].max(0), 0).mean() == pytest.approx(expected, abs=0.01)


def test_draws_have_the_means_and_covariances_of_the_formula():
    """Two configurations whose ends are predicted from one value, with the typical scales."""
    model = CurveModel(1, 27)
    points = CurvePoints(np.array([[0.5]]), np.array([27]), np.array([0]))
    posterior = model.condition(points, np.array([2.0]))
    draws = posterior.draw_means(np.array([[0.5], [9e9]]), 27, 200_000, np.random.default_rng(0))
    shared, mean, own, noise = 0.7**2 + 0.5**2, 1.0**2 + 1.0**2, 0.2**2 + 0.2**2, 0.1**2 + 1e-6
    seen = shared + mean + own + noise
    before = np.array([[shared + mean, mean], [mean, shared + mean]])
    to_seen = np.array([shared + mean, mean])
    np.testing.assert_allclose(draws.mean(1), 2 * to_seen / seen, atol=0.01)
    np.testing.assert_allclose(np.cov(draws), before - np.outer(to_seen, to_seen) / seen, atol=0.01)


def make_search(space, points, *, num_complete):
    """Trials at x whose loss ends at 10 + 20 (x - 0.3)², of which the first are complete."""
    pool = CandidatePool(space)
    rng = np.random.default_rng(0)
    candidates, curves = [], []
    for number, x in enumerate(points):
        params = {"optimizer.lr": x}
        placed = place_values(space, params)
        candidates.append(Candidate(placed.draws, placed.distributions, params))
        num_epochs = MAX_EPOCHS if number < num_complete else 2
        losses = {
            epoch: float((10 + 20 * (x - 0.3) ** 2) * (1 + epoch**-0.7) * np.exp(0.002 * rng.standard_normal()))
            for epoch in range(1, num_epochs + 1)
        }
        curves.append(ObservedCurve(pool.encoder.encode([params])[0], losses, has_ended=num_epochs == MAX_EPOCHS))
    return pool, candidates, curves


@pytest.fixture
def space(write_space):
    return write_space("optimizer.lr: interval(0.01, 0.99)\n")


def test_nothing_is_expected_once_the_optimum_is_reached_and_much_before(space):
    end = 1 + MAX_EPOCHS**-0.7

    def estimate(points):
        pool, candidates, curves = make_search(space, points, num_complete=len(points))
        return estimate_gain(pool, candidates, curves, max_epochs=MAX_EPOCHS, num_more=len(points), seed=0)

    assert estimate([0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]) == pytest.approx(20 * 0.3**2 * end, rel=0.35)
    assert 0 <= estimate([0.1, 0.2, 0.28, 0.3, 0.32, 0.4, 0.6, 0.8]) < 0.05


def test_a_paused_trial_that_will_be_better_is_a_gain(space, monkeypatch):
    """The best trial is paused, and no new configuration is considered."""
    pool, candidates, curves = make_search(space, [0.6, 0.7, 0.8, 0.9, 0.95, 0.31], num_complete=5)
    monkeypatch.setattr(pool, "draw", lambda rng, **given: ([], np.empty((0, pool.encoder.num_entries))))
    gain = estimate_gain(pool, candidates, curves, max_epochs=MAX_EPOCHS, num_more=6, seed=0)
    assert gain == pytest.approx(20 * 0.3**2 * (1 + MAX_EPOCHS**-0.7), rel=0.35)
    ended = [curve._replace(has_ended=True) for curve in curves]
    assert estimate_gain(pool, candidates, ended, max_epochs=MAX_EPOCHS, num_more=6, seed=0) == 0
