import numpy as np
import pytest
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.transform import Rotation

from handpose.evaluation.baselines import compute_mean_pose, compute_mean_pose_errors
from handpose.metrics.official import compute_freihand_scores
from handpose.skeleton import ROOT
from tests.builders import make_hands


def move_shape(shape: np.ndarray, num: int, seed: int = 0, *, noise: float = 0.0) -> np.ndarray:
    """The shape (21, 3) turned, scaled, shifted and disturbed: (num, 21, 3)."""
    rng = np.random.default_rng(seed)
    turned = np.einsum("nij,kj->nki", Rotation.random(num, rng=rng).as_matrix(), shape)
    disturbed = turned * rng.uniform(0.8, 1.2, size=(num, 1, 1)) + noise * rng.normal(size=turned.shape)
    return disturbed + rng.uniform(-0.2, 0.2, size=(num, 1, 3)) + (0, 0, 0.7)


SHAPE = 0.05 * np.random.default_rng(9).normal(size=(21, 3))


def test_mean_of_moved_copies_is_the_shape_itself() -> None:
    mean = compute_mean_pose(move_shape(SHAPE, 30))
    assert scipy_procrustes(SHAPE, mean)[2] < 1e-12
    assert np.linalg.det(np.linalg.lstsq(SHAPE - SHAPE.mean(axis=0), mean, rcond=None)[0]) > 0  # and no mirror image


def test_mean_has_the_mean_size_of_the_poses_and_lies_at_the_origin() -> None:
    poses = move_shape(SHAPE, 30, noise=0.01)
    mean = compute_mean_pose(poses)
    sizes = np.linalg.norm(poses - poses.mean(axis=1, keepdims=True), axis=(1, 2))
    assert np.linalg.norm(mean) == pytest.approx(sizes.mean())
    np.testing.assert_allclose(mean.mean(axis=0), 0, atol=1e-12)


def test_noise_averages_out() -> None:
    disparity = {
        num: scipy_procrustes(SHAPE, compute_mean_pose(move_shape(SHAPE, num, noise=0.01)))[2] for num in (4, 400)
    }
    assert disparity[400] < disparity[4] / 20


def test_no_pose_of_the_training_set_is_a_better_constant() -> None:
    training = move_shape(SHAPE, 40, noise=0.01)
    ours = compute_mean_pose_errors(training, training)["pa_mpjpe_mm"]
    assert all(
        ours < compute_freihand_scores(np.broadcast_to(pose, training.shape), training)["pa_mpjpe_mm"]
        for pose in training
    )


def test_errors_are_those_of_the_constants_by_the_independent_protocol() -> None:
    training, poses = move_shape(SHAPE, 40, noise=0.01), move_shape(SHAPE, 12, seed=1, noise=0.01)
    errors = compute_mean_pose_errors(training, poses)
    constant = np.broadcast_to(compute_mean_pose(training), poses.shape)
    assert errors["pa_mpjpe_mm"] == pytest.approx(compute_freihand_scores(constant, poses)["pa_mpjpe_mm"], abs=1e-4)
    mean = (training - training[:, [ROOT]]).mean(axis=0)
    expected = np.linalg.norm(mean - (poses - poses[:, [ROOT]]), axis=-1).mean()
    assert errors["rr_mpjpe_mm"] == pytest.approx(1000 * expected, abs=1e-9)


def test_a_data_set_without_poses_is_refused() -> None:
    with pytest.raises(ValueError, match="without poses"):
        compute_mean_pose(np.zeros((0, 21, 3)))


def test_wrong_labels_of_a_few_hands_do_not_change_the_mean_pose() -> None:
    training, test = make_hands(200), make_hands(50, seed=1)
    clean = compute_mean_pose_errors(training, test)
    training[0, 8] += (0, 0, 3.0)  # the first pose is where the alignment starts
    training[20:30] *= 1000
    dirty = compute_mean_pose_errors(training, test)
    assert dirty == pytest.approx(clean, rel=0.02)
    size = np.linalg.norm(compute_mean_pose(training))
    assert size == pytest.approx(np.linalg.norm(compute_mean_pose(make_hands(200))), rel=0.02)
