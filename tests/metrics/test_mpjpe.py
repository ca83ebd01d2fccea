import numpy as np
import pytest
import torch
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.transform import Rotation
from torch import Tensor
from torchmetrics import Metric

from handpose.metrics.mpjpe import KeypointErrorPx, PaMpjpe, RootRelativeMpjpe
from handpose.metrics.pck import PckAuc
from handpose.skeleton import ROOT

METRICS = [
    pytest.param(PaMpjpe, 3, id="pa"),
    pytest.param(lambda: PaMpjpe(reflection=True), 3, id="pa_reflection"),
    pytest.param(RootRelativeMpjpe, 3, id="root_relative"),
    pytest.param(KeypointErrorPx, 2, id="px"),
    pytest.param(PckAuc, 3, id="auc"),
]


def make_samples(num: int, coordinates: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions and targets (num, 21, coordinates) float32, about 2 cm apart at 0.7 m."""
    noise = torch.Generator().manual_seed(seed)
    target = 0.05 * torch.randn(num, 21, coordinates, generator=noise) + 0.7
    spread = torch.linspace(0.002, 0.04, num)[:, None, None]  # so that a mean of batch means would be another number
    return target + spread * torch.randn(target.shape, generator=noise), target


def compute_value(metric: Metric, predicted: Tensor, target: Tensor, batches: list[int] | None = None) -> float:
    for p, t in zip(predicted.split(batches or len(predicted)), target.split(batches or len(target)), strict=True):
        metric.update(p, t)
    return float(metric.compute())


@pytest.mark.parametrize(("metric", "coordinates"), METRICS)
class TestEveryMetric:
    def test_uneven_batches_are_one_batch(self, metric, coordinates: int) -> None:
        predicted, target = make_samples(20, coordinates)
        assert compute_value(metric(), predicted, target, [1, 16, 3]) == pytest.approx(
            compute_value(metric(), predicted, target), rel=1e-14
        )

    def test_reset_forgets(self, metric, coordinates: int) -> None:
        predicted, target = make_samples(8, coordinates)
        used = metric()
        compute_value(used, *make_samples(5, coordinates, seed=1))
        used.reset()
        assert compute_value(used, predicted, target) == compute_value(metric(), predicted, target)

    def test_metrics_of_two_processes_merge(self, metric, coordinates: int) -> None:
        predicted, target = make_samples(20, coordinates)
        first, second = metric(), metric()
        first.update(predicted[:7], target[:7])
        second.update(predicted[7:], target[7:])
        first.merge_state(second)
        assert float(first.compute()) == pytest.approx(compute_value(metric(), predicted, target), rel=1e-14)
        assert {reduction.__name__ for reduction in first._reductions.values()} == {"dim_zero_sum"}

    def test_a_network_in_bfloat16_does_not_round_it(self, metric, coordinates: int) -> None:
        predicted, target = make_samples(20, coordinates)
        network = torch.nn.ModuleDict({"metric": metric()}).to(torch.bfloat16)
        assert compute_value(network["metric"], predicted, target, [5] * 4) == pytest.approx(
            compute_value(metric(), predicted, target), rel=1e-12
        )

    def test_a_prediction_that_is_not_finite_is_not_hidden(self, metric, coordinates: int) -> None:
        predicted, target = make_samples(4, coordinates)
        good = compute_value(metric(), predicted, target)
        predicted[2] = torch.nan
        bad = compute_value(metric(), predicted, target)
        assert bad < good if metric().higher_is_better else np.isnan(bad)

    def test_the_truth_scores_best(self, metric, coordinates: int) -> None:
        _, target = make_samples(4, coordinates)
        score = compute_value(metric(), target, target)
        if metric().higher_is_better:  # rounding may leave an error above the first threshold, which is 0
            assert 1 - 0.5 / 99 - 1e-9 <= score <= 1 + 1e-9
        else:
            assert score == pytest.approx(0, abs=1e-9)


def test_pa_mpjpe_agrees_with_scipy_to_a_millionth_of_a_millimetre() -> None:
    predicted, target = (xyz.double() for xyz in make_samples(30, 3))
    errors = []
    for p, t in zip(predicted.numpy(), target.numpy(), strict=True):
        source, goal = p - p.mean(0), t - t.mean(0)
        turned = Rotation.align_vectors(goal, source)[0].apply(source)
        scale = (turned * goal).sum() / np.square(source).sum()
        errors.append(np.linalg.norm(scale * turned - goal, axis=1).mean())
    assert compute_value(PaMpjpe(), predicted, target) == pytest.approx(1000 * np.mean(errors), abs=1e-6)


def test_pa_mpjpe_with_reflection_agrees_with_scipy_to_a_millionth_of_a_millimetre() -> None:
    predicted, target = (xyz.double() for xyz in make_samples(30, 3))
    predicted[::2, :, 0] *= -1
    errors = []
    for p, t in zip(predicted.numpy(), target.numpy(), strict=True):
        goal, fitted, _ = scipy_procrustes(t, p)  # both of unit size
        errors.append(np.linalg.norm(goal - fitted, axis=1).mean() * np.linalg.norm(t - t.mean(0)))
    assert compute_value(PaMpjpe(reflection=True), predicted, target) == pytest.approx(1000 * np.mean(errors), abs=1e-6)


def test_pa_mpjpe_is_zero_for_a_turned_scaled_and_shifted_hand() -> None:
    _, target = make_samples(3, 3)
    rotation = torch.from_numpy(Rotation.random(rng=np.random.default_rng(0)).as_matrix().copy())
    assert compute_value(PaMpjpe(), 3 * target.double() @ rotation + 0.2, target.double()) == pytest.approx(0, abs=1e-9)


def test_root_relative_error_ignores_the_position_and_counts_the_root() -> None:
    _, target = make_samples(3, 3)
    predicted = target.double() + torch.tensor([0.25, -0.5, 0.5])
    predicted[:, 4] += torch.tensor([0.0, 0.003, 0.004], dtype=torch.float64)  # one joint of 21 is 5 mm off
    assert compute_value(RootRelativeMpjpe(), predicted, target.double()) == pytest.approx(5 / 21, abs=1e-9)
    moved_root = target.double().clone()
    moved_root[:, ROOT, 2] += 0.021  # the 20 others are then 21 mm off
    assert compute_value(RootRelativeMpjpe(), moved_root, target.double()) == pytest.approx(20, abs=1e-9)


def test_keypoint_error_by_hand() -> None:
    target = torch.zeros(2, 21, 2)
    predicted = target.clone()
    predicted[0] = torch.tensor([3.0, 4.0])
    assert compute_value(KeypointErrorPx(), predicted, target) == 2.5


def test_keypoints_without_a_label_are_left_out_of_the_pixel_error():
    target = torch.zeros(3, 21, 2)
    predicted = target + torch.tensor([3.0, 4.0])
    target[0, :20] = torch.nan  # one label is left, whose error is 5 px
    predicted[1] *= 2.0
    target[2] = torch.nan  # no label: the image does not count
    assert compute_value(KeypointErrorPx(), predicted, target) == pytest.approx((5 + 10) / 2)
    assert compute_value(KeypointErrorPx(), predicted, target, [1, 2]) == pytest.approx((5 + 10) / 2)
    predicted[0, 20] = torch.nan
    assert np.isnan(compute_value(KeypointErrorPx(), predicted, target))
