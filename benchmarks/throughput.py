"""Measure training images/s of our Trainer, of a bare PyTorch loop, and of the pipeline that this project started from.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --image-size 224 --encoder mobilenetv3_small_100 efficientnet_lite0
    python benchmarks/throughput.py --precision bf16-mixed --compile default

All have the same network, batch size and number of threads (one, as a slot of a sweep), on drawn hands. The runs are
interleaved, and the table has their medians.

    bare        a loop on one batch that is already augmented: network, loss, backward, clipping, optimizer, schedule
    augmented   the same, with our augmentation of that batch in each step
    trainer     `make_training_trainer` and `HandDataModule` as in a trial of a sweep: loading, augmentation, the check
                that every loss is finite, and what the Trainer does between steps. Goal: 0.95 of bare on a CPU
    original    each image is decoded by PIL, rotated with its joints by up to half a circle (nearest neighbour),
                converted to a tensor and collated in the training process; soft-argmax and squared error in mm, Adam,
                the loss and the mean joint error read as Python numbers in each step, images and weights in PyTorch's
                default layout. Goal: ours at least 3 times as fast

In addition, in milliseconds per step: decoding, rotating and collating in the original, and loading and augmentation in
ours.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.data import PerImageDataset, decode_pil, make_config, rotate_pil  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.data.augment import View  # noqa: E402
from handpose.data.datamodule import HandDataModule  # noqa: E402
from handpose.data.sample import HandBatch  # noqa: E402
from handpose.heatmaps import CameraAxes, HeatmapTruth  # noqa: E402
from handpose.losses import CoordinateMse  # noqa: E402
from handpose.training.fit import prepare_run  # noqa: E402
from handpose.training.module import HandPose, make_parameter_groups  # noqa: E402
from handpose.training.results import RunFolders  # noqa: E402
from handpose.training.trainer import make_training_trainer, suppress_library_output  # noqa: E402

_WARM_UP = 4  # number of steps of each run that are not measured
_RANGES_MM = {"x_mm": (-400.0, 400.0), "y_mm": (-400.0, 400.0), "z_mm": (0.0, 3000.0)}


@dataclass(frozen=True)
class BenchmarkRun:
    """A configuration that is ready to train. `steps` is the number of steps of a run after the warm-up."""

    config: DictConfig
    module: HandPose
    data: HandDataModule
    device: torch.device
    steps: int

    @classmethod
    def from_config(cls, config: DictConfig, *, steps: int) -> "BenchmarkRun":
        prepared = prepare_run(config, stage="fit", quiet=True)
        on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
        device = torch.device("cuda" if on_gpu else "cpu")
        return cls(config, prepared.module, prepared.data, device, steps)

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the configured precision."""
        if self.config.trainer.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def resident(self) -> HandBatch:
        """Return a training batch on the device."""
        return HandBatch(*(field.to(self.device) for field in next(iter(self.data.train_dataloader()))))


def time_steps(step: Callable[[], object], run: BenchmarkRun) -> float:
    """Return the mean seconds per step after the warm-up."""
    for _ in range(_WARM_UP):
        step()
    _synchronize(run.device)
    began = time.perf_counter()
    for _ in range(run.steps):
        step()
    _synchronize(run.device)
    return (time.perf_counter() - began) / run.steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_bare(run: BenchmarkRun, *, augmented: bool) -> float:
    """Measure the seconds per step of a plain loop on one resident batch."""
    module = run.module.to(run.device).train()
    optimizer = module.optimizer(make_parameter_groups(module.net))
    schedule = module.lr_schedule(optimizer, num_steps=1000, steps_per_epoch=100)
    batch = run.resident()
    view = module.augment(batch, torch.Generator().manual_seed(0))
    view = view._replace(image=view.image.contiguous(memory_format=torch.channels_last))
    parameters = list(module.net.parameters())

    def step() -> None:
        current: View = module.augment(batch, torch.Generator().manual_seed(0)) if augmented else view
        size = (current.image.shape[-2], current.image.shape[-1])
        with run.autocast():
            coordinates = module.axes.encode(current.xyz_m, current.intrinsics, size)
            truth = HeatmapTruth(coordinates, current.xyz_m, current.intrinsics, size)
            terms = module.loss(module.net(current.image), truth, module.axes)
            loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, run.config.trainer.gradient_clip_val)
        optimizer.step()
        schedule.step()

    return time_steps(step, run)


class StepClock(pl.Callback):
    """Times the steps of a Trainer, and checks every loss as a trial of a sweep does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began, self.steps_s = 0.0, 0.0
        self.num_steps = 0
        self.is_finite: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_finite = torch.isfinite(outputs["loss"].detach()).all()
        self.is_finite = is_finite if self.is_finite is None else self.is_finite & is_finite
        self.num_steps += 1
        if self.num_steps == _WARM_UP:
            _synchronize(self.device)
            self.began = time.perf_counter()
        if self.num_steps == trainer.limit_train_batches:
            _synchronize(self.device)
            self.steps_s = (time.perf_counter() - self.began) / (self.num_steps - _WARM_UP)


def measure_trainer(run: BenchmarkRun, folder: Path) -> float:
    """Measure the seconds per step of our Trainer with loader and augmentation."""
    clock = StepClock(run.device)
    config = run.config.copy()
    config.trainer.max_epochs = 1
    config.trainer.limit_train_batches = _WARM_UP + run.steps
    config.trainer.limit_val_batches = 1
    with suppress_library_output():
        make_training_trainer(config, RunFolders(folder, folder, folder), callbacks=[clock], quiet=True).fit(
            run.module, datamodule=run.data
        )
    return clock.steps_s


class OriginalPipeline:
    """The pipeline that this project started from, rebuilt from its description, with one of our networks."""

    def __init__(self, run: BenchmarkRun) -> None:
        self.run = run
        self.net = copy.deepcopy(run.module.net).to(memory_format=torch.contiguous_format).to(run.device)
        self.axes = CameraAxes(sigma=0.02, target="gaussian", read_out="soft_argmax", **_RANGES_MM).to(run.device)
        self.loss = CoordinateMse()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)

    def iterate_batches(self) -> Iterator[list[Tensor]]:
        """Yield batches without end."""
        dataset = PerImageDataset(self.run.data.splits.train, decode_pil, rotate_pil)
        while True:
            yield from DataLoader(dataset, self.run.batch_size, shuffle=True, drop_last=True, num_workers=0)

    def measure_training(self) -> float:
        """Measure the seconds per step."""
        batches = self.iterate_batches()
        self.net.train()

        def step() -> float:
            image, xyz_m = (field.to(self.run.device) for field in next(batches))
            target = self.axes.encode(xyz_m, xyz_m, (1, 1))
            with self.run.autocast():
                logits = self.net(image)
            loss = self.loss(logits, HeatmapTruth(target, xyz_m, xyz_m, (1, 1)), self.axes)["coordinate"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            predicted_m = self.axes.decode(self.axes.read_out(logits).detach(), xyz_m, (1, 1), xyz_m)
            return loss.item() + 1000 * torch.linalg.vector_norm(predicted_m - xyz_m, dim=-1).mean().item()

        return time_steps(step, self.run)

    def measure_parts(self) -> dict[str, float]:
        """Measure the milliseconds per step of everything before the network."""
        images, count = self.run.data.splits.train, self.run.batch_size
        files, batches = list(images.files[:count]), self.iterate_batches()
        pixels = [decode_pil(path) for path in files]
        seconds = {
            "original: decoding": time_steps(lambda: [decode_pil(path) for path in files], self.run),
            "original: turning": time_steps(lambda: [rotate_pil(image, 100.0) for image in pixels], self.run),
            "original: decoding, turning, tensors, collating": time_steps(lambda: next(batches), self.run),
        }
        return {name: round(1e3 * value, 2) for name, value in seconds.items()}


def measure_parts(run: BenchmarkRun) -> dict[str, float]:
    """Measure the milliseconds per step of loading and of augmentation."""
    batches, batch = _repeat_forever(run.data), run.resident()
    seconds = {
        "ours: loading": time_steps(lambda: next(batches), run),
        "ours: augmentation": time_steps(lambda: run.module.augment(batch, torch.Generator().manual_seed(0)), run),
    }
    return {name: round(1e3 * value, 2) for name, value in seconds.items()}


def _repeat_forever(data: HandDataModule) -> Iterator[HandBatch]:
    while True:
        yield from data.train_dataloader()


def measure_row(config: DictConfig, *, steps: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Measure the images/s of all four, as medians of interleaved runs, and the parts of a step."""
    run = BenchmarkRun.from_config(config, steps=steps)
    original = OriginalPipeline(run)
    sides: dict[str, Callable[[], float]] = {
        "bare": lambda: measure_bare(run, augmented=False),
        "augmented": lambda: measure_bare(run, augmented=True),
        "trainer": lambda: measure_trainer(run, folder),
        "original": original.measure_training,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    rates = {name: run.batch_size / statistics.median(values) for name, values in seconds.items()}
    return {
        "encoder": config.model.encoder.name,
        "image_size": config.data.image_size,
        "precision": config.trainer.precision,
        "compile": config.model.compile,
        "steps": steps,
        "repeats": repeats,
        "images_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "runs": {name: [round(run.batch_size / value, 1) for value in values] for name, values in seconds.items()},
        "trainer_over_bare": round(rates["trainer"] / rates["bare"], 3),
        "trainer_over_original": round(rates["trainer"] / rates["original"], 2),
        "parts_ms": original.measure_parts() | measure_parts(run),
    }


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the results with its parts."""
    rates = row["images_per_s"]
    print(
        f"{row['encoder'][:26]:26}{row['image_size']:6}{row['precision']:>12}{row['compile'] or '-':>17}"
        f"{rates['bare']:8.1f}{rates['augmented']:11.1f}{rates['trainer']:9.1f}{rates['original']:10.1f}"
        f"{row['trainer_over_bare']:14.3f}{row['trainer_over_original']:12.2f}"
    )
    for name, value in row["parts_ms"].items():
        print(f"    {name}: {value:.2f} ms of a step")
    sys.stdout.flush()


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv3_small_100"], help="encoders to measure")
    parser.add_argument("--image-size", type=int, nargs="+", default=[96, 224], help="sides of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch; default: %(default)s")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["32-true", "bf16-mixed"],
        default=["32-true"],
        help="values of trainer.precision",
    )
    parser.add_argument("--compile", nargs="+", default=["null"], help="values of model.compile")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch; default: %(default)s")
    parser.add_argument("--steps", type=int, default=25, help="training steps per run; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each side; default: %(default)s")
    parser.add_argument("--override", nargs="*", default=[], help="overrides of the configuration, KEY=VALUE")
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "benchmarks" / "results" / "throughput.json",
        help="file for the figures, as JSON; default: %(default)s",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{format_machine()}; {given.threads} thread(s), batches of {given.batch_size}; images/s")
    print(
        f"{'encoder':26}{'px':>6}{'precision':>12}{'compile':>17}{'bare':>8}{'augmented':>11}{'trainer':>9}"
        f"{'original':>10}{'trainer/bare':>14}{'/original':>12}"
    )
    rows = []
    for size in given.image_size:
        with tempfile.TemporaryDirectory() as name:
            for encoder, precision, mode in (
                (encoder, precision, mode)
                for encoder in given.encoder
                for precision in given.precision
                for mode in given.compile
            ):
                overrides = [
                    f"data.batch_size={given.batch_size}",
                    f"num_threads={given.threads}",
                    f"model.encoder.name={encoder}",
                    f"trainer.precision={precision}",
                    f"model.compile={mode}",
                    *given.override,
                ]
                num_images = (_WARM_UP + given.steps + 1) * given.batch_size
                config = make_config(Path(name), image_size=size, num_images=num_images, overrides=overrides)
                row = measure_row(config, steps=given.steps, repeats=given.repeats, folder=Path(name) / "run")
                rows.append(row)
                print_row(row)
    settings = {name: getattr(given, name) for name in ("threads", "batch_size", "override")}
    write_results(given.output, settings | {"rows": rows})


if __name__ == "__main__":
    main()
