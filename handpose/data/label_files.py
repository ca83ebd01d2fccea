"""Labels that are spread over many files, or over huge ones: read once on a node, then from one file of arrays.

DexYCB has 580,000 label files and the annotations of InterHand2.6M are gigabytes of JSON, which takes minutes to read.
The arrays are kept next to the packed images, under a hash of the names, sizes and modification times of the files.
"""

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from handpose.errors import UserError
from handpose.files import write_atomically

_THREADS = 16  # a network disk answers many requests at a time; for a local one it makes no difference
_AGAIN = "unpack the data set again"

Arrays = dict[str, NDArray[Any]]
T = TypeVar("T")


def read_arrays(
    read: Callable[[], Arrays], *, files: Sequence[Path], kind: str, cache_folder: str | Path | None
) -> Arrays:
    """Return the arrays that `read` makes of label files, from the cache if it has them.

    Args:
        read: reads the files. Its arrays must not contain objects.
        files: all files that the arrays depend on.
        kind: what is read and how, with a version: a part of the name in the cache.
        cache_folder: folder of the cache; None: no cache. If it cannot be written, nothing is cached and no error is
            raised, because `pack` needs the folder as well and reports the error.

    Raises:
        UserError: a file is missing.
    """
    if cache_folder is None:
        return read()
    state = hashlib.sha256(kind.encode())
    for path, sizes in zip(files, map_files(_read_size_and_mtime, files), strict=True):
        state.update(f"{path} {sizes}\0".encode("utf-8", "surrogateescape"))
    cached = Path(cache_folder).expanduser().absolute() / f"labels-{kind.split()[0]}-{state.hexdigest()[:16]}.npz"
    damaged = (OSError, ValueError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), open(cached, "rb") as opened, np.load(opened, allow_pickle=False) as saved:
        return dict(saved)
    arrays = read()
    with contextlib.suppress(OSError), write_atomically(cached) as part, open(part, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return arrays


def map_files(read: Callable[[Path], T], files: Sequence[Path]) -> list[T]:
    """Call a function for each file, many at a time, and return the results in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, files))


def read_json(path: Path, layout: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        layout: what to do about a missing file, for error messages.

    Raises:
        UserError: the file is missing or not valid JSON.
    """
    try:
        return json.loads(read_bytes(path, layout))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_AGAIN}") from None


def read_bytes(path: Path, layout: str) -> bytes:
    """Read a file. Arguments and errors are those of `read_json`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {layout}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def read_pickle(path: Path, layout: str) -> dict[str, Any]:
    """Read a pickled dictionary of numbers and NumPy arrays. Anything else in it, such as code, is refused.

    Args:
        path: the file, which Python 2 may have written.
        layout: what to do about a missing file, for error messages.

    Raises:
        UserError: the file is missing, damaged, or contains something else.
    """
    try:
        with path.open("rb") as opened:
            content = _ArrayUnpickler(opened).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {layout}") from None
    except Exception as error:  # a damaged file can raise any exception
        raise UserError(f"{path} cannot be read as a pickled dictionary of arrays ({error}); {_AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dictionary but holds {type(content).__name__}; {_AGAIN}")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    _MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
    _NAMES = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module in self._MODULES and name in self._NAMES) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


def to_array(value: Any, shape: tuple[int, ...], path: Path, name: str) -> NDArray[np.float64]:
    """Convert a label to an array of float64.

    Args:
        value: numbers, in nested lists or in an array.
        shape: the shape that the array must have.
        path: the file with the label, for the error message.
        name: name of the label, for the error message.

    Raises:
        UserError: the label has another shape, or contains something that is not a finite number.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all():
        numbers = " x ".join(map(str, shape))
        raise UserError(f"{path}: {name} is not {numbers} finite numbers; {_AGAIN}")
    return array


def check_root(root: Path, *, inner: str, where: str) -> None:
    """Check that a data set is where the configuration says.

    Args:
        root: the folder of the data set.
        inner: a file or folder that it must contain.
        where: where to get the data set.

    Raises:
        UserError: the folder does not exist or does not contain `inner`.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} {'is no folder' if root.exists() else 'does not exist'}; {where}")
    if (root / inner).exists():
        return
    for folder in sorted(root.iterdir()):
        if (folder / inner).exists():
            raise UserError(f"data.root={root} has no {inner}, but {folder.name} in it has; use data.root={folder}")
    raise UserError(f"data.root={root} has no {inner}; {where}")


def _read_size_and_mtime(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from None
    return stat.st_size, stat.st_mtime_ns
