"""Measure exported networks: size, images/s and millimetres of fp32, fp16 and int8, side by side.

    python benchmarks/export.py
    python benchmarks/export.py --checkpoint FILE

Without a checkpoint, a network of the default kind is trained for a few epochs on drawn hands. Each precision is
written once. Its images/s are those of single pictures with ONNX Runtime on the CPU: the median of several rounds, in
each of which the files take turns for some seconds. Its errors are those of the validation split, whose pictures also
calibrate int8, and of the test split, which nothing has seen.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.data import make_config  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.config import quote_override  # noqa: E402
from handpose.evaluation.onnx_graph import export_onnx  # noqa: E402
from handpose.evaluation.onnx_precision import (  # noqa: E402
    PRECISIONS,
    Precision,
    compute_split_error_mm,
    measure_images_per_s,
    write_precision,
)
from handpose.evaluation.trained_network import read_network  # noqa: E402
from handpose.export import name_files, read_data, read_pictures  # noqa: E402
from handpose.training.fit import fit  # noqa: E402
from handpose.training.results import RunFolders  # noqa: E402


def train_network(folder: Path, *, epochs: int, threads: int) -> Path:
    """Train a network on drawn hands. Return its last checkpoint."""
    overrides = [
        "checkpoints.enabled=true",
        "data.source.num_eval=100",
        f"trainer.max_epochs={epochs}",
        f"num_threads={threads}",
    ]
    config = make_config(folder, image_size=64, num_images=900, overrides=overrides)
    checkpoint = fit(config, RunFolders(folder, folder, folder), quiet=True).last_checkpoint
    assert checkpoint is not None, "checkpoints are enabled"
    return checkpoint


def measure_checkpoint(checkpoint: Path, overrides: Sequence[str], *, rounds: int, folder: Path) -> dict[str, Any]:
    """Export a checkpoint in all precisions, and measure them. Return precision -> figures."""
    network = read_network(checkpoint)
    side = network.choose_input_size(None)
    data = read_data(checkpoint, side, overrides)
    splits = {split: read_pictures(data, split) for split in ("val", "test")}
    files = name_files(folder / "hand.onnx", PRECISIONS)
    export_onnx(network.module, files["fp32"], side=side)
    for precision in PRECISIONS[1:]:
        write_precision(files["fp32"], files[precision], precision, calibration=splits["val"].choose_calibration())
    images = splits["val"].images
    rates = zip(*(measure_images_per_s(list(files.values()), images) for _ in range(rounds)), strict=True)
    figures: dict[str, Any] = {}
    for (precision, file), values in zip(files.items(), rates, strict=True):
        errors = {
            f"{split}_pa_mpjpe_mm": round(compute_split_error_mm(file, network.module.axes, pictures.hands), 4)
            for split, pictures in splits.items()
            if pictures.hands is not None
        }
        figures[precision] = {
            "megabytes": round(file.stat().st_size / 1e6, 3),
            "images_per_s": round(statistics.median(values), 1),
            "rounds": [round(value, 1) for value in values],
            **errors,
        }
    return {"side": side, "pictures": {name: len(each.images) for name, each in splits.items()}, "precisions": figures}


def print_rows(figures: Mapping[Precision, Mapping[str, Any]]) -> None:
    """Print a row for each precision. Gains and losses are relative to fp32."""
    reference = figures["fp32"]
    for precision, row in figures.items():
        line = f"{precision:<10}{row['megabytes']:8.2f}{row['images_per_s']:10.1f}"
        line += f"{row['images_per_s'] / reference['images_per_s']:7.2f}"
        for split in ("val", "test"):
            key = f"{split}_pa_mpjpe_mm"
            line += f"{row[key]:10.3f}{row[key] - reference[key]:9.3f}" if key in row else f"{'-':>10}{'-':>9}"
        print(line, flush=True)


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], help="checkpoints to export")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of the training; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch and ONNX; default: %(default)s")
    parser.add_argument("--override", nargs="*", default=[], help="overrides of the data set, KEY=VALUE")
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "benchmarks" / "results" / "export.json",
        help="file for the figures, as JSON; default: %(default)s",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{format_machine()}; {given.threads} thread(s), single pictures; PA-MPJPE in mm")
    head = f"{'precision':<10}{'MB':>8}{'images/s':>10}{'gain':>7}{'val':>10}{'lost':>9}{'test':>10}{'lost':>9}"
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints = given.checkpoint or [train_network(folder, epochs=given.epochs, threads=given.threads)]
        for checkpoint in checkpoints:
            overrides = [quote_override("paths.packed", str(folder / "packed")), *given.override]
            row = measure_checkpoint(checkpoint, overrides, rounds=given.rounds, folder=folder)
            rows[checkpoint.name] = row
            print(f"\n{checkpoint.name}, {row['side']} px, pictures: {row['pictures']}\n{head}")
            print_rows(row["precisions"])
    write_results(given.output, {"threads": given.threads, "rounds": given.rounds, "networks": rows})


if __name__ == "__main__":
    main()
