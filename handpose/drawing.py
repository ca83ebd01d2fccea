"""Pictures of predictions, for TensorBoard and for files.

Each function takes arrays and returns an (H, W, 3) uint8 picture. Matplotlib's figures are used without pyplot, whose
global state is not thread-safe and keeps every figure alive. Each finger always has the same colour, and all
coordinates of drawing are pixels of the picture. Letters: N hands, K = 21 keypoints (FreiHAND order), H height, W
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from handpose.skeleton import BONES, FINGERS, JOINT_NAMES, ROOT

FINGER_COLOURS = {"thumb": "#ff4d4d", "index": "#ffa31a", "middle": "#2fd061", "ring": "#2f9dff", "little": "#c866ff"}
WRIST_COLOUR = "#e8e8e8"
JOINT_COLOURS = (WRIST_COLOUR, *(FINGER_COLOURS[finger] for finger in FINGERS for _ in range(4)))
"""The colour of each joint, and of the bone that ends at it."""

WRIST_AND_TIPS = (0, *(joint for joint, name in enumerate(JOINT_NAMES) if name.endswith("tip")))
GRID_MM = 50
"""Distance of the grid lines behind the 3-D skeletons. One line of each direction goes through the root."""

PixelArray = NDArray[np.uint8]
FloatArray = NDArray[np.floating]

_DPI = 100
_POINTS_PER_PX = 72 / _DPI  # Matplotlib's widths are in points
_GAP_PX = 6
_MAX_SIDES_OUTSIDE = 10
"""A skeleton over a frame is left out if a joint is so many sides of the picture away."""
_LEGEND_PX = 26
_SKELETON_BACKGROUND, _PAGE_BACKGROUND, _PAPER, _PAPER_LINES, _INK = (
    "#17191c",
    "#eceef1",
    "#ffffff",
    "#e4e4e4",
    "#303030",
)
_BONES = np.array(BONES)
_COLOURS = np.array([to_rgb(colour) for colour in JOINT_COLOURS])
_FINGERS_LEGEND = (("wrist", WRIST_COLOUR), *FINGER_COLOURS.items())
_VIEWS = (("camera view", 0, 2, -1), ("from its right, far \N{RIGHTWARDS ARROW}", 2, 0, 1))
"""Name, axis to the right, axis of sight, and its sign towards the viewer. In both views, y points down."""


def draw_predictions(
    images: PixelArray,
    predicted_uv: FloatArray,
    target_uv: FloatArray | None = None,
    *,
    radii_px: FloatArray | None = None,
    columns: int = 4,
    captions: Sequence[str] | None = None,
) -> PixelArray:
    """Draw predicted skeletons over their images in the colours of the fingers, and true ones as thin white lines.

    A skeleton with a coordinate that is not finite is left out.

    Args:
        images: (N, H, W, 3) uint8 images.
        predicted_uv: (N, K, 2) predicted joints in pixels of the images; (0, 0) is the centre of the first pixel.
        target_uv: (N, K, 2) true joints in pixels of the images.
        radii_px: (N, K) expected errors in pixels of the images, drawn as circles; NaN: no circle.
        columns: number of images in a row.
        captions: a text for each hand.
    """
    cells, size = _layout_cells(len(images), _choose_display_size(images), columns)
    axes = _make_axes(
        size,
        _SKELETON_BACKGROUND,
        (
            *_FINGERS_LEGEND,
            *([] if target_uv is None else [("truth (line)", "white")]),
            *([] if radii_px is None else [("expected error (circle)", "0.6")]),
        ),
    )
    for hand, box in enumerate(cells):
        _draw_image(axes, box, _resize_to_box(images[hand], box))
        uv = _scale_to_box(predicted_uv[hand], images, box)
        if radii_px is not None:
            _draw_circles(axes, box, uv, radii_px[hand] * box.width / images.shape[2])
        _draw_skeleton(axes, box, uv)
        if target_uv is not None:
            _draw_thin_skeleton(axes, box, _scale_to_box(target_uv[hand], images, box), "white")
        if captions is not None:
            _draw_label(axes, box, captions[hand], "white", backdrop=_SKELETON_BACKGROUND)
    return _render(axes)


def draw_skeletons_3d(
    predicted_m: FloatArray,
    target_m: FloatArray | None = None,
    *,
    columns: int = 3,
    captions: Sequence[str] | None = None,
) -> PixelArray:
    """Draw skeletons relative to their root, each from the camera and from its right, where the depth is visible.

    True skeletons are thin and dark. All views have the same scale, at which the true skeletons fit, or the predicted
    ones if there are none. Lines outside a view are clipped.

    Args:
        predicted_m: (N, K, 3) predicted joints in metres, camera frame.
        target_m: (N, K, 3) true joints in metres, camera frame.
        columns: number of hands in a row.
        captions: a text for each hand.
    """
    predicted = _to_root_relative_mm(predicted_m)
    target = None if target_m is None else _to_root_relative_mm(target_m)
    centres, reach_mm = _find_view(predicted if target is None else target)
    cells, size = _layout_cells(len(predicted), (440, 220), columns)
    legend = (
        *_FINGERS_LEGEND,
        *([] if target is None else [("truth (line)", _INK)]),
        (f"grid {GRID_MM} mm", "#c9c9c9"),
    )
    axes = _make_axes(size, _PAGE_BACKGROUND, legend)
    for hand, cell in enumerate(cells):
        axes.add_patch(Rectangle((cell.left, cell.top), cell.width, cell.height, color=_PAPER, linewidth=0, zorder=0))
        for box, (view, right, sight, sign) in zip(cell.split_in_halves(), _VIEWS, strict=True):
            frame = _Frame(box, centres[hand, [right, 1]], reach_mm)
            _draw_grid(axes, frame)
            _draw_skeleton(
                axes, box, frame.to_pixels(predicted[hand][:, [right, 1]]), nearness=sign * predicted[hand][:, sight]
            )
            if target is not None:
                _draw_thin_skeleton(axes, box, frame.to_pixels(target[hand][:, [right, 1]]), _INK)
            _draw_label(axes, box, view, "#777777", backdrop=_PAPER, at_bottom=True)
        if captions is not None:
            _draw_label(axes, cell, captions[hand], _INK, backdrop=_PAPER)
    return _render(axes)


_DEPTH_LABEL = "near \N{LEFTWARDS ARROW} depth \N{RIGHTWARDS ARROW} far"


def draw_heatmaps(
    images: PixelArray,
    u: FloatArray,
    v: FloatArray,
    depth: FloatArray,
    target: FloatArray | None = None,
    *,
    peak_values: Sequence[float] | None = None,
    joints: Sequence[int] = WRIST_AND_TIPS,
    columns: int = 4,
    captions: Sequence[str] | None = None,
) -> PixelArray:
    """Draw the probabilities of a few joints along the three axes, in the colours of their fingers.

    The curves along u and v are on the borders of the image, their product is an overlay on the image, and the curve
    along depth (near to far) is below it. The curves of a border have the same scale, so that a sharp one looks sharp.
    Lines and crosses mark the truth.

    Args:
        images: (N, H, W, 3) uint8 images.
        u: (N, K, bins) probabilities along u; they sum to 1 over the bins.
        v: (N, K, bins) probabilities along v.
        depth: (N, K, bins) probabilities along the depth range.
        target: (N, K, 3) true coordinates in [0, 1] of the axes.
        peak_values: along u, v and depth, the largest probability of the training targets. It is drawn as high as the
            border and with full brightness, so that a network that has learnt nothing looks pale. Without it, the
            pictures of all networks are equally bright.
        joints: the joints to draw: one per finger, because the joints of a finger have the same colour.
        columns: number of hands in a row.
        captions: a text for each hand.
    """
    (width, height), strip, below = _choose_display_size(images), 44, 70
    cells, size = _layout_cells(len(images), (width + strip, strip + height + below), columns)
    axes = _make_axes(
        size, _SKELETON_BACKGROUND, [(JOINT_NAMES[joint].replace("_", " "), JOINT_COLOURS[joint]) for joint in joints]
    )
    chosen = list(joints)
    for hand, cell in enumerate(cells):
        image_box = _Box(cell.left, cell.top + strip, width, height)
        curves = [axis[hand, chosen] for axis in (u, v, depth)]
        truth = None if target is None else target[hand, chosen]
        tops = peak_values or (None, None, None)
        background = _resize_to_box(images[hand], image_box)
        overlay = _overlay_heatmaps(background, curves[0], curves[1], _COLOURS[chosen], peaks=tops[:2])
        _draw_image(axes, image_box, overlay)
        borders = (
            _Box(cell.left, cell.top, width, strip),
            _Box(cell.left + width, cell.top + strip, strip, height),
            _Box(cell.left, cell.top + strip + height + 4, width, below - 24),
        )
        for axis, box in enumerate(borders):
            _draw_curves(axes, box, curves[axis], _COLOURS[chosen], is_vertical=axis == 1, peak=tops[axis])
            if truth is not None:
                _draw_marks(axes, box, truth[:, axis], _COLOURS[chosen], is_vertical=axis == 1)
        if truth is not None:
            _draw_crosses(axes, image_box, truth[:, :2])
        _draw_label(axes, cell, _DEPTH_LABEL, "#9aa0a6", backdrop=_SKELETON_BACKGROUND, at_bottom=True)
        if captions is not None:
            _draw_label(axes, image_box, captions[hand], "white", backdrop=_SKELETON_BACKGROUND)
    return _render(axes)


def draw_over_photograph(photograph: PixelArray, uv: FloatArray, radii_px: FloatArray | None = None) -> PixelArray:
    """Draw a predicted skeleton over a photograph at its own size. The width of the lines grows with the photograph.

    A skeleton with a coordinate that is not finite is left out.

    Args:
        photograph: (H, W, 3) uint8 image.
        uv: (K, 2) joints in its pixels.
        radii_px: (K,) expected errors in its pixels, drawn as circles; NaN: no circle.
    """
    height, width = photograph.shape[:2]
    axes = _blank_axes(width, height, dpi=_DPI * max(1.0, max(height, width) / 400))
    box = _Box(0, 0, width, height)
    _draw_image(axes, box, photograph)
    if radii_px is not None:
        _draw_circles(axes, box, uv + 0.5, radii_px)
    _draw_skeleton(axes, box, uv + 0.5)
    return _render(axes)


def draw_over_frame(frame: Image.Image, uv: FloatArray, radii_px: FloatArray | None = None) -> PixelArray:
    """Draw a predicted skeleton over a frame of a video, like `draw_over_photograph` but in a few milliseconds.

    A skeleton with a coordinate that is not finite or far outside is left out, as when a joint is beside the camera.

    Args:
        frame: the RGB picture.
        uv: (K, 2) joints in its pixels.
        radii_px: (K,) expected errors in its pixels, drawn as circles; NaN, or larger than the picture: no circle.
    """
    drawn = frame.copy()
    if not (np.abs(uv) < _MAX_SIDES_OUTSIDE * max(frame.size)).all():
        return np.asarray(drawn)
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(frame.size) / 200))
    for low, high in BONES:
        for colour, extra in (("black", 2), (JOINT_COLOURS[high], 0)):
            pen.line([tuple(uv[low]), tuple(uv[high])], fill=colour, width=width + extra)
    for joint, (x, y) in enumerate(uv):
        pen.circle((x, y), width + 1, fill=JOINT_COLOURS[joint], outline="black")
        if radii_px is not None and radii_px[joint] < max(frame.size):
            pen.circle((x, y), radii_px[joint], outline=JOINT_COLOURS[joint])
    return np.asarray(drawn)


@dataclass(frozen=True)
class _Box:
    """A rectangle of the picture, in pixels from the upper left corner."""

    left: float
    top: float
    width: int
    height: int

    def split_in_halves(self) -> tuple["_Box", "_Box"]:
        half = self.width // 2
        return _Box(self.left, self.top, half, self.height), _Box(self.left + half, self.top, half, self.height)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return self.left, self.left + self.width, self.top + self.height, self.top


@dataclass(frozen=True)
class _Frame:
    """A view of space, with equal axes: maps mm relative to the root to pixels of a box."""

    box: _Box
    centre_mm: FloatArray  # (2,)
    reach_mm: float

    def to_pixels(self, points_mm: FloatArray) -> FloatArray:
        """Convert points (K, 2) from mm to pixels."""
        middle = (self.box.left + self.box.width / 2, self.box.top + self.box.height / 2)
        return (points_mm - self.centre_mm) * (min(self.box.width, self.box.height) / 2 / self.reach_mm) + middle


def _layout_cells(num: int, cell: tuple[int, int], columns: int) -> tuple[list[_Box], tuple[int, int]]:
    """Lay out `num` cells in rows. Return their boxes, and the (width, height) of the picture."""
    columns = max(1, min(columns, num))
    (width, height), rows = cell, -(-num // columns)
    places = [divmod(i, columns) for i in range(num)]
    boxes = [_Box(column * (width + _GAP_PX), row * (height + _GAP_PX), width, height) for row, column in places]
    return boxes, (columns * (width + _GAP_PX) - _GAP_PX, rows * (height + _GAP_PX) - _GAP_PX + _LEGEND_PX)


def _choose_display_size(images: PixelArray) -> tuple[int, int]:
    """Choose the (width, height) at which to show an image: about 300 pixels, by a whole factor if possible."""
    height, width = images.shape[1:3]
    factor = 300 / max(height, width)
    factor = round(factor) if factor > 1.5 else factor
    return round(width * factor), round(height * factor)


def _resize_to_box(image: PixelArray, box: _Box) -> PixelArray:
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(image)).resize((box.width, box.height), Image.Resampling.BICUBIC)
    )


def _scale_to_box(uv: FloatArray, images: PixelArray, box: _Box) -> FloatArray:
    """Convert pixels of the image to pixels of the picture, (K, 2)."""
    height, width = images.shape[1:3]
    return (uv + 0.5) * (box.width / width, box.height / height) + (box.left, box.top)


def _to_root_relative_mm(xyz_m: FloatArray) -> FloatArray:
    return 1000.0 * (xyz_m - xyz_m[:, ROOT : ROOT + 1])


def _find_view(hands_mm: FloatArray) -> tuple[FloatArray, float]:
    """Return the centre of each hand, (N, 3), and half the side of a view that fits all of them, in mm."""
    finite_mm = np.where(np.isfinite(hands_mm), hands_mm, 0.0)
    low, high = finite_mm.min(axis=1), finite_mm.max(axis=1)
    return (low + high) / 2, max(1.2 * float((high - low).max()) / 2, 1.0)


def _make_axes(size: tuple[int, int], background: str, legend: Sequence[tuple[str, str]]) -> Axes:
    """Make empty axes in pixels, y down, with the legend in the last row."""
    width, height = size
    axes = _blank_axes(width, height, dpi=_DPI, background=background)
    step = min(96.0, (width - 8) / len(legend))
    for place, (name, colour) in enumerate(legend):
        left, middle = 10 + place * step, height - _LEGEND_PX / 2
        axes.plot(
            [left],
            [middle],
            "s",
            color=colour,
            markersize=10 * _POINTS_PER_PX,
            markeredgecolor="black",
            markeredgewidth=0.5,
        )
        axes.text(
            left + 10,
            middle,
            name,
            color=_INK if background == _PAGE_BACKGROUND else "white",
            va="center",
            fontsize=7.5,
        )
    return axes


def _blank_axes(width: int, height: int, *, dpi: float, background: str = "white") -> Axes:
    """Make axes in pixels, y down, that fill a new picture."""
    size = (width + 0.01) / dpi, (height + 0.01) / dpi  # Matplotlib rounds pixels down
    figure = Figure(figsize=size, dpi=dpi, facecolor=background)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.axis("off")
    return axes


def _render(axes: Axes) -> PixelArray:
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _clip_to_box(axes: Axes, box: _Box, artist: Artist) -> None:
    """Clip what is outside the box, where another hand may be."""
    bounds = Bbox.from_extents(box.left, box.top, box.left + box.width, box.top + box.height)
    artist.set_clip_box(TransformedBbox(bounds, axes.transData))


def _draw_image(axes: Axes, box: _Box, pixels: PixelArray) -> None:
    axes.imshow(pixels, extent=box.extent, interpolation="nearest", aspect="auto", zorder=0)


def _draw_lines(
    axes: Axes, box: _Box, segments: FloatArray, colours: str | FloatArray, width: float, **style: Any
) -> None:
    lines = LineCollection(list(segments), colors=colours, linewidths=width * _POINTS_PER_PX, capstyle="round", **style)
    axes.add_collection(lines, autolim=False)
    _clip_to_box(axes, box, lines)


def _draw_skeleton(axes: Axes, box: _Box, points: FloatArray, nearness: FloatArray | None = None) -> None:
    """Draw a skeleton in the colours of the fingers with a dark outline. Bones with more nearness (K,) are on top."""
    if not np.isfinite(points).all():
        return
    nearness = np.zeros(len(points)) if nearness is None else nearness
    bones = _BONES[np.argsort(nearness[_BONES].mean(axis=1), kind="stable")]
    _draw_lines(axes, box, points[bones], "black", 5.4, alpha=0.55)
    _draw_lines(axes, box, points[bones], _COLOURS[bones[:, 1]], 3.4)
    order = np.argsort(nearness, kind="stable")
    x, y = points[order].T
    dots = axes.scatter(
        x, y, s=(7.5 * _POINTS_PER_PX) ** 2, c=_COLOURS[order], edgecolors="black", linewidths=_POINTS_PER_PX, zorder=3
    )
    _clip_to_box(axes, box, dots)


def _draw_circles(axes: Axes, box: _Box, points: FloatArray, radii: FloatArray) -> None:
    """Draw a transparent circle in the colour of the finger around each joint, (K, 2) points and (K,) radii."""
    for (x, y), radius, colour in zip(points, radii, _COLOURS, strict=True):
        if np.isfinite([x, y, radius]).all():
            circle = Circle((x, y), radius, facecolor=(*to_rgb(colour), 0.22), edgecolor=(*to_rgb(colour), 0.7))
            circle.set_linewidth(_POINTS_PER_PX)
            axes.add_patch(circle)
            _clip_to_box(axes, box, circle)


def _draw_thin_skeleton(axes: Axes, box: _Box, points: FloatArray, colour: str) -> None:
    if np.isfinite(points).all():
        _draw_lines(
            axes, box, points[_BONES], _SKELETON_BACKGROUND if colour == "white" else _PAPER, 2.6, alpha=0.6, zorder=4
        )
        _draw_lines(axes, box, points[_BONES], colour, 1.3, zorder=4)


def _draw_grid(axes: Axes, frame: _Frame) -> None:
    """Draw lines every GRID_MM. One line of each direction goes through the root, which is the origin."""
    box = frame.box
    middle_line = frame.to_pixels(np.zeros((1, 2)))[0]
    step = frame.to_pixels(np.array([[GRID_MM, 0.0]]))[0, 0] - middle_line[0]
    reach = np.arange(-20, 21)[:, None] * step + middle_line  # (41, 2)
    ends = np.array([[box.left, box.top], [box.left + box.width, box.top + box.height]])
    vertical = [[(x, ends[0, 1]), (x, ends[1, 1])] for x in reach[:, 0]]
    horizontal = [[(ends[0, 0], y), (ends[1, 0], y)] for y in reach[:, 1]]
    _draw_lines(axes, box, np.array(vertical + horizontal), _PAPER_LINES, 1.0, zorder=0)


def _overlay_heatmaps(
    image: PixelArray, u: FloatArray, v: FloatArray, colours: FloatArray, *, peaks: Sequence[float | None]
) -> PixelArray:
    """Darken an image, and overlay the product of the curves u (J, W) and v (J, H) of each joint in its colour."""
    height, width, _ = image.shape
    glow = 0.6 * image.astype(np.float32) / 255
    across, down = _resample_curves(u, width, peaks[0]), _resample_curves(v, height, peaks[1])
    for along_u, along_v, colour in zip(across, down, colours, strict=True):
        alpha = 0.85 * np.outer(along_v, along_u)[..., None]
        glow += alpha * (colour - glow)
    return np.rint(255 * glow.clip(0, 1)).astype(np.uint8)


def _resample_curves(curves: FloatArray, length: int, peak: float | None) -> FloatArray:
    """Resample curves (J, bins) to `length` pixels, and scale them so that the peak, or each one's maximum, is 1."""
    bins = curves.shape[1]
    pixels, centres = (np.arange(length) + 0.5) / length, (np.arange(bins) + 0.5) / bins
    finite = np.nan_to_num(curves)
    tops = [max(peak or float(curve.max()), 1e-12) for curve in finite]
    return np.stack([np.interp(pixels, centres, c / top).clip(max=1.0) for c, top in zip(finite, tops, strict=True)])


def _draw_curves(
    axes: Axes, box: _Box, curves: FloatArray, colours: FloatArray, *, is_vertical: bool, peak: float | None = None
) -> None:
    """Draw curves (J, bins) on the lower border of the box, or on its left border, running down."""
    curves = np.nan_to_num(curves)
    bins = curves.shape[1]
    rise = 0.94 * (curves / max(peak or float(curves.max()), 1e-12)).clip(max=1.0)
    line = _placed(box, (np.arange(bins) + 0.5) / bins, rise, upright=is_vertical)
    feet = _placed(box, np.array([0.0, 1.0]), np.zeros(2), upright=is_vertical)
    area = PolyCollection([[feet[0], *one, feet[1]] for one in line], facecolors=colours, alpha=0.22, linewidths=0)
    axes.add_collection(area, autolim=False)
    _draw_lines(axes, box, line, colours, 1.4)
    _draw_lines(axes, box, np.array([feet]), "#6c7076", 1.6, zorder=3)


def _draw_marks(axes: Axes, box: _Box, positions: FloatArray, colours: FloatArray, *, is_vertical: bool) -> None:
    """Draw a line across the box at each position (J,) in [0, 1]."""
    ends = np.array([0.0, 1.0] if is_vertical else [1.0, 0.0])
    _draw_lines(
        axes, box, _placed(box, positions[:, None], ends, upright=is_vertical), colours, 1.0, linestyles=(0, (1, 2))
    )


def _placed(box: _Box, along: FloatArray, rise: FloatArray, *, upright: bool) -> FloatArray:
    """Convert positions in [0, 1] along and above the lower border of the box to pixels (..., 2).

    Args:
        box: the box.
        along: positions along the border.
        rise: positions above it.
        upright: use the left border instead: positions along it run down, and those above it go to the right.
    """
    along, rise = np.broadcast_arrays(along, rise)
    x, y = (rise, along) if upright else (along, 1 - rise)
    return np.stack((box.left + x * box.width, box.top + y * box.height), axis=-1)


def _draw_crosses(axes: Axes, box: _Box, positions: FloatArray) -> None:
    x, y = (positions * (box.width, box.height) + (box.left, box.top)).T
    _clip_to_box(
        axes,
        box,
        axes.scatter(
            x, y, s=(9 * _POINTS_PER_PX) ** 2, c="white", marker="+", linewidths=1.3 * _POINTS_PER_PX, zorder=4
        ),
    )


def _draw_label(axes: Axes, box: _Box, text: str, colour: str, *, backdrop: str, at_bottom: bool = False) -> None:
    height = box.top + (box.height - 5 if at_bottom else 5)
    frame = {"facecolor": backdrop, "alpha": 0.6, "linewidth": 0, "pad": 2}
    vertical = "bottom" if at_bottom else "top"
    axes.text(box.left + 6, height, text, color=colour, va=vertical, fontsize=8, bbox=frame, zorder=0.5)
