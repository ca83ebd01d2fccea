"""Labels in memory-mapped files next to the packed images, so that the processes of a node share them too.

As arrays and paths in memory, the labels of FreiHAND take 120 MB in each process.
"""

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handpose.data.sample import Annotations, ImageFiles, Splits
from handpose.files import write_atomically

_MIN_BYTES = 2**20  # smaller arrays stay in memory


def share_labels(splits: Splits, folder: Path) -> Splits:
    """Return the same splits with their large arrays in files under `folder`, named by a hash of their contents.

    The arrays can be written to; changes stay in this process. If the folder cannot be written, the arrays stay in
    memory and no error is raised: `pack` needs the folder as well and reports the error.
    """
    try:
        train, val, test = (_share_split(split, folder) for split in (splits.train, splits.val, splits.test))
        return replace(splits, train=train, val=val, test=test)
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
    # Copy on write, because torch warns about read-only arrays.
    return np.asarray(np.load(file, mmap_mode="c"))
