import pytest
import torch

from handpose.heatmaps import AxisLogits, CameraAxes, ImageAxes, gaussian_heatmaps
from handpose.losses import CoordinateMse, HeatmapLoss

AXES = ImageAxes(sigma=0.05)


def logits_of(coordinates, bins=64):
    return AxisLogits(
        *(gaussian_heatmaps(coordinates[..., i], bins=bins, sigma=0.05).clamp_min(1e-30).log() for i in range(3))
    )


@pytest.fixture
def coordinates():
    return 0.2 + 0.6 * torch.rand(4, 21, 3, generator=torch.Generator().manual_seed(0))


def heatmap_loss(depth_weight=1.0):
    return HeatmapLoss(heatmap_weight=1.0, coordinate_weight=1.0, depth_weight=depth_weight)


def test_the_heatmap_loss_is_zero_for_the_true_heatmaps(coordinates):
    terms = heatmap_loss()(logits_of(coordinates), coordinates, AXES)
    assert terms["heatmap"] == pytest.approx(0.0, abs=1e-5)
    assert terms["coordinate"] == pytest.approx(0.0, abs=1e-3)


def test_the_divergence_of_two_shifted_gaussians_has_its_closed_form(coordinates):
    shifted = coordinates + torch.tensor([0.03, 0.0, 0.0])
    terms = heatmap_loss()(logits_of(shifted, bins=256), coordinates, AXES)
    assert terms["heatmap"] == pytest.approx(0.03**2 / (2 * 0.05**2) / 3, rel=1e-2)  # KL of N(a, s) and N(b, s)
    assert terms["coordinate"] == pytest.approx(10 * 0.03 / 3, rel=1e-2)


def test_depth_weight_counts_the_depth_axis_more(coordinates):
    shifted = coordinates + torch.tensor([0.0, 0.0, 0.03])
    light = heatmap_loss(1.0)(logits_of(shifted), coordinates, AXES)["coordinate"]
    heavy = heatmap_loss(4.0)(logits_of(shifted), coordinates, AXES)["coordinate"]
    assert heavy / light == pytest.approx(4 / (6 / 3), rel=1e-3)


def test_a_joint_outside_the_picture_does_not_count(coordinates):
    logits = logits_of(coordinates)
    outside = coordinates.clone()
    outside[:, 3, 0] = 1.7
    terms = heatmap_loss()(logits, outside, AXES)
    assert sum(terms.values()) < 1e-2


def test_the_mse_of_camera_axes_is_in_square_millimetres(coordinates):
    axes = CameraAxes(sigma=0.05, x_mm=[0, 200], y_mm=[0, 200], z_mm=[0, 1000])
    shifted = coordinates + torch.tensor([0.01, 0.01, 0.01])
    loss = CoordinateMse()(logits_of(shifted, bins=256), coordinates, axes)["coordinate"]
    assert loss == pytest.approx((2**2 + 2**2 + 10**2) / 3, rel=2e-2)
