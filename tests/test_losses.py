import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from handpose import geometry
from handpose.heatmaps import (
    AxisLogits,
    CameraAxes,
    HeatmapTruth,
    ImageAxes,
    draw_gaussian_heatmaps,
    hide_unknown_depth,
)
from handpose.losses import CoordinateMse, HeatmapLoss, js_divergence, kl_divergence
from tests.builders import make_cameras, make_hands

AXES = ImageAxes(sigma=0.05, target="gaussian", read_out="soft_argmax")
RANGES = {"x_mm": [-500, 500], "y_mm": [-500, 500], "z_mm": [0, 1000]}
SIZE = (96, 96)


def make_logits(coordinates, bins=64, sigma=0.05):
    """Of heatmaps drawn round the coordinates; the same that the target's softmax is made of, also in their tails."""
    centers = (torch.arange(bins) + 0.5) / bins
    return AxisLogits(*(-0.5 * ((centers - coordinates[..., i, None]) / sigma).square() for i in range(3)))


def make_truth(coordinates):
    """Where only coordinates play a part."""
    nothing = torch.full_like(coordinates, torch.nan)
    return HeatmapTruth(coordinates, nothing, nothing, SIZE)


@pytest.fixture
def coordinates():
    return 0.2 + 0.6 * torch.rand(4, 21, 3, generator=torch.Generator().manual_seed(0))


def make_heatmap_loss(**values):
    weights = {
        "divergence": "kl",
        "heatmap_weight": 1.0,
        "coordinate_weight": 1.0,
        "depth_weight": 1.0,
        "bone_length_weight": 0.0,
        "bone_direction_weight": 0.0,
    }
    return HeatmapLoss(**weights | values)


def make_bone_loss(**values):
    return make_heatmap_loss(bone_length_weight=1.0, bone_direction_weight=1.0, **values)


def fit_axes(kind, xyz_m):
    options = {"sigma": 0.02, "target": "gaussian", "read_out": "soft_argmax"}
    axes = ImageAxes(**options) if kind == "image" else CameraAxes(**options, **RANGES)
    axes.fit(xyz_m)
    return axes


def make_hands_and_axes(kind, *, count=8, shift_m=(0.0, 0.0, 0.0)):
    """Axes and the truth of some hands, all in the picture unless they are shifted."""
    xyz_m = torch.from_numpy(make_hands(count)).float()
    axes = fit_axes(kind, xyz_m)
    xyz_m = xyz_m + torch.tensor(shift_m)
    intrinsics = torch.from_numpy(make_cameras(count, size=96)).float()
    return axes, HeatmapTruth(axes.encode(xyz_m, intrinsics, SIZE), xyz_m, intrinsics, SIZE)


def test_the_heatmap_loss_is_zero_for_the_true_heatmaps(coordinates):
    terms = make_heatmap_loss()(make_logits(coordinates), make_truth(coordinates), AXES)
    assert terms["heatmap"] == pytest.approx(0.0, abs=1e-5)
    assert terms["coordinate"] == pytest.approx(0.0, abs=1e-3)


def test_the_divergence_of_two_shifted_gaussians_has_its_closed_form(coordinates):
    shifted = coordinates + torch.tensor([0.03, 0.0, 0.0])
    terms = make_heatmap_loss()(make_logits(shifted, bins=256), make_truth(coordinates), AXES)
    assert terms["heatmap"] == pytest.approx(0.03**2 / (2 * 0.05**2) / 3, rel=1e-2)  # KL of N(a, s) and N(b, s)
    assert terms["coordinate"] == pytest.approx(10 * 0.03 / 3, rel=1e-2)


def test_depth_weight_counts_the_depth_axis_more(coordinates):
    shifted = coordinates + torch.tensor([0.0, 0.0, 0.03])
    light = make_heatmap_loss(depth_weight=1.0)(make_logits(shifted), make_truth(coordinates), AXES)["coordinate"]
    heavy = make_heatmap_loss(depth_weight=4.0)(make_logits(shifted), make_truth(coordinates), AXES)["coordinate"]
    assert heavy / light == pytest.approx(4 / (6 / 3), rel=1e-3)


def test_a_joint_outside_the_picture_does_not_count(coordinates):
    logits = make_logits(coordinates)
    outside = coordinates.clone()
    outside[:, 3, 0] = 1.7
    terms = make_heatmap_loss()(logits, make_truth(outside), AXES)
    assert sum(terms.values()) < 1e-2


def test_the_mse_of_camera_axes_is_in_square_millimetres(coordinates):
    axes = CameraAxes(
        sigma=0.05, target="gaussian", read_out="soft_argmax", x_mm=[0, 200], y_mm=[0, 200], z_mm=[0, 1000]
    )
    shifted = coordinates + torch.tensor([0.01, 0.01, 0.01])
    loss = CoordinateMse()(make_logits(shifted, bins=256), make_truth(coordinates), axes)["coordinate"]
    assert loss == pytest.approx((2**2 + 2**2 + 10**2) / 3, rel=2e-2)


heatmaps = st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12).map(torch.tensor)


@given(logits=heatmaps, other=heatmaps)
def test_the_divergences_are_those_of_scipy(logits, other):
    target = torch.softmax(other.double(), -1)
    ours = torch.softmax(logits.double(), -1)
    assert float(kl_divergence(logits.double(), target)) == pytest.approx(entropy(target, ours), rel=1e-6, abs=1e-9)
    assert float(js_divergence(logits.double(), target)) == pytest.approx(jensenshannon(ours, target) ** 2, abs=1e-8)


@given(logits=heatmaps, other=heatmaps)
def test_the_jensen_shannon_divergence_is_symmetric_and_at_most_log_2(logits, other):
    there = js_divergence(logits.double(), torch.softmax(other.double(), -1))
    back = js_divergence(other.double(), torch.softmax(logits.double(), -1))
    assert float(there) == pytest.approx(float(back), abs=1e-9)
    assert -1e-9 <= float(there) <= 0.6931471806


def test_far_apart_the_jensen_shannon_divergence_is_log_2_with_finite_gradients():
    logits = (-1e4 * torch.arange(8.0)).requires_grad_()
    divergence = js_divergence(logits, draw_gaussian_heatmaps(torch.tensor(0.9), bins=8, sigma=0.01))
    divergence.backward()
    assert float(divergence.detach()) == pytest.approx(0.693147, abs=1e-5)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["kl", "jsd"])
@pytest.mark.parametrize("shape", ["gaussian", "laplacian"])
def test_the_divergence_from_the_heatmaps_that_are_asked_for_is_zero(coordinates, divergence, shape):
    axes = ImageAxes(sigma=0.05, target=shape, read_out="soft_argmax")
    drawn = AxisLogits(*(axes.draw_heatmaps(coordinates[..., i], bins=64).clamp_min(1e-37).log() for i in range(3)))
    terms = make_heatmap_loss(divergence=divergence)(drawn, make_truth(coordinates), axes)
    assert float(terms["heatmap"]) == pytest.approx(0.0, abs=1e-5)


def test_bones_of_no_weight_are_not_computed(coordinates):
    terms = make_heatmap_loss()(make_logits(coordinates), make_truth(coordinates), AXES)
    assert set(terms) == {"heatmap", "coordinate"}


@pytest.mark.parametrize("kind", ["image", "camera"])
@pytest.mark.parametrize("shift_m", [(0.0, 0.0, 0.0), (0.02, -0.01, 0.3)])
def test_the_bone_losses_are_zero_for_the_truth_wherever_the_hand_is(kind, shift_m):
    axes, truth = make_hands_and_axes(kind, shift_m=shift_m)
    assert ((truth.coordinates > 0.0) & (truth.coordinates < 1.0)).all()
    terms = make_bone_loss()(make_logits(truth.coordinates, bins=1024, sigma=0.004), truth, axes)
    assert float(terms["bone_length"]) == pytest.approx(0.0, abs=1e-3)
    assert float(terms["bone_direction"]) == pytest.approx(0.0, abs=1e-4)


def test_bones_do_not_see_where_the_root_lies():
    axes, truth = make_hands_and_axes("camera")
    bent = truth.coordinates + 0.02 * torch.randn(truth.coordinates.shape, generator=torch.Generator().manual_seed(0))
    here, there = (make_bone_loss()(make_logits(bent + away, bins=512), truth, axes) for away in (0.0, 0.03))
    for name in ("bone_length", "bone_direction"):
        assert float(here[name]) > 0.01
        assert float(here[name]) == pytest.approx(float(there[name]), rel=1e-2)


def test_the_bone_losses_of_a_stretched_and_of_a_mirrored_hand_have_their_closed_form():
    axes, truth = make_hands_and_axes("camera")
    lengths = geometry.compute_bone_lengths(truth.xyz_m)
    root = truth.coordinates[:, 9:10]
    stretched = make_logits(root + 1.2 * (truth.coordinates - root), bins=512)
    terms = make_bone_loss()(stretched, truth, axes)
    assert float(terms["bone_length"]) == pytest.approx(float((0.2 * lengths / lengths[:, 9:10]).mean()), rel=1e-2)
    assert float(terms["bone_direction"]) == pytest.approx(0.0, abs=1e-3)
    opposite = make_bone_loss()(make_logits(2 * root - truth.coordinates, bins=512), truth, axes)
    assert float(opposite["bone_length"]) == pytest.approx(0.0, abs=1e-2)
    assert float(opposite["bone_direction"]) == pytest.approx(2.0, abs=1e-3)


LOSSES = {
    "kl": make_bone_loss(),
    "jsd": make_bone_loss(divergence="jsd"),
    "mse": CoordinateMse(),
}


@pytest.mark.parametrize("kind", ["image", "camera"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shift_m", [(0.12, 0.0, 0.0), (0.0, -0.15, 0.0), (5.0, 5.0, 5.0), (0.0, 0.0, -0.6)])
def test_hands_partly_or_wholly_outside_the_picture_give_finite_losses_and_gradients(kind, name, shift_m):
    axes, truth = make_hands_and_axes(kind, shift_m=shift_m)  # the last has its joints in the camera's plane
    logits = AxisLogits(*(torch.zeros(8, 21, 24, requires_grad=True) for _ in range(3)))
    terms = LOSSES[name](logits, truth, axes)
    loss = sum(terms.values())
    loss.backward()
    assert all(0.0 <= float(term.detach()) < (1e6 if name == "mse" else 100.0) for term in terms.values())
    assert all(
        axis.grad.isfinite().all() and axis.grad.abs().max() < (1e6 if name == "mse" else 100) for axis in logits
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_coordinate_outside_the_picture_has_no_gradient_and_the_others_have_theirs(name):
    axes, truth = make_hands_and_axes("image", shift_m=(0.12, 0.0, 0.0))
    outside = truth.coordinates[..., 0] > 1.0
    assert 0.1 < outside.float().mean() < 0.9
    logits = AxisLogits(*(torch.zeros(8, 21, 24, requires_grad=True) for _ in range(3)))
    sum(LOSSES[name](logits, truth, axes).values()).backward()
    assert logits.u.grad[outside].abs().max() == 0.0
    assert (logits.u.grad[~outside].abs().amax(-1) > 0.0).all()


@pytest.mark.parametrize("kind", ["image", "camera"])
def test_a_reference_bone_of_almost_no_length_does_not_rule_the_losses_of_a_batch(kind):
    axes, truth = make_hands_and_axes(kind)
    xyz_m = truth.xyz_m.clone()
    xyz_m[0, 10] = xyz_m[0, 9] + torch.tensor([1e-4, 0.0, 0.0])
    wrong = HeatmapTruth(axes.encode(xyz_m, truth.intrinsics, SIZE), xyz_m, truth.intrinsics, SIZE)
    logits = make_logits(torch.full((8, 21, 3), 0.5))
    clean, dirty = (make_bone_loss()(logits, each, axes) for each in (truth, wrong))
    for name in ("bone_length", "bone_direction"):
        assert dirty[name] == pytest.approx(clean[name].item(), rel=0.3)


@pytest.mark.parametrize("divergence", ["kl", "jsd"])
def test_a_hand_without_depth_counts_only_along_u_and_v(divergence):
    """Two of its keypoints have no label. The loss is that of the other coordinates, and its gradient is finite."""
    axes, truth = make_hands_and_axes("image", count=2)
    rays = truth.xyz_m / truth.xyz_m[..., 2:]
    rays[1, [9, 10]] = torch.nan
    coordinates = truth.coordinates.clone()
    coordinates[1, [9, 10]] = torch.nan
    has_depth = torch.tensor([True, False])
    xyz_m = truth.xyz_m.where(has_depth[:, None, None], rays)
    mixed = HeatmapTruth(hide_unknown_depth(coordinates, has_depth), xyz_m, truth.intrinsics, truth.size)
    logits = AxisLogits(*(torch.randn(2, 21, 32, requires_grad=True) for _ in range(3)))
    loss = make_bone_loss(divergence=divergence)
    terms = loss(logits, mixed, axes)
    sum(terms.values()).backward()
    assert all(axis.grad.isfinite().all() for axis in logits)
    assert logits.depth.grad[1].abs().max() == 0
    assert logits.u.grad[1, [9, 10]].abs().max() == 0
    assert logits.u.grad[1, :9].abs().amin(dim=-1).min() > 0
    alone = HeatmapTruth(truth.coordinates[:1], truth.xyz_m[:1], truth.intrinsics[:1], truth.size)
    of_first = loss(AxisLogits(*(axis[:1] for axis in logits)), alone, axes)
    for name in ("bone_length", "bone_direction"):  # only the first hand has bones
        assert terms[name].item() == pytest.approx(of_first[name].item(), rel=1e-5)


def test_the_squared_error_leaves_out_unknown_coordinates(coordinates):
    truth = make_truth(coordinates)
    hidden = hide_unknown_depth(coordinates, torch.tensor([True, False, False, True]))
    logits = make_logits(coordinates + torch.tensor([0.0, 0.0, 0.05]))
    full, partial = (CoordinateMse()(logits, each, AXES)["coordinate"] for each in (truth, make_truth(hidden)))
    assert float(partial) == pytest.approx(float(full) * (2 / 4) * 3 / (3 - 2 / 4), rel=0.02)
