"""Photographs of any size: what the network is shown of them, and what is known of their cameras."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from handpose.data.pack import pack
from handpose.data.sample import Annotations, ImageFiles
from handpose.errors import UserError
from handpose.evaluation.photographs import (
    find_photographs,
    make_camera,
    make_whole_view_intrinsics,
    read_intrinsics,
    read_photograph,
    warp_photograph,
)
from tests.builders import write_jpeg

EXIF_ORIENTATION, EXIF_FOCAL_35MM, EXIF_IFD = 0x0112, 0xA405, 0x8769


def make_slopes(width, height):
    """Red rises to the right by 2 a pixel, green downwards."""
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([2 * u, 2 * v, np.full_like(u, 255)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(120, 60), (50, 90), (64, 64), (31, 17)])
def test_a_whole_photograph_is_seen_in_the_middle_and_its_pixels_where_the_camera_says(size):
    side, camera = 64, np.array([[70.0, 0, 20], [0, 70, 30], [0, 0, 1]])
    view = make_whole_view_intrinsics(size, camera, side=side)
    picture = warp_photograph(make_slopes(*size), view @ np.linalg.inv(camera), side=side).astype(float)
    scale, (width, height) = side / max(size), size
    points = np.array([[width / 4, height / 2], [width / 2, height / 3], [0.7 * width, 0.6 * height]])
    rays = (points - camera[:2, 2]) / 70.0
    at = rays * (view[0, 0], view[1, 1]) + view[:2, 2]
    for (u, v), (new_u, new_v) in zip(points, at, strict=True):
        x, y = round(new_u), round(new_v)
        expected = [2 * (u + (x - new_u) / scale), 2 * (v + (y - new_v) / scale)]
        assert picture[y, x, :2] == pytest.approx(expected, abs=2.5 * max(1.0, 1 / scale))
    black = (picture.sum(axis=-1) == 0).mean()
    assert black == pytest.approx(1 - min(size) / max(size), abs=0.06)


def test_fine_patterns_are_averaged_not_sampled():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (512, 256))).convert("RGB")
    shown = warp_photograph(stripes, make_whole_view_intrinsics(stripes.size, np.eye(3), side=64), side=64)
    assert np.abs(shown.astype(float) - 127.5).max() < 10


def test_a_picture_of_the_right_size_is_shown_as_it_is():
    picture = make_slopes(64, 64)
    assert (warp_photograph(picture, np.eye(3), side=64) == np.asarray(picture)).all()


@pytest.mark.parametrize(("stored", "side"), [(224, 96), (96, 128), (64, 64), (97, 64), (64, 97)])
def test_a_square_photograph_is_shown_with_the_pixels_that_a_training_sees(tmp_path, stored, side):
    noise = np.random.default_rng(0).integers(0, 256, (stored, stored, 3), dtype=np.uint8)
    (tmp_path / "rgb").mkdir()
    write_jpeg(tmp_path / "rgb/00000000.jpg", noise)
    camera = np.array([[2.0 * stored, 0, 0.4 * stored], [0, 2.1 * stored, 0.6 * stored], [0, 0, 1]])
    annotations = Annotations(
        files=ImageFiles.from_paths([tmp_path / "rgb/00000000.jpg"]),
        intrinsics=camera[None],
        xyz_m=None,
        scale_m=None,
        pose=np.array([0]),
    )
    packed = pack(annotations, image_size=side, folder=tmp_path / "packed", progress=False)
    picture, _ = read_photograph(tmp_path / "rgb/00000000.jpg")
    view = make_whole_view_intrinsics(picture.size, camera, side=side)
    assert view == pytest.approx(packed.intrinsics[0], rel=1e-6)
    assert np.array_equal(warp_photograph(picture, view @ np.linalg.inv(camera), side=side), packed.images[0])


def test_a_photograph_is_turned_upright_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # turned by a quarter, clockwise, to be upright
    picture = make_slopes(40, 20)
    picture.save(tmp_path / "turned.png", exif=exif)
    read, _ = read_photograph(tmp_path / "turned.png")
    assert (np.asarray(read) == np.rot90(np.asarray(picture), k=-1)).all()


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("L", 77, (77, 77, 77)), ("RGBA", (10, 20, 30, 0), (255, 255, 255)), ("RGBA", (10, 20, 30, 255), (10, 20, 30))],
)
def test_other_kinds_of_pictures_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (5, 4), value).save(tmp_path / "picture.png")
    read, _ = read_photograph(tmp_path / "picture.png")
    assert (read.mode, read.getpixel((2, 2))) == ("RGB", expected)


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.full((4, 5), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert read_photograph(tmp_path / "deep.png")[0].getpixel((0, 0)) == (40_000 // 257,) * 3


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_file_that_is_no_picture_is_a_sentence(tmp_path, content):
    path = tmp_path / "hand.jpg"
    make_slopes(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(UserError, match=r"hand\.jpg cannot be read as a picture"):
        read_photograph(path)


def test_the_camera_is_the_best_that_is_known():
    size, given = (400, 300), np.diag([1.0, 2.0, 1.0])
    assert (make_camera(size, given=given, focal_px=5, exif_px=6).intrinsics == given).all()
    asked, of_file = (make_camera(size, given=None, focal_px=focal, exif_px=6) for focal in (5, None))
    assert (asked.intrinsics[0, 0], of_file.intrinsics[0, 0]) == (5, 6)
    nothing = make_camera(size, given=None, focal_px=None, exif_px=None)
    assert nothing.intrinsics.tolist() == [[480, 0, 199.5], [0, 480, 149.5], [0, 0, 1]]
    assert nothing.source.startswith("assumed")
    assert [camera.is_assumed for camera in (asked, of_file, nothing)] == [False, False, True]


def test_a_focal_length_for_35_mm_film_is_that_over_the_diagonal(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[EXIF_FOCAL_35MM] = 50
    make_slopes(120, 80).save(tmp_path / "a.jpg", exif=exif)
    assert read_photograph(tmp_path / "a.jpg")[1] == pytest.approx(
        50 / math.hypot(36, 24) * math.hypot(120, 80), rel=1e-3
    )


def test_folders_are_searched_and_names_are_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in find_photographs([tmp_path, tmp_path / "a.png"])] == ["a.png", "b.JPG"]
    with pytest.raises(UserError, match="does not exist; give photographs"):
        find_photographs([tmp_path / "nowhere.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no photographs"):
        find_photographs([tmp_path / "empty"])


K = [[300.0, 0.0, 100.0], [0.0, 310.0, 90.0], [0.0, 0.0, 1.0]]


def test_intrinsics_come_as_numbers_as_one_matrix_as_a_list_or_by_name(tmp_path):
    def read(content):
        (tmp_path / "K.json").write_text(json.dumps(content))
        return read_intrinsics(str(tmp_path / "K.json"), ["a.jpg", "b.jpg"])

    other = (np.array(K) * [[2], [2], [1]]).tolist()
    assert [k.tolist() for k in read_intrinsics("300,310,100,90", ["a.jpg", "b.jpg"])] == [K, K]
    assert [k.tolist() for k in read(K)] == [K, K]
    assert [k.tolist() for k in read([K, other])] == [K, other]
    by_name = read({"b.jpg": other})
    assert by_name[0] is None
    assert by_name[1].tolist() == other


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("300,310,100", "neither a file nor four numbers"),
        ("K.json", "neither a file nor four numbers"),
        ("-300,310,100,90", "fx and fy above 0"),
        ([K, K], "has 2 matrices but there are 1 photographs"),
        ([[1, 2], [3, 4]], "not a 3 x 3 matrix"),
        ([[1, 2], [3]], "must hold 3 x 3 matrices"),
        ([[300, 0, 0], [5, 300, 0], [0, 0, 1]], "must be"),
        ({"z.jpg": K}, "names none of the photographs; the first name in it is z.jpg"),
        (3, "must hold 3 x 3 matrices, but it holds 3"),
    ],
)
def test_intrinsics_that_are_none_are_a_sentence(tmp_path, content, sentence):
    text = content
    if not isinstance(content, str):
        text = str(tmp_path / "K.json")
        (tmp_path / "K.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        read_intrinsics(text, ["a.jpg"])
