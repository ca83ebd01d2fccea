"""Photographs of any size and their cameras: reading them, and warping them to the views that a network gets.

A network takes square images of one size. It gets the image of a virtual camera with another focal length and principal
point, which is also turned if the hand is cropped. The intrinsics of this camera are known, so that joints found in its
frame can be converted to the frame of the photograph's own camera. Pixel centres are at integer coordinates.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from handpose.data.pictures import open_upright, resize_image
from handpose.errors import UserError, explain_file_error

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ASSUMED_FOCAL = 1.2
"""Focal length, in longer sides of the photograph, if nothing is known about it; as in COLMAP (Schoenberger 2016)."""

_FULL_FRAME_DIAGONAL_MM = 43.27
_IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0)  # in Pillow's convention


class Camera(NamedTuple):
    """The camera of a photograph.

    Attributes:
        intrinsics: (3, 3) matrix, for pixels of the photograph.
        source: where the intrinsics come from, in words.
        is_assumed: the focal length is a guess.
    """

    intrinsics: NDArray[np.float64]
    source: str
    is_assumed: bool = False


class Photograph(NamedTuple):
    """A photograph, upright and in RGB."""

    path: Path
    picture: Image.Image
    camera: Camera


def find_photographs(paths: Sequence[Path]) -> list[Path]:
    """List the given files, and the photographs in the given folders, sorted by name.

    Raises:
        UserError: a path does not exist, or a folder has no photographs.
    """
    found: list[Path] = []
    for place in paths:
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{place} has no photographs, that is, files that end in {', '.join(SUFFIXES)}")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place} does not exist; give photographs, or folders of photographs")
    return list(dict.fromkeys(found))


def read_photograph(path: Path) -> tuple[Image.Image, float | None]:
    """Read a photograph as upright RGB.

    Grey images get three equal channels, 16 bits become 8, and transparent pixels become white.

    Returns:
        The image, and its focal length in pixels; None if the EXIF data do not contain it.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        upright, exif = open_upright(path)
        focal_mm = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm)
        photograph = _to_rgb(upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error
    # 35 mm equivalent: the same angle of view over the diagonal (CIPA DCG-001).
    focal = float(focal_mm) / _FULL_FRAME_DIAGONAL_MM * math.hypot(*photograph.size) if focal_mm else None
    return photograph, focal


def read_upright_size(path: Path) -> tuple[int, int]:
    """Read the (width, height) of a photograph as `read_photograph` returns it, without decoding its pixels.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error
    return (height, width) if is_turned else (width, height)


def make_camera(
    size: tuple[int, int], *, given: NDArray[np.float64] | None, focal_px: float | None, exif_px: float | None
) -> Camera:
    """Make the camera of a photograph from the best information that is available.

    Args:
        size: (width, height) of the photograph.
        given: (3, 3) intrinsics, if they are known.
        focal_px: the focal length that the user gave, in pixels, if any.
        exif_px: the focal length from the EXIF data, in pixels, if any.
    """
    if given is not None:
        return Camera(given, "given")
    if focal_px is not None:
        return Camera(_make_central_intrinsics(focal_px, size), "focal length given, principal point in the middle")
    if exif_px is not None:
        return Camera(
            _make_central_intrinsics(exif_px, size), "focal length from the EXIF data, principal point in the middle"
        )
    assumed = _make_central_intrinsics(ASSUMED_FOCAL * max(size), size)
    source = f"assumed: focal length {ASSUMED_FOCAL} times the longer side, principal point in the middle"
    return Camera(assumed, source, is_assumed=True)


def make_whole_view_intrinsics(
    size: tuple[int, int], intrinsics: NDArray[np.float64], *, side: int
) -> NDArray[np.float64]:
    """Return the (3, 3) intrinsics of a square view that shows a whole photograph.

    Args:
        size: (width, height) of the photograph.
        intrinsics: (3, 3) of the photograph's camera.
        side: side of the view in pixels.
    """
    scale = side / max(size)
    width, height = size
    to_view = np.diag([scale, scale, 1.0])
    to_view[:2, 2] = (side - 1) / 2 - scale * np.array([(width - 1) / 2, (height - 1) / 2])
    return to_view @ intrinsics


def warp_photograph(photograph: Image.Image, homography: NDArray[np.float64], *, side: int) -> NDArray[np.uint8]:
    """Warp a photograph to a square view. Pixels outside the photograph are black.

    The photograph is first resized like the images of a training. So a square photograph that is shown as a whole gives
    the same pixels as in a training.

    Args:
        photograph: the image.
        homography: (3, 3) from pixels of the photograph to pixels of the view.
        side: side of the view in pixels.

    Returns:
        (side, side, 3) image.
    """
    smaller, to_smaller = _resize_for_view(photograph, homography, side=side)
    back = to_smaller @ np.linalg.inv(homography)  # pixels of the view -> pixels of the resized photograph
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # Pillow measures from the corners of pixels
    back = half @ back @ np.linalg.inv(half)
    coefficients = (back / back[2, 2]).ravel()[:8].tolist()
    if smaller.size == (side, side) and np.allclose(coefficients, _IDENTITY, rtol=0.0, atol=1e-6):
        return np.asarray(smaller)
    view = smaller.transform(
        (side, side), Image.Transform.PERSPECTIVE, coefficients, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(view)


def read_intrinsics(text: str, names: Sequence[str]) -> list[NDArray[np.float64] | None]:
    """Read the intrinsics of each photograph.

    Args:
        text: `fx,fy,cx,cy` in pixels, or the path of a JSON file. The file contains one 3 x 3 matrix for all
            photographs, a list with one matrix per photograph, or an object of file names and matrices.
        names: the file names of the photographs.

    Returns:
        A (3, 3) matrix per photograph; None for photographs that the object does not contain.

    Raises:
        UserError: the text or the file is anything else.
    """
    if not os.path.lexists(text):
        return [_parse_numbers(text)] * len(names)
    try:
        content = json.loads(Path(text).read_bytes())
    except OSError as error:
        raise UserError(f"--intrinsics {explain_file_error(error, text, verb='read')}") from error
    except ValueError as error:
        raise UserError(f"--intrinsics {text} does not hold JSON ({error})") from error
    if isinstance(content, dict):
        unknown = sorted(set(content) - set(names))
        if len(unknown) == len(content):
            raise UserError(
                f"--intrinsics {text} names none of the photographs; the first name in it is {(unknown or ['-'])[0]}"
            )
        return [_check_matrix(content[name], f"{text}, {name}") if name in content else None for name in names]
    if np.ndim(_check_numbers(content, text)) == 2:
        return [_check_matrix(content, text)] * len(names)
    if not isinstance(content, list):
        raise UserError(f"--intrinsics {text} must hold 3 x 3 matrices, but it holds {content}")
    if len(content) != len(names):
        raise UserError(f"--intrinsics {text} has {len(content)} matrices but there are {len(names)} photographs")
    return [_check_matrix(item, f"{text}, entry {i}") for i, item in enumerate(content)]


def _make_central_intrinsics(focal: float, size: tuple[int, int]) -> NDArray[np.float64]:
    width, height = size
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def _parse_numbers(text: str) -> NDArray[np.float64]:
    try:
        fx, fy, cx, cy = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--intrinsics {text} is neither a file nor four numbers; give FILE or fx,fy,cx,cy in pixels"
        ) from error
    return _check_matrix([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], text)


def _check_numbers(values: object, source: str) -> NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(f"--intrinsics {source} must hold 3 x 3 matrices") from error


def _check_matrix(values: object, source: str) -> NDArray[np.float64]:
    matrix = _check_numbers(values, source)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise UserError(f"--intrinsics {source}: not a 3 x 3 matrix of finite numbers")
    if (matrix[[1, 2, 2, 2], [0, 0, 1, 2]] != (0, 0, 0, 1)).any() or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise UserError(f"--intrinsics {source}: must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx and fy above 0")
    return matrix


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits: convert would clip at 255
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("a picture of floating-point numbers")
    if picture.has_transparency_data:
        over_white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(over_white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _resize_for_view(
    photograph: Image.Image, homography: NDArray[np.float64], *, side: int
) -> tuple[Image.Image, NDArray[np.float64]]:
    """Resize a photograph to about its size in the view.

    A photograph that is enlarged so much that only a part of it is visible keeps its size, because the whole of it
    could become very large.

    Returns:
        The photograph, and the (3, 3) matrix from its pixels to those of the resized one.
    """
    width, height = photograph.size
    scale = _compute_scale_at(homography, np.array([(side - 1) / 2, (side - 1) / 2]))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if scale >= 1.0 and max(size) > side:
        return photograph, np.eye(3)
    along = np.array(size) / (width, height)
    to_smaller = np.diag([*along, 1.0])
    to_smaller[:2, 2] = 0.5 * along - 0.5
    return resize_image(photograph, size), to_smaller


def _compute_scale_at(homography: NDArray[np.float64], pixel: NDArray[np.float64]) -> float:
    """Compute the local scale of a homography at a pixel (2,) of the view: view pixels per pixel of the photograph."""
    back = np.linalg.inv(homography)
    u, v, w = back @ [*pixel, 1.0]
    jacobian = back[:2, :2] / w - np.outer([u, v], back[2, :2]) / w**2
    return float(1.0 / math.sqrt(abs(np.linalg.det(jacobian))))
