import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from handpose.drawing import (
    FINGER_COLOURS,
    JOINT_COLOURS,
    draw_heatmaps,
    draw_over_frame,
    draw_over_photograph,
    draw_predictions,
    draw_skeletons_3d,
)
from handpose.skeleton import JOINT_NAMES

SIDE = 100  # shown enlarged by 3
INDEX_TIP = JOINT_NAMES.index("index_tip")
MIDDLE_TIP = JOINT_NAMES.index("middle_tip")


def rgb(colour: str) -> np.ndarray:
    return np.rint(255 * np.array(to_rgb(colour)))


def where(picture: np.ndarray, colour: str) -> np.ndarray:
    """(n, 2) x, y of the pixels of a colour, give or take a rounding."""
    return np.argwhere(np.abs(picture - rgb(colour)).max(axis=-1) <= 2)[:, ::-1]


def grey_images(num: int) -> np.ndarray:
    return np.full((num, SIDE, SIDE, 3), 90, np.uint8)


def spread_uv(num: int) -> np.ndarray:
    """Joints far apart: five columns of four, and the wrist below."""
    uv = [(50, 92), *((12 + 18 * finger, 15 + 20 * segment) for finger in range(5) for segment in range(4))]
    return np.broadcast_to(np.array(uv, float), (num, 21, 2)).copy()


def heatmap(num: int, places: float | np.ndarray, bins: int) -> np.ndarray:
    distance = (np.arange(bins) + 0.5) / bins - np.broadcast_to(places, (num, 21))[..., None]
    curve = np.exp(-0.5 * np.square(distance / 0.03)) + 1e-9
    return curve / curve.sum(axis=-1, keepdims=True)


def every_picture(num: int = 3, *, spoil: float | None = None) -> list[np.ndarray]:
    uv = spread_uv(num)
    xyz = np.random.default_rng(0).normal(0, 0.05, size=(num, 21, 3)) + np.array([0, 0, 0.6])
    u, v, depth = heatmap(num, 0.3, 28), heatmap(num, 0.6, 40), heatmap(num, 0.5, 16)
    if spoil is not None:
        for values in (uv, xyz, u, depth):
            values[0, 5] = spoil
    captions = [f"{i} mm" for i in range(num)]
    target = np.full((num, 21, 3), 0.4)
    return [
        draw_predictions(grey_images(num), uv, spread_uv(num), captions=captions),
        draw_skeletons_3d(xyz, xyz + 0.01, captions=captions),
        draw_heatmaps(grey_images(num), u, v, depth, target, captions=captions),
    ]


@pytest.fixture(scope="module")
def three_pictures() -> list[np.ndarray]:
    return every_picture()


@pytest.mark.parametrize("num", [1, 3, 8])
def test_pictures_are_uint8_rgb_and_not_empty(num: int) -> None:
    for picture in every_picture(num):
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        for colour in FINGER_COLOURS.values():
            assert len(where(picture, colour)) > 20


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_a_diverged_prediction_is_no_error_and_leaves_the_others(value: float, three_pictures) -> None:
    for picture, good in zip(every_picture(spoil=value), three_pictures, strict=True):
        assert picture.shape == good.shape
        assert len(where(picture, FINGER_COLOURS["ring"])) > 20


def test_a_drawn_joint_has_its_colour_at_its_pixel() -> None:
    uv = spread_uv(5)
    picture = draw_predictions(grey_images(5), uv, columns=3)
    for joint, (x, y) in enumerate(3 * (uv[0] + 0.5)):  # the first hand lies in the corner
        for left in (0, picture.shape[1] - 3 * SIDE):  # and the third one ends at the right border
            pixel = picture[int(y), int(left + x)].astype(float)
            np.testing.assert_allclose(pixel, rgb(JOINT_COLOURS[joint]), atol=2)


def test_a_hand_that_leaves_its_image_is_not_drawn_over_the_next() -> None:
    uv = spread_uv(2)
    uv[1] = np.nan
    uv[0, INDEX_TIP] = (250, 50)
    drawn = where(draw_predictions(grey_images(2), uv)[: 3 * SIDE], FINGER_COLOURS["index"])
    assert drawn[:, 0].max() < 3 * SIDE


def test_the_truth_is_a_white_line() -> None:
    uv = spread_uv(1)
    without = draw_predictions(grey_images(1), uv)[: 3 * SIDE]
    with_truth = draw_predictions(grey_images(1), uv, uv + 5)[: 3 * SIDE]
    assert len(where(without, "white")) == 0
    assert len(where(with_truth, "white")) > 100


def finger_towards(direction: tuple[float, float, float]) -> np.ndarray:
    """A hand in its root, but for a middle finger of 80 mm; a thumb of as much the other way keeps the view centred."""
    xyz = np.full((1, 21, 3), 0.1)
    xyz[0, MIDDLE_TIP] += 0.08 * np.array(direction)
    xyz[0, JOINT_NAMES.index("thumb_tip")] -= 0.08 * np.array(direction)
    return xyz


def extent_of_middle_finger(direction: tuple[float, float, float], *, side: bool) -> tuple[np.ndarray, np.ndarray]:
    """The vector from the root to the end of the middle finger in one of the two views, and its spread."""
    picture = draw_skeletons_3d(finger_towards(direction))
    picture = picture[:-30]  # above the legend
    half = picture.shape[1] // 2
    places = where(picture[:, half:] if side else picture[:, :half], FINGER_COLOURS["middle"])
    thumb = where(picture[:, half:] if side else picture[:, :half], FINGER_COLOURS["thumb"])
    return places.mean(axis=0) - thumb.mean(axis=0), np.ptp(places, axis=0)


def test_depth_shows_from_the_side_with_far_to_the_right() -> None:
    offset, spread = extent_of_middle_finger((0, 0, 1), side=True)
    assert offset[0] > 50
    assert abs(offset[1]) < 2
    assert spread[0] > 50
    assert extent_of_middle_finger((0, 0, -1), side=True)[0][0] < -50


def test_camera_view_is_not_mirrored_and_has_equal_axes() -> None:
    right, wide = extent_of_middle_finger((1, 0, 0), side=False)
    down, high = extent_of_middle_finger((0, 1, 0), side=False)
    assert right[0] > 50
    assert down[1] > 50
    assert wide[0] == pytest.approx(high[1], abs=2)


def test_skeletons_do_not_depend_on_the_position_of_the_hand() -> None:
    xyz = np.random.default_rng(0).normal(0, 0.05, size=(2, 21, 3))
    np.testing.assert_array_equal(draw_skeletons_3d(xyz), draw_skeletons_3d(xyz + np.array([0.25, 0.5, 1.0])))


def test_probabilities_glow_at_their_product_and_stand_on_the_borders() -> None:
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    curves = heatmap(1, 0.25, 40), heatmap(1, 0.75, 20), heatmap(1, 0.5, 16)
    picture = draw_heatmaps(images, *curves, joints=[INDEX_TIP]).astype(int)
    strip = picture.shape[1] - 3 * SIDE  # the curve along v stands to the right of the image, that along u above it
    image = picture[strip : strip + 3 * SIDE, : 3 * SIDE]
    y, x = np.unravel_index(image.sum(axis=-1).argmax(), image.shape[:2])
    assert (x, y) == (pytest.approx(75, abs=4), pytest.approx(225, abs=9))  # to half a bin
    np.testing.assert_allclose(image[y, x] / image[y, x].max(), rgb(JOINT_COLOURS[INDEX_TIP]) / 255, atol=0.03)
    along_u = where(picture[: strip - 3, : 3 * SIDE], JOINT_COLOURS[INDEX_TIP])
    along_v = where(picture[strip : strip + 3 * SIDE, 3 * SIDE + 3 :], JOINT_COLOURS[INDEX_TIP])
    along_depth = where(picture[strip + 3 * SIDE : strip + 3 * SIDE + 45, : 3 * SIDE], JOINT_COLOURS[INDEX_TIP])
    assert along_u[along_u[:, 1].argmin(), 0] == pytest.approx(75, abs=4)
    assert along_v[along_v[:, 0].argmax(), 1] == pytest.approx(225, abs=9)
    assert along_depth[along_depth[:, 1].argmin(), 0] == pytest.approx(150, abs=12)


def test_a_network_that_knows_nothing_looks_pale_beside_what_it_is_trained_to_give() -> None:
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    flat = tuple(np.full((1, 21, bins), 1 / bins) for bins in (40, 20, 16))
    trained = heatmap(1, 0.25, 40), heatmap(1, 0.75, 20), heatmap(1, 0.5, 16)
    peaks = [float(curve.max()) for curve in trained]
    glow = {
        name: draw_heatmaps(images, *curves, peak_values=peaks, joints=[INDEX_TIP])[100:250, 50:250].max()
        for name, curves in (("flat", flat), ("trained", trained))
    }
    assert glow["flat"] < 0.3 * glow["trained"]
    np.testing.assert_array_equal(  # what reaches the peaks is drawn as without them
        draw_heatmaps(images, *trained, peak_values=peaks), draw_heatmaps(images, *trained)
    )


def test_no_figure_stays_behind() -> None:
    every_picture(1)
    gc.collect()
    before = sum(type(thing) is Figure for thing in gc.get_objects())
    for _ in range(2):
        every_picture(1)
    gc.collect()
    assert sum(type(thing) is Figure for thing in gc.get_objects()) == before
    assert pyplot.get_fignums() == []


def test_threads_draw_the_same_pictures(three_pictures) -> None:
    with ThreadPoolExecutor(4) as threads:
        for pictures in threads.map(lambda _: every_picture(), range(4)):
            for picture, alone in zip(pictures, three_pictures, strict=True):
                np.testing.assert_array_equal(picture, alone)


@pytest.mark.parametrize("shape", [(80, 50), (90, 400), (1000, 700)])
def test_a_hand_over_a_photograph_is_drawn_in_its_pixels_at_its_size(shape):
    height, width = shape
    uv = spread_uv(1)[0] * (width / SIDE, height / SIDE)
    picture = draw_over_photograph(np.full((height, width, 3), 90, np.uint8), uv)
    assert picture.shape == (height, width, 3)
    tip = uv[INDEX_TIP].round().astype(int)
    nearest = np.abs(where(picture, FINGER_COLOURS["index"]) - tip).max(axis=1).min()
    assert nearest <= 1
    assert (picture[-1, 0] == 90).all()
    circled = draw_over_photograph(np.full((height, width, 3), 90, np.uint8), uv, np.full(21, 12.0))
    changed = np.argwhere((circled != picture).any(axis=2))[:, ::-1]
    distances = np.linalg.norm(changed[:, None] - uv[None], axis=-1).min(axis=1)
    assert 10.0 < distances.max() < 14.5  # a circle of 12 px around each joint
    unknown = draw_over_photograph(np.full((height, width, 3), 90, np.uint8), uv, np.full(21, np.nan))
    assert (unknown == picture).all()
    lost = draw_over_photograph(np.full((height, width, 3), 90, np.uint8), np.full((21, 2), np.nan))
    assert (lost == 90).all()


def test_a_hand_over_a_frame_is_drawn_in_its_pixels_at_its_size():
    frame = Image.new("RGB", (2 * SIDE, 2 * SIDE), (90, 90, 90))
    uv = 2 * spread_uv(1)[0]
    picture = draw_over_frame(frame, uv)
    assert picture.shape == (2 * SIDE, 2 * SIDE, 3)
    column, row = uv[INDEX_TIP].round().astype(int)
    assert (picture[row, column] == rgb(FINGER_COLOURS["index"])).all()
    assert (draw_over_frame(frame, uv, np.full(21, 12.0)) != picture).any()
    assert (draw_over_frame(frame, uv, np.full(21, np.nan)) == picture).all()
    assert (draw_over_frame(frame, uv, np.full(21, 1e9)) == picture).all()  # a joint almost beside the camera
    for nowhere in (np.nan, np.inf, -1e12):
        assert (draw_over_frame(frame, np.where(np.arange(21)[:, None] == 3, nowhere, uv)) == 90).all()
    assert (np.asarray(frame) == 90).all()
