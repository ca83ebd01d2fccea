"""What data sets pass to the network: the annotations of a split, and batches.

Letters: N images of a split, B batch, K = 21 joints (FreiHAND order), H height, W width. In the camera frame x points
right, y down and z away from the camera.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ALWAYS_TRAINED = -1
"""The group of images that are always used for training (`Annotations.group`)."""


class HandBatch(NamedTuple):
    """A batch from a data loader. Missing values are NaN, so that all batches have the same type.

    Attributes:
        image: (B, 3, H, W) uint8, RGB.
        intrinsics: (B, 3, 3) float32, in pixels of `image`.
        xyz_m: (B, K, 3) float32, joints in metres, camera frame; NaN if the data set has none. Without depth, each is a
            point on the ray of a labelled keypoint, whose projection alone has a meaning; NaN without a label.
        scale_m: (B,) float32, length of the reference bone in metres; NaN if unknown.
        position: (B,) int64, position of each image in its split.
        mask: (B, 1, H, W) uint8, 255 on the hand; (B, 0, H, W) if there are no masks or none were requested.
        has_depth: (B,) bool, False if only the 2-D keypoints of the hand are known.
    """

    image: Tensor
    intrinsics: Tensor
    xyz_m: Tensor
    scale_m: Tensor
    position: Tensor
    mask: Tensor
    has_depth: Tensor


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
        files: paths of N JPEG files. With crops, several images may be parts of the same file.
        intrinsics: (N, 3, 3) in pixels of the image at its own size, before it is resized.
        xyz_m: (N, K, 3) joints in metres, camera frame; None if there are none.
        scale_m: (N,) length of the reference bone in metres; None if there is none.
        pose: (N,) id of the pose that each image shows. Images of the same pose show the same hand in front of
            different backgrounds.
        masks: folder with the mask `%08d.jpg` of each pose, bright on the hand; None if there are no masks.
        is_scale_given: whether scale_m is published with the data set, so that predictions may use it. False if it was
            measured on xyz_m, which is the truth.
        crops: (N, 4) the square of each file that is the image: left, top and side in pixels of the file, and 1 if the
            square is mirrored, else 0. All zero: the whole file. `intrinsics` and `xyz_m` belong to the square, after
            mirroring. None: the whole file for all images.
        weight: (N,) how often training draws each image, relative to the others; None: once in an epoch.
        rays: (N, K, 3) where the rays of 2-D keypoints meet the plane of depth 1, for hands of which only these are
            known; NaN for a joint without a label. The rows of other hands are NaN here, as the rows of such hands are
            in `xyz_m`. None: there are no such hands.
        group: (N,) id of the group of each image, for example its person or its video. The training and validation
            images of a group are not divided between folds (handpose/data/folds.py). ALWAYS_TRAINED: the image is in
            no fold. None: the pose is the group.
    """

    files: ImageFiles
    intrinsics: NDArray[np.float64]
    xyz_m: NDArray[np.float64] | None
    scale_m: NDArray[np.float64] | None
    pose: NDArray[np.int64]
    masks: Path | None = None
    is_scale_given: bool = True
    crops: NDArray[np.int64] | None = None
    weight: NDArray[np.float64] | None = None
    rays: NDArray[np.float64] | None = None
    group: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def crops_or_whole(self) -> NDArray[np.int64]:
        """The crops, (N, 4): all zero if the images are whole files."""
        return np.zeros((len(self), 4), dtype=np.int64) if self.crops is None else self.crops

    @property
    def is_flat(self) -> bool:
        """Whether only 2-D keypoints are known, of all hands."""
        return self.rays is not None and self.xyz_m is None

    def select(self, images: NDArray[np.int64]) -> "Annotations":
        """Select images by their positions in this split, in the given order."""
        arrays: dict[str, Any] = {
            field.name: value[images]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return replace(self, files=self.files[images], **arrays)


def join_annotations(first: Annotations, second: Annotations) -> Annotations:
    """Concatenate two splits of one data set. A kind of label that one of them lacks is missing in the result."""

    def both(name: str) -> Any:
        parts = getattr(first, name), getattr(second, name)
        return None if any(part is None for part in parts) else np.concatenate(parts)

    is_cropped = first.crops is not None or second.crops is not None
    return Annotations(
        files=join_files(first.files, second.files),
        masks=first.masks,
        is_scale_given=first.is_scale_given and second.is_scale_given,
        crops=np.concatenate([first.crops_or_whole, second.crops_or_whole]) if is_cropped else None,
        **{name: both(name) for name in ("intrinsics", "xyz_m", "scale_m", "pose", "weight", "rays", "group")},
    )


def join_files(*parts: ImageFiles) -> ImageFiles:
    """Concatenate lists of files."""
    return ImageFiles(np.concatenate([part.paths for part in parts]))


@dataclass(frozen=True)
class Splits:
    """The three splits of a data set. No pose is in two of them.

    Attributes:
        train: the training split.
        val: the validation split.
        test: the test split.
        notes: sentences that the user should read, for example how many hands were left out.
    """

    train: Annotations
    val: Annotations
    test: Annotations
    notes: tuple[str, ...] = ()


def number_poses(train: Annotations, val: Annotations, test: Annotations, *, notes: tuple[str, ...]) -> Splits:
    """Join splits whose poses are each numbered from 0 and occur in one image: no two splits share a number then.

    The groups of the training and the validation split, if they have any, are numbered from 0 and become different.
    """
    num_groups = 0 if train.group is None else 1 + int(train.group.max())
    return Splits(
        train=train,
        val=replace(val, pose=val.pose + len(train), group=None if val.group is None else val.group + num_groups),
        test=replace(test, pose=test.pose + len(train) + len(val)),
        notes=notes,
    )
