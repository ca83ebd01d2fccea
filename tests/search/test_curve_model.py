"""The model of learning curves against formulas, simulations and curves that follow a law."""

import numpy as np
import pytest
from scipy.stats import norm

from handpose.search.curve_model import CurveModel, CurvePoints
from handpose.search.curve_worth import (
    CurveForecast,
    ObservedCurve,
    Option,
    collect_points,
    fit_model,
    list_decision_epochs,
)

MAX_EPOCHS = 27
EPOCHS = list_decision_epochs(MAX_EPOCHS)


def make_points(*entries):
    vectors, epochs, trials = zip(*entries, strict=True)
    return CurvePoints(np.array(vectors, dtype=float), np.array(epochs), np.array(trials))


def compute_course(x, epochs):
    """A loss that falls as a power of the epoch, to a level that is least at x = 0.3."""
    return (10 + 20 * (x - 0.3) ** 2) * (1 + np.asarray(epochs, dtype=float) ** -0.7)


def make_curves(num, *, seed=0, noise=0.01, epochs=EPOCHS):
    rng = np.random.default_rng(seed)
    curves = []
    for x in rng.random(num):
        losses = compute_course(x, epochs) * np.exp(noise * rng.standard_normal(len(epochs)))
        curves.append(ObservedCurve(np.array([x]), dict(zip(epochs, losses, strict=True))))
    return curves


# --- the model --------------------------------------------------------------------------------------------------------


def test_one_known_value_gives_the_formula_of_a_gaussian_process():
    """With the typical scales, before any fit. The covariance of another trial with the same configuration and epoch
    has all but the trial's own part."""
    model = CurveModel(1, MAX_EPOCHS)
    posterior = model.condition(make_points(([0.5], MAX_EPOCHS, 0)), np.array([2.0]))
    shared, own, noise = 0.7**2 + 0.5**2 + 1.0**2 + 1.0**2, 0.2**2 + 0.2**2, 0.1**2 + 1e-6
    same, other = (
        posterior.predict(make_points(([0.5], MAX_EPOCHS, 0))),
        posterior.predict(make_points(([0.5], MAX_EPOCHS, 7))),
    )
    total = shared + own
    assert same.mean[0] == pytest.approx(2 * total / (total + noise))
    assert same.deviation[0] ** 2 == pytest.approx(total - total**2 / (total + noise), rel=1e-6)
    assert other.mean[0] == pytest.approx(2 * shared / (total + noise))
    assert other.deviation[0] ** 2 == pytest.approx(total - shared**2 / (total + noise))


def test_a_configuration_is_predicted_without_what_a_trial_deviates():
    model = CurveModel(1, MAX_EPOCHS)
    posterior = model.condition(make_points(([0.5], MAX_EPOCHS, 0)), np.array([2.0]))
    shared, own, noise = 0.7**2 + 0.5**2 + 1.0**2 + 1.0**2, 0.2**2 + 0.2**2, 0.1**2 + 1e-6
    found = posterior.predict_configurations(np.array([[0.5]]), MAX_EPOCHS)
    assert found.mean[0] == pytest.approx(2 * shared / (shared + own + noise))
    assert found.deviation[0] ** 2 == pytest.approx(shared - shared**2 / (shared + own + noise), rel=1e-6)


def test_a_trial_and_its_configuration_vary_together_by_the_formula():
    model = CurveModel(1, MAX_EPOCHS)
    posterior = model.condition(make_points(([0.0], 1, 0)), np.array([0.0]))
    middles = posterior.predict(make_points(([9e9], 9, 5)))
    ends = posterior.predict_configurations(np.array([[9e9]]), 27)
    # Far from the known trial only the mean course is shared with it: level 1, slope 1, and epoch 1 is at time 0.
    between = 1 - np.log(9) / np.log(27)
    before = 0.7**2 + 0.5**2 * np.exp(-0.5 * (between / 0.6) ** 2)
    known = 0.7**2 + 0.5**2 + 0.2**2 + 0.2**2 + 1.0**2 + 0.1**2 + 1e-6
    expected = before + 1.0 + 1.0 * (1 - between) - 1.0 / known
    assert posterior.compute_covariance(middles, ends)[0] == pytest.approx(expected)


def test_the_end_of_a_curve_is_predicted_from_its_beginning_and_from_other_curves():
    curves = make_curves(30)
    begun = [ObservedCurve(curve.vector, {e: v for e, v in curve.losses.items() if e <= 4}) for curve in curves[:10]]
    known = [*begun, *curves[10:]]
    model = CurveModel(1, MAX_EPOCHS)
    fit_model(model, known, EPOCHS)
    forecast = CurveForecast(model, known, MAX_EPOCHS, EPOCHS)
    options = [Option(curve.vector, place, 4, 1.0, 0.0) for place, curve in enumerate(begun)]
    expected = [compute_course(curve.vector[0], MAX_EPOCHS) for curve in begun]
    np.testing.assert_allclose(forecast.rate(options).final_loss, expected, rtol=0.03)


@pytest.mark.slow
def test_the_chance_to_be_best_is_as_often_right_as_it_says():
    """How often configurations whose trials are seen until epoch 4 end better than all others by the margin."""
    hits, chances = [], []
    for seed in range(25):
        curves = make_curves(24, seed=seed)
        known = [
            ObservedCurve(curve.vector, {e: v for e, v in curve.losses.items() if e <= 4}) if place < 12 else curve
            for place, curve in enumerate(curves)
        ]
        model = CurveModel(1, MAX_EPOCHS)
        fit_model(model, known, EPOCHS)
        forecast = CurveForecast(model, known, MAX_EPOCHS, EPOCHS)
        rating = forecast.rate([Option(known[place].vector, place, 4, 1.0, 0.0) for place in range(12)])
        chances += list(rating.probability)
        ends = [compute_course(known[place].vector[0], MAX_EPOCHS) for place in range(12)]
        hits += [end < goal for end, goal in zip(ends, rating.goal, strict=True)]
    assert np.mean(chances) == pytest.approx(np.mean(hits), abs=0.03)


def test_a_fit_makes_the_values_more_likely_and_finds_the_noise():
    rng = np.random.default_rng(0)
    vectors = rng.random((40, 1))
    points = CurvePoints(vectors, np.full(40, MAX_EPOCHS), np.arange(40))
    for noise in (0.05, 0.5):
        values = np.sin(6 * vectors[:, 0]) + noise * rng.standard_normal(40)
        model = CurveModel(1, MAX_EPOCHS)
        model.fit(points, values)
        prediction = model.condition(points, values).predict(points._replace(trials=np.arange(100, 140)))
        error = np.sqrt(np.mean((prediction.mean - np.sin(6 * vectors[:, 0])) ** 2))
        assert error < 0.6 * noise


# --- what a second of training is worth -------------------------------------------------------------------------------


def test_worth_is_what_a_policy_of_two_steps_gains_per_second():
    """For one option, the best cutoff at the best early epoch is looked for by simulation."""
    curves = make_curves(12, noise=0.05)
    known = [ObservedCurve(curves[0].vector, {1: curves[0].losses[1]}), *curves[1:]]
    model = CurveModel(1, MAX_EPOCHS)
    fit_model(model, known, EPOCHS)
    forecast = CurveForecast(model, known, MAX_EPOCHS, EPOCHS)
    rating = forecast.rate([Option(known[0].vector, 0, 1, 2.0, 3.0)])
    rng, best = np.random.default_rng(0), 0.0
    end = forecast._posterior.predict_configurations(known[0].vector[None], MAX_EPOCHS)
    goal = end.mean[0] + end.deviation[0] * norm.ppf(rating.probability[0])
    for epoch in EPOCHS[1:4]:
        soon = forecast._posterior.predict(make_points((known[0].vector, epoch, 0)))
        covariance = np.array(
            [
                [soon.deviation[0] ** 2 + model.noise**2, forecast._posterior.compute_covariance(soon, end)[0]],
                [forecast._posterior.compute_covariance(soon, end)[0], end.deviation[0] ** 2],
            ]
        )
        seen, final = rng.multivariate_normal([soon.mean[0], end.mean[0]], covariance, 200_000).T
        for cutoff in np.quantile(seen, np.linspace(0.02, 0.98, 49)):
            passed = seen < cutoff
            cost = (epoch - 1) * 2.0 + 3.0 + passed.mean() * (MAX_EPOCHS - epoch) * 2.0
            best = max(best, (passed * np.maximum(goal - final, 0.0)).mean() / cost)
    straight = np.maximum(goal - final, 0.0).mean() / (26 * 2.0 + 3.0)
    assert rating.worth[0] == pytest.approx(max(best, straight), rel=0.05)


def test_the_same_trial_is_worth_less_if_it_costs_more():
    known = make_curves(12)
    model = CurveModel(1, MAX_EPOCHS)
    fit_model(model, known, EPOCHS)
    forecast = CurveForecast(model, known, MAX_EPOCHS, EPOCHS)
    new = np.array([0.31])
    cheap, slow, late = forecast.rate(
        [Option(new, None, 0, 1.0, 0.0), Option(new, None, 0, 4.0, 0.0), Option(new, None, 0, 1.0, 20.0)]
    ).worth
    assert slow == pytest.approx(cheap / 4)
    assert slow < cheap
    assert late < cheap


def test_a_running_trial_is_expected_to_do_what_the_model_says_so_that_others_go_elsewhere():
    known = make_curves(12)
    model = CurveModel(1, MAX_EPOCHS)
    fit_model(model, known, EPOCHS)
    place = np.array([0.9])
    running = ObservedCurve(place, {}, is_running=True)
    option = [Option(place, None, 0, 1.0, 0.0)]
    alone = CurveForecast(model, known, MAX_EPOCHS, EPOCHS).rate(option)
    beside = CurveForecast(model, [*known, running], MAX_EPOCHS, EPOCHS).rate(option)
    assert beside.probability[0] <= alone.probability[0]
    assert beside.final_loss[0] == pytest.approx(alone.final_loss[0], rel=0.01)


def test_losses_below_zero_are_not_taken_for_logarithms():
    """As of a metric that is better the larger it is."""
    curves = [ObservedCurve(curve.vector, {e: -1 / v for e, v in curve.losses.items()}) for curve in make_curves(12)]
    model = CurveModel(1, MAX_EPOCHS)
    fit_model(model, curves, EPOCHS)
    rating = CurveForecast(model, curves, MAX_EPOCHS, EPOCHS).rate([Option(np.array([0.3]), None, 0, 1.0, 0.0)])
    assert rating.final_loss[0] == pytest.approx(-1 / compute_course(0.3, MAX_EPOCHS), rel=0.05)


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [(1, (1,)), (2, (1, 2)), (9, (1, 2, 3, 4, 7, 9)), (27, (1, 2, 3, 4, 7, 10, 15, 23, 27))],
)
def test_decisions_lie_closer_together_at_the_beginning(max_epochs, expected):
    assert list_decision_epochs(max_epochs) == expected


def test_with_folds_decisions_are_in_the_first_fold_and_at_the_ends_of_all():
    assert list_decision_epochs(27, folds=3) == (1, 2, 3, 4, 7, 9, 18, 27)
    assert list_decision_epochs(4, folds=4) == (1, 2, 3, 4)


def test_many_values_are_thinned_and_the_best_trials_and_newest_epochs_stay():
    curves = make_curves(300)
    points, losses = collect_points(curves, np.array(EPOCHS), 200, least=2)
    assert len(losses) <= 200
    best = sorted(range(300), key=lambda place: curves[place].losses[MAX_EPOCHS])[:50]
    kept = {(int(trial), int(epoch)) for trial, epoch in zip(points.trials, points.epochs, strict=True)}
    assert {(place, epoch) for place in best for epoch in (1, MAX_EPOCHS)} <= kept
    np.testing.assert_allclose(
        losses, [curves[trial].losses[epoch] for trial, epoch in zip(points.trials, points.epochs, strict=True)]
    )


def test_the_unit_of_a_metric_does_not_matter():
    """Losses that are not all above 0, such as those of a metric whose larger values are better, in two units."""
    options = [Option(np.array([x]), None, 0, 1.0, 0.0) for x in (0.1, 0.3, 0.9)]
    ratings = []
    for unit in (1.0, 1e-6):
        curves = [
            curve._replace(losses={epoch: unit * (value - 40) for epoch, value in curve.losses.items()})
            for curve in make_curves(12)
        ]
        model = CurveModel(1, MAX_EPOCHS)
        fit_model(model, curves, EPOCHS)
        ratings.append(CurveForecast(model, curves, MAX_EPOCHS, EPOCHS).rate(options))
    np.testing.assert_allclose(ratings[0].worth, ratings[1].worth, rtol=1e-6)
    np.testing.assert_allclose(1e-6 * ratings[0].final_loss, ratings[1].final_loss, rtol=1e-6)
