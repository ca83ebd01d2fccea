"""Changes of an image that do not depend on the camera: another background, a patch over the hand, blur and noise.

Images are (B, 3, H, W) in [0, 1], on any device, and are changed in place. Random numbers are drawn on the CPU, so they
are the same on every device.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from handpose import geometry
from handpose.data.random_draws import RandomDraws
from handpose.errors import UserError

_TEXTURES = ((0.3, 3), (0.2, 8), (0.12, 24))  # amplitude and number of knots per side: gradient, blotches, grain
_HUE = 0.3  # part of the amplitude that differs between the channels
_BLUR = (0.003, 0.012)  # standard deviation as a fraction of the image side: 0.3 to 1.2 px of 96
_NOISE_MARGIN = 32  # px, largest offset of an image in the field of noise
_BACKGROUND_PX = 256
_MAX_BACKGROUNDS = 500  # 98 MB
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def replace_backgrounds(image: Tensor, cover: Tensor, backgrounds: Tensor, rows: Tensor) -> None:
    """Replace the backgrounds of some images.

    Args:
        image: (B, 3, H, W), changed in place.
        cover: (n, 1, H, W) in [0, 1], 1 on the hand.
        backgrounds: (n, 3, H, W) new backgrounds.
        rows: (n,) the images to change.
    """
    rows = rows.to(image.device)
    image[rows] = torch.lerp(backgrounds, image[rows], cover)


def draw_backgrounds(size: tuple[int, int], draws: RandomDraws, device: torch.device) -> Tensor:
    """Draw backgrounds: a colour, mostly a dull one, with smooth noise of several scales, from plain to busy.

    Args:
        size: (H, W) of the images.
        draws: random numbers for the images.
        device: device of the result.

    Returns:
        (count, 3, H, W) in [0, 1].
    """
    busy, saturation = draws.uniform(1, 1, 1), draws.uniform(1, 1, 1)
    color = draws.uniform(3, 1, 1)
    color = torch.lerp(color.mean(dim=1, keepdim=True), color, saturation.square()).to(device)
    busy = busy.to(device)
    background = color.expand(-1, -1, *size)
    for amplitude, knots in _TEXTURES:
        background = background + amplitude * busy * _draw_smooth_noise(size, knots, draws, device)
    return background.clamp(0.0, 1.0)


def crop_backgrounds(folder: str, size: tuple[int, int], draws: RandomDraws, device: torch.device) -> Tensor:
    """Cut random parts from random images of a folder. Half of them are mirrored on average.

    Args:
        folder: folder with images.
        size: (H, W) of the result.
        draws: random numbers for the images.
        device: device of the result.

    Returns:
        (count, 3, H, W) in [0, 1].
    """
    pictures = read_backgrounds(folder)
    count, rows = draws.count, draws.integers(len(pictures))
    part, left, top, side = (draws.uniform() for _ in range(4))
    part = 0.4 + 0.6 * part  # fraction of the side
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = part * torch.where(side < 0.5, 1.0, -1.0)
    transform[:, 1, 1] = part
    transform[:, :, 2] = (1.0 - part)[:, None] * (2.0 * torch.stack([left, top], dim=-1) - 1.0)
    picked = pictures[rows].to(device).float() / 255.0
    with geometry.disable_autocast(picked):
        grid = F.affine_grid(transform.to(device), [count, 3, *size], align_corners=False)
        return F.grid_sample(picked, grid, mode="bilinear", padding_mode="border", align_corners=False)


@lru_cache(maxsize=1)
def read_backgrounds(folder: str) -> Tensor:
    """Read the images of a folder and of the folders in it as squares of 256 px.

    Of more than 500 images, 500 are used, evenly spaced in the order of their names. The result is cached for the next
    training.

    Args:
        folder: folder with images.

    Returns:
        (M, 3, 256, 256) uint8.

    Raises:
        UserError: the folder has no images, or one cannot be read.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise UserError(
            f"augment.background_folder={folder} has no pictures ({' '.join(_IMAGE_SUFFIXES)}); give another folder, "
            "or null for drawn backgrounds"
        )
    spread = np.linspace(0, len(files) - 1, min(len(files), _MAX_BACKGROUNDS)).round().astype(int)
    return torch.from_numpy(np.stack([_read_square(files[i]) for i in spread]).transpose(0, 3, 1, 2).copy())


def _read_square(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            return np.asarray(ImageOps.fit(picture.convert("RGB"), (_BACKGROUND_PX, _BACKGROUND_PX)))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"augment.background_folder: {file} cannot be read as a picture; remove it") from error


class Patches(NamedTuple):
    """Rotated ellipses and rectangles that cover part of n images.

    Attributes:
        center: (n, 2) in pixels.
        half: (n, 2) half sides in pixels.
        angle: (n,) in radians.
        is_ellipse: (n,) bool.
        color: (n, 3, H, W) in [0, 1].
    """

    center: Tensor
    half: Tensor
    angle: Tensor
    is_ellipse: Tensor
    color: Tensor

    @classmethod
    def draw(cls, uv: Tensor, size: tuple[int, int], sides: Sequence[float], draws: RandomDraws) -> "Patches":
        """Draw a patch over a random joint of each hand.

        Args:
            uv: (n, K, 2) joints in pixels.
            size: (H, W) of the images.
            sides: smallest and largest side as a fraction of the longer side of the hand.
            draws: random numbers for the images.
        """
        count, num_joints, _ = uv.shape
        joint = draws.integers(num_joints).to(uv.device)
        low, high = sides
        share = (low + (high - low) * draws.uniform(2)).to(uv)
        angle = (math.pi * draws.uniform()).to(uv)
        is_ellipse = (draws.uniform() < 0.5).to(uv.device)
        color = draw_backgrounds(size, draws, uv.device)
        # The projection of a joint in the plane of the camera is not finite.
        uv = uv.nan_to_num().clamp(-2.0 * max(size), 3.0 * max(size))
        hand = (uv.amax(dim=1) - uv.amin(dim=1)).amax(dim=-1, keepdim=True)
        center = uv[torch.arange(count, device=uv.device), joint]
        return cls(center, (0.5 * share * hand).clamp_min(0.5), angle, is_ellipse, color)

    def cover(self, size: tuple[int, int]) -> Tensor:
        """Return how much of each pixel the patches hide, (n, 1, H, W) in [0, 1]. Their edges are one pixel wide."""
        height, width = size
        du = torch.arange(width, device=self.center.device)[None, None, :] - self.center[:, 0, None, None]
        dv = torch.arange(height, device=self.center.device)[None, :, None] - self.center[:, 1, None, None]
        cosine, sine = self.angle.cos()[:, None, None], self.angle.sin()[:, None, None]
        along = (cosine * du + sine * dv).abs() / self.half[:, 0, None, None]
        across = (cosine * dv - sine * du).abs() / self.half[:, 1, None, None]
        radius = torch.where(self.is_ellipse[:, None, None], torch.hypot(along, across), torch.maximum(along, across))
        return ((1.0 - radius) * self.half.amin(dim=-1)[:, None, None] + 0.5).clamp(0.0, 1.0)[:, None]


def draw_patches(patches: Patches, image: Tensor, rows: Tensor) -> None:
    """Draw the patches over the images of the given rows, (n,)."""
    rows = rows.to(image.device)
    size = (image.shape[-2], image.shape[-1])
    image[rows] = torch.lerp(image[rows], patches.color.to(image), patches.cover(size).to(image))


def blur(image: Tensor, rows: Tensor, draws: RandomDraws) -> None:
    """Blur the images of the given rows, (n,), by Gaussians of random width."""
    count, side = len(rows), max(image.shape[-2:])
    low, high = _BLUR
    sigma = side * (low + (high - low) * draws.uniform())  # px
    radius = math.ceil(3.0 * high * side)
    taps = torch.arange(-radius, radius + 1)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]).square(), dim=-1).to(image)  # (n, taps)
    kernel = kernel.repeat_interleave(3, dim=0)
    rows = rows.to(image.device)
    planes = F.pad(image[rows].reshape(1, 3 * count, *image.shape[-2:]), [radius] * 4, mode="replicate")
    with geometry.disable_autocast(image):
        planes = F.conv2d(planes, kernel[:, None, :, None], groups=3 * count)
        planes = F.conv2d(planes, kernel[:, None, None, :], groups=3 * count)
    image[rows] = planes.view(count, 3, *image.shape[-2:])


def add_noise(image: Tensor, max_std: float, draws: RandomDraws) -> None:
    """Add sensor noise. Its standard deviation is drawn for each image, up to `max_std` grey levels of 255.

    All images use one field of noise, each with another offset: to draw a field for each would take longer than the
    warp.
    """
    height, width = image.shape[-2:]
    field = draws.common_normal(3, height + _NOISE_MARGIN, width + _NOISE_MARGIN).to(image)
    level = (max_std / 255.0 * draws.uniform(1, 1, 1)).to(image)
    du, dv = (draws.integers(_NOISE_MARGIN + 1).to(image.device) for _ in range(2))
    rows = (dv[:, None] + torch.arange(height, device=image.device))[:, :, None]  # (B, H, 1)
    columns = (du[:, None] + torch.arange(width, device=image.device))[:, None, :]  # (B, 1, W)
    image.add_(level * field[:, rows, columns].transpose(0, 1)).clamp_(0.0, 1.0)


def _draw_smooth_noise(size: tuple[int, int], knots: int, draws: RandomDraws, device: torch.device) -> Tensor:
    """Draw noise that is normal at knots x knots places and smooth between them: (count, 3, H, W).

    It varies more in brightness than in hue.
    """
    values = draws.normal(1, knots, knots) + _HUE * draws.normal(3, knots, knots)
    return F.interpolate(values.to(device), size=size, mode="bilinear", align_corners=True)
