"""Scores against what NumPy and the other metrics say of the same predictions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from handpose.evaluation.curves import draw_pck
from handpose.evaluation.score_table import make_table
from handpose.evaluation.scores import (
    compute_bootstrap_interval,
    compute_joint_errors,
    compute_scores,
    count_joints_outside,
)
from handpose.files import to_json
from handpose.geometry import project
from handpose.metrics.mpjpe import PaMpjpe
from handpose.skeleton import JOINT_NAMES
from tests.builders import make_cameras, make_hands

SIZE = 32
NUM = 12


@pytest.fixture
def truth():
    return make_hands(NUM), make_cameras(NUM, SIZE)


def add_noise(target_m, sigma_m=0.008):
    return target_m + np.random.default_rng(1).normal(0, sigma_m, target_m.shape)


def score(predicted_m, target_m, intrinsics):
    names = [f"{i:08d}" for i in range(len(target_m))]
    return compute_scores(
        predicted_m, target_m, intrinsics, size=(SIZE, SIZE), training_m=make_hands(9, seed=3), names=names
    )


def test_a_hand_of_zeros_is_scored_in_mm_as_the_official_metric_does_and_left_out_in_pixels(truth):
    target, intrinsics = truth
    predicted = add_noise(target)
    predicted[4] = 0.0
    result, others = score(predicted, target, intrinsics), np.delete(np.arange(NUM), 4)
    centred = target[4] - target[4].mean(axis=0)
    # It is aligned to the centroid of its target, which is what the toolbox's example of zeros scores.
    assert compute_joint_errors(predicted, target, intrinsics).aligned_mm[4] == pytest.approx(
        1000 * np.linalg.norm(centred, axis=-1)
    )
    assert result["official"]["xyz_mean3d_cm"] == pytest.approx(
        100 * np.linalg.norm(predicted - target, axis=-1).mean()
    )
    without = score(predicted[others], target[others], intrinsics[others])
    assert result["num_hands_without_pixels"] == 1
    assert without["num_hands_without_pixels"] == 0
    assert result["keypoint_error_px"] == pytest.approx(without["keypoint_error_px"])
    for joint in JOINT_NAMES:
        expected = without["joints"][joint]["keypoint_error_px"]
        assert result["joints"][joint]["keypoint_error_px"] == pytest.approx(expected)
    assert "; 1 hand with a joint at depth 0 left out" in make_table(result)


def test_hands_of_zeros_only_have_no_pixels_and_are_valid_json(truth):
    target, intrinsics = truth
    result = score(np.zeros_like(target), target, intrinsics)
    assert result["num_hands_without_pixels"] == NUM
    strict = json.loads(to_json(result), parse_constant=pytest.fail)
    assert strict["keypoint_error_px"] is None
    assert strict["without_reflection"]["pa_mpjpe_mm"] == pytest.approx(result["without_reflection"]["pa_mpjpe_mm"])
    assert "nan px" in make_table(result)


def test_the_error_as_a_fraction_of_the_hands_box_is_that_in_pixels_over_its_longer_side(truth):
    target, intrinsics = truth
    predicted = add_noise(target)
    result = score(predicted, target, intrinsics)
    predicted_uv, uv = (project(torch.from_numpy(x), torch.from_numpy(intrinsics)).numpy() for x in (predicted, target))
    sides = [max(np.ptp(hand[:, 0]), np.ptp(hand[:, 1])) for hand in uv]
    per_hand = np.linalg.norm(predicted_uv - uv, axis=-1).mean(axis=1) / sides
    assert result["keypoint_error_box_fraction"] == pytest.approx(per_hand.mean())
    assert result["image_size_px"] == [SIZE, SIZE]


def test_the_truth_scores_perfectly(truth):
    target, intrinsics = truth
    result = score(target, target, intrinsics)
    assert result["without_reflection"]["pa_mpjpe_mm"] == pytest.approx(0, abs=1e-4)
    assert result["official"]["xyz_auc3d"] == pytest.approx(1)
    assert result["keypoint_error_px"] == 0
    assert all(share == 1 for kind in result["pck"].values() for share in kind.values())


def test_only_the_official_protocol_forgives_a_mirrored_hand(truth):
    target, intrinsics = truth
    result = score(target * (-1, 1, 1), target, intrinsics)
    assert result["official"]["xyz_al_mean3d_cm"] == pytest.approx(0, abs=1e-5)
    assert result["without_reflection"]["pa_mpjpe_mm"] > 1


def test_parts_add_up_to_the_whole_and_agree_with_the_metric_of_training(truth):
    target, intrinsics = truth
    predicted = add_noise(target)
    result = score(predicted, target, intrinsics)
    metric = PaMpjpe()
    metric.update(torch.from_numpy(predicted), torch.from_numpy(target))
    assert result["without_reflection"]["pa_mpjpe_mm"] == pytest.approx(float(metric.compute()), abs=1e-4)
    of_joints = [result["joints"][name]["pa_mpjpe_mm"] for name in JOINT_NAMES]
    assert np.mean(of_joints) == pytest.approx(float(metric.compute()), abs=1e-4)
    fingers = result["fingers"]
    weighted = fingers["wrist"]["rr_mpjpe_mm"] + 4 * sum(fingers[f]["rr_mpjpe_mm"] for f in fingers if f != "wrist")
    assert weighted / 21 == pytest.approx(result["root_relative"]["rr_mpjpe_mm"])
    rows = result["truncation"]
    assert sum(row["num_hands"] for row in rows) == NUM
    assert sum(row["num_hands"] * row["keypoint_error_px"] for row in rows) / NUM == pytest.approx(
        result["keypoint_error_px"]
    )


def test_an_error_of_one_joint_is_that_joints_alone(truth):
    target, intrinsics = truth
    predicted = target.copy()
    predicted[:, 8, 0] += 0.006
    result = score(predicted, target, intrinsics)
    assert result["joints"]["index_tip"]["rr_mpjpe_mm"] == pytest.approx(6)
    assert result["fingers"]["index"]["rr_mpjpe_mm"] == pytest.approx(1.5)
    assert result["fingers"]["thumb"]["rr_mpjpe_mm"] == 0
    assert result["pck"]["root_relative"] == pytest.approx({"5": 20 / 21, "10": 1, "15": 1, "20": 1, "30": 1})


def test_joints_outside_the_picture_are_counted_from_the_camera(truth):
    target, intrinsics = truth
    assert (count_joints_outside(target, intrinsics, (SIZE, SIZE)) == 0).all()
    moved = target + np.array([0.12, 0.0, 0.0])
    u, v = project(torch.from_numpy(moved), torch.from_numpy(intrinsics)).numpy().transpose(2, 0, 1)
    expected = ((u >= SIZE - 0.5) | (v >= SIZE - 0.5) | (u < -0.5) | (v < -0.5)).sum(axis=1)
    assert 0 < expected.max() < 21
    assert (count_joints_outside(moved, intrinsics, (SIZE, SIZE)) == expected).all()


def test_the_worst_hands_come_first(truth):
    target, intrinsics = truth
    predicted = target.copy()
    predicted[5, 4] += 0.05
    predicted[2, 4] += 0.02
    assert [row["hand"] for row in score(predicted, target, intrinsics)["worst"][:2]] == ["00000005", "00000002"]


def test_the_bootstraps_interval_is_that_of_the_normal_approximation_for_many_hands():
    errors = np.random.default_rng(0).gamma(4.0, 2.0, 2000)
    low, high = compute_bootstrap_interval(errors)
    reach = norm.ppf(0.975) * errors.std(ddof=1) / np.sqrt(len(errors))
    assert (low, high) == pytest.approx((errors.mean() - reach, errors.mean() + reach), abs=0.15 * reach)
    assert compute_bootstrap_interval(errors) == [low, high]


def test_the_table_names_both_protocols_and_every_joint(truth):
    target, intrinsics = truth
    result = score(add_noise(target), target, intrinsics)
    text = make_table(result)
    labels = ("in papers", "allows a reflection", "without reflection", "mean pose", "at middle_mcp", "32 x 32 px")
    for words in (*labels, *JOINT_NAMES):
        assert words in text
    assert f"{result['without_reflection']['pa_mpjpe_mm']:.2f}" in text
    assert f"{10 * result['official']['xyz_al_mean3d_cm']:.2f}" in text


def test_the_curve_is_a_picture(truth, tmp_path):
    target, intrinsics = truth
    draw_pck(tmp_path / "pck.png", {"aligned": compute_joint_errors(add_noise(target), target, intrinsics).aligned_mm})
    with Image.open(tmp_path / "pck.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5
