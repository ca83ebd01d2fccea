import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from handpose.data.crops import (
    FrameHands,
    compute_crops,
    cut_out_hands,
    cut_square,
    describe_left_out,
    find_cut_off,
    mirror_points,
    move_intrinsics,
    move_keypoints,
    project_points,
)
from handpose.data.pack import pack
from handpose.data.sample import Annotations, ImageFiles
from tests.builders import make_hands
from tests.data.layouts import FRAME_CAMERA, FRAME_SIZE, INDEX_TIP, make_frame_hands, project, write_frame


def make_frames(folder, xyz_m, is_left=None) -> FrameHands:
    num = len(xyz_m)
    files = [folder / f"{i}.jpg" for i in range(num)]
    for file, hand in zip(files, xyz_m, strict=True):
        write_frame(file, [project(hand, FRAME_CAMERA)[INDEX_TIP]])
    cameras, sizes = np.tile(FRAME_CAMERA, (num, 1, 1)), np.tile(FRAME_SIZE, (num, 1))
    left = np.zeros(num, dtype=bool) if is_left is None else np.array(is_left)
    return FrameHands(ImageFiles.from_paths(files), sizes, cameras, xyz_m, left)


def find_disk(image) -> np.ndarray:
    """(u, v) of the centre of the bright pixels."""
    rows, columns = np.nonzero(image.min(axis=-1) > 180)
    return np.array([columns.mean(), rows.mean()])


def test_the_joint_is_where_the_packed_picture_shows_it(tmp_path):
    xyz_m = make_frame_hands(6)
    is_left = [False, True, False, True, False, True]
    annotations = cut_out_hands(make_frames(tmp_path, xyz_m, is_left), margin=0.3)
    for size in (64, 160):
        packed = pack(annotations, image_size=size, folder=tmp_path / "packed", progress=False)
        seen = project(annotations.xyz_m, packed.intrinsics)[:, INDEX_TIP]
        for image, uv in zip(packed.images, seen, strict=True):
            np.testing.assert_allclose(find_disk(image), uv, atol=0.4)


def test_a_cut_out_has_the_same_rays_as_its_picture(tmp_path):
    xyz_m = make_frame_hands(3)
    hands = make_frames(tmp_path, xyz_m)
    annotations = cut_out_hands(hands, margin=0.25)
    np.testing.assert_array_equal(annotations.xyz_m, xyz_m)
    uv = project(xyz_m, FRAME_CAMERA) - annotations.crops[:, None, :2]
    np.testing.assert_allclose(project(annotations.xyz_m, annotations.intrinsics), uv, atol=1e-9)
    np.testing.assert_array_equal(annotations.intrinsics[:, :2, :2], hands.intrinsics[:, :2, :2])


def test_a_left_hand_becomes_the_mirror_image_of_its_cut_out(tmp_path):
    xyz_m = make_frame_hands(2)
    right = cut_out_hands(make_frames(tmp_path, xyz_m), margin=0.3)
    left = cut_out_hands(make_frames(tmp_path, xyz_m, [True, True]), margin=0.3)
    side = right.crops[:, 2]
    uv, mirrored = (project(split.xyz_m, split.intrinsics) for split in (right, left))
    np.testing.assert_allclose(mirrored[..., 0], (side[:, None] - 1) - uv[..., 0], atol=1e-9)
    np.testing.assert_allclose(mirrored[..., 1], uv[..., 1], atol=1e-9)
    np.testing.assert_array_equal(left.xyz_m, xyz_m * [-1, 1, 1])
    stores = [pack(split, image_size=96, folder=tmp_path / "packed", progress=False) for split in (right, left)]
    assert stores[0].store != stores[1].store
    difference = stores[0].images[:, :, ::-1].astype(int) - stores[1].images
    assert np.abs(difference).max() <= 1


@given(skew=st.floats(-5, 5), left=st.integers(-50, 400), side=st.integers(1, 300), seed=st.integers(0, 99))
def test_mirroring_twice_gives_the_hand_back(skew, left, side, seed):
    camera = FRAME_CAMERA + skew * np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])
    xyz_m, crops = make_hands(1, seed), np.array([[left, 7, side, 1]])
    is_left = np.array([True])
    once = move_intrinsics(camera[None], crops)
    twice = move_intrinsics(once, np.array([[0, 0, side, 1]]))
    np.testing.assert_allclose(twice, move_intrinsics(camera[None], np.array([[left, 7, side, 0]])), atol=1e-9)
    np.testing.assert_array_equal(mirror_points(mirror_points(xyz_m, is_left), is_left), xyz_m)
    uv = project_points(mirror_points(xyz_m, is_left), once)
    np.testing.assert_allclose(uv, move_keypoints(project_points(xyz_m, camera[None]), crops), atol=1e-9)
    image = np.arange(2 * side * side * 3, dtype=np.uint8).reshape(2 * side, side, 3)[:side]
    flipped = cut_square(image, np.array([0, 0, side, 1]))
    np.testing.assert_array_equal(cut_square(flipped, np.array([0, 0, side, 1])), image)


def test_the_square_is_centred_on_the_joints_and_as_large_as_the_margin_says():
    uv = np.array([[[100.0, 50.0], [180.0, 90.0], [np.nan, np.nan]]])
    left, top, side, is_mirrored = compute_crops(uv, margin=0.25)[0]
    assert side == 120  # 1.5 times the width of 80
    assert abs(left + (side - 1) / 2 - 140) <= 0.5
    assert abs(top + (side - 1) / 2 - 70) <= 0.5
    assert is_mirrored == 0


def test_a_square_beyond_the_picture_is_black_there():
    image = np.full((4, 6, 3), 9, np.uint8)
    square = cut_square(image, np.array([-2, 1, 5, 0]))
    assert square.shape == (5, 5, 3)
    np.testing.assert_array_equal(square[:3, 2:], image[1:, :3])
    assert square[:, :2].max() == square[3:].max() == 0
    for corner in ([-9, 0], [9, 0], [0, -9], [0, 9]):
        assert cut_square(image, np.array([*corner, 3, 0])).max() == 0
    assert cut_square(image, np.zeros(4, dtype=int)) is image


def test_a_hand_at_the_border_or_behind_the_camera_is_cut_off(tmp_path):
    xyz_m = make_hands(3)
    xyz_m[1] += [0.35, 0, 0]
    xyz_m[2, 4, 2] = -0.1
    np.testing.assert_array_equal(find_cut_off(make_frames(tmp_path, xyz_m)), [False, True, True])


def test_a_store_depends_on_the_squares(tmp_path):
    hands = make_frames(tmp_path, make_frame_hands(2))
    first, wider = (cut_out_hands(hands, margin=margin) for margin in (0.2, 0.4))
    stores = [pack(each, image_size=32, folder=tmp_path / "packed", progress=False) for each in (first, wider, first)]
    assert stores[0].contents == stores[2].contents != stores[1].contents
    assert stores[0].store == stores[2].store != stores[1].store


def test_a_store_of_whole_files_has_the_same_name_as_before_there_were_squares(tmp_path):
    write_frame(tmp_path / "0.jpg", [], (32, 32))
    files = ImageFiles.from_paths([tmp_path / "0.jpg"])
    whole = Annotations(files, FRAME_CAMERA[None], None, None, np.arange(1))
    marked = Annotations(files, FRAME_CAMERA[None], None, None, np.arange(1), crops=np.zeros((1, 4), dtype=np.int64))
    stores = [pack(each, image_size=None, folder=tmp_path / "packed", progress=False) for each in (whole, marked)]
    np.testing.assert_array_equal(stores[0].images, stores[1].images)
    np.testing.assert_array_equal(stores[0].intrinsics, stores[1].intrinsics)


def test_hands_that_are_left_out_are_counted_with_the_reason():
    said = describe_left_out("ho3d", "training", 10, {"without joints": 2, "cut off": np.int64(1), "too small": 0})
    assert said == ("ho3d: 3 of 10 hands of the training split are left out: 2 without joints, 1 cut off",)
    assert describe_left_out("ho3d", "training", 10, {"cut off": 0}) == ()
