"""The one-euro filter agrees with the published formula: little jitter at rest, little lag in motion."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.evaluation.one_euro import OneEuroFilter, compute_weight

RATE_HZ = 30.0


def smooth(signal, *, min_cutoff_hz=1.0, beta=0.0, rate_hz=RATE_HZ):
    one_euro = OneEuroFilter(min_cutoff_hz=min_cutoff_hz, beta=beta)
    return np.array([one_euro(np.asarray(value, float), time_s=i / rate_hz) for i, value in enumerate(signal)])


def follow_the_paper(signal, *, min_cutoff_hz, beta, rate_hz, speed_cutoff_hz=1.0):
    """Algorithms 1 to 3 of Casiez et al. (2012), for one signal, written with their time constant."""

    def alpha(cutoff_hz):
        tau = 1.0 / (2.0 * math.pi * cutoff_hz)
        return 1.0 / (1.0 + tau * rate_hz)

    filtered, speed = [signal[0]], 0.0
    for value in signal[1:]:
        raw_speed = (value - filtered[-1]) * rate_hz
        speed = alpha(speed_cutoff_hz) * raw_speed + (1 - alpha(speed_cutoff_hz)) * speed
        weight = alpha(min_cutoff_hz + beta * abs(speed))
        filtered.append(weight * value + (1 - weight) * filtered[-1])
    return np.array(filtered)


@given(
    signal=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30),
    min_cutoff_hz=st.floats(0.05, 10.0),
    beta=st.floats(0.0, 1.0),
    rate_hz=st.floats(5.0, 240.0),
)
def test_it_is_the_published_filter(signal, min_cutoff_hz, beta, rate_hz):
    settings = {"min_cutoff_hz": min_cutoff_hz, "beta": beta, "rate_hz": rate_hz}
    assert smooth(signal, **settings) == pytest.approx(follow_the_paper(signal, **settings), abs=1e-6)


def test_two_steps_agree_with_a_computation_by_hand():
    # At 2 pi Hz of sampling, a cut-off of 1 Hz has the weight 1 / (1 + 1) of its new value.
    filtered = smooth([0.0, 8.0, 8.0], min_cutoff_hz=1.0, rate_hz=2.0 * math.pi)
    assert filtered == pytest.approx([0.0, 4.0, 6.0])


@given(value=st.floats(-1e6, 1e6), beta=st.floats(0.0, 1.0))
def test_a_constant_stays(value, beta):
    assert smooth([value] * 9, beta=beta) == pytest.approx([value] * 9)


def test_noise_is_reduced_and_more_so_with_a_lower_cutoff():
    noise = np.random.default_rng(0).normal(size=(600, 21, 3))
    deviations = [smooth(noise, min_cutoff_hz=cutoff, beta=0.02)[60:].std() for cutoff in (0.3, 1.0, 3.0)]
    assert deviations == sorted(deviations)
    assert deviations[1] < 0.5 * noise.std()


def test_the_lag_behind_a_step_is_smaller_with_a_larger_beta():
    step = np.where(np.arange(60) < 20, 0.0, 100.0)
    lags = [np.abs(smooth(step, beta=beta) - step).sum() for beta in (0.0, 0.01, 0.05, 0.2)]
    assert lags == sorted(lags, reverse=True)
    assert lags[-1] < 0.5 * lags[0]


def test_signals_do_not_influence_each_other():
    signals = np.random.default_rng(1).normal(size=(40, 3))
    together = smooth(signals, beta=0.1)
    for i in range(3):
        assert together[:, i] == pytest.approx(smooth(signals[:, i], beta=0.1))


def test_a_longer_step_in_time_gives_the_new_value_more_weight():
    weights = [compute_weight(1.0, step_s) for step_s in (0.001, 0.03, 1.0)]
    assert weights == sorted(weights)
    assert 0.0 < weights[0] < weights[-1] < 1.0
