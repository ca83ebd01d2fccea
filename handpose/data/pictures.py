"""Image files as pixels. Decoding and resizing are done only here, for data sets and for photographs.

EXIF data may say that an image has to be displayed rotated or mirrored. A photograph is rotated accordingly. The labels
of a data set refer to the stored pixels, so such a file of a data set is an error.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from handpose.errors import UserError

_MAX_PIXELS = 100_000_000
"""Largest image of a data set. A damaged header can claim 65500 x 65500 pixels, for which there is no memory."""
_METADATA_MARKERS = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/")


def decode_dataset_image(path: str, *, colorspace: str = "rgb") -> NDArray[np.uint8]:
    """Decode a JPEG file of a data set.

    Args:
        path: the file.
        colorspace: "rgb" or "gray".

    Returns:
        (H, W, 3), or (H, W, 1) for "gray".

    Raises:
        UserError: the file cannot be read, is truncated (libjpeg would fill the rest with grey), has more than 100
            million pixels, or has an EXIF orientation other than upright.
    """
    try:
        content = Path(path).read_bytes()
        _check_size(path, content)
        pixels = simplejpeg.decode_jpeg(content, colorspace=colorspace, strict=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the image {path} cannot be read ({error.strerror}); unpack the data set again") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be decoded as a JPEG ({error}); unpack the data set again") from None
    _check_orientation(path, content)
    return pixels


def check_picture_size(path: str, size: tuple[int, int]) -> None:
    """Check the size in the header of a JPEG file of a data set whose pictures all have the same size.

    Args:
        path: the file.
        size: (width, height) that labels refer to.

    Raises:
        UserError: the file has another size or cannot be read.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"the image {path} cannot be read ({error.strerror}); unpack the data set again") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be decoded as a JPEG ({error}); unpack the data set again") from None
    if (width, height) != size:
        raise UserError(
            f"{path} is {width} x {height} pixels, but the labels of the data set refer to pictures of {size[0]} x "
            f"{size[1]}; use the pictures as published"
        )


def open_upright(path: Path) -> tuple[Image.Image, Image.Exif]:
    """Open a photograph, rotated as its EXIF data say.

    Args:
        path: the file.

    Returns:
        The upright image, and its EXIF data as stored.

    Raises:
        Exception: Pillow cannot read the file as an image. The type depends on the reason.
    """
    with Image.open(path) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened), opened.getexif()


def resize_image(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image by bicubic interpolation, without aliasing when it becomes smaller.

    Args:
        picture: the image.
        size: (width, height) in pixels.
    """
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def _check_size(path: str, content: bytes) -> None:
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    if height * width > _MAX_PIXELS:
        raise UserError(
            f"{path} has {width} x {height} pixels according to its header, which is too large; the file is damaged, "
            "or has to be made smaller"
        )


def _check_orientation(path: str, content: bytes) -> None:
    if not any(mark in content for mark in _METADATA_MARKERS):
        return  # reading EXIF data with Pillow takes as long as decoding the image
    with Image.open(BytesIO(content)) as opened:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in (0, 1):  # some programs write 0 for "unknown"
        raise UserError(
            f"{path} has the EXIF orientation {orientation}, so viewers rotate it, but labels refer to the "
            "stored pixels; remove the tag (exiftool -Orientation= FILE) if the labels fit the stored pixels, else "
            "rotate the pixels"
        )
