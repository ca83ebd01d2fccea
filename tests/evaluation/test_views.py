"""Averaging at test time: what turns with the hand comes back exactly, what turns with the picture averages out."""

import math

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import nn

from handpose.config import compose
from handpose.config_files import CONFIGS
from handpose.data.augment import View
from handpose.errors import UserError
from handpose.evaluation.views import Views, average_views, look_at_joints
from handpose.geometry import project, to_root_relative
from tests.builders import as_prediction, make_cameras, make_hands

SIZE = 32
NUM_HANDS = 4
UNKNOWN = torch.full((NUM_HANDS,), torch.nan)
ONE_PASS = {"num_rotations": 1, "rotation_deg": 180.0, "mirror": False, "scales": [1.0], "crop": None}


def make_views(**changed) -> Views:
    return Views(**(ONE_PASS | changed))


@pytest.fixture
def view() -> View:
    """In float64, so that what is left of an error is not rounding."""
    generator = torch.Generator().manual_seed(0)
    return View(
        image=torch.rand(NUM_HANDS, 3, SIZE, SIZE, dtype=torch.float64, generator=generator),
        intrinsics=torch.from_numpy(make_cameras(NUM_HANDS, SIZE)),
        xyz_m=torch.from_numpy(make_hands(NUM_HANDS)),
    )


def center_view(view: View) -> View:
    """With the principal point in the middle, so that the views turn about the optical axis."""
    intrinsics = view.intrinsics.clone()
    intrinsics[:, :2, 2] = (SIZE - 1) / 2
    return view._replace(intrinsics=intrinsics)


class ReadsTheTruth(nn.Module):
    """Knows the joints of every view, whatever it shows, and adds an error of its own: equivariant without it."""

    def __init__(self, error_m=(0.0, 0.0, 0.0)):
        super().__init__()
        self.error_m = torch.tensor(error_m, dtype=torch.float64)
        self.views = []

    def predict(self, view, scale_m):
        self.views.append(view)
        return as_prediction(view.xyz_m + self.error_m, 0.001)


EVERY_OPTION = [
    ({}, 1),
    ({"num_rotations": 5}, 5),
    ({"num_rotations": 4, "rotation_deg": 20.0}, 4),
    ({"num_rotations": 4, "rotation_deg": 0.0}, 1),
    ({"mirror": True}, 2),
    ({"scales": [0.8, 1.0, 1.3]}, 3),
    ({"crop": 0.6}, 2),
    ({"num_rotations": 3, "mirror": True, "scales": [0.9, 1.1], "crop": 0.5}, 13),
]


@pytest.mark.parametrize(("options", "passes"), EVERY_OPTION)
def test_a_network_that_is_right_in_every_view_is_right_in_the_mean(view, options, passes):
    module = ReadsTheTruth()
    error_mm = 1000 * (make_views(**options).predict_xyz_m(module, view, UNKNOWN) - view.xyz_m).abs()
    assert error_mm.max() < 1e-4
    assert len(module.views) == make_views(**options).num_passes == passes


@pytest.mark.parametrize(("options", "passes"), EVERY_OPTION)
def test_a_hand_half_outside_the_picture_comes_back_as_exactly(view, options, passes):
    aside = view._replace(xyz_m=view.xyz_m + torch.tensor([0.15, -0.12, 0.0]))
    assert not (project(aside.xyz_m, aside.intrinsics) < SIZE).all()
    error_mm = 1000 * (make_views(**options).predict_xyz_m(ReadsTheTruth(), aside, UNKNOWN) - aside.xyz_m).abs()
    assert error_mm.max() < 1e-4


@pytest.mark.parametrize("options", [options for options, _ in EVERY_OPTION])
def test_every_view_shows_the_picture_that_its_camera_sees(view, options):
    """The pixel under a joint is the same in all views, up to the warp's blur: the joint moved with the picture."""
    slope = torch.linspace(0, 1, SIZE, dtype=torch.float64)
    seen = [slope.expand(SIZE, SIZE), slope[:, None].expand(SIZE, SIZE), torch.ones(SIZE, SIZE)]
    module = ReadsTheTruth()
    make_views(**options).predict_xyz_m(
        module, view._replace(image=torch.stack(seen).expand(NUM_HANDS, -1, -1, -1)), UNKNOWN
    )
    expected = (project(view.xyz_m, view.intrinsics)[:, 9] / (SIZE - 1)).clamp(0, 1)  # as the slopes run
    for shown in module.views:
        assert torch.allclose(read_value(shown, joint=9)[:, :2], expected, atol=0.01)


def read_value(view, *, joint):
    uv = project(view.xyz_m, view.intrinsics)[:, joint]
    grid = ((2 * uv + 1) / SIZE - 1).view(-1, 1, 1, 2)
    return nn.functional.grid_sample(view.image, grid, align_corners=False).flatten(1)


def measure_turns(view, *, degrees, num):
    """By how much each view of a straight camera is turned, in radians."""
    centre, module = (SIZE - 1) / 2, ReadsTheTruth()
    make_views(num_rotations=num, rotation_deg=degrees).predict_xyz_m(module, center_view(view), UNKNOWN)
    found = torch.stack([project(one.xyz_m, one.intrinsics) - centre for one in [center_view(view), *module.views]])
    turned = torch.view_as_complex(found[1:]) / torch.view_as_complex(found[0])
    assert torch.allclose(turned, turned[:, :1, :1].expand_as(turned), atol=1e-9)
    return turned[:, 0, 0]


def test_the_views_turn_evenly_over_the_full_circle(view):
    expected = torch.polar(torch.ones(6).double(), 2 * math.pi * torch.arange(6).double() / 6)
    assert torch.allclose(measure_turns(view, degrees=180.0, num=6), expected, atol=1e-9)


def test_the_views_turn_evenly_to_either_side(view):
    angles = measure_turns(view, degrees=30.0, num=5).angle()
    assert torch.allclose(angles.rad2deg(), torch.tensor([-30.0, -15.0, 0.0, 15.0, 30.0]).double(), atol=1e-9)


def test_an_error_that_stays_with_the_picture_averages_out(view):
    view = center_view(view)
    sideways = ReadsTheTruth((0.01, -0.02, 0.0))
    assert torch.allclose(make_views(num_rotations=4).predict_xyz_m(sideways, view, UNKNOWN), view.xyz_m, atol=1e-6)
    to_one_side = ReadsTheTruth((0.01, 0.0, 0.0))
    assert torch.allclose(make_views(mirror=True).predict_xyz_m(to_one_side, view, UNKNOWN), view.xyz_m, atol=1e-6)
    away = ReadsTheTruth((0.0, 0.0, 0.01))
    relative = to_root_relative(make_views(num_rotations=4).predict_xyz_m(away, view, UNKNOWN))
    assert torch.allclose(relative, to_root_relative(view.xyz_m), atol=1e-6)


def test_inverse_depths_are_averaged_and_poses_are_not_bent_by_it(view):
    near, far = view.xyz_m * 0.5, view.xyz_m * 2.0
    mean = average_views(torch.stack([near, far]))
    assert torch.allclose(mean[:, 9, 2], view.xyz_m[:, 9, 2] / 1.25)  # 1 / mean(1 / 0.5, 1 / 2)
    assert torch.allclose(project(mean[:, 9:10], view.intrinsics), project(view.xyz_m[:, 9:10], view.intrinsics))
    assert torch.allclose(to_root_relative(mean), 1.25 * to_root_relative(view.xyz_m))


def test_a_crop_shows_the_hand_in_the_middle_at_the_size_that_is_asked_for(view):
    module = ReadsTheTruth()
    aside = view._replace(xyz_m=view.xyz_m + torch.tensor([0.12, 0.1, 0.2]))
    make_views(crop=0.6).predict_xyz_m(module, aside, UNKNOWN)
    uv = project(module.views[1].xyz_m, module.views[1].intrinsics)
    low, high = uv.amin(1), uv.amax(1)
    assert torch.allclose((low + high) / 2, torch.tensor((SIZE - 1) / 2).double(), atol=1e-9)
    assert torch.allclose((high - low).amax(1), torch.tensor(0.6 * SIZE).double(), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    direction=st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)),
    seed=st.integers(0, 1000),
)
def test_the_camera_that_looks_at_a_hand_turns_by_the_least_angle(direction, seed):
    ray = torch.tensor([*direction, 1.0]).double()
    points = ray[:2] + 0.001 * torch.rand(1, 21, 2, generator=torch.Generator().manual_seed(seed)).double()
    camera = torch.eye(3).double()[None]
    rotation, _ = look_at_joints(points, camera, (SIZE, SIZE), fill=0.5)
    middle = torch.cat([(points.amin(1) + points.amax(1)) / 2, torch.ones(1, 1)], dim=1)[0]
    turned = Rotation.from_matrix(rotation[0].numpy())  # raises for a matrix that is none
    assert turned.apply(middle / middle.norm()) == pytest.approx([0, 0, 1], abs=1e-12)
    assert turned.magnitude() == pytest.approx(math.acos(1 / middle.norm()), abs=1e-6)


def test_joints_in_one_place_are_enlarged_by_a_finite_factor(view):
    rotation, intrinsics = look_at_joints(
        torch.full((NUM_HANDS, 21, 2), 9.0).double(), view.intrinsics, (32, 32), fill=0.5
    )
    assert rotation.isfinite().all()
    assert torch.allclose(intrinsics[:, 0, 0], 8 * view.intrinsics[:, 0, 0])


def test_networks_without_intrinsics_are_not_shown_pictures_of_another_camera():
    axes = instantiate(compose("train", ["heatmap=camera_axes"]).heatmap)
    make_views(num_rotations=8, mirror=True).check_axes(axes)
    for options in ({"crop": 0.6}, {"scales": [0.9, 1.0]}):
        with pytest.raises(UserError, match="do not work with heatmap=camera_axes"):
            make_views(**options).check_axes(axes)


@pytest.mark.parametrize("wrong", [{"num_rotations": 0}, {"rotation_deg": 181.0}, {"scales": []}, {"scales": [0.0]}])
def test_a_value_out_of_its_range_is_refused(wrong):
    with pytest.raises(UserError, match=f"test_time.{next(iter(wrong))} must"):
        make_views(**wrong)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIGS / "test_time").glob("*.yaml")))
def test_every_choice_makes_views_no_further_turned_than_the_training_was(choice):
    config = compose("train", [f"test_time={choice}", "augment.rotation_deg=30"])
    assert max(map(abs, instantiate(config.test_time).angles)) <= math.radians(30) + 1e-9


def test_one_pass_is_the_default_and_the_original_turns_over_the_full_circle():
    assert instantiate(compose("train", []).test_time).num_passes == 1
    original = compose("train", ["experiment=exp_submission", "test_time=rotations_mirror"])
    assert instantiate(original.test_time).num_passes == 16
    assert instantiate(original.test_time).angles == pytest.approx([math.radians(45 * i) for i in range(8)])
