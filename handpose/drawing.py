"""Pictures of predictions for TensorBoard and for files, drawn from plain arrays.

Each function returns an (H, W, 3) uint8 picture. Matplotlib's figures are used directly: pyplot keeps global state, so
it is not safe in threads and keeps every figure alive. A finger has one colour everywhere, and all drawing is in pixels
of the picture. Letters: N hands, K = 21 keypoints (FreiHAND order), H height, W width.
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
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from numpy.typing import NDArray
from PIL import Image

from handpose.skeleton import BONES, FINGERS, JOINT_NAMES, ROOT

FINGER_COLOURS = {"thumb": "#ff4d4d", "index": "#ffa31a", "middle": "#2fd061", "ring": "#2f9dff", "little": "#c866ff"}
WRIST_COLOUR = "#e8e8e8"
JOINT_COLOURS = (WRIST_COLOUR, *(FINGER_COLOURS[finger] for finger in FINGERS for _ in range(4)))
"""The colour of each joint, and of the bone that ends in it."""

WRIST_AND_TIPS = (0, *(joint for joint, name in enumerate(JOINT_NAMES) if name.endswith("tip")))
GRID_MM = 50
"""Distance of the lines behind the skeletons in space; one of each direction goes through the root."""

Pixels = NDArray[np.uint8]
Values = NDArray[np.floating]

_DPI = 100
_PX = 72 / _DPI  # Matplotlib's widths are in points
_GAP = 6
_LEGEND = 26
_NIGHT, _DESK, _PAPER, _PAPER_LINES, _INK = "#17191c", "#eceef1", "#ffffff", "#e4e4e4", "#303030"
_BONES = np.array(BONES)
_COLOURS = np.array([to_rgb(colour) for colour in JOINT_COLOURS])
_FINGERS_LEGEND = (("wrist", WRIST_COLOUR), *FINGER_COLOURS.items())
_VIEWS = (("camera view", 0, 2, -1), ("from its right, far \N{RIGHTWARDS ARROW}", 2, 0, 1))
"""Name, axis to the right, axis of sight, and its sign towards the viewer; y points down in both."""


def predictions_over_images(
    images: Pixels,
    predicted_uv: Values,
    target_uv: Values | None = None,
    *,
    columns: int = 4,
    captions: Sequence[str] | None = None,
) -> Pixels:
    """Predicted skeletons in the colours of the fingers over their images; the truth as a thin white line.

    images: (N, H, W, 3) uint8; predicted_uv, target_uv: (N, K, 2) in pixels of the images, (0, 0) is the centre of the
    first; captions: a text a hand. A skeleton with a coordinate that is not finite is left out.
    """
    cells, size = _cells(len(images), _readable(images), columns)
    axes = _canvas(size, _NIGHT, (*_FINGERS_LEGEND, *([] if target_uv is None else [("truth (line)", "white")])))
    for hand, box in enumerate(cells):
        _show(axes, box, _resized(images[hand], box))
        _skeleton(axes, box, _on_image(predicted_uv[hand], images, box))
        if target_uv is not None:
            _thin_skeleton(axes, box, _on_image(target_uv[hand], images, box), "white")
        if captions is not None:
            _label(axes, box, captions[hand], "white", backdrop=_NIGHT)
    return _rendered(axes)


def skeletons_3d(
    predicted_m: Values,
    target_m: Values | None = None,
    *,
    columns: int = 3,
    captions: Sequence[str] | None = None,
) -> Pixels:
    """Skeletons relative to their root, each as the camera sees it and from its right, where the depth shows.

    predicted_m, target_m: (N, K, 3) in metres, camera frame; captions: a text a hand. The truth is thin and dark. All
    views have one scale, chosen so that the truth fits (the predictions where there is none); what lies outside is cut.
    """
    predicted = _root_relative_mm(predicted_m)
    target = None if target_m is None else _root_relative_mm(target_m)
    centres, reach_mm = _framing(predicted if target is None else target)
    cells, size = _cells(len(predicted), (440, 220), columns)
    legend = (
        *_FINGERS_LEGEND,
        *([] if target is None else [("truth (line)", _INK)]),
        (f"grid {GRID_MM} mm", "#c9c9c9"),
    )
    axes = _canvas(size, _DESK, legend)
    for hand, cell in enumerate(cells):
        axes.add_patch(Rectangle((cell.left, cell.top), cell.width, cell.height, color=_PAPER, linewidth=0, zorder=0))
        for box, (view, right, sight, sign) in zip(cell.halves(), _VIEWS, strict=True):
            frame = _Frame(box, centres[hand, [right, 1]], reach_mm)
            _graph_paper(axes, frame)
            _skeleton(axes, box, frame.place(predicted[hand][:, [right, 1]]), nearness=sign * predicted[hand][:, sight])
            if target is not None:
                _thin_skeleton(axes, box, frame.place(target[hand][:, [right, 1]]), _INK)
            _label(axes, box, view, "#777777", backdrop=_PAPER, at_bottom=True)
        if captions is not None:
            _label(axes, cell, captions[hand], _INK, backdrop=_PAPER)
    return _rendered(axes)


def heatmaps_along_axes(
    images: Pixels,
    u: Values,
    v: Values,
    depth: Values,
    target: Values | None = None,
    *,
    peaks: Sequence[float] | None = None,
    joints: Sequence[int] = WRIST_AND_TIPS,
    columns: int = 4,
    captions: Sequence[str] | None = None,
) -> Pixels:
    """The probabilities of a few joints along the three axes, in the colours of their fingers.

    The curves along u and v stand on the borders of the image, their product glows on it, and the curve along depth
    (near to far) lies below. The curves of a border share one scale, so that a sharp one looks sharp. Lines and crosses
    mark the truth.
    images: (N, H, W, 3) uint8; u: (N, K, bins), v and depth alike: each sums to 1 over an axis of the image, or of the
    depth range; target: (N, K, 3), the truth in [0, 1] of the axes; peaks: along u, v and depth, the probability at the
    top of what the network is trained to give, which is as high as a border and as bright as a glow, so that one that
    knows nothing looks pale; without them each is as bright as the other. joints: one of a finger, lest two have one
    colour; captions: a text a hand.
    """
    (width, height), strip, below = _readable(images), 44, 70
    cells, size = _cells(len(images), (width + strip, strip + height + below), columns)
    axes = _canvas(size, _NIGHT, [(JOINT_NAMES[joint].replace("_", " "), JOINT_COLOURS[joint]) for joint in joints])
    chosen = list(joints)
    for hand, cell in enumerate(cells):
        picture = _Box(cell.left, cell.top + strip, width, height)
        curves = [axis[hand, chosen] for axis in (u, v, depth)]
        truth = None if target is None else target[hand, chosen]
        tops = peaks or (None, None, None)
        background = _resized(images[hand], picture)
        _show(axes, picture, _glowing(background, curves[0], curves[1], _COLOURS[chosen], peaks=tops[:2]))
        borders = (
            _Box(cell.left, cell.top, width, strip),
            _Box(cell.left + width, cell.top + strip, strip, height),
            _Box(cell.left, cell.top + strip + height + 4, width, below - 24),
        )
        for axis, box in enumerate(borders):
            _curves(axes, box, curves[axis], _COLOURS[chosen], upright=axis == 1, peak=tops[axis])
            if truth is not None:
                _marks(axes, box, truth[:, axis], _COLOURS[chosen], upright=axis == 1)
        if truth is not None:
            _crosses(axes, picture, truth[:, :2])
        _label(
            axes,
            cell,
            "near \N{LEFTWARDS ARROW} depth \N{RIGHTWARDS ARROW} far",
            "#9aa0a6",
            backdrop=_NIGHT,
            at_bottom=True,
        )
        if captions is not None:
            _label(axes, picture, captions[hand], "white", backdrop=_NIGHT)
    return _rendered(axes)


def hand_over_photograph(photograph: Pixels, uv: Values) -> Pixels:
    """A predicted skeleton over a picture of any size, at that size; lines are as thick as the picture is large.

    photograph: (H, W, 3) uint8; uv: (K, 2) in its pixels. A skeleton with a coordinate that is not finite is left out.
    """
    height, width = photograph.shape[:2]
    axes = _blank_axes(width, height, dpi=_DPI * max(1.0, max(height, width) / 400))
    box = _Box(0, 0, width, height)
    _show(axes, box, photograph)
    _skeleton(axes, box, uv + 0.5)
    return _rendered(axes)


@dataclass(frozen=True)
class _Box:
    """A rectangle of the picture, in pixels from its upper left corner."""

    left: float
    top: float
    width: int
    height: int

    def halves(self) -> tuple["_Box", "_Box"]:
        half = self.width // 2
        return _Box(self.left, self.top, half, self.height), _Box(self.left + half, self.top, half, self.height)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return self.left, self.left + self.width, self.top + self.height, self.top


@dataclass(frozen=True)
class _Frame:
    """A view of space: mm relative to the root -> pixels of a box, with equal axes."""

    box: _Box
    centre_mm: Values  # (2,)
    reach_mm: float

    def place(self, points_mm: Values) -> Values:
        """(K, 2) -> (K, 2)."""
        middle = (self.box.left + self.box.width / 2, self.box.top + self.box.height / 2)
        return (points_mm - self.centre_mm) * (min(self.box.width, self.box.height) / 2 / self.reach_mm) + middle


def _cells(num: int, cell: tuple[int, int], columns: int) -> tuple[list[_Box], tuple[int, int]]:
    """Boxes of `num` cells in rows, and (width, height) of the picture."""
    columns = max(1, min(columns, num))
    (width, height), rows = cell, -(-num // columns)
    places = [divmod(i, columns) for i in range(num)]
    boxes = [_Box(column * (width + _GAP), row * (height + _GAP), width, height) for row, column in places]
    return boxes, (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP + _LEGEND)


def _readable(images: Pixels) -> tuple[int, int]:
    """(width, height) at which an image is shown: enlarged to about 300 pixels, by a whole factor where it can be."""
    height, width = images.shape[1:3]
    factor = 300 / max(height, width)
    factor = round(factor) if factor > 1.5 else factor
    return round(width * factor), round(height * factor)


def _resized(image: Pixels, box: _Box) -> Pixels:
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(image)).resize((box.width, box.height), Image.Resampling.BICUBIC)
    )


def _on_image(uv: Values, images: Pixels, box: _Box) -> Values:
    """Pixels of the image -> pixels of the picture, (K, 2)."""
    height, width = images.shape[1:3]
    return (uv + 0.5) * (box.width / width, box.height / height) + (box.left, box.top)


def _root_relative_mm(xyz_m: Values) -> Values:
    return 1000.0 * (xyz_m - xyz_m[:, ROOT : ROOT + 1])


def _framing(hands_mm: Values) -> tuple[Values, float]:
    """Centre of each hand, (N, 3), and half the side of a view that holds any of them, both in mm."""
    finite = np.where(np.isfinite(hands_mm), hands_mm, 0.0)
    low, high = finite.min(axis=1), finite.max(axis=1)
    return (low + high) / 2, max(1.2 * float((high - low).max()) / 2, 1.0)


def _canvas(size: tuple[int, int], background: str, legend: Sequence[tuple[str, str]]) -> Axes:
    """Empty axes whose unit is the pixel, y down, with the legend on the last line."""
    width, height = size
    axes = _blank_axes(width, height, dpi=_DPI, background=background)
    step = min(96.0, (width - 8) / len(legend))
    for place, (name, colour) in enumerate(legend):
        left, middle = 10 + place * step, height - _LEGEND / 2
        axes.plot(
            [left], [middle], "s", color=colour, markersize=10 * _PX, markeredgecolor="black", markeredgewidth=0.5
        )
        axes.text(left + 10, middle, name, color=_INK if background == _DESK else "white", va="center", fontsize=7.5)
    return axes


def _blank_axes(width: int, height: int, *, dpi: float, background: str = "white") -> Axes:
    """Axes that fill a new picture, whose unit is the pixel, y down."""
    size = (width + 0.01) / dpi, (height + 0.01) / dpi  # Matplotlib rounds pixels down
    figure = Figure(figsize=size, dpi=dpi, facecolor=background)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.axis("off")
    return axes


def _rendered(axes: Axes) -> Pixels:
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _clipped(axes: Axes, box: _Box, artist: Artist) -> None:
    """Leave out what lies outside the box, which is another hand's."""
    bounds = Bbox.from_extents(box.left, box.top, box.left + box.width, box.top + box.height)
    artist.set_clip_box(TransformedBbox(bounds, axes.transData))


def _show(axes: Axes, box: _Box, pixels: Pixels) -> None:
    axes.imshow(pixels, extent=box.extent, interpolation="nearest", aspect="auto", zorder=0)


def _lines(axes: Axes, box: _Box, segments: Values, colours: str | Values, width: float, **style: Any) -> None:
    lines = LineCollection(list(segments), colors=colours, linewidths=width * _PX, capstyle="round", **style)
    axes.add_collection(lines, autolim=False)
    _clipped(axes, box, lines)


def _skeleton(axes: Axes, box: _Box, points: Values, nearness: Values | None = None) -> None:
    """A skeleton in the colours of the fingers, cased in dark; the nearer bones and joints (K,) lie on top."""
    if not np.isfinite(points).all():
        return
    nearness = np.zeros(len(points)) if nearness is None else nearness
    bones = _BONES[np.argsort(nearness[_BONES].mean(axis=1), kind="stable")]
    _lines(axes, box, points[bones], "black", 5.4, alpha=0.55)
    _lines(axes, box, points[bones], _COLOURS[bones[:, 1]], 3.4)
    order = np.argsort(nearness, kind="stable")
    x, y = points[order].T
    dots = axes.scatter(x, y, s=(7.5 * _PX) ** 2, c=_COLOURS[order], edgecolors="black", linewidths=_PX, zorder=3)
    _clipped(axes, box, dots)


def _thin_skeleton(axes: Axes, box: _Box, points: Values, colour: str) -> None:
    if np.isfinite(points).all():
        _lines(axes, box, points[_BONES], _NIGHT if colour == "white" else _PAPER, 2.6, alpha=0.6, zorder=4)
        _lines(axes, box, points[_BONES], colour, 1.3, zorder=4)


def _graph_paper(axes: Axes, frame: _Frame) -> None:
    """Lines every GRID_MM through the root, which is the origin."""
    box = frame.box
    middle_line = frame.place(np.zeros((1, 2)))[0]
    step = frame.place(np.array([[GRID_MM, 0.0]]))[0, 0] - middle_line[0]
    reach = np.arange(-20, 21)[:, None] * step + middle_line  # (41, 2)
    ends = np.array([[box.left, box.top], [box.left + box.width, box.top + box.height]])
    vertical = [[(x, ends[0, 1]), (x, ends[1, 1])] for x in reach[:, 0]]
    horizontal = [[(ends[0, 0], y), (ends[1, 0], y)] for y in reach[:, 1]]
    _lines(axes, box, np.array(vertical + horizontal), _PAPER_LINES, 1.0, zorder=0)


def _glowing(image: Pixels, u: Values, v: Values, colours: Values, *, peaks: Sequence[float | None]) -> Pixels:
    """The image, darkened, with the product of the curves u (J, W) and v (J, H) of each joint in its colour."""
    height, width, _ = image.shape
    glow = 0.6 * image.astype(np.float32) / 255
    across, down = _stretched(u, width, peaks[0]), _stretched(v, height, peaks[1])
    for along_u, along_v, colour in zip(across, down, colours, strict=True):
        alpha = 0.85 * np.outer(along_v, along_u)[..., None]
        glow += alpha * (colour - glow)
    return np.rint(255 * glow.clip(0, 1)).astype(np.uint8)


def _stretched(curves: Values, length: int, peak: float | None) -> Values:
    """Curves (J, bins) at `length` pixels, at most 1, which is the peak or each one's own largest value."""
    bins = curves.shape[1]
    pixels, centres = (np.arange(length) + 0.5) / length, (np.arange(bins) + 0.5) / bins
    finite = np.nan_to_num(curves)
    tops = [max(peak or float(curve.max()), 1e-12) for curve in finite]
    return np.stack([np.interp(pixels, centres, c / top).clip(max=1.0) for c, top in zip(finite, tops, strict=True)])


def _curves(
    axes: Axes, box: _Box, curves: Values, colours: Values, *, upright: bool, peak: float | None = None
) -> None:
    """Curves (J, bins) with their feet on the lower border of the box, or on its left border and running down."""
    curves = np.nan_to_num(curves)
    bins = curves.shape[1]
    rise = 0.94 * (curves / max(peak or float(curves.max()), 1e-12)).clip(max=1.0)
    line = _placed(box, (np.arange(bins) + 0.5) / bins, rise, upright=upright)
    feet = _placed(box, np.array([0.0, 1.0]), np.zeros(2), upright=upright)
    area = PolyCollection([[feet[0], *one, feet[1]] for one in line], facecolors=colours, alpha=0.22, linewidths=0)
    axes.add_collection(area, autolim=False)
    _lines(axes, box, line, colours, 1.4)
    _lines(axes, box, np.array([feet]), "#6c7076", 1.6, zorder=3)


def _marks(axes: Axes, box: _Box, places: Values, colours: Values, *, upright: bool) -> None:
    """A line across the box at each place (J,) in [0, 1]."""
    ends = np.array([0.0, 1.0] if upright else [1.0, 0.0])
    _lines(axes, box, _placed(box, places[:, None], ends, upright=upright), colours, 1.0, linestyles=(0, (1, 2)))


def _placed(box: _Box, along: Values, rise: Values, *, upright: bool) -> Values:
    """Pixels (..., 2) of places in [0, 1] along the lower border of the box and above it.

    upright: along its left border, downwards, and to the right of it.
    """
    along, rise = np.broadcast_arrays(along, rise)
    x, y = (rise, along) if upright else (along, 1 - rise)
    return np.stack((box.left + x * box.width, box.top + y * box.height), axis=-1)


def _crosses(axes: Axes, box: _Box, places: Values) -> None:
    x, y = (places * (box.width, box.height) + (box.left, box.top)).T
    _clipped(axes, box, axes.scatter(x, y, s=(9 * _PX) ** 2, c="white", marker="+", linewidths=1.3 * _PX, zorder=4))


def _label(axes: Axes, box: _Box, text: str, colour: str, *, backdrop: str, at_bottom: bool = False) -> None:
    height = box.top + (box.height - 5 if at_bottom else 5)
    frame = {"facecolor": backdrop, "alpha": 0.6, "linewidth": 0, "pad": 2}
    vertical = "bottom" if at_bottom else "top"
    axes.text(box.left + 6, height, text, color=colour, va=vertical, fontsize=8, bbox=frame, zorder=0.5)
