"""Vectors of configurations, worked out by hand; interpolation against the formula for one known point."""

import numpy as np
import pytest

from handpose.search.candidates import CandidatePool
from handpose.search.encoding import interpolate

SPACE = """
optimizer.lr: tag(log, interval(1e-4, 1e-2))
model.decoder.depth: range(1, 6)
loss.divergence: choice(kl, jsd)
augment.rotation_deg: choice(20, 45, 90)
optimizer.betas: choice([0.9, 0.99], [0.9, 0.999])
data.batch_size: 16
"""
CONDITIONAL = """
def space(trial):
    depth = trial.suggest_int("depth", 0, 4)
    return {"depth": depth} | ({"skips": trial.suggest_categorical("skips", [0, False])} if depth else {})
"""


def test_numbers_lie_in_their_range_and_choices_have_an_entry_for_each_option(write_space):
    encoder = CandidatePool(write_space(SPACE)).encoder
    params = {
        "optimizer.lr": 1e-3,
        "model.decoder.depth": 2,
        "loss.divergence": "kl",
        "augment.rotation_deg": 90,
        "optimizer.betas": [0.9, 0.999],
        "data.batch_size": 16,
    }
    # rotation, jsd, kl, depth, betas (0.999, 0.99), lr: sorted
    np.testing.assert_allclose(encoder.encode([params]), [[1, 0, 1, 0.25, 1, 0, 0.5]])
    assert encoder.num_entries == 7


def test_a_missing_parameter_lies_in_the_middle_and_is_marked(write_space):
    encoder = CandidatePool(write_space(CONDITIONAL, ".py")).encoder
    vectors = encoder.encode([{"depth": 4, "skips": 0}, {"depth": 4, "skips": False}, {"depth": 0}])
    np.testing.assert_allclose(vectors, [[1, 0, 1], [1, 1, 1], [0, 0.5, 0]])


def test_a_range_is_logarithmic_only_if_the_space_says_so(write_space):
    """Though random draws between 0 and 1 have a large ratio."""
    encoder = CandidatePool(write_space("x: interval(0.0, 1.0)\ny: tag(log, interval(0.1, 0.4))")).encoder
    np.testing.assert_allclose(encoder.encode([{"x": 0.0, "y": 0.2}, {"x": 0.5, "y": 0.1}]), [[0, 0.5], [0.5, 0]])


def test_a_key_that_the_space_computes_is_scaled_by_draws(write_space):
    text = "def space(trial):\n    x = trial.suggest_float('x', -3, 0)\n    return {'lr': 10**x}\n"
    encoder = CandidatePool(write_space(text, ".py")).encoder
    low, middle, high = encoder.encode([{"lr": 10**x} for x in (-3, -1.5, 0)])[:, 0]
    np.testing.assert_allclose([low, middle, high], [0, 0.5, 1], atol=0.02)


def test_no_configurations_give_an_empty_array(write_space):
    assert CandidatePool(write_space(SPACE)).encoder.encode([]).shape == (0, 7)


def test_values_are_kept_where_they_are_known_and_zero_far_away():
    known = np.array([[0.0, 0.0], [1.0, 1.0]])
    asked = np.array([[0.0, 0.0], [50.0, 0.0]])
    found = interpolate(known, np.array([2.0, 0.0]), asked)
    similarity = np.exp(-0.5 * 2 / 0.5)
    exact = np.linalg.inv([[1.05, similarity], [similarity, 1.05]]) @ [2.0, 0.0]
    assert found == pytest.approx([exact[0] + similarity * exact[1], 0.0])
    assert interpolate(np.empty((0, 2)), np.empty(0), asked).tolist() == [0.0, 0.0]


def test_a_conditional_range_is_the_union_of_its_ranges(write_space):
    draws = "{'a': a, 'd': trial.suggest_int('d', 1, a)}"
    text = f"def space(trial):\n    a = trial.suggest_categorical('a', [5, 1])\n    return {draws}\n"
    encoder = CandidatePool(write_space(text, ".py")).encoder
    np.testing.assert_allclose(encoder.encode([{"a": 5, "d": 5}, {"a": 1, "d": 1}])[:, 1], [1, 0])


def test_infinity_and_a_number_without_logarithm_have_finite_entries(write_space):
    text = (
        "def space(trial):\n    use = trial.suggest_categorical('use', [1, 0])\n"
        "    clip = trial.suggest_categorical('clip', [1.0, 5.0, float('inf')])\n"
        "    return {'use': use, 'clip': clip, 'wd': trial.suggest_float('wd', 1e-6, 0.1, log=True) if use else 0.0}\n"
    )
    encoder = CandidatePool(write_space(text, ".py")).encoder
    vectors = encoder.encode([{"use": 0, "clip": float("inf"), "wd": 0.0}, {"use": 1, "clip": 5.0, "wd": 0.1}])
    # clip is infinite, clip, use, wd
    np.testing.assert_allclose(vectors, [[1, 0.5, 0, -1], [0, 1, 1, 1]])
