import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import laplace, norm

from handpose import geometry
from handpose.errors import UserError
from handpose.heatmaps import (
    AxisLogits,
    CameraAxes,
    HeatmapTruth,
    ImageAxes,
    compute_expected_coordinates,
    debiased_argmax,
    draw_gaussian_heatmaps,
    draw_laplacian_heatmaps,
    soft_argmax,
)
from tests.builders import make_cameras, make_hands

SIZE = (96, 128)
DRAWN = {"target": "gaussian", "read_out": "soft_argmax"}
DRAW = {"gaussian": draw_gaussian_heatmaps, "laplacian": draw_laplacian_heatmaps}


@pytest.fixture
def batch():
    xyz_m = torch.from_numpy(make_hands(16)).float()
    intrinsics = torch.from_numpy(make_cameras(16, size=100)).float()
    return xyz_m, intrinsics


def test_a_gaussian_heatmap_is_the_normal_density_at_the_bins():
    heatmap = draw_gaussian_heatmaps(torch.tensor(0.37, dtype=torch.float64), bins=200, sigma=0.05)
    density = norm(0.37, 0.05).pdf((np.arange(200) + 0.5) / 200) / 200
    assert np.allclose(heatmap.numpy(), density, atol=1e-9)


def test_a_laplacian_heatmap_is_its_density_at_the_bins():
    heatmap = draw_laplacian_heatmaps(torch.tensor(0.37, dtype=torch.float64), bins=2000, sigma=0.03)
    density = laplace(0.37, 0.03 / np.sqrt(2)).pdf((np.arange(2000) + 0.5) / 2000) / 2000
    assert np.allclose(heatmap.numpy(), density, atol=1e-6)


@pytest.mark.parametrize("shape", DRAW)
def test_sigma_is_the_deviation_in_fractions_of_the_axis_whatever_the_number_of_bins(shape):
    for bins in (28, 56, 112, 224):
        heatmap = DRAW[shape](torch.tensor(0.5, dtype=torch.float64), bins=bins, sigma=0.04)
        centers = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        deviation = (heatmap * (centers - 0.5).square()).sum().sqrt()
        assert deviation == pytest.approx(0.04, rel=0.04)


@pytest.mark.parametrize("shape", DRAW)
def test_axes_draw_the_heatmaps_they_are_asked_for(shape):
    axes = ImageAxes(sigma=0.04, target=shape, read_out="soft_argmax")
    coordinates = torch.rand(5, 21)
    assert torch.equal(axes.draw_heatmaps(coordinates, bins=24), DRAW[shape](coordinates, bins=24, sigma=0.04))


def test_soft_argmax_reads_the_coordinate_back_between_the_bins():
    coordinates = torch.linspace(0.2, 0.8, 61, dtype=torch.float64)
    logits = draw_gaussian_heatmaps(coordinates, bins=32, sigma=0.04).log()
    assert torch.allclose(soft_argmax(logits), coordinates, atol=1e-6)


CELLS = (1, 2, 3, 7)  # of the last map of an encoder, at 32, 64, 96 and 224 px
SIGMAS = (0.006, 0.015, 0.05, 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", DRAW)
@pytest.mark.parametrize("depth", range(6))
def test_the_debiased_read_out_gives_back_what_targets_were_drawn_for_also_at_the_border(shape, depth, dtype):
    coordinates = torch.linspace(0.0, 1.0, 101, dtype=dtype)
    for cells, bins_per_cell, sigma in itertools.product(CELLS, (1, 2), SIGMAS):
        if cells * bins_per_cell * 2**depth == 1:
            continue  # the only bin holds all mass, wherever the coordinate is
        target = DRAW[shape](coordinates, bins=cells * bins_per_cell * 2**depth, sigma=sigma)
        read = debiased_argmax(target.log(), sigma=sigma, target=shape)
        assert (read - coordinates).abs().max() < 1e-3, (cells, bins_per_cell, sigma)


@pytest.mark.parametrize("shape", DRAW)
def test_a_single_bin_is_read_out_as_the_middle(shape):
    assert debiased_argmax(torch.tensor([[0.0], [3.0]]), sigma=0.1, target=shape).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("shape", "bound"), [("gaussian", 0.03), ("laplacian", 0.06)])
def test_the_mean_of_a_target_is_its_coordinate_however_narrow_it_is_asked_to_be(shape, bound):
    for bins, sigma in itertools.product((12, 24, 48, 96, 192), SIGMAS[:-1]):
        border = (6 if shape == "gaussian" else 10) * max(sigma, 0.5 / bins)  # what it cuts off pulls the mean away
        if border < 0.5:
            coordinates = torch.linspace(border, 1.0 - border, 301, dtype=torch.float64)
            heatmap = DRAW[shape](coordinates, bins=bins, sigma=sigma)
            centers = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
            assert ((heatmap * centers).sum(-1) - coordinates).abs().max() < bound / bins, (bins, sigma)


@pytest.mark.parametrize("shape", DRAW)
def test_narrow_targets_move_with_their_coordinate_inside_a_bin(shape):
    coordinates = torch.linspace(0.0, 1.0, 301, dtype=torch.float64)
    heatmap = DRAW[shape](coordinates, bins=6, sigma=0.01)  # depth 1 at 96 px
    mean = (heatmap * (torch.arange(6, dtype=torch.float64) + 0.5) / 6).sum(-1)
    assert (mean.diff() > 0).all()
    assert (mean - coordinates)[50:251].abs().max() < 0.02


def test_a_laplacian_heatmap_is_its_mass_within_the_borders_of_the_bins():
    for coordinate in (0.0, 0.04, 0.37, 1.0):
        heatmap = draw_laplacian_heatmaps(torch.tensor(coordinate, dtype=torch.float64), bins=10, sigma=0.06)
        mass = np.diff(laplace(coordinate, 0.06 / np.sqrt(2)).cdf(np.linspace(0, 1, 11)))
        assert np.allclose(heatmap.numpy(), mass / mass.sum(), atol=1e-12)


@pytest.mark.parametrize("shape", DRAW)
def test_near_the_border_the_debiased_read_out_errs_far_less_than_the_soft_argmax(shape):
    coordinates = torch.cat([torch.linspace(0.0, 0.04, 41), torch.linspace(0.96, 1.0, 41)]).double()
    logits = DRAW[shape](coordinates, bins=48, sigma=0.04).log()
    pulled = (soft_argmax(logits) - coordinates).abs().mean()
    assert pulled > 0.3 * 0.04
    assert (debiased_argmax(logits, sigma=0.04, target=shape) - coordinates).abs().mean() < 0.1 * pulled


@pytest.mark.parametrize("shape", DRAW)
def test_mass_that_lies_evenly_over_the_axis_does_not_move_the_debiased_read_out(shape):
    coordinates = torch.linspace(0.05, 0.95, 91, dtype=torch.float64)
    heatmap = 0.7 * DRAW[shape](coordinates, bins=48, sigma=0.04) + 0.3 / 48
    assert (soft_argmax(heatmap.log()) - coordinates).abs().mean() > 0.05
    assert torch.allclose(debiased_argmax(heatmap.log(), sigma=0.04, target=shape), coordinates, atol=1e-4)


def test_inside_the_axis_the_debiased_read_out_is_the_soft_argmax_however_unsure_a_network_is():
    two_places = 0.5 * draw_gaussian_heatmaps(torch.tensor([[0.3], [0.6]]), bins=48, sigma=0.04).sum(0).log()
    assert debiased_argmax(two_places, sigma=0.04, target="gaussian") == pytest.approx(0.45, abs=1e-4)


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40),
    sigma=st.floats(0.001, 0.9),
    shape=st.sampled_from(list(DRAW)),
)
def test_the_debiased_read_out_lies_on_the_axis_for_any_logits(logits, sigma, shape):
    assert 0.0 <= float(debiased_argmax(torch.tensor(logits), sigma=sigma, target=shape)) <= 1.0


@pytest.mark.parametrize("shape", DRAW)
def test_a_coordinate_outside_the_axis_still_has_a_finite_heatmap(shape):
    heatmap = DRAW[shape](torch.tensor([-3.0, 4.0]), bins=16, sigma=0.01)
    assert heatmap.isfinite().all()
    assert torch.allclose(heatmap.sum(-1), torch.ones(2))


@pytest.mark.parametrize("kind", ["soft_argmax", "debiased"])
def test_coordinates_are_float32_for_half_precision_logits(kind):
    logits = torch.randn(2, 21, 8).bfloat16()
    read = ImageAxes(sigma=0.1, target="gaussian", read_out=kind).read_out(AxisLogits(logits, logits, logits))
    assert (read.dtype, read.shape) == (torch.float32, (2, 21, 3))


def test_axes_read_out_as_they_are_asked_to():
    logits = AxisLogits(*(torch.randn(2, 21, bins) for bins in (8, 12, 16)))
    mean, peak = (ImageAxes(sigma=0.1, target="gaussian", read_out=kind) for kind in ("soft_argmax", "debiased"))
    assert torch.equal(mean.read_out(logits), compute_expected_coordinates(logits))
    assert torch.equal(peak.read_out(logits)[..., 2], debiased_argmax(logits.depth, sigma=0.1, target="gaussian"))


@pytest.mark.parametrize("known_scale", [True, False])
def test_image_axes_give_the_metric_joints_back_through_the_intrinsics(batch, known_scale):
    xyz_m, intrinsics = batch
    xyz_m = xyz_m[:1].expand(16, -1, -1) + torch.linspace(0, 0.3, 16)[:, None, None] * torch.tensor([0.1, 0.2, 1.0])
    axes = ImageAxes(sigma=0.02, **DRAWN)
    axes.fit(xyz_m)  # one hand in sixteen places: its proportions and its size are known exactly
    scale_m = geometry.compute_bone_lengths(xyz_m)[:, 9] if known_scale else torch.full((16,), torch.nan)
    coordinates = axes.encode(xyz_m, intrinsics, SIZE)
    assert torch.allclose(axes.decode(coordinates, intrinsics, SIZE, scale_m), xyz_m, atol=2e-4)


def test_image_axes_hold_pixels_and_relative_depth(batch):
    xyz_m, intrinsics = batch
    axes = ImageAxes(sigma=0.02, **DRAWN)
    axes.fit(xyz_m)
    coordinates = axes.encode(xyz_m, intrinsics, SIZE)
    uv = geometry.project(xyz_m, intrinsics)
    assert torch.allclose(coordinates[..., 0] * 128 - 0.5, uv[..., 0], atol=1e-3)
    assert torch.allclose(coordinates[..., 1] * 96 - 0.5, uv[..., 1], atol=1e-3)
    assert torch.allclose(coordinates[:, 9, 2], torch.full((16,), 0.5))
    assert ((coordinates[..., 2] > 0) & (coordinates[..., 2] < 1)).all()


@pytest.mark.parametrize("kind", ["image", "camera"])
def test_the_hand_of_true_coordinates_is_the_true_one_in_lengths_of_its_reference_bone(batch, kind):
    xyz_m, intrinsics = batch
    ranges = {"x_mm": [-500, 500], "y_mm": [-500, 500], "z_mm": [0, 2000]}
    axes = ImageAxes(sigma=0.02, **DRAWN) if kind == "image" else CameraAxes(sigma=0.02, **DRAWN, **ranges)
    axes.fit(xyz_m)
    truth = HeatmapTruth(axes.encode(xyz_m, intrinsics, SIZE), xyz_m, intrinsics, SIZE)
    joints = axes.normalize_hand(truth.coordinates, truth)
    length = torch.linalg.vector_norm(xyz_m[:, 10] - xyz_m[:, 9], dim=-1)
    assert torch.allclose(joints * length[:, None, None], xyz_m, atol=1e-5)


WRONG = {
    "a reference bone of almost no length": lambda hand: hand.index_copy(0, torch.tensor([10]), hand[9:10] + 1e-4),
    "a fingertip a metre away": lambda hand: hand + torch.eye(21)[:, 12:13] * torch.tensor([0.0, 0.0, 1.0]),
    "millimetres": lambda hand: 1000.0 * hand,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("share", [0.004, 0.1])
def test_wrong_labels_of_a_few_hands_do_not_change_what_depth_means(wrong, share):
    xyz_m = torch.from_numpy(make_hands(500)).float()
    clean, dirty = ImageAxes(sigma=0.02, **DRAWN), ImageAxes(sigma=0.02, **DRAWN)
    clean.fit(xyz_m)
    for hand in range(int(share * len(xyz_m))):
        xyz_m[hand] = wrong(xyz_m[hand])
    dirty.fit(xyz_m)
    for name in ("depth_range", "bone_lengths", "scale_m"):
        assert torch.allclose(getattr(dirty, name), getattr(clean, name), rtol=0.02), name


def test_the_axis_of_depth_holds_all_clean_hands_with_a_tenth_to_spare():
    xyz_m = torch.from_numpy(make_hands(500)).float()
    axes = ImageAxes(sigma=0.02, **DRAWN)
    axes.fit(xyz_m)
    relative = (xyz_m[..., 2] - xyz_m[:, 9, None, 2]) / torch.linalg.vector_norm(xyz_m[:, 10] - xyz_m[:, 9], dim=-1)[
        :, None
    ]
    assert axes.depth_range == pytest.approx(1.1 * relative.abs().max().item(), rel=1e-5)


def test_the_ranges_that_camera_axes_ask_for_are_those_of_hands_that_are_not_far_from_the_rest(batch):
    xyz_m = batch[0].clone()
    xyz_m[3, 8, 0] += 50.0
    axes = CameraAxes(sigma=0.02, **DRAWN, x_mm=[-1, 1], y_mm=[-500, 500], z_mm=[0, 2000])
    with pytest.raises(UserError, match="the joints span") as refused:
        axes.fit(xyz_m)
    spans = re.findall(r"-?\d+", str(refused.value).partition("span")[2])
    assert max(map(int, spans)) < 2000


def test_relative_depth_does_not_depend_on_the_size_of_the_hand(batch):
    xyz_m, intrinsics = batch
    axes = ImageAxes(sigma=0.02, **DRAWN)
    axes.fit(xyz_m)
    assert torch.allclose(axes.encode(xyz_m, intrinsics, SIZE), axes.encode(1.3 * xyz_m, intrinsics, SIZE), atol=1e-4)


def test_camera_axes_are_linear_in_millimetres(batch):
    xyz_m, intrinsics = batch
    axes = CameraAxes(sigma=0.02, **DRAWN, x_mm=[-500, 500], y_mm=[-500, 500], z_mm=[0, 2000])
    coordinates = axes.encode(xyz_m, intrinsics, SIZE)
    assert torch.allclose(1000 * xyz_m[..., 2], 2000 * coordinates[..., 2], atol=1e-3)
    assert torch.allclose(axes.decode(coordinates, intrinsics, SIZE, xyz_m[:, 0, 0]), xyz_m, atol=1e-6)


def test_camera_axes_refuse_a_training_set_outside_their_ranges(batch):
    axes = CameraAxes(sigma=0.02, **DRAWN, x_mm=[-1, 1], y_mm=[-500, 500], z_mm=[0, 2000])
    with pytest.raises(UserError, match=r"x_mm.*widen the ranges"):
        axes.fit(batch[0])


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1.0])
def test_sigma_outside_the_axis_is_refused(sigma):
    with pytest.raises(UserError, match=rf"heatmap\.sigma.*{sigma}"):
        ImageAxes(sigma=sigma, **DRAWN)


def test_mixed_precision_does_not_round_what_is_read_out():
    logits = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = soft_argmax(logits)
    assert torch.equal(mixed, soft_argmax(logits))


def test_hands_without_depth_do_not_change_what_the_axes_take_from_the_others():
    xyz_m = torch.from_numpy(make_hands(20)).float()
    nothing = torch.full((30, 21, 3), torch.nan)
    options = {"sigma": 0.02, "target": "gaussian", "read_out": "soft_argmax"}
    alone, mixed = ImageAxes(**options), ImageAxes(**options)
    alone.fit(xyz_m)
    mixed.fit(torch.cat([nothing, xyz_m]))
    for name, value in alone.state_dict().items():
        assert torch.equal(mixed.state_dict()[name], value)


def test_a_network_trained_without_depth_has_no_range_to_keep():
    xyz_m = torch.from_numpy(make_hands(20)).float()
    axes = ImageAxes(sigma=0.02, target="gaussian", read_out="soft_argmax")
    axes.fit(xyz_m, is_trained=True)
    fitted = axes.depth_range.clone()
    assert fitted > 1.1
    axes.fit(2.0 * xyz_m * torch.tensor([1.0, 1.0, 3.0]), is_trained=True)
    assert axes.depth_range == fitted
