"""Augmentation as a virtual camera: K and xyz turn with the picture, so that projection stays exact.

A picture is what one camera saw; turned about its centre and with other intrinsics the same camera would have seen the
picture warped by the homography K' R K^-1 (Hartley and Zisserman 2004, section 8.4), whatever the depth. One warp a
batch, on the batch's device; test-time augmentation uses the same functions.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handpose.data.sample import HandBatch
from handpose.errors import UserError

Interpolation = Literal["bilinear", "nearest"]


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
    center = intrinsics.new_tensor([(width - 1) / 2.0, (height - 1) / 2.0, 1.0])
    axis = F.normalize(torch.linalg.solve(intrinsics, center.expand(len(intrinsics), 3)), dim=-1)
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
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
    batch, _, height, width = image.shape
    v, u = torch.meshgrid(
        torch.arange(height, device=image.device, dtype=image.dtype),
        torch.arange(width, device=image.device, dtype=image.dtype),
        indexing="ij",
    )
    target = torch.stack([u, v, torch.ones_like(u)], dim=-1).view(-1, 3)  # (HW, 3)
    source = target @ torch.linalg.inv(homography).transpose(1, 2)  # (B, HW, 3)
    source = source[..., :2] / source[..., 2:]
    size = image.new_tensor([width, height])
    grid = ((2.0 * source + 1.0) / size - 1.0).view(batch, height, width, 2)
    return F.grid_sample(image, grid, mode=interpolation, padding_mode="zeros", align_corners=False)


def turned(view: View, rotation: Tensor, intrinsics: Tensor, *, interpolation: Interpolation = "bilinear") -> View:
    """The view of the same hand by a camera turned by rotation (B, 3, 3), with other intrinsics (B, 3, 3)."""
    homography = intrinsics @ rotation @ torch.linalg.inv(view.intrinsics)
    image = warp(view.image, homography, interpolation=interpolation)
    return View(image, intrinsics, view.xyz_m @ rotation.transpose(1, 2))


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
        """One random view of each picture; generator lives on the CPU, its draws are the same on every device."""
        view = unchanged(batch)
        if self.rotation_deg or self.scale or self.shift:
            view = self._moved(view, generator)
        return view._replace(image=self._recolored(view.image, generator))

    def _moved(self, view: View, generator: torch.Generator) -> View:
        count, size = len(view.image), (view.image.shape[-2], view.image.shape[-1])
        angle = math.radians(self.rotation_deg) * _symmetric(count, generator).to(view.image)
        zoom = torch.exp(-math.log1p(-self.scale) * _symmetric(count, generator)).to(view.image)
        shift_px = self.shift * max(size) * _symmetric((count, 2), generator).to(view.image)
        rotation = rotation_about_center(angle, view.intrinsics, size)
        intrinsics = zoomed(view.intrinsics, zoom, shift_px, size)
        return turned(view, rotation, intrinsics, interpolation=self.interpolation)

    def _recolored(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if not (self.brightness or self.contrast or self.color):
            return image
        count = len(image)
        gain = (
            1.0 + self.brightness * _symmetric((count, 1), generator) + self.color * _symmetric((count, 3), generator)
        )
        contrast = 1.0 + self.contrast * _symmetric((count, 1, 1, 1), generator).to(image)
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        return (((image - mean) * contrast + mean) * gain[:, :, None, None].to(image)).clamp(0.0, 1.0)


def _symmetric(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2.0 * torch.rand(shape, generator=generator) - 1.0
