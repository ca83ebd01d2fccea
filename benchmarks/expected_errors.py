"""Measure whether the expected errors of a network can be trusted, on validation images and on new poses.

    python benchmarks/expected_errors.py --work FOLDER --root PHOTOGRAPHS --output FILE

The configuration that is best in benchmarks/curves (default; photographs with --root, a data set in FreiHAND's layout)
is trained for 40 epochs on images of 64 pixels, with several seeds, calibrated and tested as train.py does. The table
has, for the networks by themselves (means) and for all of them together, on the validation split and on the test split:
the mean expected and the mean true error relative to the root; the mean difference of the two in ten groups of joints;
and by how much the mean error falls without the 20 % of the joints with the largest expected errors, or, at best, with
the largest true errors. An interrupted run continues.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from benchmarks.ensembles import find_best_params  # noqa: E402
from benchmarks.record_curves import RECORDINGS  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.config import compose, quote_override  # noqa: E402
from handpose.evaluation.__main__ import main as evaluate  # noqa: E402
from handpose.files import read_json  # noqa: E402
from handpose.sweep.trainable.trial import add_param_overrides  # noqa: E402
from handpose.training.fit import RunFolders, train_and_test  # noqa: E402

_LEFT_OUT = 0.2


def train(place: Path, overrides: Sequence[str], seed: int) -> Path:
    """Train a network, or find the one that an earlier call has trained. Return its calibrated checkpoint."""
    done = place / "checkpoint.txt"
    if not done.exists():
        chosen = {"seed": seed, "num_threads": 1}
        config = compose("train", [*add_param_overrides(overrides, chosen), "logger=none"])
        place.mkdir(parents=True, exist_ok=True)
        checkpoint = train_and_test(config, RunFolders(place, place, place), quiet=True).checkpoint
        assert checkpoint is not None
        done.write_text(checkpoint.name, encoding="utf-8")
        print(f"trained {place.name}: {checkpoint.stem}", flush=True)
    return place / done.read_text(encoding="utf-8")


def measure(checkpoints: Sequence[Path], split: str, place: Path) -> dict[str, float]:
    """Evaluate the expected errors of one network, or of several together, on a split."""
    named = [argument for path in checkpoints for argument in ("--checkpoint", str(path))]
    evaluate([*named, "--split", split, "--output", str(place)])
    found = read_json(place / "evaluation.json")["confidence"]
    curves = found["sparsification"]
    left = np.interp(_LEFT_OUT, curves["left_out"], curves["by_observed_mm"])
    return {
        "expected_mm": found["mean_expected_mm"],
        "observed_mm": found["mean_observed_mm"],
        "difference_mm": found["calibration_error_mm"],
        "gain": found["gain_without_least_confident"],
        "best_gain": float(1.0 - left / found["mean_observed_mm"]),
    }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a table for a terminal."""
    heads = ("expected, mm", "true, mm", "difference, mm", "without 20 %", "at best")
    lines = [f"{'networks':<14}{'split':<8}" + "".join(f"{head:>16}" for head in heads)]
    for row in rows:
        cells = [f"{row[name]:.1f}" for name in ("expected_mm", "observed_mm", "difference_mm")]
        cells += [f"-{100 * row[name]:.0f} %" for name in ("gain", "best_gain")]
        lines.append(f"{row['networks']:<14}{row['split']:<8}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained networks, which are kept")
    parser.add_argument("--root", type=Path, help="folder of photographs; without it, synthetic hands are used")
    parser.add_argument("--seeds", type=int, default=3, help="number of networks; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of a training; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    name = "default" if given.root is None else "photographs"
    fixed = ("trainer.max_epochs", "data.source.num_eval")
    kept = [item for item in RECORDINGS[name].overrides if not item.startswith(fixed)]
    overrides = [*add_param_overrides(kept, find_best_params(name)[0]), f"trainer.max_epochs={given.epochs}"]
    if given.root is None:
        overrides += ["data.source.num_eval=200", quote_override("paths.data", str(given.work / "data"))]
    else:
        overrides.append(quote_override("data.root", str(given.root.resolve())))
    overrides.append(quote_override("paths.output", str(given.work / "outputs")))
    checkpoints = [train(given.work / f"seed_{seed}", overrides, seed) for seed in range(given.seeds)]
    rows = []
    for split in ("val", "test"):
        single = [measure([path], split, given.work / f"{path.parent.name}-{split}") for path in checkpoints]
        rows.append(
            {"networks": "one (mean)", "split": split}
            | {key: statistics.fmean(row[key] for row in single) for key in single[0]}
        )
        together = measure(checkpoints, split, given.work / f"together-{split}")
        rows.append({"networks": f"{given.seeds} together", "split": split, **together})
    print(format_machine())
    print(format_table(rows))
    write_results(given.output, {"data": name, "epochs": given.epochs, "seeds": given.seeds, "rows": rows})


if __name__ == "__main__":
    main()
