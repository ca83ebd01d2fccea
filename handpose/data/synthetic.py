"""Rendered hands in the layout of FreiHAND_pub_v2, with masks: the data set that needs no download.

`num_workers` processes draw the images once into root/<fingerprint of the parameters>/, and the reader of FreiHAND
reads them. `python -m handpose.data.synthetic --sheet FILE` draws a contact sheet to look at.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from handpose import skeleton
from handpose.data import hand_drawing, hand_scene
from handpose.data.freihand import FreiHand
from handpose.data.hand_scene import Difficulty
from handpose.data.sample import Splits
from handpose.errors import UserError, explain_file_error, format_size, get_free_bytes, is_about_files
from handpose.files import check_output_file, write_atomically, write_folder_atomically, write_json
from handpose.locks import hold_write_lock
from handpose.resources import count_cores
from handpose.utf8 import use_utf8
from handpose.yaml_files import load_yaml

GENERATOR_VERSION = 5
"""Increase it whenever the images or the files with them change. Data sets of another version are not used."""

_KEYS = ("K", "xyz", "scale")  # names of FreiHAND's JSON files
_MIN_IMAGE_SIZE = 32
_BYTES_PER_PIXEL = 1.1  # for a noisy image as JPEG, its mask and its annotation, with a margin
_FINGER_COLOURS = ((255, 70, 60), (255, 190, 0), (60, 220, 70), (60, 160, 255), (225, 90, 255))


@dataclass(eq=False)
class Synthetic:
    """The data set of rendered hands. `splits` draws it if it does not exist yet.

    Args:
        root: folder of all synthetic data sets, always data.root.
        num_train: number of hands to draw for training and validation.
        num_eval: number of hands to draw for the test split.
        image_size: side of the drawn images in pixels.
        seed: seed of the drawing.
        roll_deg: largest rotation of the hand in the image plane, to either side.
        tilt_deg: largest rotation of the hand out of the image plane, to either side.
        back_probability: probability that the back of the hand faces the camera and not the palm.
        pose_variety: factor on the spread of the finger poses.
        focal: smallest and largest focal length, in image sides.
        fill: smallest and largest longer side of the joints' bounding box, in image sides.
        cutoff_probability: probability that the hand reaches over the border of the image.
        occluder_probability: probability of a shape in front of the hand.
        blur_probability: probability of blur.
        noise: largest standard deviation of the sensor noise, in grey levels of 255.
        clutter: how busy the background is, from 0 (plain) to 1.
        val_fraction: fraction of the training poses that is held out for validation.
        split: what is held out; blocks: runs of neighbouring poses; random: single poses.
        num_blocks: number of runs of held-out poses, with split=blocks.
        split_seed: seed that places the blocks or draws the poses.
        num_workers: processes that draw; None: one for each core.

    Raises:
        UserError: a value is out of its range.
    """

    name: ClassVar[str] = "synthetic"

    root: str
    _: KW_ONLY
    num_train: int
    num_eval: int
    image_size: int
    seed: int
    roll_deg: float
    tilt_deg: float
    back_probability: float
    pose_variety: float
    focal: Sequence[float]
    fill: Sequence[float]
    cutoff_probability: float
    occluder_probability: float
    blur_probability: float
    noise: float
    clutter: float
    val_fraction: float
    split: Literal["blocks", "random"]
    num_blocks: int
    split_seed: int
    num_workers: int | None = None

    def __post_init__(self) -> None:
        least = {"num_train": 2, "num_eval": 1, "image_size": _MIN_IMAGE_SIZE, "seed": 0}
        for name, number in least.items():
            _check_count(name, getattr(self, name), number)
        if self.num_workers is not None:
            _check_count("num_workers", self.num_workers, 1)
        self.difficulty = _make_difficulty(**{each.name: getattr(self, each.name) for each in fields(Difficulty)})
        self.counts = {"training": self.num_train, "evaluation": self.num_eval}
        self._root = Path(self.root).expanduser().absolute()

    def splits(self) -> Splits:
        """Return the splits as `FreiHand` reads them. Draw the images first if necessary.

        Raises:
            UserError: the folder cannot be written, or the disk is too small.
        """
        names = ("val_fraction", "split", "num_blocks", "split_seed")
        return FreiHand(str(self.generate()), **{name: getattr(self, name) for name in names}).splits()

    @property
    def folder(self) -> Path:
        """Folder of the data set with these parameters. Its name is a hash of everything that its pixels depend on."""
        text = json.dumps(self._describe(), sort_keys=True)
        return self._root / f"hands-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _describe(self) -> dict[str, Any]:
        return {
            "generator_version": GENERATOR_VERSION,
            "counts": self.counts,
            "image_size": self.image_size,
            "seed": self.seed,
            "difficulty": asdict(self.difficulty),
        }

    def generate(self) -> Path:
        """Draw the data set unless it exists, and return its folder.

        If several processes call this, one draws and the others wait.
        """
        if not self._is_complete():
            lock = self.folder.with_name(f"{self.folder.name}.lock")
            wait = f"Waiting for another process that draws {self.folder}"
            with hold_write_lock(lock, on_wait=wait, make_error=lambda error: _make_write_error(self._root, error)):
                if not self._is_complete():
                    self._draw_all()
        return self.folder

    def _is_complete(self) -> bool:
        """Whether the folder still has all its files; some may have been lost since it was made."""
        try:
            images = {split: len(os.listdir(self.folder / split / "rgb")) for split in hand_drawing.SPLITS}
            masks = len(os.listdir(self.folder / hand_drawing.MASKED_SPLIT / "mask"))
        except OSError:
            return False
        annotations = [self.folder / f"{split}_{key}.json" for split in hand_drawing.SPLITS for key in _KEYS]
        is_complete = images == self.counts and masks == self.counts[hand_drawing.MASKED_SPLIT]
        return is_complete and all(path.is_file() for path in annotations)

    def _draw_all(self) -> None:
        """Draw into a temporary folder and rename it last, so that a folder with the final name is complete.

        The caller holds the lock.
        """
        start = time.monotonic()
        try:
            with write_folder_atomically(self.folder) as partial:
                _check_space(self._root, sum(self.counts.values()) * self.image_size**2 * _BYTES_PER_PIXEL)
                for split in hand_drawing.SPLITS:
                    (partial / split / "rgb").mkdir(parents=True)
                (partial / hand_drawing.MASKED_SPLIT / "mask").mkdir()
                self._write_annotations(partial, self._run_workers(partial))
        except OSError as error:
            raise _make_write_error(self._root, error) from None
        seconds = time.monotonic() - start
        print(f"Drew {sum(self.counts.values())} hands in {self.folder} in {seconds:.1f} s", file=sys.stderr)

    def _write_annotations(self, folder: Path, rows: dict[str, list[hand_drawing.Row]]) -> None:
        for split, pictures in rows.items():
            for key in _KEYS:
                write_json(folder / f"{split}_{key}.json", [row[key] for row in pictures])
        write_json(folder / "synthetic.json", self._describe(), indent=2)

    def _run_workers(self, folder: Path) -> dict[str, list[hand_drawing.Row]]:
        """Distribute the images among processes, and return the annotations of each split in order."""
        total = sum(self.counts.values())
        num_workers = min(self.num_workers or count_cores(), total)
        order = hand_drawing.DrawingJob(
            str(folder), tuple(self.counts.values()), self.image_size, self.seed, self.difficulty
        )
        rows: dict[tuple[str, int], hand_drawing.Row] = {}
        stop = threading.Event()

        def work(worker: int, advance: Callable[[], None]) -> None:
            for row in hand_drawing.draw_in_process(order, worker, num_workers):
                rows[row["split"], row["index"]] = row
                advance()
                if stop.is_set():
                    break

        with _show_progress(total) as advance, ThreadPoolExecutor(num_workers) as pool:
            try:
                for done in [pool.submit(work, worker, advance) for worker in range(num_workers)]:
                    done.result()
            finally:
                stop.set()
        return {split: [rows[split, i] for i in range(count)] for split, count in self.counts.items()}


_RANGES = {
    "roll_deg": (0, 180),
    "tilt_deg": (0, 90),
    "back_probability": (0, 1),
    "pose_variety": (0, 2),
    "focal": (0.8, 10),
    "fill": (0.1, 1),
    "cutoff_probability": (0, 1),
    "occluder_probability": (0, 1),
    "blur_probability": (0, 1),
    "noise": (0, 50),
    "clutter": (0, 1),
}


def _make_difficulty(**values: Any) -> Difficulty:
    """Make a Difficulty, or raise UserError if a value is outside _RANGES."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        check = _check_pair if name in ("focal", "fill") else _check_in_range
        checked[name] = check(name, value, *_RANGES[name])
    return Difficulty(**checked)


def _check_count(name: str, value: object, min_value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < min_value:
        raise UserError(f"data.{name} must be a whole number of at least {min_value}, but got {value!r}")


def _check_in_range(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"data.{name} must be a number from {low:g} to {high:g}, but got {value!r}")
    return float(value)


def _check_pair(name: str, values: object, low: float, high: float) -> tuple[float, float]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise UserError(f"data.{name} must be a pair [low, high], but got {values!r}")
    first, last = (_check_in_range(name, value, low, high) for value in values)
    if first > last:
        raise UserError(f"data.{name} must be a pair [low, high] with low <= high, but got [{first:g}, {last:g}]")
    return first, last


def _make_write_error(root: Path, error: OSError) -> UserError:
    reason = explain_file_error(error, remedy="choose another folder on a local disk")
    return UserError(f"the synthetic hands cannot be written to data.root={root} because {reason}")


def _check_space(root: Path, needed_bytes: float) -> None:
    free = get_free_bytes(root)
    if free < needed_bytes:
        raise UserError(
            f"the synthetic set needs up to {format_size(needed_bytes)}, but data.root={root} has "
            f"{format_size(free)} free; choose another folder, or a smaller data.num_train or data.image_size"
        )


@contextmanager
def _show_progress(total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each image. It moves a progress bar on stderr.

    If stderr is not a terminal, only one line is printed.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"Drawing {total} synthetic hands; this happens once", file=sys.stderr, flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Drawing synthetic hands (once)", total=total)
        yield lambda: bar.advance(task)


def draw_contact_sheet(path: Path, *, num: int, seed: int, image_size: int, difficulty: Difficulty) -> None:
    """Write a contact sheet of the first training images, plain and below with joints and bones drawn in.

    Args:
        path: image file to write.
        num: number of hands.
        seed: seed of the data set.
        image_size: side of an image in pixels.
        difficulty: parameters of the images.

    Raises:
        UserError: the file name does not have the extension of an image format.
        OSError: the file cannot be written.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise UserError(f"the sheet {path} must have the name of a picture, like sheet.png")
    zoom = max(1, round(256 / image_size))
    tile, columns = image_size * zoom, min(num, 6)
    sheet = Image.new("RGB", (columns * tile, -(-num // columns) * 2 * tile))
    for index in range(num):
        picture = hand_scene.draw_image(seed, 0, index, image_size, difficulty)
        plain = Image.fromarray(picture.image).resize((tile, tile), Image.Resampling.BICUBIC)
        row, column = divmod(index, columns)
        sheet.paste(plain, (column * tile, 2 * row * tile))
        _draw_skeleton(plain, (picture.uv + 0.5) * zoom - 0.5)
        sheet.paste(plain, (column * tile, (2 * row + 1) * tile))
    with write_atomically(path) as part:
        sheet.save(part, kind)


def _draw_skeleton(image: Image.Image, uv: NDArray[np.float64]) -> None:
    draw = ImageDraw.Draw(image)
    for parent, child in skeleton.BONES:
        ends = [tuple(uv[parent].tolist()), tuple(uv[child].tolist())]
        draw.line(ends, fill=_FINGER_COLOURS[(child - 1) // 4], width=2)
    for u, v in uv.tolist():
        draw.ellipse((u - 2, v - 2, u + 2, v + 2), fill=(255, 255, 255))


def read_default_difficulty() -> Difficulty:
    """Read the difficulty from configs/data/synthetic.yaml, which contains the defaults."""
    path = Path(__file__).resolve().parents[2] / "configs" / "data" / "synthetic.yaml"
    source = load_yaml(path)["source"]
    return _make_difficulty(**{field.name: source[field.name] for field in fields(Difficulty)})


_DESCRIPTION = """\
Draw synthetic hands, and write them with their joints to one picture.

  python -m handpose.data.synthetic --sheet hands.png --num 12
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m handpose.data.synthetic --sheet FILE` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m handpose.data.synthetic",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sheet", type=Path, required=True, metavar="FILE", help="picture to write")
    parser.add_argument("--num", type=int, default=24, help="number of hands; default: 24")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set; default: 0")
    parser.add_argument(
        "--image-size", type=int, default=128, metavar="PX", help="side of each hand in pixels; default: 128"
    )
    options = parser.parse_args(arguments)
    try:
        _check_count("num", options.num, 1)
        _check_count("seed", options.seed, 0)
        _check_count("image_size", options.image_size, _MIN_IMAGE_SIZE)
        if not options.sheet.absolute().parent.exists():
            raise UserError(f"--sheet {options.sheet} cannot be written: its folder does not exist")
        check_output_file(options.sheet, "--sheet")
        draw_contact_sheet(
            options.sheet,
            num=options.num,
            seed=options.seed,
            image_size=options.image_size,
            difficulty=read_default_difficulty(),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not is_about_files(error):
            raise
        print(f"error: {explain_file_error(error)}", file=sys.stderr)
        return 2
    print(f"Wrote {options.num} hands to {options.sheet}")
    return 0


if __name__ == "__main__":
    use_utf8()
    sys.exit(main())
