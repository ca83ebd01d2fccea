"""Images decoded once into a memory-mapped store that all trials of a node share.

A store is a folder `<fingerprint>/` with images.npy (N, S, S, 3) uint8, sides.npy (the side of each image in pixels
before it was resized) and manifest.json. The fingerprint is a hash of the names, sizes and modification times of the
files, of the squares that are cut out of them, of the image size and of the version of the store, so a changed data set
gets a new store. The store does not contain labels.

Pixels: centres are at integer coordinates. The centre of the top left pixel is (0, 0), its corner is (-0.5, -0.5).
Resizing by a factor s keeps the corners of the image in place, so u' = (u + 0.5) s - 0.5, for the principal point too.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from handpose.data.crops import cut_square
from handpose.data.pictures import decode_dataset_image, resize_image
from handpose.data.sample import Annotations, ImageFiles
from handpose.errors import UserError, add_file_name, explain_file_error, format_size, get_free_bytes
from handpose.files import check_owner, write_folder_atomically, write_json
from handpose.locks import hold_write_lock
from handpose.resources import count_cores

_VERSION = 2
_CHUNK = 64  # images per task: 10 MB at 224 px, so there are few tasks and they need little memory
_STAT_THREADS = 16  # a network disk answers many requests at a time; for a local one it makes no difference


@dataclass(frozen=True)
class PackedImages:
    """An opened store of images.

    Attributes:
        store: folder of the store.
        images: (N, S, S, 3) uint8, RGB, memory-mapped and read-only.
        intrinsics: (N, 3, 3) in pixels of `images`.
        contents: hash of the names and sizes of the files, and of the squares that are cut out of them. It is the same
            on every machine that has a copy of them.
    """

    store: Path
    images: NDArray[np.uint8]
    intrinsics: NDArray[np.float32]
    contents: str

    @property
    def image_size(self) -> int:
        """Side S of the images in pixels."""
        return self.images.shape[1]

    def __reduce__(self) -> tuple[Callable[..., "PackedImages"], tuple[Any, ...]]:
        """Pickle only the path. Pickling the memory map would copy all images."""
        return _reopen, (self.store, self.intrinsics, self.contents)


def pack(
    annotations: Annotations,
    *,
    image_size: int | None,
    folder: Path,
    workers: int | None = None,
    progress: bool = True,
) -> PackedImages:
    """Open the store of the given images under `folder`. Make it first if it is missing or incomplete.

    Any number of processes may call this at the same time; one of them makes the store.

    Args:
        annotations: the images and their intrinsics.
        image_size: side S in pixels that images are resized to; None: keep the size of the files, which must be the
            same for all.
        folder: folder of the stores.
        workers: number of threads that decode; None: one for each core.
        progress: whether to show a progress bar on stderr while packing, or one line if stderr is not a terminal.

    Raises:
        UserError: a file is missing, not a JPEG, truncated, not square, or has an EXIF orientation; the sizes differ
            and there is no `image_size`; or `folder` cannot be written, has too little space, or has been made by
            another user in a place such as /tmp.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"data.image_size={image_size} must be positive, or null for the size of the files")
    files = ImageFileState.read(annotations.files, annotations.crops)
    store, images, sides = open_store(files, _IMAGES, image_size, folder, workers, progress)
    intrinsics = resize_intrinsics(annotations.intrinsics, images.shape[1] / sides)
    return PackedImages(store, images, intrinsics.astype(np.float32), files.contents)


def resize_intrinsics(intrinsics: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the camera matrices of images resized by `scale`, with pixel centres at integer coordinates.

    Args:
        intrinsics: (N, 3, 3) in pixels before resizing.
        scale: (N,) new side / old side.
    """
    resize = np.zeros_like(intrinsics)
    resize[:, 0, 0] = resize[:, 1, 1] = scale
    resize[:, 0, 2] = resize[:, 1, 2] = 0.5 * scale - 0.5
    resize[:, 2, 2] = 1.0
    return resize @ intrinsics


class StoreKind(NamedTuple):
    """What a store contains.

    Attributes:
        name: name of its items, in the plural.
        channels: channels of an item.
        decode: reads a file as (H, W, channels).
    """

    name: str
    channels: int
    decode: Callable[[str], NDArray[np.uint8]]


def open_store(
    files: "ImageFileState", kind: StoreKind, image_size: int | None, folder: Path, workers: int | None, progress: bool
) -> tuple[Path, NDArray[np.uint8], NDArray[np.int32]]:
    """Open the store of the given files. Make it first if necessary.

    Args:
        files: the files.
        kind: what the store contains.
        image_size: as in `pack`.
        folder: folder of the stores.
        workers: as in `pack`.
        progress: as in `pack`.

    Returns:
        The folder of the store, its items (N, S, S, channels), and the sides (N,) of the files in pixels.

    Raises:
        UserError: as in `pack`.
    """
    store = folder.expanduser().absolute() / files.compute_fingerprint(image_size, kind)
    check_owner(store)
    opened = _open_if_whole(store, len(files.paths), kind)
    if opened is None:
        lock = store.with_name(f"{store.name}.lock")  # several trials of a node may start at the same moment
        wait = f"Waiting for another process that packs the images in {store}" if progress else ""
        with hold_write_lock(lock, on_wait=wait, make_error=lambda error: _make_write_error(store.parent, error)):
            check_owner(store)
            opened = _open_if_whole(store, len(files.paths), kind)  # another process may have made it meanwhile
            if opened is None:
                _make_store(store, files, kind, image_size, workers or count_cores(), progress)
                opened = _open_if_whole(store, len(files.paths), kind)
    assert opened is not None, f"{store} was created but cannot be opened"
    return store, *opened


class ImageFileState(NamedTuple):
    """The image files, with hashes that change when the files change.

    Attributes:
        paths: the files.
        source: folder that contains all of them.
        contents: hash of their names and sizes, and of the crops.
        changed: hash of their modification times.
        crops: as in `Annotations`.
    """

    paths: list[str]
    source: str
    contents: str
    changed: str
    crops: NDArray[np.int64] | None = None

    @classmethod
    def read(cls, files: ImageFiles, crops: NDArray[np.int64] | None = None) -> "ImageFileState":
        """Read the sizes and modification times of the files."""
        paths = [os.fsdecode(path) for path in files.paths]
        chunks = [paths[i : i + 1024] for i in range(0, len(paths), 1024)]
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            stats = np.concatenate(list(pool.map(_read_sizes_and_mtimes, chunks)))
        source = os.path.commonpath({os.path.dirname(path) for path in paths})
        names = "\0".join(path.removeprefix(source) for path in paths)
        squares = b"" if crops is None else np.ascontiguousarray(crops).tobytes()
        contents = _hash_text(os.fsencode(names) + stats[:, 0].tobytes() + squares)
        return cls(paths, source, contents, _hash_text(stats[:, 1].tobytes()), crops)

    def decode(self, row: int, kind: "StoreKind") -> NDArray[np.uint8]:
        """Decode the image of a row, which is a file or a square of it."""
        image = kind.decode(self.paths[row])
        return image if self.crops is None else cut_square(image, self.crops[row])

    def compute_fingerprint(self, image_size: int | None, kind: StoreKind) -> str:
        """Return the name of the folder of their store."""
        state = f"{_VERSION} {image_size} {self.contents} {self.changed}"
        return _hash_text((state if kind is _IMAGES else f"{state} {kind.name}").encode())


def _hash_text(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()[:16]


def _read_sizes_and_mtimes(paths: list[str]) -> NDArray[np.int64]:
    stats = np.empty((len(paths), 2), dtype=np.int64)
    for row, path in enumerate(paths):
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"the image {path} cannot be read ({error.strerror}); unpack the data set again") from None
        stats[row] = stat.st_size, stat.st_mtime_ns
    return stats


def _open_if_whole(store: Path, num_images: int, kind: StoreKind) -> tuple[NDArray[np.uint8], NDArray[np.int32]] | None:
    """Return the items and sides of a store, or None if it is missing or incomplete."""
    try:
        manifest = json.loads((store / "manifest.json").read_bytes())
        if (store / "images.npy").stat().st_size != manifest["num_bytes"]:
            return None
        images, sides = open_map(store), np.load(store / "sides.npy")
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    whole = images.shape[0] == num_images and images.shape[3:] == (kind.channels,) and sides.shape == (num_images,)
    return (images, sides) if whole and images.dtype == np.uint8 else None


def open_map(store: Path) -> NDArray[np.uint8]:
    """Map the items of a store into memory, read-only."""
    # A plain array over the map: indexing an np.memmap is slower, and every slice would be an np.memmap again.
    return np.asarray(np.load(store / "images.npy", mmap_mode="r"))


def _reopen(store: Path, intrinsics: NDArray[np.float32], contents: str) -> PackedImages:
    return PackedImages(store, open_map(store), intrinsics, contents)


def _make_write_error(folder: Path, error: OSError) -> UserError:
    reason = explain_file_error(error, remedy="set paths.packed to a folder on a local disk with more space")
    return UserError(f"images cannot be packed in {folder} because {reason}")


def _make_store(
    store: Path, files: ImageFileState, kind: StoreKind, image_size: int | None, workers: int, progress: bool
) -> None:
    """Decode all files into a folder next to `store`, and rename it when it is complete. The caller holds the lock."""
    start = time.monotonic()
    try:
        with write_folder_atomically(store) as partial:
            size = image_size or _read_side(files.paths[0], files.decode(0, kind))
            _check_space(store.parent, (len(files.paths), size, size, kind.channels))
            resize = image_size is not None
            _write_images(partial, files, kind, size, resize=resize, workers=workers, progress=progress)
            _write_manifest(partial, files, image_size)
    except OSError as error:
        raise _make_write_error(store.parent, error) from None
    if progress:
        seconds = time.monotonic() - start
        print(f"Packed {len(files.paths)} {kind.name} of {size} px in {store} in {seconds:.1f} s", file=sys.stderr)


def _check_space(folder: Path, shape: tuple[int, ...]) -> None:
    needed, free = math.prod(shape), get_free_bytes(folder)
    if needed > free:
        raise UserError(
            f"packing {shape[0]} images of {shape[1]} px needs {format_size(needed)} but {folder} has "
            f"{format_size(free)} free; set paths.packed to a larger disk, or a smaller data.image_size"
        )


def _write_images(
    folder: Path, files: ImageFileState, kind: StoreKind, size: int, *, resize: bool, workers: int, progress: bool
) -> None:
    target, paths = folder / "images.npy", files.paths
    shape = (len(paths), size, size, kind.channels)
    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    header = target.stat().st_size - images.nbytes
    del images

    def write_chunk(start: int) -> NDArray[np.int32]:
        """Write to the file, not through the map: on a full disk a file raises OSError, a map kills the process."""
        decoded = [files.decode(row, kind) for row in range(start, min(start + _CHUNK, len(paths)))]
        sides = [_read_side(path, image) for path, image in zip(paths[start:], decoded, strict=False)]
        if not resize:
            _check_same_side(paths, start, sides, size)
        with add_file_name(target), open(target, "r+b") as file:
            file.seek(header + start * math.prod(shape[1:]))
            file.write(np.stack([_resize(image, size) for image in decoded]).data)
        return np.array(sides, dtype=np.int32)

    sides = []
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    with bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(f"Packing {len(paths)} {kind.name}", total=len(paths))
        for chunk in pool.map(write_chunk, range(0, len(paths), _CHUNK)):
            sides.append(chunk)
            bar.advance(task, len(chunk))
    contents = BytesIO()  # NumPy's error for a file on a full disk gives no reason
    np.save(contents, np.concatenate(sides))
    (folder / "sides.npy").write_bytes(contents.getbuffer())


def _write_manifest(folder: Path, files: ImageFileState, image_size: int | None) -> None:
    images = folder / "images.npy"
    with open(images, "rb") as file:
        os.fsync(file.fileno())  # a complete store must survive a power cut
    manifest = {
        "version": _VERSION,
        "source": files.source,
        "contents": files.contents,
        "image_size": image_size,
        "num_images": len(files.paths),
        "num_bytes": images.stat().st_size,
    }
    write_json(folder / "manifest.json", manifest, indent=2)


_IMAGES = StoreKind("images", 3, decode_dataset_image)


def _read_side(path: str, image: NDArray[np.uint8]) -> int:
    height, width = image.shape[:2]
    if height != width:
        raise UserError(
            f"{path} is {width} x {height} pixels, but images must be square; crop the image and "
            f"shift the principal point in K accordingly"
        )
    return height


def _check_same_side(paths: list[str], start: int, sides: list[int], size: int) -> None:
    for path, side in zip(paths[start:], sides, strict=False):
        if side != size:
            raise UserError(
                f"{paths[0]} is {size} x {size} pixels but {path} is {side} x {side}; "
                "set data.image_size to resize all images to one size"
            )


def _resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if image.shape[0] == size:
        return image
    flat = image[..., 0] if image.shape[2] == 1 else image
    return np.asarray(resize_image(Image.fromarray(flat), (size, size))).reshape(size, size, -1)
