"""One synthetic image of a hand in front of a background. It depends only on (seed, split, index) and the parameters.

Only NumPy is imported here, so that the processes that draw start quickly.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose import skeleton
from handpose.data import hand_kinematics, hand_renderer, hand_shading
from handpose.data.hand_renderer import Pixels

Floats = NDArray[np.float64]
SUPERSAMPLING = 2
_MIN_EXTENT_MM = 140.0
_MIN_DEPTH_MM = 150.0  # minimum depth of a joint, so that the flesh around it is well in front of the camera
_FOREARM_MM = 240.0


@dataclass(frozen=True)
class Difficulty:
    """Parameters that make the images harder. Pairs are (low, high).

    Attributes:
        roll_deg: largest rotation of the hand in the image plane, to either side.
        tilt_deg: largest rotation of the hand out of the image plane, to either side.
        back_probability: probability that the back of the hand faces the camera and not the palm.
        pose_variety: factor on the postural synergies.
        focal: focal length in image sides.
        fill: longer side of the joints' bounding box in image sides.
        cutoff_probability: probability that the hand reaches over the border of the image.
        occluder_probability: probability of a shape in front of the hand.
        blur_probability: probability of blur.
        noise: largest standard deviation of the sensor noise in grey levels of 255.
        clutter: how busy the background is, from 0 (plain) to 1.
    """

    roll_deg: float
    tilt_deg: float
    back_probability: float
    pose_variety: float
    focal: tuple[float, float]
    fill: tuple[float, float]
    cutoff_probability: float
    occluder_probability: float
    blur_probability: float
    noise: float
    clutter: float


class SyntheticImage(NamedTuple):
    """An image with its labels.

    Attributes:
        image: (H, W, 3) RGB.
        mask: (H, W) True on the hand, including what an occluder covers.
        intrinsics: (3, 3) in pixels.
        xyz_m: (K, 3) joints in metres, camera frame.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    intrinsics: Floats
    xyz_m: Floats

    @property
    def uv(self) -> Floats:
        """(K, 2) position of the joints in the image in pixels."""
        uvw = self.xyz_m @ self.intrinsics.T
        return uvw[:, :2] / uvw[:, 2:]

    @property
    def scale_m(self) -> float:
        """Length of the reference bone in metres."""
        start, end = skeleton.REFERENCE_BONE
        return float(np.linalg.norm(self.xyz_m[end] - self.xyz_m[start]))


class HandView(NamedTuple):
    """Position of the hand relative to the camera, and the camera.

    Attributes:
        rotation: (3, 3) from the frame of the hand to the camera frame.
        translation: (3,) in mm.
        intrinsics: (3, 3) in pixels.
    """

    rotation: Floats
    translation: Floats
    intrinsics: Floats


def draw_image(seed: int, split: int, index: int, image_size: int, difficulty: Difficulty) -> SyntheticImage:
    """Draw an image. The result is the same on every machine and in every process.

    Args:
        seed: seed of the data set.
        split: index of the split.
        index: index of the image in the split.
        image_size: side of the image in pixels.
        difficulty: parameters of the image.
    """
    rng = np.random.default_rng([seed, split, index])
    shape = hand_kinematics.draw_shape(rng)
    pose = hand_kinematics.draw_pose(rng, shape, difficulty.pose_variety)
    hand = hand_kinematics.pose_hand(shape, pose)
    view = draw_view(rng, hand.joints, image_size, difficulty)
    forearm = _draw_forearm(rng, view)
    sleeve_mm = rng.uniform(35, 120) if rng.random() < 0.45 else None
    flesh = hand_renderer.build_flesh(shape, hand, forearm, sleeve_mm).transform(view.rotation, view.translation)
    skin, light = hand_shading.draw_skin(rng), hand_shading.draw_light(rng)
    image = draw_background(rng, image_size, difficulty.clutter)
    mask = _paint_hand(image, flesh, skin, light, view.intrinsics)
    if rng.random() < difficulty.occluder_probability:
        _paint_occluder(rng, image, mask)
    pixels = _apply_exposure(rng, image, difficulty)
    xyz_m = (hand.joints @ view.rotation.T + view.translation) / 1000
    return SyntheticImage(pixels, mask > 0.5, view.intrinsics, xyz_m)


def draw_view(rng: np.random.Generator, joints: Floats, image_size: int, difficulty: Difficulty) -> HandView:
    """Rotate the hand, choose a camera, and place the hand at the distance where it has the drawn size in the image.

    Args:
        rng: generator of random numbers.
        joints: (K, 3) in the frame of the hand in mm.
        image_size: side of the image in pixels.
        difficulty: parameters of the image.
    """
    rotation = _draw_rotation(rng, difficulty)
    focal = image_size * math.exp(rng.uniform(*np.log(difficulty.focal)))
    principal = (image_size - 1) / 2 + rng.normal(0, 0.02 * image_size, 2)
    intrinsics = np.array([[focal, 0, principal[0]], [0, focal, principal[1]], [0, 0, 1.0]])
    turned = joints @ rotation.T
    turned -= (turned.min(0) + turned.max(0)) / 2
    side = image_size * rng.uniform(*difficulty.fill)
    wanted = _draw_centre(rng, turned, side, image_size, rng.random() < difficulty.cutoff_probability)
    # A fist is small. It may fill less of the image, since from nearer by perspective would distort it too much.
    side *= min(1.0, np.ptp(turned[:, :2], axis=0).max() / _MIN_EXTENT_MM)
    offset = np.array([0.0, 0.0, focal * np.ptp(turned[:, :2], axis=0).max() / side - 2 * turned[:, 2].min()])
    for _ in range(4):  # the box depends slightly on the position; a few iterations converge
        placed = turned + offset
        uv = placed[:, :2] / placed[:, 2:] * focal + principal
        box = np.stack([uv.min(0), uv.max(0)])
        offset[2] = max(offset[2] * np.ptp(box, axis=0).max() / side, _MIN_DEPTH_MM - turned[:, 2].min())
        offset[:2] += (wanted - box.mean(0)) * offset[2] / focal
    translation = (turned + offset - joints @ rotation.T)[0]
    return HandView(rotation, translation, intrinsics)


def _draw_rotation(rng: np.random.Generator, difficulty: Difficulty) -> Floats:
    """Draw a rotation: fingers up, palm (or back) towards the camera, then rotated about the axes of the image."""
    facing = math.pi * (rng.random() < difficulty.back_probability)
    x, y = np.radians(rng.uniform(-difficulty.tilt_deg, difficulty.tilt_deg, 2))
    roll = math.radians(rng.uniform(-difficulty.roll_deg, difficulty.roll_deg))
    return _rotate_about(2, roll) @ _rotate_about(0, x) @ _rotate_about(1, y + facing) @ np.diag([1.0, -1.0, -1.0])


def _rotate_about(axis: int, angle: float) -> Floats:
    first, second = (axis + 1) % 3, (axis + 2) % 3
    rotation = np.eye(3)
    rotation[first, first] = rotation[second, second] = math.cos(angle)
    rotation[second, first] = math.sin(angle)
    rotation[first, second] = -rotation[second, first]
    return rotation


def _draw_centre(
    rng: np.random.Generator, rotated_joints: Floats, side: float, image_size: int, cut_off: bool
) -> Floats:
    """Draw the centre of the joints' bounding box in px.

    The box is inside the image or, if `cut_off`, reaches over one border by about 8 to 30 % of its extent.
    """
    extent = np.ptp(rotated_joints[:, :2], axis=0)
    half = side * extent / extent.max() / 2
    margin = 0.04 * image_size
    slack = np.maximum(image_size / 2 - half - margin, 0)
    centre = image_size / 2 + slack * rng.uniform(-1, 1, 2) * 0.9
    if cut_off:
        axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
        centre[axis] = image_size / 2 + sign * (image_size / 2 - half[axis] * rng.uniform(0.4, 0.85))
    return centre


def _draw_forearm(rng: np.random.Generator, view: HandView) -> Floats:
    """Draw the vector from the wrist to the elbow, (3,) in mm, in the frame of the hand. The wrist bends both ways.

    The forearm is shortened so that it ends in front of the camera.
    """
    bend, lean = math.radians(rng.normal(0, 14)), math.radians(np.clip(rng.normal(0, 9), -20, 20))
    direction = np.array([math.sin(lean), -math.cos(lean) * math.cos(bend), math.cos(lean) * math.sin(bend)])
    approach = -float(view.rotation[2] @ direction)
    capacity = float(view.translation[2]) - _MIN_DEPTH_MM / 2
    return direction * min(_FOREARM_MM, capacity / max(approach, 1e-9))


def _paint_hand(
    image: Pixels,
    flesh: hand_renderer.Flesh,
    skin: hand_shading.Skin,
    light: hand_shading.Light,
    intrinsics: Floats,
) -> Pixels:
    """Paint the hand over the background, in place. Return how much of each pixel it covers, (H, W)."""
    size, ss = image.shape[0], SUPERSAMPLING
    cover = np.zeros((size, size), np.float32)
    surface = hand_renderer.trace_rays(flesh, intrinsics, size, ss)
    if surface is None:
        return cover
    px_per_mm = intrinsics[0, 0] / float(flesh.start[:, 2].mean())
    colour = hand_shading.shade(surface, flesh, skin, light, px_per_mm, ss)
    top, bottom, left, right = surface.box
    view = (slice(top // ss, bottom // ss), slice(left // ss, right // ss))
    height, width = surface.depth.shape
    layer = np.zeros((4, height * width), np.float32)
    layer[:3, surface.pixels] = colour
    layer[3, surface.pixels] = 1
    blocks = layer.reshape(4, height // ss, ss, width // ss, ss)
    layer = np.sum([blocks[:, :, i, :, j] for i in range(ss) for j in range(ss)], axis=0) / np.float32(ss**2)
    image[view] *= (1 - layer[3])[..., None]
    image[view] += np.moveaxis(layer[:3], 0, -1)
    cover[view] = layer[3]
    return cover


def draw_background(rng: np.random.Generator, size: int, clutter: float) -> Pixels:
    """Draw a background, (H, W, 3) linear: a smooth wall, shapes in front of it, and texture at several scales."""
    image = np.broadcast_to(_draw_colour(rng), (size, size, 3)).copy()
    image *= _draw_smooth_noise(rng, size, 3, rng.uniform(0.1, 0.4), 0.15)
    for _ in range(rng.poisson(4 * clutter)):
        _paint_shape(rng, image, rng.uniform(0, size, 2), size * rng.uniform(0.04, 0.45, 2))
    if rng.random() < 0.35 * clutter:
        image *= 1 + _draw_stripes(rng, size)[..., None]
    if rng.random() < 0.7 * clutter:
        knots, amplitude, hue = int(rng.integers(5, 12)), rng.uniform(0.05, 0.3), rng.uniform(0, 0.3)
        for octave in range(3):
            image *= _draw_smooth_noise(rng, size, knots * 2**octave + octave, amplitude / 1.5**octave, hue)
    return image


def _draw_colour(rng: np.random.Generator) -> Pixels:
    """Draw a linear colour, (3,). Most objects in rooms are dull, a few are colourful."""
    brightness, saturation = rng.uniform(0.12, 0.95) ** 2.2, rng.beta(1.2, 2.5)
    hue = rng.uniform(0, 1, 3) ** 2
    return (brightness * (1 - saturation + saturation * hue / hue.max())).astype(np.float32)


@lru_cache(maxsize=128)
def _make_interpolation_weights(size: int, knots: int) -> Pixels:
    """Return weights (size, knots) that interpolate a row of pixels smoothly from a row of knots."""
    at = np.linspace(0, knots - 1, size)
    low = np.minimum(at.astype(int), knots - 2)
    share = at - low
    share = share * share * (3 - 2 * share)
    weights = np.zeros((size, knots), np.float32)
    weights[np.arange(size), low] = 1 - share
    weights[np.arange(size), low + 1] = share
    return weights


def _draw_smooth_noise(rng: np.random.Generator, size: int, knots: int, amplitude: float, hue: float) -> Pixels:
    """Draw brightness factors around 1, (H, W, 3). `hue`: part of the amplitude that differs between channels."""
    values = rng.standard_normal((knots, knots, 1), np.float32) + np.float32(hue) * rng.standard_normal(
        (knots, knots, 3), np.float32
    )
    weights = _make_interpolation_weights(size, knots)
    rows = weights @ (values * np.float32(amplitude)).reshape(knots, -1)
    return np.maximum(1 + np.matmul(weights, rows.reshape(size, knots, 3)), 0.15)


@lru_cache(maxsize=4)
def _make_grid(size: int) -> tuple[Pixels, Pixels]:
    at = np.arange(size, dtype=np.float32)
    return at[None, :], at[:, None]


def _draw_stripes(rng: np.random.Generator, size: int) -> Pixels:
    """Draw stripes or a weave, as deviations of the brightness from 1."""
    x, y = _make_grid(size)
    waves = []
    for _ in range(2):
        angle, period = rng.uniform(0, math.pi), size * rng.uniform(0.04, 0.25)
        kx, ky = 2 * math.pi / period * math.cos(angle), 2 * math.pi / period * math.sin(angle)
        waves.append(np.sin(x * np.float32(kx) + (y * np.float32(ky) + np.float32(rng.uniform(0, 6.3)))))
    strength = np.float32(rng.uniform(0.08, 0.3))
    return strength * (waves[0] * waves[1] if rng.random() < 0.5 else waves[0])


def _paint_shape(rng: np.random.Generator, image: Pixels, centre: Floats, half: Floats) -> None:
    """Paint a rotated ellipse or rectangle with soft edges over the image, in place.

    Args:
        rng: generator of random numbers.
        image: (H, W, 3) linear.
        centre: (2,) in pixels.
        half: (2,) half sides in pixels.
    """
    size = image.shape[0]
    angle, is_ellipse, colour = rng.uniform(0, math.pi), rng.random() < 0.5, _draw_colour(rng)
    slope = rng.uniform(-0.8, 0.8, 2) / size  # slope of the brightness, so that the shape does not look flat
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    reach = np.array([cosine * half[0] + sine * half[1], sine * half[0] + cosine * half[1]]) + 1
    (left, top), (right, bottom) = np.clip([centre - reach, centre + reach + 1], 0, size).astype(int)
    dx = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(centre[0])
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[1])
    cosine, sine = math.cos(angle), math.sin(angle)
    along = np.abs(dx * (cosine / half[0]) + dy * (sine / half[0]))
    across = np.abs(dy * (cosine / half[1]) - dx * (sine / half[1]))
    inside = 1 - (np.sqrt(along * along + across * across) if is_ellipse else np.maximum(along, across))
    cover = np.clip(inside * float(half.min() / 1.5) + 0.5, 0, 1)[..., None]
    brightness = (1 + dx * float(slope[0]) + dy * float(slope[1]))[..., None]
    part = image[top:bottom, left:right]
    part += cover * (np.maximum(brightness, 0) * colour - part)


def _paint_occluder(rng: np.random.Generator, image: Pixels, mask: Pixels) -> None:
    """Paint a shape over a part of the hand, in place."""
    rows, columns = np.nonzero(mask > 0.5)
    if rows.size == 0:
        return
    pick = int(rng.integers(rows.size))
    half = image.shape[0] * rng.uniform([0.05, 0.04], [0.22, 0.10])
    _paint_shape(rng, image, np.array([columns[pick], rows[pick]], float), half)


def _apply_exposure(rng: np.random.Generator, image: Pixels, difficulty: Difficulty) -> NDArray[np.uint8]:
    """Apply blur (sometimes), brightness, gamma and sensor noise, in this order."""
    if rng.random() < difficulty.blur_probability:
        share = np.float32(rng.uniform(0.1, 0.3))
        for axis in (0, 1):
            rows = np.moveaxis(image, axis, 0)
            neighbours = np.concatenate([rows[:1], rows[:-1]]) + np.concatenate([rows[1:], rows[-1:]])
            image = (1 - 2 * share) * image + share * np.moveaxis(neighbours, 0, axis)
    pixels = hand_shading.to_srgb(image * np.float32(math.exp(rng.normal(0, 0.12)))).astype(np.float32)
    level = np.float32(rng.uniform(0, difficulty.noise))
    pixels += level * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
