"""What travels from the data sets to the network: annotations of a split, and a batch.

Letters: N images of a split, B batch, K = 21 joints (FreiHAND order), H height, W width. The camera frame has x to the
right, y down, z away from the camera.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class HandBatch(NamedTuple):
    """A batch as the loader hands it over; absent values are NaN, so that a batch always has one type."""

    image: Tensor  # (B, 3, H, W) uint8, RGB
    intrinsics: Tensor  # (B, 3, 3) float32, pixels of `image`
    xyz_m: Tensor  # (B, K, 3) float32, metres, camera frame; NaN where the data set has none
    scale_m: Tensor  # (B,) float32, length of the reference bone in metres; NaN where unknown
    position: Tensor  # (B,) int64, position of the image in its split
    mask: Tensor  # (B, 1, H, W) uint8, 255 on the hand; (B, 0, H, W) where there are none or nobody asked for them


class ImageFiles(Sequence[Path]):
    """Paths of images in little memory: 60 bytes each, where a Path takes 500 and FreiHAND has 134,200.

    paths: (N,) encoded, of one width.
    """

    def __init__(self, paths: NDArray[np.bytes_]) -> None:
        self.paths = paths

    @classmethod
    def from_paths(cls, files: Iterable[Path]) -> "ImageFiles":
        """The given ones, in their order."""
        return cls(np.array([os.fsencode(file) for file in files], dtype=np.bytes_))

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice | NDArray[np.int64]) -> "ImageFiles": ...

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> "Path | ImageFiles":
        found = self.paths[index]
        return ImageFiles(found) if isinstance(found, np.ndarray) else Path(os.fsdecode(found))


@dataclass(frozen=True)
class Annotations:
    """The images of one split and what is known of each.

    files: N JPEG paths. intrinsics: (N, 3, 3) in pixels of the file as it is. xyz_m: (N, K, 3) metres in the camera
    frame, or None. scale_m: (N,) reference bone in metres, or None. pose: (N,) id of the pose each image shows; images
    that share it show the same hand before another background. masks: folder with the mask `%08d.jpg` of each pose,
    bright on the hand, or None. is_scale_given: scale_m is published with the data set, so that predictions may use it;
    False where it was measured on xyz_m, the truth.
    """

    files: ImageFiles
    intrinsics: NDArray[np.float64]
    xyz_m: NDArray[np.float64] | None
    scale_m: NDArray[np.float64] | None
    pose: NDArray[np.int64]
    masks: Path | None = None
    is_scale_given: bool = True

    def __len__(self) -> int:
        return len(self.files)

    def select(self, images: NDArray[np.int64]) -> "Annotations":
        """The given images (positions in this split), in the given order."""
        return Annotations(
            files=self.files[images],
            intrinsics=self.intrinsics[images],
            xyz_m=None if self.xyz_m is None else self.xyz_m[images],
            scale_m=None if self.scale_m is None else self.scale_m[images],
            pose=self.pose[images],
            masks=self.masks,
            is_scale_given=self.is_scale_given,
        )


def join_annotations(first: Annotations, second: Annotations) -> Annotations:
    """The images of two splits of one data set, in this order; what one of them lacks neither has."""

    def both(name: str) -> Any:
        parts = getattr(first, name), getattr(second, name)
        return None if any(part is None for part in parts) else np.concatenate(parts)

    return Annotations(
        files=ImageFiles(np.concatenate([first.files.paths, second.files.paths])),
        masks=first.masks,
        is_scale_given=first.is_scale_given and second.is_scale_given,
        **{name: both(name) for name in ("intrinsics", "xyz_m", "scale_m", "pose")},
    )


@dataclass(frozen=True)
class Splits:
    """The three splits of a data set. No pose is in two of them."""

    train: Annotations
    val: Annotations
    test: Annotations
