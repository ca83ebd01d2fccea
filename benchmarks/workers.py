"""Compare a trial on two workers with the same trial on one, and on one that differs only in rounding.

    python benchmarks/workers.py --output benchmarks/results/workers.json

Each side is a sweep of the same configurations, which differ in the seed, with batches of data.batch_size in total: on
one worker with one core, on two workers (`sweep.workers_per_trial=2`), and on one worker with two cores, which sums in
another order. After one epoch they agree to many digits in double precision, and to a few in single precision. In a
longer training rounding errors grow. The third side shows how much two runs of the same configuration differ anyway.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, EpochReported, read_events  # noqa: E402

_METRICS = ("val/pa_mpjpe_mm", "val/rr_mpjpe_mm", "val/keypoint_error_px", "val/pck_auc")
_SIDES = {
    "one worker": ("sweep.workers_per_trial=1", "sweep.cpus_per_trial=1"),
    "two workers": ("sweep.workers_per_trial=2", "sweep.cpus_per_trial=1"),
    "one worker, two cores": ("sweep.workers_per_trial=1", "sweep.cpus_per_trial=2"),
}
_SMALL = (
    *("data=synthetic", "data.image_size=64", "model.encoder.name=lcnet_035", "model.decoder.depth=2"),
    *("trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "sweep.preflight=off", "sweep.confirm.seeds=0"),
    *("sweep.retrain=false", "sweep.max_concurrent=1", "scheduler=fifo", "searcher=grid"),
)


def main() -> None:
    """Run all sides in both precisions and print their metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: %(default)s")
    parser.add_argument(
        "--epochs",
        type=int,
        default=12,
        help="epochs in single precision; default: %(default)s; in double precision there is one",
    )
    parser.add_argument(
        "--hands",
        type=int,
        default=1200,
        help="synthetic hands for training and validation in single precision; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    print(format_machine())
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        space = Path(folder) / "seeds.yaml"
        space.write_text(
            f"seed: choice({', '.join(str(seed) for seed in range(1, given.seeds + 1))})\n", encoding="utf-8"
        )
        kinds = {
            "double precision, one epoch": (1, 480, "64-true"),
            "single precision, one epoch": (1, 480, "32-true"),
            f"single precision, {given.epochs} epochs": (given.epochs, given.hands, "32-true"),
        }
        found = {
            name: _run_sides(Path(folder) / str(number), space, given.seeds, *kind)
            for number, (name, kind) in enumerate(kinds.items())
        }
    for what, sides in found.items():
        print(f"\n{what}, mean of {given.seeds} seeds")
        for side, metrics in sides.items():
            print(
                f"  {side:<22}",
                *(
                    f"{name} {_compute_mean(metrics, name):.4g}{_format_difference(sides, side, name)}"
                    for name in _METRICS
                ),
            )
    write_results(given.output, {"seeds": given.seeds, "found": found})


def _run_sides(
    folder: Path, space: Path, seeds: int, epochs: int, hands: int, precision: str
) -> dict[str, list[dict[str, float]]]:
    """Return for each side the metrics after the last epoch, for each seed."""
    return {
        side: _run_sweep(
            folder / str(number), space, seeds, epochs, hands, (*settings, f"trainer.precision={precision}")
        )
        for number, (side, settings) in enumerate(_SIDES.items())
    }


def _run_sweep(
    folder: Path, space: Path, seeds: int, epochs: int, hands: int, settings: tuple[str, ...]
) -> list[dict[str, float]]:
    places = (f"paths.data={folder.parents[1]}/data", f"paths.output={folder}", f"search_space={space}")
    size = (f"data.source.num_train={hands}", "data.source.num_eval=60", f"sweep.max_epochs={epochs}")
    command = [sys.executable, "tune.py", *_SMALL, *settings, *places, *size, "sweep.name=side"]
    subprocess.run([*command, f"sweep.num_trials={seeds}"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    events = read_events(folder / "sweeps/side" / EVENTS_FILE)
    last = {event.trial: event for event in events if isinstance(event, EpochReported) and event.epoch == epochs}
    return [{name: last[trial].metrics[name] for name in _METRICS} for trial in sorted(last)]


def _compute_mean(metrics: list[dict[str, float]], name: str) -> float:
    return statistics.mean(each[name] for each in metrics)


def _format_difference(sides: dict[str, list[dict[str, float]]], side: str, name: str) -> str:
    """Format the difference of a side's mean from that of one worker, and the largest difference for the same seed."""
    first = sides["one worker"]
    if side == "one worker":
        return ""
    each = max(abs(here[name] / there[name] - 1) for here, there in zip(sides[side], first, strict=True))
    return f" ({_compute_mean(sides[side], name) / _compute_mean(first, name) - 1:+.2%}, a seed up to {each:.2%})"


if __name__ == "__main__":
    main()
