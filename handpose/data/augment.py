"""Augmentation as a virtual camera: K and xyz turn with the picture, so that projection stays exact.

A picture is what one camera saw; turned about its centre and with other intrinsics the same camera would have seen the
picture warped by the homography K' R K^-1 (Hartley and Zisserman 2004, section 8.4), whatever the depth. One warp a
batch, on the batch's device; test-time augmentation uses the same functions.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose import geometry
from handpose.data.sample import HandBatch
from handpose.errors import UserError

Interpolation = Literal["bilinear", "nearest"]
_CACHED_PIXELS = 2**18  # 11 MB of floats: pictures, where their pixels come from, new pictures


class View(NamedTuple):
    """What the network is shown, and the camera that belongs to it."""

    image: Tensor  # (B, 3, H, W) float32 in [0, 1]
    intrinsics: Tensor  # (B, 3, 3), px
    xyz_m: Tensor  # (B, K, 3), metres


def unchanged(batch: HandBatch) -> View:
    """The batch as it is, as floating-point numbers in [0, 1]."""
    return View(batch.image.float() / 255.0, batch.intrinsics, batch.xyz_m)


def rotation_about_center(angle: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """Rotations (B, 3, 3) of the camera by angle (B,) in radians about the ray through the picture's centre.

    intrinsics: (B, 3, 3) px; size: (H, W). Rodrigues' formula. A positive angle turns the picture clockwise, as seen.
    """
    height, width = size
    center = intrinsics.new_tensor([[(width - 1) / 2.0, (height - 1) / 2.0]])
    ray = F.pad(geometry.normalized_image_points(center, intrinsics)[:, 0], (0, 1), value=1.0)  # (B, 3)
    x, y, z = F.normalize(ray, dim=-1).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    with geometry.exactly(angle):
        return torch.eye(3, device=angle.device, dtype=angle.dtype) + sine * cross + (1.0 - cosine) * cross @ cross


def zoomed(intrinsics: Tensor, zoom: Tensor, shift_px: Tensor, size: tuple[int, int]) -> Tensor:
    """Intrinsics of a camera whose picture is enlarged by zoom (B,) about its centre, then moved by shift_px (B, 2)."""
    height, width = size
    center = intrinsics.new_tensor([(width - 1) / 2.0, (height - 1) / 2.0])
    result = intrinsics.clone()
    result[:, :2, :2] *= zoom[:, None, None]
    result[:, :2, 2] = (intrinsics[:, :2, 2] - center) * zoom[:, None] + center + shift_px
    return result


def warp(image: Tensor, homography: Tensor, *, interpolation: Interpolation) -> Tensor:
    """Warp pictures (B, 3, H, W), floating point, by homographies (B, 3, 3) from old to new pixels, black outside."""
    grid = sampling_grid(homography, (image.shape[-2], image.shape[-1]))
    return F.grid_sample(image, grid, mode=interpolation, padding_mode="zeros", align_corners=False)


def sampling_grid(homography: Tensor, size: tuple[int, int]) -> Tensor:
    """Where `grid_sample` finds each new pixel in the old picture, (B, H, W, 2); homography: as in `warp`.

    Coordinate by coordinate, each a sum of a row and a column: for 16 pictures of 96 px on one core 0.1 ms, where a
    product for each pixel took 2.7.
    """
    height, width = size
    # Pixels (u, v) are (2 u + 1) / W - 1, (2 v + 1) / H - 1 to grid_sample.
    to_unit = homography.new_tensor(
        [[2.0 / width, 0.0, 1.0 / width - 1.0], [0.0, 2.0 / height, 1.0 / height - 1.0], [0.0, 0.0, 1.0]]
    )
    with geometry.exactly(homography):
        of_u, of_v, constant = (to_unit @ torch.linalg.inv(homography)).unbind(-1)  # each (B, 3)
    u = torch.arange(width, device=homography.device, dtype=homography.dtype)
    v = torch.arange(height, device=homography.device, dtype=homography.dtype)
    along_u = of_u[:, :, None] * u + constant[:, :, None]
    source = along_u[:, :, None, :] + (of_v[:, :, None] * v)[:, :, :, None]  # (B, 3, H, W)
    grid = source[:, :2].div_(source[:, 2:])
    return grid.permute(0, 2, 3, 1)


def turned(view: View, rotation: Tensor, intrinsics: Tensor, *, interpolation: Interpolation = "bilinear") -> View:
    """The view of the same hand by a camera turned by rotation (B, 3, 3), with other intrinsics (B, 3, 3)."""
    homography, xyz_m = _seen_by(view.intrinsics, view.xyz_m, rotation, intrinsics)
    return View(warp(view.image, homography, interpolation=interpolation), intrinsics, xyz_m)


def _seen_by(before: Tensor, xyz_m: Tensor, rotation: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Homography (B, 3, 3) from the pixels before to those of a turned camera, and the joints in its frame."""
    with geometry.exactly(rotation):
        return intrinsics @ rotation @ torch.linalg.inv(before), xyz_m @ rotation.transpose(1, 2)


def mirrored(view: View) -> View:
    """The view in a mirror, left and right exchanged: a right hand becomes a left one."""
    width = view.image.shape[-1]
    intrinsics = view.intrinsics.clone()
    intrinsics[:, 0, 2] = (width - 1) - intrinsics[:, 0, 2]
    intrinsics[:, 0, 1] = -intrinsics[:, 0, 1]
    return View(view.image.flip(-1), intrinsics, view.xyz_m * view.xyz_m.new_tensor([-1.0, 1.0, 1.0]))


class Augment(nn.Module):
    """Random views of a batch, drawn from a generator, so that a step is the same whenever it is repeated.

    rotation_deg: turned by up to this to either side. scale: zoomed by a factor in [1 - scale, 1 / (1 - scale)],
    log-uniform. shift: moved by up to this fraction of the picture. brightness, contrast: factors in [1 - x, 1 + x];
    color: the same for each channel alone.
    """

    def __init__(
        self,
        *,
        rotation_deg: float,
        scale: float,
        shift: float,
        brightness: float,
        contrast: float,
        color: float,
        interpolation: Interpolation,
    ) -> None:
        super().__init__()
        limits = {"scale": scale, "shift": shift, "brightness": brightness, "contrast": contrast, "color": color}
        for name, value in limits.items():
            if not 0.0 <= value < 1.0:
                raise UserError(f"augment.{name} must be at least 0 and less than 1, but it is {value}")
        if not 0.0 <= rotation_deg <= 180.0:
            raise UserError(f"augment.rotation_deg must lie between 0 and 180, but it is {rotation_deg}")
        self.rotation_deg = rotation_deg
        self.scale = scale
        self.shift = shift
        self.brightness = brightness
        self.contrast = contrast
        self.color = color
        self.interpolation = interpolation

    def forward(self, batch: HandBatch, generator: torch.Generator) -> View:
        """One random view of each picture; generator lives on the CPU, its draws are the same on every device.

        The image is channels last in memory, as the network wants it.
        """
        homography, intrinsics, xyz_m = self._moved(batch, generator)
        colors = self._colors(len(batch.image), generator, like=intrinsics)
        image = torch.empty(
            batch.image.shape, dtype=torch.float32, device=batch.image.device, memory_format=torch.channels_last
        )
        for part in _parts(batch.image):
            seen = batch.image[part].to(torch.float32, copy=True)  # in [0, 255]
            if homography is not None:
                seen = warp(seen, homography[part], interpolation=self.interpolation)
            image[part] = seen.div_(255.0) if colors is None else _recolored(seen, *(each[part] for each in colors))
        return View(image, intrinsics, xyz_m)

    def _moved(self, batch: HandBatch, generator: torch.Generator) -> tuple[Tensor | None, Tensor, Tensor]:
        """Homography from old to new pixels, None for no motion, and the new intrinsics and joints."""
        if not (self.rotation_deg or self.scale or self.shift):
            return None, batch.intrinsics, batch.xyz_m
        count, size = len(batch.image), (batch.image.shape[-2], batch.image.shape[-1])
        angle = math.radians(self.rotation_deg) * _symmetric(count, generator).to(batch.intrinsics)
        zoom = torch.exp(-math.log1p(-self.scale) * _symmetric(count, generator)).to(batch.intrinsics)
        shift_px = self.shift * max(size) * _symmetric((count, 2), generator).to(batch.intrinsics)
        rotation = rotation_about_center(angle, batch.intrinsics, size)
        intrinsics = zoomed(batch.intrinsics, zoom, shift_px, size)
        homography, xyz_m = _seen_by(batch.intrinsics, batch.xyz_m, rotation, intrinsics)
        return homography, intrinsics, xyz_m

    def _colors(self, count: int, generator: torch.Generator, *, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gain of each channel (B, 3, 1, 1) and contrast (B, 1, 1, 1); None for no change."""
        if not (self.brightness or self.contrast or self.color):
            return None
        gain = (
            1.0 + self.brightness * _symmetric((count, 1), generator) + self.color * _symmetric((count, 3), generator)
        )
        contrast = 1.0 + self.contrast * _symmetric((count, 1, 1, 1), generator)
        return gain[:, :, None, None].to(like), contrast.to(like)


def _recolored(image: Tensor, gain: Tensor, contrast: Tensor) -> Tensor:
    """Contrast about each picture's mean, then the gain of each channel: one factor and one summand a channel.

    image: (B, 3, H, W) in [0, 255], overwritten; gain: (B, 3, 1, 1); contrast: (B, 1, 1, 1). Returns it in [0, 1].
    """
    mean = image.mean(dim=(1, 2, 3), keepdim=True) / 255.0
    return image.mul_(contrast * gain / 255.0).add_((mean - contrast * mean) * gain).clamp_(0.0, 1.0)


def _parts(image: Tensor) -> Iterator[slice]:
    """So many pictures at a time that the cache holds what is made of them; on a GPU all.

    On one core 2,870 pictures of 224 px a second, and 1,220 where the steps each went over all 32 of a batch.
    """
    count, _, height, width = image.shape
    step = max(1, _CACHED_PIXELS // (height * width)) if image.device.type == "cpu" else count
    return (slice(start, start + step) for start in range(0, count, step))


def _symmetric(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2.0 * torch.rand(shape, generator=generator) - 1.0
