"""Scores of expected errors: perfect, useless and wrong by a factor."""

import numpy as np
import pytest
from PIL import Image

from handpose.evaluation.confidence import compute_confidence_scores, draw_confidence
from handpose.skeleton import ROOT

RNG = np.random.default_rng(0)
OBSERVED = RNG.gamma(2.0, 5.0, (400, 21))
OBSERVED[:, ROOT] = 0.0
OTHERS = np.arange(21) != ROOT


def test_errors_that_are_expected_exactly_leave_nothing_to_gain():
    scores = compute_confidence_scores(OBSERVED, OBSERVED)
    assert scores["calibration_error_mm"] == pytest.approx(0.0, abs=1e-9)
    assert scores["sparsification_error"] == pytest.approx(0.0, abs=1e-9)
    assert scores["rank_correlation"] == pytest.approx(1.0)
    kept = np.sort(OBSERVED[:, OTHERS], axis=None)[: int(0.8 * 400 * 20)]
    assert scores["gain_without_least_confident"] == pytest.approx(1 - kept.mean() / OBSERVED[:, OTHERS].mean())


def test_expected_errors_without_information_gain_nothing():
    scores = compute_confidence_scores(RNG.permutation(OBSERVED, axis=0)[:, ::-1], OBSERVED)
    assert scores["gain_without_least_confident"] == pytest.approx(0.0, abs=0.02)
    assert abs(scores["rank_correlation"]) < 0.05
    assert scores["sparsification_error"] > 0.3


def test_expected_errors_that_are_too_small_keep_their_order():
    scores = compute_confidence_scores(OBSERVED / 2, OBSERVED)
    assert scores["calibration_error_mm"] == pytest.approx(OBSERVED[:, OTHERS].mean() / 2)
    assert scores["sparsification_error"] == pytest.approx(0.0, abs=1e-9)


def test_the_root_whose_error_is_none_does_not_count():
    expected = OBSERVED.copy()
    expected[:, ROOT] = 1e6
    assert compute_confidence_scores(expected, OBSERVED) == compute_confidence_scores(OBSERVED, OBSERVED)


def test_unknown_errors_have_no_scores():
    assert compute_confidence_scores(np.full((3, 21), np.nan), OBSERVED[:3]) is None


def test_equal_errors_have_no_rank_correlation():
    assert np.isnan(compute_confidence_scores(np.ones((3, 21)), OBSERVED[:3])["rank_correlation"])


def test_the_picture_can_be_read(tmp_path):
    draw_confidence(tmp_path / "confidence.png", compute_confidence_scores(OBSERVED, OBSERVED))
    with Image.open(tmp_path / "confidence.png") as picture:
        assert picture.width > 800


def test_equal_expected_errors_gain_nothing_even_if_the_joints_are_sorted():
    observed = np.sort(OBSERVED, axis=None).reshape(OBSERVED.shape)
    scores = compute_confidence_scores(np.ones_like(observed), observed)
    assert scores["gain_without_least_confident"] == pytest.approx(0.0, abs=0.03)
