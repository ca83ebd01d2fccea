"""Files of pictures as pixels: the one place where they are decoded and resized, for training and for photographs.

EXIF data may say that a picture is to be shown turned or mirrored. A photograph is turned as they say. The labels of a
data set belong to the pixels as they are stored, so there such a file is refused.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from handpose.errors import UserError

_METADATA_MARKERS = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/")


def decode_dataset_image(path: str, *, colorspace: str = "rgb") -> NDArray[np.uint8]:
    """A JPEG of a data set, (H, W, 3), or (H, W, 1) for the colorspace "gray".

    Raises UserError where the file cannot be read, is cut short (libjpeg would fill it up with grey), or is to be
    turned according to its EXIF data.
    """
    try:
        content = Path(path).read_bytes()
        pixels = simplejpeg.decode_jpeg(content, colorspace=colorspace, strict=True)
    except OSError as error:
        raise UserError(f"the image {path} cannot be read ({error.strerror}); unpack the data set again") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be decoded as a JPEG ({error}); unpack the data set again") from None
    _check_orientation(path, content)
    return pixels


def open_upright(path: Path) -> tuple[Image.Image, Image.Exif]:
    """A photograph as it is to be shown, and its EXIF data as they are stored.

    Raises an exception of Pillow where the file cannot be read as a picture.
    """
    with Image.open(path) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened), opened.getexif()


def resize_image(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at another size (width, height), bicubic. Nothing aliases where it becomes smaller."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def _check_orientation(path: str, content: bytes) -> None:
    if not any(mark in content for mark in _METADATA_MARKERS):
        return  # Pillow takes as long to look as the picture takes to decode
    with Image.open(BytesIO(content)) as opened:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in (0, 1):  # 0 is written for "unknown"
        raise UserError(
            f"{path} has the EXIF orientation {orientation}, so viewers rotate it, but labels refer to the "
            "stored pixels; remove the tag (exiftool -Orientation= FILE) if the labels fit the stored pixels, else "
            "rotate the pixels"
        )
