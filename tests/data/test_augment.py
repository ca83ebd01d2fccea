import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from handpose import geometry
from handpose.data.augment import (
    Augment,
    View,
    center_intrinsics,
    mirror_view,
    rotate_about_center,
    rotate_view,
    tilt_camera,
    to_view,
    warp,
    zoom_intrinsics,
)
from handpose.data.random_draws import BatchShare, RandomDraws
from handpose.data.sample import HandBatch
from handpose.errors import UserError
from handpose.heatmaps import ImageAxes
from tests.builders import make_cameras, make_hands

SIZE = (64, 64)
OFF = {
    "rotation_deg": 0.0,
    "perspective_deg": 0.0,
    "scale": 0.0,
    "shift": 0.0,
    "mirror": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "color": 0.0,
    "background": 0.0,
    "background_folder": None,
    "occlusion": 0.0,
    "occlusion_size": [0.2, 0.6],
    "blur": 0.0,
    "noise": 0.0,
}


def make_augment(**values):
    return Augment(**(OFF | {"interpolation": "bilinear"} | values))


@pytest.fixture
def batch():
    return hand_batch()


def hand_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return HandBatch(
        image=torch.randint(0, 256, (8, 3, *SIZE), dtype=torch.uint8, generator=generator),
        intrinsics=torch.from_numpy(make_cameras(8, size=64, seed=seed)).float(),
        xyz_m=torch.from_numpy(make_hands(8, seed)).float(),
        scale_m=torch.full((8,), 0.04),
        position=torch.arange(8),
        mask=(255 * (torch.rand(8, 1, *SIZE, generator=generator) < 0.5)).to(torch.uint8),
        has_depth=torch.ones(8, dtype=torch.bool),
    )


def to_double(view):
    return View(*(field.double() for field in view))


def test_a_turned_camera_sees_the_warped_keypoints(batch):
    """Projecting the turned joints with the new K is the homography of the projected joints, to 1e-4 px."""
    view = to_double(to_view(batch))
    angle = torch.linspace(-3, 3, 8, dtype=torch.float64)
    rotation = rotate_about_center(angle, view.intrinsics, SIZE)
    intrinsics = zoom_intrinsics(
        view.intrinsics, torch.linspace(0.6, 1.6, 8).double(), torch.full((8, 2), 3.0).double(), SIZE
    )
    seen = rotate_view(view, rotation, intrinsics)
    uv = geometry.project(view.xyz_m, view.intrinsics)
    homography = intrinsics @ rotation @ torch.linalg.inv(view.intrinsics)
    moved = torch.cat([uv, torch.ones_like(uv[..., :1])], -1) @ homography.mT
    assert torch.allclose(geometry.project(seen.xyz_m, seen.intrinsics), moved[..., :2] / moved[..., 2:], atol=1e-4)


def test_the_warp_moves_a_dot_to_where_its_joint_projects(batch):
    """Independent of the algebra: a bright dot painted at a joint is found again at the joint's new projection."""
    view = to_double(to_view(batch))
    uv = geometry.project(view.xyz_m, view.intrinsics)[:, 9]  # (B, 2)
    v, u = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    dots = torch.exp(-((u - uv[:, 0, None, None]) ** 2 + (v - uv[:, 1, None, None]) ** 2) / 8)
    view = view._replace(image=dots[:, None].expand(-1, 3, -1, -1).double())
    rotation = rotate_about_center(torch.linspace(-0.6, 0.6, 8).double(), view.intrinsics, SIZE)
    seen = rotate_view(
        view,
        rotation,
        zoom_intrinsics(view.intrinsics, torch.full((8,), 1.1).double(), torch.zeros(8, 2).double(), SIZE),
    )
    weight = seen.image[:, 0] / seen.image[:, 0].sum((1, 2), keepdim=True)
    found = torch.stack([(weight * u).sum((1, 2)), (weight * v).sum((1, 2))], -1)
    assert torch.allclose(found, geometry.project(seen.xyz_m, seen.intrinsics)[:, 9], atol=0.1)


def batch_to_double(batch):
    return batch._replace(intrinsics=batch.intrinsics.double(), xyz_m=batch.xyz_m.double())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rotation_deg=st.floats(0, 180),
    perspective_deg=st.floats(0, 45),
    scale=st.floats(0, 0.5),
    shift=st.floats(0, 0.5),
)
def test_projecting_the_turned_joints_is_warping_the_projected_ones(seed, rotation_deg, perspective_deg, scale, shift):
    """With all motions together, to 1e-4 px."""
    before = batch_to_double(hand_batch(seed=seed % 1000))
    module = make_augment(rotation_deg=rotation_deg, perspective_deg=perspective_deg, scale=scale, shift=shift)
    motion = module.draw_motion(before, RandomDraws(torch.Generator().manual_seed(seed), 8))
    if motion.homography is None:
        return
    uv = geometry.project(before.xyz_m, before.intrinsics)
    warped = torch.cat([uv, torch.ones_like(uv[..., :1])], dim=-1) @ motion.homography.mT
    assert (warped[..., 2] > 0).all()
    seen = geometry.project(motion.xyz_m, motion.intrinsics)
    assert (seen - warped[..., :2] / warped[..., 2:]).abs().max() < 1e-4


def test_a_tilted_camera_keeps_the_middle_of_the_picture_in_its_place_and_of_its_size(batch):
    motion = make_augment(perspective_deg=40.0).draw_motion(
        batch_to_double(batch), RandomDraws(torch.Generator().manual_seed(0), 8)
    )
    corners = 31.5 + np.array([[0, 0], [1e-3, 0], [0, 1e-3]])
    for matrix in motion.homography.numpy():
        moved = np.c_[corners, np.ones(3)] @ matrix.T
        places = moved[:, :2] / moved[:, 2:]
        assert np.allclose(places[0], 31.5, atol=1e-9)
        assert np.linalg.det((places[1:] - places[0]) / 1e-3) == pytest.approx(1.0, abs=1e-3)
    assert not torch.allclose(motion.xyz_m, batch.xyz_m.double(), atol=0.01)


def test_tilts_keep_to_their_limit_and_turn_the_optical_axis(batch):
    motion = make_augment(perspective_deg=25.0).draw_motion(
        batch_to_double(batch), RandomDraws(torch.Generator().manual_seed(2), 8)
    )
    turn = torch.linalg.lstsq(batch.xyz_m.double(), motion.xyz_m).solution.mT
    rotation = Rotation.from_matrix(turn.numpy())
    assert rotation.magnitude().max() < np.deg2rad(25.0) + 1e-6
    assert rotation.magnitude().max() > np.deg2rad(10.0)
    assert np.abs(rotation.as_rotvec()[:, 2]).max() < 1e-6


def test_a_tilt_is_scipys_rotation():
    angle, direction = np.array([0.3, -0.5]), np.array([0.0, 2.0])
    axes = np.stack([np.cos(direction), np.sin(direction), [0.0, 0.0]], axis=-1)
    expected = Rotation.from_rotvec(angle[:, None] * axes).as_matrix()
    assert np.allclose(tilt_camera(torch.from_numpy(angle), torch.from_numpy(direction)).numpy(), expected)


def test_a_camera_can_be_centered_on_a_ray(batch):
    ray, place = torch.tensor([[0.2, -0.1, 0.9]]).expand(8, 3), torch.tensor([[10.0, 20.0]]).expand(8, 2)
    seen = geometry.project(ray[:, None], center_intrinsics(batch.intrinsics, ray, place))[:, 0]
    assert torch.allclose(seen, place, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.floats(0, 0.95), shift=st.floats(0, 0.99), offset=st.floats(-0.5, 0.5))
def test_hands_half_outside_the_picture_give_numbers_everywhere(seed, scale, shift, offset):
    batch = hand_batch(seed=seed % 1000)
    batch = batch._replace(xyz_m=batch.xyz_m + torch.tensor([offset * 0.3, 0.0, 0.0]))
    module = make_augment(**FULL | {"scale": scale, "shift": shift, "perspective_deg": 45.0, "occlusion": 1.0})
    view = module(batch, torch.Generator().manual_seed(seed))
    axes = ImageAxes(sigma=0.03, target="gaussian", read_out="soft_argmax")
    coordinates = axes.encode(view.xyz_m, view.intrinsics, SIZE)
    drawn = [axes.draw_heatmaps(coordinates[..., axis], bins=16) for axis in range(3)]
    assert all(values.isfinite().all() for values in (*view, coordinates, *drawn))
    assert view.image.min() >= 0
    assert view.image.max() <= 1


def test_what_is_off_draws_nothing(batch):
    """The picture with a patch on it is elsewhere the one without: probability 0 does not move the other draws."""
    plain = {name: value for name, value in FULL.items() if name not in ("background", "occlusion", "blur", "noise")}
    without = make_augment(**plain)(batch, torch.Generator().manual_seed(7))
    with_patch = make_augment(**plain, occlusion=1.0)(batch, torch.Generator().manual_seed(7))
    assert torch.equal(without.intrinsics, with_patch.intrinsics)
    same = (without.image == with_patch.image).all(dim=1).float().mean(dim=(1, 2))
    assert same.min() > 0.02
    assert same.max() < 1.0


def test_another_background_leaves_the_hand_and_takes_all_else(batch):
    seen = make_augment(background=1.0)(batch, torch.Generator().manual_seed(0))
    on_hand = (batch.mask == 255).expand(-1, 3, -1, -1)
    before = batch.image / 255.0
    assert torch.equal(seen.image[on_hand], before[on_hand])
    assert (seen.image[~on_hand] - before[~on_hand]).abs().mean() > 0.1


def test_backgrounds_come_from_the_folder(batch, tmp_path):
    Image.new("RGB", (80, 60), (0, 255, 0)).save(tmp_path / "green.png")
    module = make_augment(background=1.0, background_folder=str(tmp_path))
    module.check_files()
    seen = module(batch, torch.Generator().manual_seed(0)).image.permute(0, 2, 3, 1)
    assert torch.allclose(seen[batch.mask[:, 0] == 0], torch.tensor([0.0, 1.0, 0.0]))


def test_a_folder_of_backgrounds_is_looked_at_only_when_it_is_used(tmp_path):
    make_augment(background_folder=str(tmp_path)).check_files()
    with pytest.raises(UserError, match=r"augment\.background_folder=.* has no pictures"):
        make_augment(background=0.5, background_folder=str(tmp_path)).check_files()


def test_the_background_turns_with_the_hand(batch):
    """A white hand on black: after any motion what is not white is background, none of it black corners."""
    v, u = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = (255 * ((u - 40) ** 2 + (v - 30) ** 2 < 100)).to(torch.uint8)
    white = batch._replace(image=disc.expand(8, 3, *SIZE), mask=disc.expand(8, 1, *SIZE))
    motion = {"rotation_deg": 180.0, "scale": 0.3, "perspective_deg": 20.0}
    plain = make_augment(**motion)(white, torch.Generator().manual_seed(3)).image
    seen = make_augment(**motion, background=1.0)(white, torch.Generator().manual_seed(3)).image
    assert torch.allclose(seen[plain > 0.999], torch.tensor(1.0), atol=3e-3)
    assert (seen[plain < 1e-3] > 0.01).float().mean() > 0.8


def test_a_share_of_the_pictures_is_changed(batch):
    many = HandBatch(*(field.repeat(50, *[1] * (field.ndim - 1)) for field in batch))
    for name in ("background", "occlusion", "blur"):
        seen = make_augment(**{name: 0.25})(many, torch.Generator().manual_seed(0)).image
        changed = (seen != many.image / 255.0).flatten(1).any(dim=1).float().mean()
        assert changed == pytest.approx(0.25, abs=0.08), name


def test_the_camera_turns_about_the_centre_of_the_picture(batch):
    intrinsics = batch.intrinsics.double()
    rotation = rotate_about_center(torch.full((8,), 0.7).double(), intrinsics, SIZE)
    ray = torch.linalg.inv(intrinsics) @ torch.tensor([31.5, 31.5, 1.0]).double()
    expected = Rotation.from_rotvec(0.7 * (ray / ray.norm(dim=-1, keepdim=True)).numpy()).as_matrix()
    assert np.allclose(rotation.numpy(), expected)


def test_turned_views_keep_the_pose(batch):
    seen = make_augment(rotation_deg=180.0, scale=0.3, shift=0.1)(batch, torch.Generator().manual_seed(1))
    lengths = geometry.compute_bone_lengths(batch.xyz_m)
    assert torch.allclose(geometry.compute_bone_lengths(seen.xyz_m), lengths, atol=1e-6)
    assert not torch.allclose(seen.xyz_m, batch.xyz_m.to(seen.xyz_m), atol=1e-3)


def test_no_augmentation_is_the_picture_itself(batch):
    seen = make_augment()(batch, torch.Generator())
    assert torch.equal(seen.image, batch.image / 255.0)
    assert torch.equal(seen.xyz_m, batch.xyz_m)


def test_the_identity_homography_warps_nothing(batch):
    image = batch.image / 255.0
    identity = torch.eye(3).expand(8, 3, 3)
    for interpolation in ("bilinear", "nearest"):
        assert torch.allclose(warp(image, identity, interpolation=interpolation), image, atol=1e-4)


def test_a_quarter_turn_is_rot90(batch):
    """With the principal point in the centre a quarter turn is a permutation of the pixels: NumPy's, clockwise."""
    intrinsics = torch.tensor([[100.0, 0, 31.5], [0, 100.0, 31.5], [0, 0, 1]]).expand(8, 3, 3)
    view = View(batch.image / 255.0, intrinsics, batch.xyz_m.float())
    rotation = rotate_about_center(torch.full((8,), torch.pi / 2), intrinsics, SIZE)
    seen = rotate_view(view, rotation, intrinsics, interpolation="nearest")
    assert np.allclose(seen.image.numpy(), np.rot90(view.image.numpy(), k=-1, axes=(2, 3)), atol=1e-6)


def test_a_mirrored_view_projects_to_the_mirrored_pixels(batch):
    view = to_double(to_view(batch))
    seen = mirror_view(view)
    uv, flipped = geometry.project(view.xyz_m, view.intrinsics), geometry.project(seen.xyz_m, seen.intrinsics)
    assert torch.allclose(flipped[..., 0], 63 - uv[..., 0])
    assert torch.allclose(flipped[..., 1], uv[..., 1])
    assert torch.equal(seen.image, view.image.flip(-1))


def test_mirrored_pictures_are_as_many_as_asked_and_their_labels_go_along(batch):
    colors = {"brightness": 0.2, "contrast": 0.2}
    plain, some, every = (
        make_augment(rotation_deg=20.0, mirror=folder_sync, **colors)(batch, torch.Generator().manual_seed(5))
        for folder_sync in (0.0, 0.5, 1.0)
    )
    assert torch.equal(every.image, plain.image.flip(-1))
    is_mirrored = (some.image == every.image).flatten(1).all(dim=1)
    assert 0 < is_mirrored.sum() < len(is_mirrored)
    assert torch.equal(some.image[~is_mirrored], plain.image[~is_mirrored])
    uv, of_plain = (geometry.project(view.xyz_m, view.intrinsics) for view in (some, plain))
    expected = torch.where(is_mirrored[:, None], 63 - of_plain[..., 0], of_plain[..., 0])
    assert torch.allclose(uv[..., 0], expected, atol=1e-3)
    assert torch.allclose(uv[..., 1], of_plain[..., 1], atol=1e-3)


def test_the_same_generator_draws_the_same_view(batch):
    module = make_augment(rotation_deg=30.0, scale=0.2, shift=0.1, brightness=0.2, contrast=0.2, color=0.1)
    first, again, other = (module(batch, torch.Generator().manual_seed(seed)).image for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rotations_keep_to_their_limit(batch):
    seen = make_augment(rotation_deg=20.0)(batch, torch.Generator().manual_seed(0))
    turn = torch.linalg.lstsq(batch.xyz_m.double(), seen.xyz_m.double()).solution.mT
    angles = Rotation.from_matrix(turn.numpy()).magnitude()
    assert (angles < np.deg2rad(20.0) + 1e-6).all()
    assert angles.max() > np.deg2rad(5.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotation_deg", 181.0),
        ("perspective_deg", 50.0),
        ("scale", 1.0),
        ("shift", -0.1),
        ("color", 2.0),
        ("background", 1.5),
        ("occlusion", -0.5),
        ("blur", 2.0),
        ("noise", -1.0),
        ("occlusion_size", [0.5, 0.25]),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=rf"augment\.{name}.*{re.escape(str(value))}"):
        make_augment(**{name: value})


FULL = {
    "rotation_deg": 30.0,
    "perspective_deg": 20.0,
    "scale": 0.2,
    "shift": 0.1,
    "brightness": 0.2,
    "contrast": 0.2,
    "color": 0.1,
    "background": 0.5,
    "occlusion": 0.5,
    "blur": 0.5,
    "noise": 5.0,
}


def test_a_picture_is_sampled_where_the_homography_says(batch):
    """Against SciPy's interpolation of the old picture at the new pixels' places, one coordinate at a time."""
    image = (batch.image[:1] / 255.0).double()
    homography = torch.tensor([[[1.1, 0.2, -5.0], [-0.1, 0.9, 4.0], [1e-3, -5e-4, 1.0]]]).double()
    v, u = np.mgrid[:64, :64]
    old = np.linalg.inv(homography[0].numpy()) @ np.stack([u.ravel(), v.ravel(), np.ones(64 * 64)])
    places = [old[1] / old[2], old[0] / old[2]]
    expected = [ndimage.map_coordinates(channel, places, order=1, cval=0.0) for channel in image[0].numpy()]
    inside = ((places[0] > 0) & (places[0] < 63) & (places[1] > 0) & (places[1] < 63)).reshape(64, 64)
    seen = warp(image, homography, interpolation="bilinear")[0].numpy()
    assert inside.mean() > 0.5
    assert np.allclose(seen[:, inside], np.reshape(expected, (3, 64, 64))[:, inside], atol=1e-9)


def test_contrast_is_about_the_pictures_mean_and_gains_come_after_it(batch):
    module = make_augment(brightness=0.2, contrast=0.3, color=0.1)
    seen = module(batch, torch.Generator().manual_seed(5)).image
    generator = torch.Generator().manual_seed(5)
    brightness, color, contrast = (2 * torch.rand(shape, generator=generator) - 1 for shape in ((8, 1), (8, 3), (8, 1)))
    image = (batch.image / 255.0).double()
    mean = image.mean((1, 2, 3), keepdim=True)
    sharper = mean + (1 + 0.3 * contrast)[..., None, None] * (image - mean)
    expected = (sharper * (1 + 0.2 * brightness + 0.1 * color)[..., None, None]).clamp(0, 1)
    assert torch.allclose(seen.double(), expected, atol=1e-6)


def test_pictures_are_the_same_however_many_are_made_at_a_time(batch, monkeypatch):
    whole = make_augment(**FULL)(batch, torch.Generator().manual_seed(1))
    monkeypatch.setattr("handpose.data.augment._CACHED_PIXELS", 3 * 64 * 64)
    parts = make_augment(**FULL)(batch, torch.Generator().manual_seed(1))
    assert torch.allclose(whole.image, parts.image, atol=1e-6)


@pytest.mark.parametrize("num", [2, 4])
def test_processes_that_share_a_batch_see_the_views_of_the_whole(batch, num):
    """Also where some of the effects fall to the pictures of one of them only."""
    module = make_augment(**FULL | {"mirror": 0.3, "background": 0.3, "occlusion": 0.3, "blur": 0.3})
    whole = module(batch, torch.Generator().manual_seed(1))
    size = len(batch.image) // num
    parts = [
        module(
            HandBatch(*(field[k * size :][:size] for field in batch)),
            torch.Generator().manual_seed(1),
            BatchShare(k, num),
        )
        for k in range(num)
    ]
    for one, others in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.allclose(one, torch.cat(others), atol=1e-6)


def test_the_batch_is_left_as_it_was(batch):
    before = [field.clone() for field in batch]
    make_augment(**FULL)(batch, torch.Generator().manual_seed(1))
    assert all(torch.equal(field, old) for field, old in zip(batch, before, strict=True))


def test_mixed_precision_rounds_neither_camera_nor_joints_nor_pixels(batch):
    exact = make_augment(**FULL)(batch, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make_augment(**FULL)(batch, torch.Generator().manual_seed(1))
    assert all(torch.equal(one, other) for one, other in zip(exact, mixed, strict=True))
