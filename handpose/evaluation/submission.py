"""The files of test predictions: `test_preds.json.gz` for the course, and a zip for eval.py of FreiHAND.

Beside them is a file of the expected errors. Each file has a function that writes it and one that reads it;
`read_predictions` reads both kinds of predictions. Within the project, predictions are in metres and in FreiHAND order.
Only the course's file is in millimetres and AIT order. Files are
written atomically, and the same predictions always give the same bytes.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handpose.errors import UserError, format_size
from handpose.files import write_atomically
from handpose.skeleton import AIT_FROM_FREIHAND, FREIHAND_FROM_AIT, NUM_JOINTS

COURSE_DECIMALS_MM = 4
OFFICIAL_DECIMALS_M = 7
_ERROR_DECIMALS_MM = 2
PREDICTIONS_FILE = "test_preds.json.gz"
EXPECTED_ERRORS_FILE = "test_expected_errors.json.gz"
"""File of the expected errors of test predictions, beside them."""
NUM_VERTICES = 778
_MM_PER_M = 1000.0
_PRED_JSON = "pred.json"
_MAX_JSON_BYTES = 2**30
"""Largest unpacked file that is read, ten times that of FreiHAND's evaluation set with meshes.

A small packed file can unpack to any size.
"""
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_course(path: str | Path, xyz_m: NDArray[np.floating]) -> None:
    """Write the course's file: a gzipped JSON list (N, 21, 3) in mm and AIT order, rounded to 1e-4 mm.

    Args:
        path: the file.
        xyz_m: (N, 21, 3) joints in metres, camera frame, FreiHAND order.

    Raises:
        UserError: a prediction is not finite.
    """
    ait_mm = _check_keypoints(xyz_m, f"predictions for {path}")[:, AIT_FROM_FREIHAND] * _MM_PER_M
    text = _to_json(ait_mm.round(COURSE_DECIMALS_MM).tolist())
    with write_atomically(Path(path)) as part:
        part.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))


def read_course(path: str | Path) -> NDArray[np.float64]:
    """Read the course's file.

    Returns:
        (N, 21, 3) joints in metres, FreiHAND order.

    Raises:
        UserError: the file is anything else.
    """
    try:
        with gzip.open(_check_exists(path)) as file:
            text = _read_limited(file.read, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a complete gzip file ({error}); it is truncated or a file of another kind"
        ) from error
    return _check_keypoints(_from_json(text, path), path)[:, FREIHAND_FROM_AIT] / _MM_PER_M


def write_expected_errors(path: Path, error_m: NDArray[np.floating]) -> None:
    """Write how far joints are expected to be from their true places: a gzipped JSON list (N, 21) in mm, rounded.

    Args:
        path: the file.
        error_m: (N, 21) expected errors in metres, FreiHAND order; NaN where they are not known.
    """
    rounded = (np.asarray(error_m, np.float64) * _MM_PER_M).round(_ERROR_DECIMALS_MM)
    text = _to_json([[None if np.isnan(value) else value for value in hand] for hand in rounded.tolist()])
    with write_atomically(path) as part:
        part.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))


def read_expected_errors(path: Path) -> NDArray[np.float64]:
    """Read what `write_expected_errors` writes.

    Returns:
        (N, 21) expected errors in metres, FreiHAND order.

    Raises:
        UserError: the file is anything else.
    """
    try:
        with gzip.open(_check_exists(path)) as file:
            values = np.array(_from_json(_read_limited(file.read, path), path), dtype=np.float64)
    except (gzip.BadGzipFile, EOFError, zlib.error, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a complete file of expected errors ({error})") from error
    if values.ndim != 2 or values.shape[1] != NUM_JOINTS:
        raise UserError(f"{path} must have the shape (N, {NUM_JOINTS}), but it is {values.shape}")
    return values / _MM_PER_M


def write_official(path: str | Path, xyz_m: NDArray[np.floating]) -> None:
    """Write the zip for FreiHAND's eval.py: `pred.json` with [xyz_list, verts_list], rounded to 1e-7 m.

    The vertices are 778 zeros per hand, as eval.py expects from a method without a mesh.

    Args:
        path: the zip file.
        xyz_m: (N, 21, 3) joints in metres, camera frame, FreiHAND order.

    Raises:
        UserError: a prediction is not finite.
    """
    xyz = _to_json(_check_keypoints(xyz_m, f"predictions for {path}").round(OFFICIAL_DECIMALS_M).tolist())
    no_mesh = _to_json([[0.0] * 3] * NUM_VERTICES)
    text = f"[{xyz},[{','.join([no_mesh] * len(xyz_m))}]]"
    entry = zipfile.ZipInfo(_PRED_JSON, date_time=_ZIP_EPOCH)
    entry.external_attr = 0o644 << 16
    with write_atomically(Path(path)) as part, zipfile.ZipFile(part, "w") as archive:
        archive.writestr(entry, text, compress_type=zipfile.ZIP_DEFLATED)


def read_official(path: str | Path) -> NDArray[np.float64]:
    """Read the keypoints of the zip that `write_official` writes.

    Returns:
        (N, 21, 3) joints in metres, FreiHAND order.

    Raises:
        UserError: the file is anything else.
    """
    try:
        with zipfile.ZipFile(_check_exists(path)) as archive, archive.open(_PRED_JSON) as file:
            text = _read_limited(file.read, path)
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise UserError(f"{path} is not a zip with {_PRED_JSON} in it ({error})") from error
    return _parse_keypoints(_from_json(text, path), f"{_PRED_JSON} in {path}")


def read_predictions(path: str | Path) -> NDArray[np.float64]:
    """Read the course's file, the official zip, or the pred.json in it, depending on the suffix.

    Returns:
        (N, 21, 3) joints in metres, FreiHAND order.

    Raises:
        UserError: the file is anything else.
    """
    if Path(path).suffix == ".zip":
        return read_official(path)
    if Path(path).suffix == ".json":
        return _parse_keypoints(_from_json(_read_bytes(path), path), str(path))
    return read_course(path)


def _parse_keypoints(content: object, source: str) -> NDArray[np.float64]:
    """Check and return the keypoints of pred.json. `source` describes where it was found."""
    if not isinstance(content, list) or len(content) != 2 or not all(isinstance(part, list) for part in content):
        raise UserError(f"{source} must be the two lists [xyz_list, verts_list]")
    xyz, vertices = content
    if len(xyz) != len(vertices):
        raise UserError(f"{source} has {len(xyz)} hands but {len(vertices)} meshes; they must agree")
    return _check_keypoints(xyz, source)


def _check_keypoints(xyz: object, source: str | Path) -> NDArray[np.float64]:
    try:
        array = np.asarray(xyz, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{source} must hold N x {NUM_JOINTS} x 3 numbers, but its lists have unequal lengths or other content"
        ) from error
    if array.ndim != 3 or array.shape[1:] != (NUM_JOINTS, 3):
        raise UserError(f"{source} must have the shape (N, {NUM_JOINTS}, 3), but it is {array.shape}")
    finite = np.isfinite(array).all(axis=(1, 2))
    if not finite.all():
        raise UserError(
            f"{source}: {np.count_nonzero(~finite)} of {len(array)} hands are not finite, the first is number "
            f"{int(np.argmin(finite))}; the network that predicted them has diverged (a smaller optimizer.lr helps)"
        )
    return array


def _to_json(values: list[object]) -> str:
    return json.dumps(values, separators=(",", ":"), allow_nan=False)


def _from_json(text: bytes, path: str | Path) -> object:
    try:
        return json.loads(text)
    except ValueError as error:  # also when the bytes are not UTF-8
        raise UserError(f"{path} does not hold JSON ({error})") from error


def _check_exists(path: str | Path) -> Path:
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; predictions are written at the end of a training run")
    return Path(path)


def _read_limited(read: Callable[[int], bytes], path: str | Path) -> bytes:
    """Read an unpacked file, at most `_MAX_JSON_BYTES` of it."""
    text = read(_MAX_JSON_BYTES + 1)
    if len(text) > _MAX_JSON_BYTES:
        raise UserError(f"{path} unpacks to more than {format_size(_MAX_JSON_BYTES)}; it is no file of predictions")
    return text


def _read_bytes(path: str | Path) -> bytes:
    return _check_exists(path).read_bytes()
