"""Colours of a rendered hand: skin with a lighter palm, nails and lines, a light with soft shadows, and ambient light.

All colours are linear. `to_srgb` converts them to bytes as the last step.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose.data.hand_renderer import MIDDLE, PALM, SLEEVE, TIP, Flesh, Pixels, Surface, make_smoothing_weights

Floats = NDArray[np.float64]

# sRGB tones of the back of the hand from light to dark: measured skin ranges, following the Monk skin tone scale.
_SKIN_TONES = np.array(
    [
        [240, 208, 190],
        [231, 190, 168],
        [222, 176, 148],
        [208, 156, 124],
        [190, 136, 102],
        [164, 112, 80],
        [136, 88, 62],
        [106, 68, 48],
        [78, 50, 38],
    ],
    dtype=float,
)


# Light that has passed through skin is red, so at the border of the shadow red reaches further round than blue.
_WRAP_LIGHTING = (0.40, 0.22, 0.16)

# Centre, radius and range of x of the thenar line, the head line and the heart line, in mm of the mean hand.
_PALM_LINES = ((39.0, 26.0, 37.0, -1.0, 26.0), (34.0, 128.0, 66.0, -22.0, 24.0), (-24.0, 122.0, 54.0, -40.0, 12.0))

_SHADOW_STEPS_MM = (5.0, 9.0, 14.0, 20.0, 28.0)
_SKY_STEPS_MM = ((7, 0), (0, 7), (-7, 0), (0, -7), (10, 10), (-10, 10), (10, -10), (-10, -10))


class Light(NamedTuple):
    """One distant light and ambient light.

    Attributes:
        direction: (3,) unit vector from the hand to the light, camera frame.
        colour: (3,) linear.
        ambient: (3,) linear.
    """

    direction: Floats
    colour: Floats
    ambient: Floats


class Skin(NamedTuple):
    """Linear colours of one person's hand and sleeve.

    Attributes:
        back: (3,) back of the hand.
        palm: (3,) palm.
        nail: (3,) nails.
        sleeve: (3,) sleeve.
        gloss: strength of the highlights.
    """

    back: Floats
    palm: Floats
    nail: Floats
    sleeve: Floats
    gloss: float


def to_linear(srgb: Floats) -> Floats:
    """Convert sRGB bytes to linear values in [0, 1], with a gamma of 2.2 in place of the standard's piecewise curve."""
    return (np.asarray(srgb, float) / 255) ** 2.2


_STEPS = 4095
_SRGB = np.round(255 * (np.arange(_STEPS + 1) / _STEPS) ** (1 / 2.2)).astype(np.uint8)


def to_srgb(linear: Pixels) -> NDArray[np.uint8]:
    """Clip linear values to [0, 1] and convert them to sRGB bytes."""
    return _SRGB[(np.clip(linear, 0, 1) * _STEPS + 0.5).astype(np.uint16)]


def draw_skin(rng: np.random.Generator) -> Skin:
    """Draw a tone from light to dark with a small shift of the hue. Palms differ less between people."""
    at = rng.uniform(0, len(_SKIN_TONES) - 1)
    low = min(int(at), len(_SKIN_TONES) - 2)
    tone = _SKIN_TONES[low] + (at - low) * (_SKIN_TONES[low + 1] - _SKIN_TONES[low])
    tone = tone * rng.normal(1, [0.02, 0.025, 0.04])
    back = to_linear(np.clip(tone, 20, 250))
    palm = back ** np.array([0.72, 0.80, 0.82]) * np.array([0.98, 0.90, 0.88])
    nail = back ** np.array([0.70, 0.78, 0.76])
    return Skin(back, palm, nail, to_linear(rng.uniform(15, 235, 3)), float(rng.uniform(0.02, 0.12)))


def draw_light(rng: np.random.Generator) -> Light:
    """Draw a light on the camera's side of the hand, more often above the hand than below it."""
    direction = np.array([rng.uniform(-1, 1), rng.uniform(-1.1, 0.5), -rng.uniform(0.35, 1.1)])
    warmth = rng.normal(0, 0.06)
    colour = rng.uniform(0.65, 1.05) * np.array([1 + warmth, 1.0, 1 - warmth])
    ambient = rng.uniform(0.18, 0.42) * np.array([1 - warmth, 1.0, 1 + warmth])
    return Light(direction / np.linalg.norm(direction), colour, ambient)


def shade(surface: Surface, flesh: Flesh, skin: Skin, light: Light, px_per_mm: float, supersampling: int) -> Pixels:
    """Compute the linear colours of the P covered pixels.

    Args:
        surface: the visible surface.
        flesh: its cones.
        skin: colours of the hand.
        light: the light.
        px_per_mm: pixels of the final image for each mm at the hand, which gives the scale of the shadows.
        supersampling: rays per pixel in each direction.

    Returns:
        (3, P).
    """
    normal = surface.normal
    lit, open_sky = _compute_shadows(surface, light, px_per_mm, supersampling)
    facing = light.direction.astype(np.float32) @ normal
    half = light.direction - np.array([0.0, 0.0, 1.0])
    shine = np.maximum((half / np.linalg.norm(half)).astype(np.float32) @ normal, 0)
    for _ in range(4):
        shine *= shine  # to the 16th power
    shine *= lit * np.float32(skin.gloss)
    open_sky *= np.float32(0.8) - np.float32(0.2) * normal[1]
    colour = _compute_albedo(surface, flesh, skin)
    for channel, wrap in enumerate(_WRAP_LIGHTING):
        light_in = facing * (1 / (1 + wrap)) + wrap / (1 + wrap)
        np.maximum(light_in, 0, out=light_in)
        light_in *= lit * np.float32(light.colour[channel])
        light_in += open_sky * np.float32(light.ambient[channel])
        colour[channel] *= light_in
        colour[channel] += shine
    return colour


def _compute_albedo(surface: Surface, flesh: Flesh, skin: Skin) -> Pixels:
    """Compute the colours under white light, (3, P)."""
    cone, along, normal = surface.cone, surface.along, surface.normal
    kind = flesh.kind[cone]
    x, y, z = flesh.palmar.T.astype(np.float32)[:, cone]
    towards_palm = normal[0] * x + normal[1] * y + normal[2] * z
    share = np.clip(np.float32(1.1) * towards_palm + np.float32(0.5), 0, 1)
    at_joint = (along < 0.2) & ((kind == MIDDLE) | (kind == TIP))
    bright = np.ones_like(along)
    pad = towards_palm[at_joint]
    bright[at_joint] -= np.exp(-((along[at_joint] / 0.07) ** 2)) * np.where(pad > 0, 0.22 * pad, -0.10 * pad)
    palm = np.flatnonzero((kind == PALM) & (towards_palm > 0.2))
    bright[palm] *= _compute_palm_lines(surface.points[:, palm], flesh)
    nail = (kind == TIP) & (along > 0.5) & (towards_palm < -0.62)
    sleeve = kind == SLEEVE
    albedo = np.empty((3, along.size), np.float32)
    for channel in range(3):
        back, front = float(skin.back[channel]), float(skin.palm[channel])
        albedo[channel] = (share * (front - back) + back) * bright
        albedo[channel, nail] = skin.nail[channel]
        albedo[channel, sleeve] = skin.sleeve[channel]
    return albedo


def _compute_palm_lines(points: Pixels, flesh: Flesh) -> Pixels:
    """Compute the brightness of points on the palm, (P,). It is lower along the palm lines, which are arcs."""
    x, y, _ = (flesh.frame / flesh.girth).astype(np.float32) @ (points - flesh.origin.astype(np.float32)[:, None])
    bright = np.ones_like(x)
    for centre_x, centre_y, radius, low, high in _PALM_LINES:
        off = np.hypot(x - np.float32(centre_x), y - np.float32(centre_y)) - np.float32(radius)
        bright -= np.float32(0.2) * np.exp(-np.square(off / np.float32(0.9))) * ((x > low) & (x < high) & (y > 18))
    return bright


def _smooth_inside(values: Pixels, inside: NDArray[np.bool_]) -> Pixels:
    """Average over the nearest pixels that are inside, which gives shadows a soft border."""
    down, across = make_smoothing_weights(values.shape[0], 1), make_smoothing_weights(values.shape[1], 1)
    weights = inside.astype(np.float32)
    softened: Pixels = down @ (values * weights) @ across
    softened /= np.maximum(down @ weights @ across, 1)
    return softened


def _compute_shadows(surface: Surface, light: Light, px_per_mm: float, supersampling: int) -> tuple[Pixels, Pixels]:
    """Compute how much of the light and of the sky each covered pixel receives, (P,) each, from the depth buffer alone.

    There is one value for each pixel of the final image. Steps towards the light that pass behind a nearer surface give
    shadow, and neighbouring pixels that are nearer to the camera hide part of the sky.
    """
    depth = surface.depth[::supersampling, ::supersampling]
    far = np.float32(1e9)
    reach = int(30 * px_per_mm) + 1
    padded = np.pad(np.where(np.isfinite(depth), depth, far), reach, constant_values=far)
    height, width = depth.shape

    def over(dx_mm: float, dy_mm: float) -> Pixels:
        """Return how much nearer to the camera the surface is at this offset, in mm."""
        top, left = reach + round(dy_mm * px_per_mm), reach + round(dx_mm * px_per_mm)
        return here - padded[top : top + height, left : left + width]

    here = padded[reach : reach + height, reach : reach + width]
    lit = np.ones(depth.shape, np.float32)
    for step in _SHADOW_STEPS_MM:
        dx, dy, dz = light.direction * step
        gap = over(dx, dy) + np.float32(dz)
        lit -= np.float32(0.3) * np.clip(gap / 3 - np.float32(0.3), 0, 1) * (gap < 30)
    lit = _smooth_inside(np.maximum(lit, 0.25), here < far)
    sky = np.ones(depth.shape, np.float32)
    for dx, dy in _SKY_STEPS_MM:
        gap, distance = over(dx, dy), np.float32(math.hypot(dx, dy))
        sky -= np.float32(0.2) * np.clip(gap / distance - np.float32(0.3), 0, 1) * (gap < 60)
    rows, columns = np.divmod(surface.pixels, surface.depth.shape[1])
    cell = rows // supersampling * width + columns // supersampling
    return lit.ravel()[cell], np.maximum(sky, 0.25).ravel()[cell]
