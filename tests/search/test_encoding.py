"""Vectors of configurations, worked out by hand."""

import numpy as np

from handpose.search.encoding import SpaceEncoder

SPACE = """
optimizer.lr: tag(log, interval(1e-4, 1e-2))
model.decoder.depth: range(1, 6)
loss.divergence: choice(kl, jsd)
augment.rotation_deg: choice(20, 45, 90)
"""
CONDITIONAL = """
def space(trial):
    depth = trial.suggest_int("depth", 0, 4)
    return {"depth": depth} | ({"skips": trial.suggest_categorical("skips", [0, False])} if depth else {})
"""


def test_numbers_lie_in_their_range_and_choices_have_an_entry_for_each_option(write_space):
    encoder = SpaceEncoder(write_space(SPACE))
    draws = {"optimizer.lr": 1e-3, "model.decoder.depth": 2, "loss.divergence": "kl", "augment.rotation_deg": 90}
    np.testing.assert_allclose(encoder.encode([draws]), [[0.5, 0.25, 1, 0, 0, 1]])
    assert encoder.num_entries == 6


def test_a_missing_parameter_lies_in_the_middle_and_is_marked(write_space):
    encoder = SpaceEncoder(write_space(CONDITIONAL, ".py"))
    vectors = encoder.encode([{"depth": 4, "skips": 0}, {"depth": 4, "skips": "bool false"}, {"depth": 0}])
    np.testing.assert_allclose(vectors, [[1, 1, 1], [1, 0, 1], [0, 0.5, 0]])


def test_no_configurations_give_an_empty_array(write_space):
    assert SpaceEncoder(write_space(SPACE)).encode([]).shape == (0, 6)
