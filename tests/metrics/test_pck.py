import numpy as np
import pytest
import torch

from handpose.metrics.official import compute_freihand_scores, compute_pck_auc
from handpose.metrics.pck import PckAuc


def make_poses(num: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    target = 0.05 * rng.normal(size=(num, 21, 3)) + 0.6
    predicted = target + 0.02 * rng.normal(size=target.shape) + 0.01
    predicted[::2] *= (1, 1, -1)
    return predicted, target


def compute_area(predicted: np.ndarray, target: np.ndarray, **options) -> float:
    metric = PckAuc(**options)
    metric.update(torch.from_numpy(predicted), torch.from_numpy(target))
    return float(metric.compute())


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("xyz_auc3d", {"aligned": False}),
        ("xyz_al_auc3d", {"reflection": True}),
        ("pa_auc", {}),
    ],
)
def test_agrees_with_the_official_protocol_to_a_millionth(key: str, options: dict) -> None:
    predicted, target = make_poses()
    assert compute_area(predicted, target, **options) == pytest.approx(
        compute_freihand_scores(predicted, target)[key], abs=1e-6
    )


def test_a_constant_error_by_hand() -> None:
    target = np.zeros((2, 21, 3))
    predicted = target + np.array([0.0, 0.0, 0.0301])
    # Of the thresholds 0, 5, ... 50 mm, 35 mm is the first that counts; the trapezoid between 30 and 35 is half full.
    assert compute_area(predicted, target, aligned=False, steps=11) == pytest.approx((50 - 32.5) / 50, abs=1e-12)
    assert compute_area(predicted, target, aligned=False, steps=11, max_mm=30) == 0


def test_a_joint_at_the_threshold_is_correct() -> None:
    assert compute_pck_auc(np.array([[0.05]])) == pytest.approx(0.5 / 99)
    target = np.zeros((1, 21, 3))
    assert compute_area(target + np.array([0.0, 0.0, 0.05]), target, aligned=False) == pytest.approx(0.5 / 99)
    assert compute_area(target, target, aligned=False) == pytest.approx(1)


def test_joints_beyond_every_threshold_score_nothing() -> None:
    predicted, target = make_poses()
    assert compute_area(predicted + 1, target, aligned=False) == 0
