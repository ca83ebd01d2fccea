"""What data sets pass to the network: the annotations of a split, and batches.

Letters: N images of a split, B batch, K = 21 joints (FreiHAND order), H height, W width. In the camera frame x points
right, y down and z away from the camera.
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
    """A batch from a data loader. Missing values are NaN, so that all batches have the same type.

    Attributes:
        image: (B, 3, H, W) uint8, RGB.
        intrinsics: (B, 3, 3) float32, in pixels of `image`.
        xyz_m: (B, K, 3) float32, joints in metres, camera frame; NaN if the data set has none.
        scale_m: (B,) float32, length of the reference bone in metres; NaN if unknown.
        position: (B,) int64, position of each image in its split.
        mask: (B, 1, H, W) uint8, 255 on the hand; (B, 0, H, W) if there are no masks or none were requested.
    """

    image: Tensor
    intrinsics: Tensor
    xyz_m: Tensor
    scale_m: Tensor
    position: Tensor
    mask: Tensor


class ImageFiles(Sequence[Path]):
    """Paths of images in little memory: 60 bytes each instead of the 500 of a Path. FreiHAND has 134,200 images.

    Args:
        paths: (N,) encoded paths, all padded to one width.
    """

    def __init__(self, paths: NDArray[np.bytes_]) -> None:
        self.paths = paths

    @classmethod
    def from_paths(cls, files: Iterable[Path]) -> "ImageFiles":
        """Collect the given files in their order."""
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
    """The images of one split and their labels.

    Attributes:
        files: paths of N JPEG files.
        intrinsics: (N, 3, 3) in pixels of the file at its own size.
        xyz_m: (N, K, 3) joints in metres, camera frame; None if there are none.
        scale_m: (N,) length of the reference bone in metres; None if there is none.
        pose: (N,) id of the pose that each image shows. Images of the same pose show the same hand in front of
            different backgrounds.
        masks: folder with the mask `%08d.jpg` of each pose, bright on the hand; None if there are no masks.
        is_scale_given: whether scale_m is published with the data set, so that predictions may use it. False if it was
            measured on xyz_m, which is the truth.
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
        """Select images by their positions in this split, in the given order."""
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
    """Concatenate two splits of one data set. A kind of label that one of them lacks is missing in the result."""

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
