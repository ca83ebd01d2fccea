"""The measurement of predicted ends, on curves that follow a law."""

import importlib
import math

import numpy as np
import pytest

from handpose.search.candidates import CandidatePool

predictions = importlib.import_module("benchmarks.curve_predictions")
surrogate = importlib.import_module("benchmarks.curve_surrogate")


def make_curve(number, lr, epochs, rng):
    level = 10 + 5 * (math.log10(lr) + 3) ** 2
    losses = [level * (1 + 2 / epoch) * math.exp(0.01 * rng.standard_normal()) for epoch in range(1, epochs + 1)]
    return surrogate.RecordedCurve(number, {"lr": lr}, losses, 1.0)


def test_ends_are_predicted_and_ninety_in_a_hundred_are_in_the_interval(write_space):
    rng = np.random.default_rng(0)
    encoder = CandidatePool(write_space("lr: tag(log, interval(1e-4, 1e-2))")).encoder
    inside = []
    for _ in range(10):
        curves = [make_curve(number, 10 ** rng.uniform(-4, -2), 9, rng) for number in range(40)]
        found = predictions.predict_ends(curves[:20], curves[20:], encoder, num_seen=2)
        np.testing.assert_allclose(found.middle, found.recorded, rtol=0.1)
        inside += list((found.low <= found.recorded) & (found.recorded <= found.high))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.07)
    assert found.last_seen.tolist() == [curve.losses[1] for curve in curves[20:]]
