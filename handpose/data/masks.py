"""Masks of the hands, packed beside the images: only for trainings that put other backgrounds behind the hands.

One mask a pose, `%08d.jpg`, which serves all images that show it, as FreiHAND's four.
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

    store: its folder. masks: (M, S, S, 1) uint8, 255 on the hand, memory-mapped and read-only. poses: (M,) whose they
    are, ascending.
    """

    store: Path
    masks: NDArray[np.uint8]
    poses: NDArray[np.int64]

    def select(self, poses: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The masks of the given poses, (B, S, S)."""
        return np.take(self.masks[..., 0], np.searchsorted(self.poses, poses), axis=0)

    def __reduce__(self) -> tuple[Callable[..., "PackedMasks"], tuple[Any, ...]]:
        """Travel to another process as a path, as PackedImages do."""
        return _reopen, (self.store, self.poses)


def pack_masks(
    masks: Path, poses: NDArray[np.int64], *, image_size: int, folder: Path, progress: bool = True
) -> PackedMasks:
    """Open the store of the masks of these poses, (M,) ascending, after making it if it is not there or not whole.

    masks: the folder of the files. image_size: side in pixels that they are resized to, as their images are. folder,
    progress, errors: as of `pack`.
    """
    files = ImageFileState.read(ImageFiles.from_paths(masks / f"{pose:08d}.jpg" for pose in poses))
    store, packed, _ = open_store(files, _MASKS, image_size, folder, None, progress)
    return PackedMasks(store, packed, poses)


def _reopen(store: Path, poses: NDArray[np.int64]) -> PackedMasks:
    return PackedMasks(store, open_map(store), poses)


def _decode(path: str) -> NDArray[np.uint8]:
    """A mask (H, W, 1), 0 or 255: a JPEG's are not quite black and white."""
    return np.where(decode_dataset_image(path, colorspace="gray") > 127, np.uint8(255), np.uint8(0))


_MASKS = StoreKind("masks", 1, _decode)
