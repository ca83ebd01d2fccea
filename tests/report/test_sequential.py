"""Sequential rank tests: their distribution in noise, also where a searcher follows what was good by luck."""

import numpy as np
import pytest
from scipy import stats

from handpose.report.sequential import (
    compute_sequential_scores,
    compute_tail_probability,
    compute_threshold,
    draw_largest_null_scores,
    make_weights,
    measure_trend,
)

ONES = np.ones((40, 1))


def draw_followers(generator, num=40):
    """Places near the best value so far, as a searcher that learns puts them, of values that do not depend on them."""
    places, losses = [], []
    for number in range(num):
        centre = generator.random() if number < 5 else places[int(np.argmin(losses))]
        places.append(float(np.clip(generator.normal(centre, 0.1), 0, 1)))
        losses.append(generator.normal())
    return np.array(places), np.array(losses)


def test_scores_are_the_normal_quantiles_of_the_rank_among_earlier_values():
    scores = compute_sequential_scores(np.array([5.0, 3.0, 4.0]))
    quantile = stats.norm.ppf(0.25) / np.sqrt(stats.norm.ppf(0.25) ** 2)
    assert scores == pytest.approx([0.0, quantile, 0.0])


def test_scores_do_not_depend_on_later_values():
    values = np.random.default_rng(0).normal(size=30)
    assert compute_sequential_scores(values)[:10] == pytest.approx(compute_sequential_scores(values[:10]))


def test_scores_of_exchangeable_values_have_mean_0_and_variance_1():
    generator = np.random.default_rng(0)
    scores = np.array([compute_sequential_scores(generator.exponential(size=20)) for _ in range(4000)])
    assert scores[:, 1:].mean(axis=0) == pytest.approx(np.zeros(19), abs=0.06)
    assert scores[:, 1:].var(axis=0) == pytest.approx(np.ones(19), abs=0.1)
    correlations = np.corrcoef(scores[:, 1:].T) - np.eye(19)
    assert np.abs(correlations).max() < 0.08  # independent (Renyi 1962): 4 standard errors of 4000 draws are 0.063


def test_a_trend_in_noise_is_standard_normal_although_the_places_follow_the_luck():
    generator = np.random.default_rng(1)
    found = [measure_trend(losses, places) for places, losses in (draw_followers(generator) for _ in range(600))]
    assert np.mean(found) == pytest.approx(0, abs=0.15)
    assert np.std(found) == pytest.approx(1, abs=0.12)


def test_values_that_improve_along_a_range_have_a_negative_trend():
    places = np.random.default_rng(0).random(40)
    assert measure_trend(-places, places) < -4
    assert measure_trend(places, places) > 4
    assert measure_trend(-places, 1 - places) == pytest.approx(-measure_trend(-places, places))


def test_what_the_nuisance_explains_has_no_score():
    column = np.linspace(0, 1, 40)[:, None]
    explained = make_weights(column, np.hstack([ONES, column]))
    assert explained == pytest.approx(0)
    assert draw_largest_null_scores(explained).max() == 0


def test_the_limit_of_one_term_is_that_of_a_normal_variable_and_of_many_that_of_their_largest():
    generator = np.random.default_rng(0)
    one = draw_largest_null_scores(make_weights(generator.normal(size=(40, 1)), ONES))
    assert np.quantile(one, 0.95) == pytest.approx(1.96, abs=0.08)
    many = draw_largest_null_scores(np.linalg.qr(generator.normal(size=(40, 20)))[0])
    assert np.quantile(many, 0.95) == pytest.approx(compute_threshold(0.025, 20), abs=0.15)


def test_the_limit_and_the_tail_are_those_of_the_normal_distribution():
    assert compute_threshold(0.025, 1) == pytest.approx(1.959964)
    assert 1 - (1 - stats.norm.sf(compute_threshold(0.05, 7))) ** 7 == pytest.approx(0.05)
    assert compute_tail_probability(-1.959964) == pytest.approx(0.05, abs=1e-6)
