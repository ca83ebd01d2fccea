"""Measure the cost of a batch: time of the packed loader and of loaders for one image at a time, and memory.

    python benchmarks/data.py
    python benchmarks/data.py --root FOLDER                 FreiHAND_pub_v2's layout, instead of drawn hands
    python benchmarks/data.py --parts memory --copies 512   the annotations of 130,000 images

All loaders read the same JPEG files, on one core, in a new random order for each run. The runs of the loaders are
interleaved. "turned": the packed loader's full augmentation (virtual camera and colour, bilinear), against a rotation
by up to half a circle with nearest-neighbour sampling in the others. Batches are floating-point numbers in [0, 1] in
all rows but the first, whose images remain bytes until they are on the trial's device.

Memory: one after another, processes open the packed training set, iterate over it once, and keep it open. The table has
the memory of each process after that, minus its memory after its imports and one batch of another set: private (not
shared with another process) and proportional (shared pages divided by the number of processes that share them).
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from omegaconf import DictConfig  # noqa: E402

from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.config import compose, instantiate_key, quote_override  # noqa: E402
from handpose.data.datamodule import HandDataModule  # noqa: E402
from handpose.data.sample import Annotations  # noqa: E402
from handpose.training.build import build_data  # noqa: E402

cv2: Any = importlib.import_module("cv2") if importlib.util.find_spec("cv2") else None  # only for comparison

_TARGET_MB = 50
PixelArray = NDArray[np.uint8]


def decode_pil(path: Path) -> PixelArray:
    """Decode an RGB image (H, W, 3) with PIL."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def decode_opencv(path: Path) -> PixelArray:
    """Decode an RGB image (H, W, 3) with OpenCV."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def decode_simplejpeg(path: Path) -> PixelArray:
    """Decode an RGB image (H, W, 3) with simplejpeg."""
    return simplejpeg.decode_jpeg(path.read_bytes(), colorspace="rgb")


def rotate_pil(image: PixelArray, angle_deg: float) -> PixelArray:
    """Rotate (H, W, 3) counterclockwise about its centre with nearest-neighbour sampling."""
    return np.asarray(Image.fromarray(image).rotate(angle_deg, Image.Resampling.NEAREST))


def rotate_opencv(image: PixelArray, angle_deg: float) -> PixelArray:
    """Rotate (H, W, 3) counterclockwise about its centre with nearest-neighbour sampling."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle_deg, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_NEAREST)


class PerImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """A data set that loads one image at a time, as most loaders do: decode, rotate image and joints, make tensors.

    An item is an image (3, H, W) in [0, 1] and its joints (K, 3) in metres.
    """

    def __init__(
        self,
        annotations: Annotations,
        decode: Callable[[Path], PixelArray],
        rotate: Callable[[PixelArray, float], PixelArray] | None = None,
    ) -> None:
        assert annotations.xyz_m is not None, "training images have joints"
        self.files = annotations.files
        self.xyz_m = torch.from_numpy(annotations.xyz_m.astype(np.float32))
        self.decode = decode
        self.rotate = rotate
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, xyz_m = self.decode(self.files[index]), self.xyz_m[index]
        if self.rotate is not None:
            angle_deg = self.generator.uniform(-180.0, 180.0)
            image, xyz_m = self.rotate(image, angle_deg), xyz_m @ _rotate_z(-angle_deg).T
        return torch.tensor(image).permute(2, 0, 1).contiguous().float().div(255.0), xyz_m


def _rotate_z(angle_deg: float) -> Tensor:
    """Return the (3, 3) rotation of joints in the camera frame that turns them clockwise in the image."""
    cosine, sine = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def make_config(folder: Path, *, image_size: int, num_images: int, overrides: Iterable[str] = ()) -> DictConfig:
    """Compose a configuration with about `num_images` drawn training hands, and a tenth of that for validation.

    Args:
        folder: the folder for the data and the outputs.
        image_size: side of the images in pixels.
        num_images: number of training images, about.
        overrides: further overrides.
    """
    return compose(
        "train",
        [
            quote_override("paths.data", str(folder / "data")),
            quote_override("paths.output", str(folder / "outputs")),
            f"data.image_size={image_size}",
            f"data.source.num_train={math.ceil(num_images / 0.9)}",
            "data.source.num_eval=10",
            "data.source.num_blocks=1",
            "logger=none",
            "checkpoints.enabled=false",
            *overrides,
        ],
    )


def repeat_dataset(root: Path, folder: Path, copies: int) -> Path:
    """Make a data set that has every image of another one `copies` times under different names, as links."""
    for split in ("training", "evaluation"):
        (folder / split / "rgb").mkdir(parents=True)
        files = sorted((root / split / "rgb").glob("*.jpg"))
        for number in range(copies * len(files)):
            target = folder / split / "rgb" / f"{number:08d}.jpg"
            os.symlink(files[number % len(files)].resolve(), target)
        for name in ("K", "xyz", "scale"):
            entries = root / f"{split}_{name}.json"
            if entries.exists():
                (folder / entries.name).write_text(
                    json.dumps(json.loads(entries.read_text(encoding="utf-8")) * copies), encoding="utf-8"
                )
    return folder


class LoaderBenchmark(NamedTuple):
    """A row of the table.

    Attributes:
        name: the name of the loader.
        batches: the loader.
        work: what is done with each batch.
    """

    name: str
    batches: Iterable[Any]
    work: Callable[[Any], Any]


def list_loaders(config: DictConfig, data: HandDataModule) -> list[LoaderBenchmark]:
    """List all loaders of the table, over the training split."""
    augment, images = instantiate_key(config, "augment"), data.splits.train
    per_image = {"PIL": (decode_pil, rotate_pil), "simplejpeg, turned by PIL": (decode_simplejpeg, rotate_pil)}
    if cv2 is not None:
        per_image["OpenCV"] = (decode_opencv, rotate_opencv)
    rows = [
        LoaderBenchmark("packed, bytes", data.train_dataloader(), lambda batch: batch),
        LoaderBenchmark("packed", data.train_dataloader(), lambda batch: batch.image.float() / 255.0),
        LoaderBenchmark("packed, turned", data.train_dataloader(), lambda batch: augment(batch, _make_generator())),
    ]
    for name, (decode, rotate) in per_image.items():
        for label, turn in ((name.partition(",")[0], None), (f"{name}, turned".replace(", turned by", " by"), rotate)):
            dataset = PerImageDataset(images, decode, turn)
            rows.append(
                LoaderBenchmark(label, DataLoader(dataset, data.batch_size, shuffle=True, drop_last=True), lambda b: b)
            )
    return rows


def _make_generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(time.monotonic_ns()) % 2**31)


def measure_images_per_s(loader: LoaderBenchmark, *, num_batches: int, batch_size: int) -> float:
    """Measure the images/s of one run."""
    batches = _repeat_forever(loader.batches)
    loader.work(next(batches))
    began = time.perf_counter()
    for batch in islice(batches, num_batches):
        loader.work(batch)
    return num_batches * batch_size / (time.perf_counter() - began)


def _repeat_forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def compare_loaders(config: DictConfig, data: HandDataModule, *, repeats: int, num_batches: int) -> dict[str, Any]:
    """Print and return the images/s of each loader: the medians of interleaved runs."""
    rows = list_loaders(config, data)
    runs: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            runs[row.name].append(measure_images_per_s(row, num_batches=num_batches, batch_size=data.batch_size))
    size_kb = statistics.mean(path.stat().st_size for path in data.splits.train.files[:256]) / 1e3
    print(f"{data.image_size} px, JPEGs of {size_kb:.1f} kB, batches of {data.batch_size}, one core")
    print(f"{'loader':28}{'images/s':>10}")
    for name, values in runs.items():
        print(f"{name:28}{statistics.median(values):10.0f}")
    if cv2 is None:
        print("OpenCV is left out: opencv-python-headless is not installed")
    medians = {name: round(statistics.median(values)) for name, values in runs.items()}
    return {"image_size": data.image_size, "jpeg_kb": round(size_kb, 1), "images_per_s": medians}


class ProcessMemory(NamedTuple):
    """The memory of a process in MB.

    Attributes:
        private: not shared with another process.
        proportional: shared pages are divided by the number of processes that share them.
        mapped: of files, shared or not. The kernel can reclaim it.
    """

    private: float
    proportional: float
    mapped: float

    @classmethod
    def measure(cls) -> "ProcessMemory":
        """Measure this process, as Linux counts it."""
        fields = dict(
            _parse_kb(line) for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
        )
        private = fields["Private_Clean"] + fields["Private_Dirty"]
        return cls(private / 1e3, fields["Pss"] / 1e3, (fields["Rss"] - fields["Anonymous"]) / 1e3)


def _parse_kb(line: str) -> tuple[str, int]:
    name, value = line.split()[:2]
    return name.rstrip(":"), int(value)


def _iterate_in_process(connection: Connection, config: DictConfig, other: DictConfig) -> None:
    """In its own process: measure the memory for opening the data and iterating over it once, then wait."""
    torch.set_num_threads(1)
    next(iter(open_data(other).train_dataloader()))  # a first batch loads and allocates this for any data set
    before = ProcessMemory.measure()
    data = open_data(config)
    for _ in data.train_dataloader():
        pass
    after = ProcessMemory.measure()
    connection.send(ProcessMemory(*(b - a for a, b in zip(before, after, strict=True))))
    connection.recv()
    del data


def open_data(config: DictConfig) -> HandDataModule:
    """Return the data module of a configuration, ready to train."""
    data = build_data(config, quiet=True)
    data.setup("fit")
    return data


def measure_memory(config: DictConfig, other: DictConfig, *, processes: int) -> list[ProcessMemory]:
    """Measure how much memory each of several processes needs for the data while the others exist, in MB."""
    context = multiprocessing.get_context("spawn")
    taken, waiting = [], []
    for _ in range(processes):
        parent_end, child_end = context.Pipe()
        process = context.Process(target=_iterate_in_process, args=(child_end, config, other))
        process.start()
        child_end.close()
        waiting.append((process, parent_end))
        taken.append(parent_end.recv())
    for process, connection in waiting:
        connection.send(None)
        process.join()
    return taken


def compare_memory(config: DictConfig, other: DictConfig, *, processes: int) -> dict[str, Any]:
    """Print and return how much memory each process needs for the data."""
    data = open_data(config)
    num_images, size = len(data.splits.train), data.image_size
    store_mb = num_images * size**2 * 3 / 1e6
    rows = measure_memory(config, other, processes=processes)
    print(f"memory for {num_images} training images, {store_mb:.0f} MB packed; goal under {_TARGET_MB} MB private")
    print(f"{'process':>8}{'private MB':>12}{'proportional MB':>17}{'mapped MB':>11}")
    for number, row in enumerate(rows, start=1):
        print(f"{number:8}{row.private:12.1f}{row.proportional:17.1f}{row.mapped:11.1f}")
    figures = [{name: round(value, 1) for name, value in row._asdict().items()} for row in rows]
    return {"images": num_images, "packed_mb": round(store_mb), "goal_mb": _TARGET_MB, "processes": figures}


def _set_root(config: DictConfig, root: Path, folder: Path) -> DictConfig:
    """Compose the same run for a data set in FreiHAND's layout."""
    paths = [quote_override("data.root", str(root)), quote_override("paths.output", str(folder / "outputs"))]
    sizes = [f"data.image_size={config.data.image_size}", f"data.batch_size={config.data.batch_size}"]
    return compose("train", ["data=freihand", *paths, *sizes, "data.source.num_blocks=1"])


def main() -> None:
    """Print both tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], help="sides of the images in pixels")
    parser.add_argument("--images", type=int, default=256, help="number of synthetic hands; default: %(default)s")
    parser.add_argument(
        "--root", type=Path, help="a data set in the layout of FreiHAND_pub_v2, instead of synthetic hands"
    )
    parser.add_argument(
        "--copies", type=int, default=16, help="copies of every image for the memory measurement; default: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch; default: %(default)s")
    parser.add_argument("--batches", type=int, default=20, help="batches per run; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each loader; default: %(default)s")
    parser.add_argument(
        "--processes", type=int, default=4, help="processes of the memory measurement; default: %(default)s"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=["loaders", "memory"], default=["loaders", "memory"], help="what to measure"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "benchmarks" / "results" / "data.json",
        help="file for the figures, as JSON; default: %(default)s",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"repeats": given.repeats, "batch_size": given.batch_size, "loaders": [], "memory": []}
    print(format_machine())
    for size in given.image_size:
        with tempfile.TemporaryDirectory() as name:
            folder, batch = Path(name), [f"data.batch_size={given.batch_size}"]
            config = make_config(folder, image_size=size, num_images=given.images, overrides=batch)
            source = instantiate_key(config, "data.source")
            root = given.root or source.generate()
            config = _set_root(config, root, folder)
            if "loaders" in given.parts:
                data = open_data(config)
                rows = compare_loaders(config, data, repeats=given.repeats, num_batches=given.batches)
                results["loaders"].append(rows)
            if "memory" in given.parts:
                many = _set_root(config, repeat_dataset(root, folder / "repeated", given.copies), folder)
                results["memory"].append(compare_memory(many, config, processes=given.processes))
    write_results(given.output, results)


if __name__ == "__main__":
    main()
