"""Masks of the hands, packed next to the images. Only trainings that replace backgrounds need them.

There is one mask for each pose, `%08d.jpg`, for all images that show the pose (four in FreiHAND).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handpose.data.pack import ImageFileState, StoreKind, open_map, open_store
from handpose.data.pictures import decode_dataset_image
from handpose.data.sample import ImageFiles


@dataclass(frozen=True)
class PackedMasks:
    """An opened store of masks.

    Attributes:
        store: folder of the store.
        masks: (M, S, S, 1) uint8, 255 on the hand, memory-mapped and read-only.
        poses: (M,) the pose of each mask, ascending.
    """

    store: Path
    masks: NDArray[np.uint8]
    poses: NDArray[np.int64]

    def select(self, poses: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the masks of the given poses, (B, S, S)."""
        return np.take(self.masks[..., 0], np.searchsorted(self.poses, poses), axis=0)

    def __reduce__(self) -> tuple[Callable[..., "PackedMasks"], tuple[Any, ...]]:
        """Pickle only the path, as PackedImages do."""
        return _reopen, (self.store, self.poses)


def pack_masks(
    masks: Path, poses: NDArray[np.int64], *, image_size: int, folder: Path, progress: bool = True
) -> PackedMasks:
    """Open the store of the masks of the given poses. Make it first if it is missing or incomplete.

    Args:
        masks: folder of the mask files.
        poses: (M,) ascending.
        image_size: side in pixels of the packed masks, the same as that of the images.
        folder: folder of the stores.
        progress: as in `pack`.

    Raises:
        UserError: as in `pack`.
    """
    files = ImageFileState.read(ImageFiles.from_paths(masks / f"{pose:08d}.jpg" for pose in poses))
    store, packed, _ = open_store(files, _MASKS, image_size, folder, None, progress)
    return PackedMasks(store, packed, poses)


def _reopen(store: Path, poses: NDArray[np.int64]) -> PackedMasks:
    return PackedMasks(store, open_map(store), poses)


def _decode(path: str) -> NDArray[np.uint8]:
    """Decode a mask as (H, W, 1) with values 0 and 255. The pixels of a JPEG file are not exactly black and white."""
    return np.where(decode_dataset_image(path, colorspace="gray") > 127, np.uint8(255), np.uint8(0))


_MASKS = StoreKind("masks", 1, _decode)
