"""A picture agrees with what is written about it, and looks like the difficulty that was asked for."""

from dataclasses import replace

import numpy as np
import pytest

from handpose.data import hand_scene
from handpose.data.hand_scene import Difficulty

PLAIN = Difficulty(
    roll_deg=45,
    tilt_deg=35,
    back_probability=0.35,
    pose_variety=1,
    focal=(1.5, 4),
    fill=(0.5, 0.75),
    cutoff_probability=0,
    occluder_probability=0,
    blur_probability=0,
    noise=0,
    clutter=0,
)
SIZE = 96


def project(picture):
    """Plain pinhole, by hand."""
    x, y, z = picture.xyz_m.T
    k = picture.intrinsics
    return np.stack([k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]], axis=1)


@pytest.fixture(scope="module")
def pictures():
    return [hand_scene.draw_image(0, 0, i, SIZE, PLAIN) for i in range(40)]


def test_joints_project_into_the_hand(pictures):
    for picture in pictures:
        u, v = np.rint(project(picture)).astype(int).T
        assert picture.mask[v, u].all()


def test_the_hand_stands_out_from_a_plain_background(pictures):
    """The mask comes from the renderer; the colours alone must show where the hand is."""
    contrast = []
    for picture in pictures:
        hand, rest = picture.image[picture.mask].astype(float), picture.image[~picture.mask].astype(float)
        contrast.append(np.linalg.norm(hand.mean(0) - rest.mean(0)))
    assert np.median(contrast) > 30


def test_the_hand_fills_the_wanted_part_of_the_picture(pictures):
    sides = [np.ptp(picture.uv, axis=0).max() / SIZE for picture in pictures]
    assert max(sides) <= PLAIN.fill[1] + 0.01
    assert np.mean(np.array(sides) >= PLAIN.fill[0] - 0.01) > 0.5  # a fist may be smaller
    assert min(sides) > 0.25


def test_without_cutoff_every_joint_is_on_the_picture(pictures):
    for picture in pictures:
        assert picture.uv.min() >= 0
        assert picture.uv.max() <= SIZE - 1


def test_with_cutoff_some_joints_leave_the_picture():
    always = replace(PLAIN, cutoff_probability=1)
    outside = []
    for i in range(20):
        uv = hand_scene.draw_image(0, 0, i, SIZE, always).uv
        outside.append(((uv < 0) | (uv > SIZE - 1)).any(axis=1).mean())
    assert np.mean(np.array(outside) > 0) > 0.7
    assert 0.02 < np.mean(outside) < 0.5


def test_hands_are_at_arms_length(pictures):
    depth = np.array([picture.xyz_m[:, 2] for picture in pictures])
    assert depth.min() > 0.2
    assert depth.max() < 2.0


def test_focal_length_and_principal_point_vary_about_the_picture(pictures):
    focal = np.array([picture.intrinsics[0, 0] for picture in pictures]) / SIZE
    assert focal.min() >= PLAIN.focal[0]
    assert focal.max() <= PLAIN.focal[1]
    assert np.ptp(focal) > 1
    principal = np.array([picture.intrinsics[:2, 2] for picture in pictures])
    assert np.abs(principal - (SIZE - 1) / 2).max() < 0.12 * SIZE
    assert principal.std() > 0.005 * SIZE


def test_xyz_is_a_right_hand_in_metres(pictures):
    for picture in pictures:
        xyz = picture.xyz_m
        assert 0.06 < np.linalg.norm(xyz[9] - xyz[0]) < 0.12  # wrist to middle knuckle
        assert picture.scale_m == pytest.approx(np.linalg.norm(xyz[10] - xyz[9]))


@pytest.mark.parametrize(("back_probability", "thumb_is_right"), [(0.0, True), (1.0, False)])
def test_thumb_is_on_the_right_when_the_palm_is_seen_and_fingers_point_up(back_probability, thumb_is_right):
    upright = replace(PLAIN, roll_deg=0, tilt_deg=0, back_probability=back_probability)
    for i in range(10):
        uv = hand_scene.draw_image(0, 0, i, SIZE, upright).uv
        assert (uv[5, 0] > uv[17, 0]) == thumb_is_right  # index and little knuckle
        assert uv[9, 1] < uv[0, 1]  # knuckle above wrist


def test_roll_and_tilt_keep_their_ranges():
    turned = replace(PLAIN, roll_deg=20, tilt_deg=10, back_probability=0)
    for i in range(30):
        xyz = hand_scene.draw_image(3, 0, i, SIZE, turned).xyz_m
        along = xyz[9] - xyz[0]
        assert abs(np.degrees(np.arctan2(along[0], -along[1]))) < 20 + 8  # the palm's own direction and tilt add some
        assert abs(np.degrees(np.arcsin(along[2] / np.linalg.norm(along)))) < 10 + 3


def test_the_same_place_in_the_set_gives_the_same_picture_and_another_gives_another():
    first, again = (hand_scene.draw_image(1, 0, 5, 48, PLAIN) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.xyz_m, again.xyz_m)
    for seed, split, index in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        other = hand_scene.draw_image(seed, split, index, 48, PLAIN)
        assert not np.allclose(first.xyz_m, other.xyz_m, atol=1e-3)


def test_harder_pictures_differ_from_plain_ones():
    hard = replace(PLAIN, noise=20, clutter=1, blur_probability=1, occluder_probability=1)
    plain_rough, hard_rough = [], []
    for i in range(12):
        plain, other = (hand_scene.draw_image(0, 0, i, SIZE, d) for d in (PLAIN, hard))
        corner = slice(0, 24)
        plain_rough.append(plain.image[corner].astype(float).std())
        hard_rough.append(other.image[corner].astype(float).std())
        assert np.array_equal(plain.xyz_m, other.xyz_m)  # the looks leave the poses alone
    assert np.mean(hard_rough) > np.mean(plain_rough) + 5


def test_pictures_are_neither_empty_nor_burnt_out(pictures):
    brightness = np.array([picture.image.mean() for picture in pictures])
    assert brightness.min() > 20
    assert brightness.max() < 245
    on_hand = np.array([picture.image[picture.mask].std() for picture in pictures])
    assert np.median(on_hand) > 15  # shading, not a silhouette
    share = np.array([picture.mask.mean() for picture in pictures])
    assert share.min() > 0.05
    assert share.max() < 0.7


def test_the_hardest_cameras_and_turns_leave_the_hand_in_front_of_the_camera():
    extreme = replace(PLAIN, roll_deg=180, tilt_deg=90, focal=(0.8, 0.8), fill=(1, 1), pose_variety=2)
    for i in range(40):
        picture = hand_scene.draw_image(0, 0, i, 192, extreme)
        assert picture.xyz_m[:, 2].min() > 0.1
        inside = ((picture.uv >= 0) & (picture.uv <= 191)).all(axis=1)
        u, v = np.rint(picture.uv[inside]).astype(int).T
        assert inside.sum() > 10
        assert picture.mask[v, u].all()
