"""Labels in memory-mapped files beside the packed images, so that the processes of a node share them as well.

FreiHAND's take 120 MB in each process that reads them, as numbers and as paths.
"""

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handpose.data.sample import Annotations, ImageFiles, Splits
from handpose.files import write_atomically

_MIN_BYTES = 2**20  # what is smaller stays in memory


def share_labels(splits: Splits, folder: Path) -> Splits:
    """The same splits with their large arrays in files under `folder`, named by their contents.

    The arrays may be written to; what is written stays in this process. Where the folder cannot be written they stay in
    memory: whether it can be is for `pack` to say, which needs it.
    """
    try:
        return Splits(*(_share_split(getattr(splits, split.name), folder) for split in fields(splits)))
    except OSError:
        return splits


def _share_split(annotations: Annotations, folder: Path) -> Annotations:
    arrays: dict[str, Any] = {
        field.name: _map_array(value, folder)
        for field in fields(annotations)
        if isinstance(value := getattr(annotations, field.name), np.ndarray)
    }
    return replace(annotations, files=ImageFiles(_map_array(annotations.files.paths, folder)), **arrays)


def _map_array(values: NDArray, folder: Path) -> NDArray:
    if values.nbytes < _MIN_BYTES:
        return values
    contents = np.ascontiguousarray(values)
    name = hashlib.sha256(f"{contents.dtype.str} {contents.shape}".encode() + contents.data).hexdigest()[:16]
    file = folder / f"labels-{name}.npy"
    if not file.exists():
        with write_atomically(file) as part, open(part, "wb") as opened:
            np.save(opened, contents)
    # Copy on write, because torch warns of arrays that are read-only.
    return np.asarray(np.load(file, mmap_mode="c"))
