"""Renderer of a posed hand as a union of round cones: segments swept by a sphere whose radius changes along the way.

The intersection of a ray with a round cone has a closed form: its side is a quadratic surface, its ends are spheres. So
each cone is intersected within its own box of the image, and a depth buffer keeps the nearest hit. Normals and colours
are computed once, for the pixels that are covered. Rays are traced in the camera frame and in mm; the centres of pixels
are at integer coordinates.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose.data.hand_kinematics import HandShape, PosedHand

Floats = NDArray[np.float64]
Pixels = NDArray[np.float32]

PALM, PROXIMAL, MIDDLE, TIP, SLEEVE = range(5)
"""Part of the hand that a cone belongs to. It decides creases, nails, colour, and where cones are blended."""

_BLEND_MM = 4.5  # half width over which the normals of the palm's cones are averaged


class Flesh(NamedTuple):
    """N round cones around a hand, in mm, in the frame of the points that they were made from.

    Attributes:
        start: (N, 3) start of the axis.
        end: (N, 3) end of the axis.
        start_radius: (N,) radius at the start.
        end_radius: (N,) radius at the end.
        palmar: (N, 3) unit vector towards the side of the palm, across the axis.
        origin: (3,) the wrist.
        frame: (3, 3) whose rows are x, y and z of the hand.
        girth: factor on the measures of the mean hand.
        kind: (N,) PALM, PROXIMAL, MIDDLE, TIP or SLEEVE.
    """

    start: Floats
    end: Floats
    start_radius: Floats
    end_radius: Floats
    palmar: Floats
    origin: Floats
    frame: Floats
    girth: float
    kind: NDArray[np.int64]

    def transform(self, rotation: Floats, translation: Floats) -> "Flesh":
        """Return the same flesh after x -> rotation x + translation."""
        return self._replace(
            start=self.start @ rotation.T + translation,
            end=self.end @ rotation.T + translation,
            palmar=self.palmar @ rotation.T,
            origin=self.origin @ rotation.T + translation,
            frame=self.frame @ rotation.T,
        )


class Surface(NamedTuple):
    """What the camera sees of the flesh inside a box of the supersampled image. P pixels are covered.

    Attributes:
        box: top, bottom, left, right in supersampled pixels.
        depth: (h, w) in mm; infinite beside the hand.
        pixels: (P,) indices of the covered pixels in the flat box.
        cone: (P,) index of the cone in each of them.
        along: (P,) position along the cone: 0 at its start, 1 at its end.
        points: (3, P) in mm.
        normal: (3, P) unit vectors out of the flesh.
    """

    box: tuple[int, int, int, int]
    depth: Pixels
    pixels: NDArray[np.intp]
    cone: NDArray[np.intp]
    along: Pixels
    points: Pixels
    normal: Pixels


# Radii of the mean hand in mm: at mcp, pip, dip and near the tip; for the thumb at cmc, mcp, ip and near the tip.
_FINGER_RADII = np.array(
    [[12.5, 10.6, 9.4, 7.4], [10.0, 8.7, 7.5, 6.3], [10.2, 8.9, 7.7, 6.5], [9.6, 8.3, 7.2, 6.1], [8.4, 7.2, 6.2, 5.3]]
)


_OUTWARD = np.array([0.0, 0.0, 1.0])  # normal of the palm


class _Cone(NamedTuple):
    """One round cone in the frame of the hand, in mm, with the girth of the mean hand."""

    start: Floats
    end: Floats
    start_radius: float
    end_radius: float
    palmar: Floats = _OUTWARD
    kind: int = PALM


def build_flesh(shape: HandShape, hand: PosedHand, forearm: Floats, sleeve_mm: float | None) -> Flesh:
    """Build round cones for the fingers, the palm with its pads, the web of the thumb and the forearm.

    Args:
        shape: the bones of the hand.
        hand: its joints.
        forearm: (3,) from the wrist to the elbow in mm.
        sleeve_mm: distance from the wrist at which the sleeve begins; None: no sleeve.

    Returns:
        The cones in the frame of the hand.
    """
    girth = shape.girth
    cones = [*_build_fingers(hand, girth), *_build_palm(hand, girth), *_build_thumb_base(hand, girth)]
    cones += _build_forearm(forearm, girth, sleeve_mm)
    return Flesh(
        start=np.stack([cone.start for cone in cones]),
        end=np.stack([cone.end for cone in cones]),
        start_radius=np.array([cone.start_radius for cone in cones]) * girth,
        end_radius=np.array([cone.end_radius for cone in cones]) * girth,
        palmar=np.stack([cone.palmar for cone in cones]),
        origin=np.zeros(3),
        frame=np.eye(3),
        girth=girth,
        kind=np.array([cone.kind for cone in cones]),
    )


def _build_fingers(hand: PosedHand, girth: float) -> list[_Cone]:
    cones = []
    for finger, radii in enumerate(_FINGER_RADII.tolist()):
        chain = hand.joints[1 + 4 * finger : 5 + 4 * finger].copy()
        chain[3] -= 0.6 * radii[3] * girth * hand.distal[finger, 2]  # because the tip joint is just under the skin
        kinds = (PROXIMAL, MIDDLE, TIP) if finger else (PALM, PROXIMAL, TIP)
        for segment in range(3):
            ends, palmar = chain[segment : segment + 2], hand.palmar[finger, segment]
            cones.append(_Cone(ends[0], ends[1], radii[segment], radii[segment + 1], palmar, kinds[segment]))
    return cones


def _build_palm(hand: PosedHand, girth: float) -> list[_Cone]:
    """Build metacarpals, fillings between them, pads and webs at the finger bases, ball of the little finger."""
    knuckles = hand.joints[[5, 9, 13, 17]]
    carpus = girth * np.array([[13.0, 5, 2], [5, 4, 0], [-5, 4, 0], [-13, 5, 2]])
    pads = knuckles + girth * np.array([0.0, -6, 5])
    up = girth * _OUTWARD
    cones = [_Cone(carpus[i], knuckles[i], 13.0, 10.0) for i in range(4)]
    for i in range(3):
        wrist_side, finger_side = (carpus[i] + carpus[i + 1]) / 2, (knuckles[i] + knuckles[i + 1]) / 2
        web = finger_side + 7.2 * girth * (hand.distal[i + 1, 0] + hand.distal[i + 2, 0]) + 1.5 * up
        cones += [
            _Cone(wrist_side + up, finger_side + girth * np.array([0.0, -2, 2]), 13.5, 10.0),
            _Cone(knuckles[i] + up, knuckles[i + 1] + up, 9.6, 9.6),
            _Cone(pads[i], pads[i + 1], 9.5, 9.5),
            _Cone(finger_side + 2 * up, web, 9.0, 6.5),
        ]
    ball = girth * np.array([-15.0, 14, 7]), knuckles[3] + girth * np.array([-1.0, -16, 6])
    return [*cones, _Cone(*ball, 13.0, 11.0)]


def _build_thumb_base(hand: PosedHand, girth: float) -> list[_Cone]:
    """Build the ball of the thumb and its web to the index finger."""
    base, metacarpal = hand.joints[1], hand.joints[2] - hand.joints[1]
    index_finger = hand.joints[5]
    return [
        _Cone(girth * np.array([8.0, 12, 7]), base + 0.85 * metacarpal, 12.5, 10.5),
        _Cone(girth * np.array([2.0, 34, 6]), base + 0.60 * metacarpal, 11.0, 11.0),
        _Cone(base + 0.90 * metacarpal, 0.62 * index_finger + 4 * girth * _OUTWARD, 8.5, 9.0),
        _Cone(base + 0.50 * metacarpal, 0.45 * index_finger + 4 * girth * _OUTWARD, 8.5, 9.0),
    ]


def _build_forearm(forearm: Floats, girth: float, sleeve_mm: float | None) -> list[_Cone]:
    """Build three cones side by side, wider than thick, and three around them for the sleeve."""
    side = girth * np.cross(_OUTWARD, forearm)
    side /= np.linalg.norm(np.cross(_OUTWARD, forearm))
    cones = []
    for sign, thicker in ((-1.0, 0.0), (0.0, 1.5), (1.0, 0.0)):
        wrist, elbow = 9.5 * sign * side, 14 * sign * side + forearm
        cones.append(_Cone(wrist, elbow, 14 + thicker, 26 + thicker))
        if sleeve_mm is not None:
            share = min(sleeve_mm / float(np.linalg.norm(forearm)), 0.9)
            cuff = wrist + share * (elbow - wrist)
            cones.append(_Cone(cuff, elbow, 19.5 + 10.5 * share + thicker, 32 + thicker, kind=SLEEVE))
    return cones


def trace_rays(flesh: Flesh, intrinsics: Floats, size: int, supersampling: int) -> Surface | None:
    """Find the nearest surface for every ray of the image.

    Args:
        flesh: cones in the camera frame in mm, in front of the camera.
        intrinsics: (3, 3) without skew, in pixels of the image.
        size: side of the image in pixels.
        supersampling: rays per pixel in each direction.

    Returns:
        The surface; None if none of the flesh is in the image.
    """
    boxes = _compute_screen_boxes(flesh, intrinsics, size, supersampling)
    cone_boxes = np.concatenate([np.minimum(*boxes[..., ::2]), np.maximum(*boxes[..., 1::2])], axis=1)[:, [0, 2, 1, 3]]
    is_visible = (cone_boxes[:, 0] < cone_boxes[:, 1]) & (cone_boxes[:, 2] < cone_boxes[:, 3])
    if not is_visible.any():
        return None
    top, left = cone_boxes[is_visible][:, ::2].min(0) // supersampling * supersampling
    bottom, right = -(-cone_boxes[is_visible][:, 1::2].max(0) // supersampling) * supersampling
    rays_x, rays_y = _make_rays(intrinsics, size, supersampling)
    canvas = _DepthBuffer(rays_x[left:right], rays_y[top:bottom, None])
    for i in np.flatnonzero(is_visible).tolist():
        canvas.add_side(flesh, i, cone_boxes[i] - [top, top, left, left])
    for end, i in _find_distinct_spheres(flesh):
        canvas.add_sphere(flesh, i, end, boxes[end, i] - [top, top, left, left])
    pixels = np.flatnonzero(canvas.cone >= 0)
    if pixels.size == 0:
        return None
    which = canvas.cone.ravel()[pixels].astype(np.intp)
    points = canvas.compute_points(pixels)
    along, normal = _compute_surface(flesh, which, points)
    kind = flesh.kind[which]
    blend = np.where(kind == PALM, 1, np.where(kind == PROXIMAL, 1 - 2.2 * along, 0)).clip(0, 1).astype(np.float32)
    reach = max(1, round(_BLEND_MM * intrinsics[0, 0] / float(points[2].mean())))
    _blend_normals(normal, blend, pixels, canvas.shape, supersampling, reach)
    return Surface((top, bottom, left, right), canvas.depth, pixels, which, along, points, normal)


def _find_distinct_spheres(flesh: Flesh) -> list[tuple[int, int]]:
    """List the spheres that are not inside another one. Neighbouring cones share most of them.

    Returns:
        (end, cone) of each sphere; end is 0 for the start of the cone and 1 for its end.
    """
    centres = np.concatenate([flesh.start, flesh.end])
    radii = np.concatenate([flesh.start_radius, flesh.end_radius])
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    inside = distance + radii[:, None] <= radii[None] + 1e-6
    inside &= ~inside.T | (np.arange(len(radii))[:, None] > np.arange(len(radii)))  # of equal ones keep the first
    np.fill_diagonal(inside, False)
    return [(int(i) // len(flesh.kind), int(i) % len(flesh.kind)) for i in np.flatnonzero(~inside.any(axis=1))]


def _make_rays(intrinsics: Floats, size: int, supersampling: int) -> tuple[Pixels, Pixels]:
    """Return x/z of the columns and y/z of the rows of the supersampled image."""
    at = (np.arange(size * supersampling) + 0.5) / supersampling - 0.5
    x = (at - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (at - intrinsics[1, 2]) / intrinsics[1, 1]
    return x.astype(np.float32), y.astype(np.float32)


def _compute_screen_boxes(flesh: Flesh, intrinsics: Floats, size: int, supersampling: int) -> NDArray[np.int64]:
    """Compute the boxes of the spheres at the starts and ends of the cones, clipped to the image.

    Returns:
        (2, N, 4) top, bottom, left, right in supersampled pixels.
    """
    centre = np.stack([flesh.start, flesh.end])
    radius = np.stack([flesh.start_radius, flesh.end_radius])
    sides = []
    for axis in (1, 0):
        # Tangents from the camera to a circle in the plane of this axis and z.
        distance = np.hypot(centre[..., axis], centre[..., 2])
        middle, half = np.arctan2(centre[..., axis], centre[..., 2]), np.arcsin(np.minimum(radius / distance, 1))
        for rounded, angle in ((np.floor, middle - half), (np.ceil, middle + half)):
            px = np.tan(angle) * intrinsics[axis, axis] + intrinsics[axis, 2] + 0.5
            sides.append(rounded(px * supersampling))
    return np.clip(np.stack(sides, axis=-1), 0, size * supersampling).astype(np.int64)


class _DepthBuffer:
    """A depth buffer that also stores which cone is visible in each pixel.

    Args:
        x: (w,) x/z of the columns.
        y: (h, 1) y/z of the rows.
    """

    def __init__(self, x: Pixels, y: Pixels) -> None:
        self.x, self.y = x, y
        self.ray2 = x * x + (y * y + 1)
        self.shape = (y.shape[0], x.shape[0])
        self.depth = np.full(self.shape, np.inf, np.float32)
        self.cone = np.full(self.shape, -1, np.int16)

    def compute_points(self, pixels: NDArray[np.intp]) -> Pixels:
        """Return the points where the rays of the given pixels hit, (3, P)."""
        z = self.depth.ravel()[pixels]
        rows, columns = np.divmod(pixels, self.shape[1])
        return np.stack([self.x[columns] * z, self.y[rows, 0] * z, z])

    def add_side(self, flesh: Flesh, i: int, box: NDArray[np.int64]) -> None:
        """Add the side of cone i without its ends: c2 |q|^2 - (q.axis)^2 + 2 r slope q.axis - r^2 = 0.

        Here q = depth ray - start, slope is the sine of half the opening angle, and c2 is the square of its cosine.
        """
        start, bone, radius = flesh.start[i], flesh.end[i] - flesh.start[i], float(flesh.start_radius[i])
        length = float(np.linalg.norm(bone))
        axis, slope = bone / length, (radius - float(flesh.end_radius[i])) / length
        c2 = 1 - slope * slope
        if c2 <= 0:
            return  # one end is inside the other
        start2, start_axis = float(start @ start), float(start @ axis)
        view = (slice(box[0], box[1]), slice(box[2], box[3]))
        ray_axis, ray_start = self._dot(view, axis), self._dot(view, start)
        # Half the linear coefficient is -middle. The smaller of the two roots is the nearer one.
        quadratic = c2 * self.ray2[view]
        quadratic -= ray_axis * ray_axis
        middle = ray_start
        middle *= c2
        middle -= ray_axis * (start_axis + radius * slope)
        constant = c2 * start2 - start_axis * (start_axis + 2 * radius * slope) - radius * radius
        root = middle * middle
        root -= quadratic * constant
        misses = root <= 0
        np.sqrt(np.maximum(root, 0, out=root), out=root)
        hit = np.subtract(middle, root, out=root)
        hit /= np.maximum(quadratic, 1e-9, out=quadratic)
        foot = hit * ray_axis
        low = start_axis + slope * radius
        hit[misses | (foot < low) | (foot > low + c2 * length)] = np.inf
        self._update(view, hit, i)

    def add_sphere(self, flesh: Flesh, i: int, end: int, box: NDArray[np.int64]) -> None:
        """Add the sphere at the start (end = 0) or at the end (end = 1) of cone i."""
        centre = flesh.end[i] if end else flesh.start[i]
        radius = float(flesh.end_radius[i] if end else flesh.start_radius[i])
        view = (slice(box[0], box[1]), slice(box[2], box[3]))
        ray2, middle = self.ray2[view], self._dot(view, centre)
        root = middle * middle
        root -= ray2 * (float(centre @ centre) - radius * radius)
        misses = root <= 0
        np.sqrt(np.maximum(root, 0, out=root), out=root)
        hit = np.subtract(middle, root, out=root)
        hit /= ray2
        hit[misses] = np.inf
        self._update(view, hit, i)

    def _dot(self, view: tuple[slice, slice], vector: Floats) -> Pixels:
        x, y, z = vector.tolist()
        return self.x[view[1]] * x + (self.y[view[0]] * y + z)

    def _update(self, view: tuple[slice, slice], hit: Pixels, i: int) -> None:
        nearer = hit < self.depth[view]
        np.copyto(self.depth[view], hit, where=nearer)
        np.copyto(self.cone[view], np.int16(i), where=nearer)


def _compute_surface(flesh: Flesh, which: NDArray[np.intp], points: Pixels) -> tuple[Pixels, Pixels]:
    """Return positions along the cones, (P,), and outward normals, (3, P), of points on their surface."""
    bone = flesh.end - flesh.start
    length2 = (bone * bone).sum(1)
    slope_radius = (flesh.start_radius - flesh.end_radius) * flesh.start_radius
    cosine2 = 1 - (flesh.start_radius - flesh.end_radius) ** 2 / length2
    # along = (offset . bone - slope_radius) / (length2 cosine2) is a linear function of the point.
    weights = bone / (length2 * cosine2)[:, None]
    constant = -((flesh.start * bone).sum(1) + slope_radius) / (length2 * cosine2)
    table = np.concatenate([weights.T, constant[None], flesh.start.T, bone.T]).astype(np.float32)[:, which]
    along = points[0] * table[0] + points[1] * table[1] + points[2] * table[2] + table[3]
    np.clip(along, 0, 1, out=along)
    normal = points - table[4:7]
    normal -= along * table[7:10]
    return along, _normalise(normal)


def _normalise(vectors: Pixels) -> Pixels:
    """Scale (3, P) vectors to unit length, in place."""
    x, y, z = vectors
    vectors /= np.sqrt(x * x + y * y + z * z + np.float32(1e-12))
    return vectors


def _blend_normals(
    normal: Pixels,
    blend: Pixels,
    pixels: NDArray[np.intp],
    shape: tuple[int, int],
    supersampling: int,
    reach: int,
) -> None:
    """Average the normals of neighbouring pixels in place, so that the cones of the palm look like one skin.

    Args:
        normal: (3, P) normals.
        blend: (P,) 1: use the average; 0: keep the pixel's own normal and leave it out of the average.
        pixels: (P,) indices of the pixels in the flat box.
        shape: (h, w) of the box.
        supersampling: rays per pixel in each direction.
        reach: half width of the average in pixels of the final image, on whose grid it is computed.
    """
    rows, columns = np.divmod(pixels, shape[1])
    height, width = shape[0] // supersampling, shape[1] // supersampling
    cell = rows // supersampling * width + columns // supersampling
    down, across = make_smoothing_weights(height, reach), make_smoothing_weights(width, reach)
    smooth = np.empty_like(normal)
    for axis in range(3):
        total = np.bincount(cell, weights=normal[axis] * blend, minlength=height * width).astype(np.float32)
        smooth[axis] = (down @ total.reshape(height, width) @ across).ravel()[cell]
    normal += blend * (_normalise(smooth) - normal)
    _normalise(normal)


@lru_cache(maxsize=256)
def make_smoothing_weights(count: int, reach: int) -> Pixels:
    """Return symmetric weights (count, count) of a triangular window with half width 2 reach."""
    at = np.arange(count)
    return np.maximum(2 * reach + 1 - np.abs(at[:, None] - at), 0).astype(np.float32)
