import numpy as np
import pytest
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.transform import Rotation

from handpose.metrics.official import align, compute_freihand_scores, compute_pck_auc


def make_poses(num: int = 20, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.05 * rng.normal(size=(num, 21, 3)) + (0.0, 0.0, 0.7)


def test_predicting_zeros_scores_the_distance_to_the_centroid() -> None:
    # The toolbox's template predicts zeros and publishes a score for it, so this case must be defined: every joint
    # comes to lie on the centroid of the truth.
    target = make_poses()
    scores = compute_freihand_scores(np.zeros_like(target), target)
    to_centroid = np.linalg.norm(target - target.mean(axis=1, keepdims=True), axis=-1).mean()
    assert scores["xyz_al_mean3d_cm"] == pytest.approx(100 * to_centroid, abs=1e-9)
    assert scores["pa_mpjpe_mm"] == pytest.approx(1000 * to_centroid, abs=1e-9)
    assert scores["xyz_mean3d_cm"] == pytest.approx(100 * np.linalg.norm(target, axis=-1).mean(), abs=1e-9)
    assert scores["xyz_auc3d"] == 0


def test_the_truth_scores_perfectly() -> None:
    target = make_poses()
    scores = compute_freihand_scores(target, target)
    assert scores.pop("xyz_auc3d") == pytest.approx(1)
    assert scores.pop("xyz_al_auc3d") == pytest.approx(1, abs=0.006)  # the norms' 1e-8 leaves an error above 0
    assert scores.pop("pa_auc") == pytest.approx(1, abs=0.006)
    assert scores == pytest.approx(dict.fromkeys(scores, 0), abs=1e-4)


def test_only_the_official_alignment_mirrors_a_hand() -> None:
    target = make_poses()
    scores = compute_freihand_scores(target * (-1, 1, 1), target)
    assert scores["xyz_al_mean3d_cm"] == pytest.approx(0, abs=1e-5)
    assert scores["pa_mpjpe_mm"] > 1
    assert scores["pa_auc"] < scores["xyz_al_auc3d"]


def test_official_alignment_agrees_with_scipy_spatial() -> None:
    for predicted, target in zip(make_poses(seed=1), make_poses(seed=2), strict=True):
        goal, fitted, _ = scipy_procrustes(target, predicted)
        expected = np.linalg.norm(goal - fitted, axis=1) * np.linalg.norm(target - target.mean(axis=0))
        ours = np.linalg.norm(align(predicted, target, reflection=True) - target, axis=1)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8)


def test_alignment_without_reflection_agrees_with_scipys_rotations() -> None:
    for predicted, target in zip(make_poses(seed=1), make_poses(seed=2), strict=True):
        source, goal = predicted - predicted.mean(axis=0), target - target.mean(axis=0)
        turned = Rotation.align_vectors(goal, source)[0].apply(source)
        expected = turned * (turned * goal).sum() / np.square(source).sum() + target.mean(axis=0)
        np.testing.assert_allclose(align(predicted, target, reflection=False), expected, rtol=0, atol=1e-7)


def test_area_is_that_of_the_curve() -> None:
    errors = np.abs(np.random.default_rng(0).normal(0, 0.03, size=(500, 3)))
    exact = np.maximum(0, 1 - errors / 0.05).mean()  # each error adds a step, whose area is a rectangle
    assert compute_pck_auc(errors) == pytest.approx(exact, abs=1e-3)


def test_shapes_that_differ_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(20, 21, 3\).*\(19, 21, 3\)"):
        compute_freihand_scores(make_poses(20), make_poses(19))
