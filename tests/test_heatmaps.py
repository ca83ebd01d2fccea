import numpy as np
import pytest
import torch
from scipy.stats import norm

from handpose import geometry
from handpose.errors import UserError
from handpose.heatmaps import AxisLogits, CameraAxes, ImageAxes, gaussian_heatmaps, read_out, soft_argmax
from tests.builders import cameras, hands

SIZE = (96, 128)


@pytest.fixture
def batch():
    xyz_m = torch.from_numpy(hands(16)).float()
    intrinsics = torch.from_numpy(cameras(16, size=100)).float()
    return xyz_m, intrinsics


def test_a_gaussian_heatmap_is_the_normal_density_at_the_bins():
    heatmap = gaussian_heatmaps(torch.tensor(0.37, dtype=torch.float64), bins=200, sigma=0.05)
    density = norm(0.37, 0.05).pdf((np.arange(200) + 0.5) / 200) / 200
    assert np.allclose(heatmap.numpy(), density, atol=1e-9)


def test_sigma_is_a_fraction_of_the_axis_whatever_the_number_of_bins():
    for bins in (28, 56, 112, 224):
        heatmap = gaussian_heatmaps(torch.tensor(0.5, dtype=torch.float64), bins=bins, sigma=0.04)
        centers = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        deviation = (heatmap * (centers - 0.5).square()).sum().sqrt()
        assert deviation == pytest.approx(0.04, rel=0.02)


def test_soft_argmax_reads_the_coordinate_back_between_the_bins():
    coordinates = torch.linspace(0.2, 0.8, 61, dtype=torch.float64)
    logits = gaussian_heatmaps(coordinates, bins=32, sigma=0.04).log()
    assert torch.allclose(soft_argmax(logits), coordinates, atol=1e-6)


def test_a_coordinate_outside_the_axis_still_has_a_finite_heatmap():
    heatmap = gaussian_heatmaps(torch.tensor([-3.0, 4.0]), bins=16, sigma=0.01)
    assert heatmap.isfinite().all()
    assert torch.allclose(heatmap.sum(-1), torch.ones(2))


def test_read_out_is_float32_for_half_precision_logits():
    logits = torch.zeros(2, 21, 8, dtype=torch.bfloat16)
    assert read_out(AxisLogits(logits, logits, logits)).dtype == torch.float32


@pytest.mark.parametrize("known_scale", [True, False])
def test_image_axes_give_the_metric_joints_back_through_the_intrinsics(batch, known_scale):
    xyz_m, intrinsics = batch
    xyz_m = xyz_m[:1].expand(16, -1, -1) + torch.linspace(0, 0.3, 16)[:, None, None] * torch.tensor([0.1, 0.2, 1.0])
    axes = ImageAxes(sigma=0.02)
    axes.fit(xyz_m)  # one hand in sixteen places: its proportions and its size are known exactly
    scale_m = geometry.bone_lengths(xyz_m)[:, 9] if known_scale else torch.full((16,), torch.nan)
    coordinates = axes.encode(xyz_m, intrinsics, SIZE)
    assert torch.allclose(axes.decode(coordinates, intrinsics, SIZE, scale_m), xyz_m, atol=2e-4)


def test_image_axes_hold_pixels_and_relative_depth(batch):
    xyz_m, intrinsics = batch
    axes = ImageAxes(sigma=0.02)
    axes.fit(xyz_m)
    coordinates = axes.encode(xyz_m, intrinsics, SIZE)
    uv = geometry.project(xyz_m, intrinsics)
    assert torch.allclose(coordinates[..., 0] * 128 - 0.5, uv[..., 0], atol=1e-3)
    assert torch.allclose(coordinates[..., 1] * 96 - 0.5, uv[..., 1], atol=1e-3)
    assert torch.allclose(coordinates[:, 9, 2], torch.full((16,), 0.5))
    assert ((coordinates[..., 2] > 0) & (coordinates[..., 2] < 1)).all()


def test_relative_depth_does_not_depend_on_the_size_of_the_hand(batch):
    xyz_m, intrinsics = batch
    axes = ImageAxes(sigma=0.02)
    axes.fit(xyz_m)
    assert torch.allclose(axes.encode(xyz_m, intrinsics, SIZE), axes.encode(1.3 * xyz_m, intrinsics, SIZE), atol=1e-4)


def test_camera_axes_are_linear_in_millimetres(batch):
    xyz_m, intrinsics = batch
    axes = CameraAxes(sigma=0.02, x_mm=[-500, 500], y_mm=[-500, 500], z_mm=[0, 2000])
    coordinates = axes.encode(xyz_m, intrinsics, SIZE)
    assert torch.allclose(1000 * xyz_m[..., 2], 2000 * coordinates[..., 2], atol=1e-3)
    assert torch.allclose(axes.decode(coordinates, intrinsics, SIZE, xyz_m[:, 0, 0]), xyz_m, atol=1e-6)


def test_camera_axes_refuse_a_training_set_outside_their_ranges(batch):
    axes = CameraAxes(sigma=0.02, x_mm=[-1, 1], y_mm=[-500, 500], z_mm=[0, 2000])
    with pytest.raises(UserError, match=r"x_mm.*widen the ranges"):
        axes.fit(batch[0])


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1.0])
def test_sigma_outside_the_axis_is_refused(sigma):
    with pytest.raises(UserError, match=rf"heatmap\.sigma.*{sigma}"):
        ImageAxes(sigma=sigma)


def test_mixed_precision_does_not_round_what_is_read_out():
    logits = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = soft_argmax(logits)
    assert torch.equal(mixed, soft_argmax(logits))
