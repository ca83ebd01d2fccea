"""A process that draws its part of the synthetic images, and the function that starts it.

The process is started as `python -m handpose.data.hand_drawing`, not by `multiprocessing`: child processes of the
latter import the caller's main script again. That takes seconds if the script imports torch, and runs the script a
second time if it has no main guard.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

import handpose
from handpose.data import hand_scene
from handpose.errors import add_file_name, is_about_files
from handpose.utf8 import use_utf8

Row = dict[str, Any]
"""Annotation of an image: split, index, and K, xyz (metres) and scale as in FreiHAND's JSON files."""

SPLITS = ("training", "evaluation")
MASKED_SPLIT = "training"
"""The split with masks, as in FreiHAND."""
JPEG_QUALITY = 92
_FILE_ERROR = "OSError "
"""Prefix on stderr of a process that could not write a file. The arguments of the exception follow as JSON."""


@dataclass(frozen=True)
class DrawingJob:
    """What all processes of a data set draw together.

    Attributes:
        folder: folder of the data set, with the folders <split>/rgb and training/mask.
        counts: number of images of each of SPLITS.
        image_size: side of the images in pixels.
        seed: seed of the data set.
        difficulty: parameters of the images.
    """

    folder: str
    counts: tuple[int, ...]
    image_size: int
    seed: int
    difficulty: hand_scene.Difficulty


def draw_worker_part(order: DrawingJob, worker: int, num_workers: int) -> Iterator[Row]:
    """Draw every num_workers-th image and write it to its file.

    Args:
        order: the data set.
        worker: index of this process, counted from 0.
        num_workers: number of processes.

    Yields:
        The annotation of each image.
    """
    pictures = [(split, index) for split, count in enumerate(order.counts) for index in range(count)]
    for split, index in pictures[worker::num_workers]:
        picture = hand_scene.draw_image(order.seed, split, index, order.image_size, order.difficulty)
        jpeg = simplejpeg.encode_jpeg(picture.image, JPEG_QUALITY, colorsubsampling="420")
        _write(Path(order.folder) / SPLITS[split] / "rgb" / f"{index:08d}.jpg", jpeg)
        if SPLITS[split] == MASKED_SPLIT:
            _write(Path(order.folder) / MASKED_SPLIT / "mask" / f"{index:08d}.jpg", _encode_mask(picture))
        yield {
            "split": SPLITS[split],
            "index": index,
            "K": np.round(picture.intrinsics, 6).tolist(),
            "xyz": np.round(picture.xyz_m, 8).tolist(),
            "scale": round(picture.scale_m, 8),
        }


def _write(file: Path, content: bytes) -> None:
    with add_file_name(file):
        file.write_bytes(content)


def _encode_mask(picture: hand_scene.SyntheticImage) -> bytes:
    mask = np.where(picture.mask, np.uint8(255), np.uint8(0))[..., None]
    return simplejpeg.encode_jpeg(mask, JPEG_QUALITY, colorspace="GRAY", colorsubsampling="GRAY")


def draw_in_process(order: DrawingJob, worker: int, num_workers: int) -> Iterator[Row]:
    """Run `draw_worker_part` in a separate process, which ends with this iterator.

    Args:
        order: the data set.
        worker: index of the process, counted from 0.
        num_workers: number of processes.

    Yields:
        The annotation of each image.

    Raises:
        OSError: a file cannot be written, for example on a full disk.
        RuntimeError: the process failed for any other reason.
    """
    package_parent = str(Path(handpose.__file__).resolve().parents[1])
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    request = json.dumps({"order": asdict(order), "worker": worker, "num_workers": num_workers})
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdin,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
    ):
        stdin.write(request)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "handpose.data.hand_drawing"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            encoding="utf-8",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
            if process.wait() != 0:
                stderr.seek(0)
                _raise_failure(stderr.read())
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _raise_failure(stderr: str) -> None:
    arguments = stderr.rpartition(_FILE_ERROR)[2]
    if arguments != stderr:
        raise OSError(*json.loads(arguments))
    raise RuntimeError(f"a process that draws synthetic hands failed:\n{stderr[-2000:]}")


def _run_worker() -> None:
    request = json.load(sys.stdin)
    difficulty = hand_scene.Difficulty(**request["order"].pop("difficulty"))
    order = DrawingJob(**request["order"], difficulty=difficulty)
    try:
        for row in draw_worker_part(order, request["worker"], request["num_workers"]):
            print(json.dumps(row), flush=True)
    except OSError as error:
        if not is_about_files(error):
            raise
        sys.exit(_FILE_ERROR + json.dumps([error.errno, error.strerror, error.filename]))


if __name__ == "__main__":
    use_utf8()
    _run_worker()
