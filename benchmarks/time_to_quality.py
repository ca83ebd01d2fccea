"""Measure the cost of matching random search in real sweeps: slot-seconds until its best PA-MPJPE is reached.

    python benchmarks/time_to_quality.py --output benchmarks/results/time_to_quality.json
    python benchmarks/time_to_quality.py --recording photographs --root PHOTOGRAPHS --output ...

Everything is trained, as in benchmarks/record_curves.py: the space `default` with synthetic hands, or the space
`recipe` with photographs, in images of 64 px and 27 epochs. benchmarks/search.py compares more methods on surrogates
of such trainings; this is the check that its result holds in real sweeps.

Random search trains its trials to the end. Its best validation PA-MPJPE, at any epoch, is the target of a seed. The
cost of a method is slots x seconds from the start of its sweep until a trial first reports a value at least as good, at
any epoch. A method that never does counts with the cost of its whole sweep, so that its figure is then a lower bound;
the table has the number of seeds that reached the target. For random search itself it is the moment when it finds its
best value, which it cannot know; the cost of its whole sweep is in the table too.

Methods: our searchers and schedulers as in tune.py, all of which start with the default configuration; Ray's
ASHAScheduler and OptunaSearch, plain (benchmarks/sweeps.py), with our grace period and reduction factor, and the same
with TuneConfig(reuse_actors=True), so that Tune does not start a process for each trial. The latter is the fair
baseline, with which the others are compared.

There is a second cost, `trained`: the seconds of training and validation of all trials until then. It leaves out starts
and idle slots, so that only the search is compared. The clock of each sweep starts before Ray does.

Searches are appended to the file of --courses, and those that are in it are not run again: an interrupted benchmark
continues.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.asha_modes import compute_mean  # noqa: E402
from benchmarks.clock import ClockedSegment  # noqa: E402
from benchmarks.record_curves import RECORDINGS  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from benchmarks.sweeps import ON_CPU, REUSING, Side, make_data, measure_sweep  # noqa: E402
from handpose.config import quote_override  # noqa: E402
from handpose.resources import count_cores  # noqa: E402

RANDOM, PLAIN, BASELINE = "random search", "Ray's ASHA + OptunaSearch", "the same + reuse_actors"
METHODS: Mapping[str, tuple[Side, Sequence[str]]] = {
    RANDOM: ("ours", ("scheduler=fifo", "searcher=random")),
    "ASHA + random": ("ours", ("scheduler=asha", "searcher=random")),
    "ASHA + curves": ("ours", ("scheduler=asha", "searcher=curves")),
    "ASHA promote + curves": ("ours", ("scheduler=asha", "scheduler.mode=promote", "searcher=curves")),
    "freeze-thaw + curves": ("ours", ("scheduler=freeze_thaw", "searcher=curves")),
    "ASHA + TPE": ("ours", ("scheduler=asha", "searcher=tpe")),
    PLAIN: ("plain", ("scheduler=asha", "searcher=tpe")),
    BASELINE: (REUSING, ("scheduler=asha", "searcher=tpe")),
}


class SweepCourse(NamedTuple):
    """The course of a sweep.

    Attributes:
        reports: (slot-seconds, metric) of each report, in order.
        slot_s: cost of the whole sweep in slot-seconds.
        trained: seconds of training and validation of all trials up to each report.
    """

    reports: Sequence[tuple[float, float]]
    slot_s: float
    trained: Sequence[float]

    @property
    def best(self) -> float:
        return min(value for _, value in self.reports)

    def compute_cost_of(self, target: float) -> tuple[float, bool]:
        """Return the slot-seconds until the target was reached, else of the whole sweep, and whether it was reached."""
        reached = (slot_s for slot_s, value in self.reports if value <= target)
        cost = next(reached, None)
        return (self.slot_s, False) if cost is None else (cost, True)

    def compute_training_of(self, target: float) -> tuple[float, bool]:
        """Return the same in seconds of training and validation."""
        reached = (spent for spent, (_, value) in zip(self.trained, self.reports, strict=True) if value <= target)
        cost = next(reached, None)
        return (self.trained[-1], False) if cost is None else (cost, True)


def main() -> None:
    """Run every method with every seed, and print the cost of the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recording", choices=RECORDINGS, default="default", help="space and data as recorded; default: %(default)s"
    )
    parser.add_argument("--root", type=Path, help="folder of the photographs")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: %(default)s")
    parser.add_argument("--slots", type=int, default=count_cores(), help="trials at a time; default: number of cores")
    parser.add_argument("--random-trials", type=int, default=16, help="trials of random search; default: %(default)s")
    parser.add_argument("--num-trials", type=int, default=40, help="trials of the others; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=27, help="epochs per trial; default: %(default)s")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods; default: all of them"
    )
    parser.add_argument("--courses", type=Path, help="file of sweeps that have been run; new ones are appended")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("overrides", nargs="*", help="overrides of tune.py for all methods, KEY=VALUE")
    given = parser.parse_args()
    if missing := {RANDOM, BASELINE} - set(given.methods):
        parser.error(f"--methods: the others are compared with {' and '.join(sorted(missing))}")
    if (given.recording == "photographs") != (given.root is not None):
        parser.error("--root is needed for photographs, and only for them")
    results = summarise(run_sweeps(given))
    print(format_table(results, given.seeds))
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "courses", "root")}
    write_results(given.output, {"settings": settings, **results})


def run_sweeps(given: argparse.Namespace) -> dict[str, list[SweepCourse]]:
    """Run the sweeps that have not been run, and return the courses of each method in the order of the seeds.

    Each seed starts with another method.
    """
    courses: dict[str, list[SweepCourse]] = {name: [] for name in given.methods}
    found = _read_courses(given.courses)
    recording = RECORDINGS[given.recording]
    with tempfile.TemporaryDirectory() as folder:
        shared = [
            *(item for item in recording.overrides if not item.startswith("trainer.max_epochs=")),
            *ON_CPU,
            f"search_space={recording.space}",
            "sweep.preflight=off",
            quote_override("paths.data", f"{folder}/data"),
            quote_override("paths.packed", f"{folder}/packed"),
            f"sweep.max_epochs={given.epochs}",
            f"ray.num_cpus={given.slots}",
            *([] if given.root is None else [quote_override("data.root", str(given.root.resolve()))]),
            *given.overrides,
        ]
        for seed in range(given.seeds):
            names = list(given.methods)
            for name in names[seed % len(names) :] + names[: seed % len(names)]:
                num_trials = given.random_trials if name == RANDOM else given.num_trials
                key = json.dumps([given.recording, name, seed, num_trials, given.slots, given.epochs, given.overrides])
                if key not in found:
                    make_data(shared)
                    side, own = METHODS[name]
                    found[key] = _run_sweep(side, [*shared, *own, f"sweep.num_trials={num_trials}"], seed)
                    _append_course(given.courses, key, found[key])
                print(f"seed {seed}  {name}: best {found[key].best:.2f} mm", file=sys.stderr, flush=True)
                courses[name].append(found[key])
    return courses


def _read_courses(path: Path | None) -> dict[str, SweepCourse]:
    if path is None or not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {key: SweepCourse(*course) for key, course in lines}


def _append_course(path: Path | None, key: str, course: SweepCourse) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, course]) + "\n")


def _run_sweep(side: Side, overrides: Sequence[str], seed: int) -> SweepCourse:
    sweep = measure_sweep(side, [*overrides, f"sweep.seed={seed}"])
    values = sorted((at, value) for trial in sweep.trials for at, _, value in trial.values if math.isfinite(value))
    reports = [(sweep.num_slots * (at - sweep.started), value) for at, value in values]
    return SweepCourse(reports, sweep.slot_s, [_sum_training(sweep.trials, at) for at, _ in values])


def _sum_training(trials: Sequence[ClockedSegment], at: float) -> float:
    """Return the seconds of training and validation until a time, as if each trial had them evenly."""
    return sum(
        (trial.train_s + trial.val_s) * min(1.0, max(0.0, (at - trial.first_step) / (trial.last - trial.first_step)))
        for trial in trials
        if trial.last > trial.first_step
    )


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(courses: Mapping[str, Sequence[SweepCourse]]) -> dict[str, Any]:
    """Summarise each method: how often it reached the target, the cost, and its ratios to the two others."""
    targets = [course.best for course in courses[RANDOM]]
    costs = {
        name: [course.compute_cost_of(target) for course, target in zip(runs, targets, strict=True)]
        for name, runs in courses.items()
    }
    trained = {
        name: [course.compute_training_of(target) for course, target in zip(runs, targets, strict=True)]
        for name, runs in courses.items()
    }
    return {
        "targets_mm": targets,
        "methods": {
            name: {
                "trained_s": statistics.median(cost for cost, _ in trained[name]),
                "trained_over_baseline": _compute_ratio(trained[name], trained[BASELINE]),
                "reached": sum(is_reached for _, is_reached in paid),
                "slot_s": statistics.median(cost for cost, _ in paid),
                "over_random": _compute_ratio(paid, costs[RANDOM]),
                "over_baseline": _compute_ratio(paid, costs[BASELINE]),
                "whole_slot_s": statistics.median(course.slot_s for course in courses[name]),
                "best_mm": statistics.mean(course.best for course in courses[name]),
                "costs": paid,
            }
            for name, paid in costs.items()
        },
    }


def _compute_ratio(
    paid: Sequence[tuple[float, bool]], other: Sequence[tuple[float, bool]]
) -> tuple[float, float, float] | None:
    """Return the geometric mean over the seeds of the ratio of the costs, with its 95 % interval."""
    logs = [math.log(cost / cost_of_other) for (cost, _), (cost_of_other, _) in zip(paid, other, strict=True)]
    return compute_mean(logs, transform=np.exp)


def format_table(results: Mapping[str, Any], num_seeds: int) -> str:
    """Format the figures as a table."""
    heads = (
        "reached",
        "slot-s, median",
        "x random search",
        "x baseline",
        "trained, x base",
        "whole, slot-s",
        "best, mm",
    )
    lines = [f"{f'{num_seeds} seeds':28}" + "".join(f"{head:>19}" for head in heads)]
    for name, row in results["methods"].items():
        cells = (
            f"{row['reached']}/{num_seeds}",
            f"{row['slot_s']:.0f}",
            _format_interval(row["over_random"]),
            _format_interval(row["over_baseline"]),
            _format_interval(row["trained_over_baseline"]),
            f"{row['whole_slot_s']:.0f}",
            f"{row['best_mm']:.2f}",
        )
        lines.append(f"{name:28}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines) + "\n"


def _format_interval(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


if __name__ == "__main__":
    main()
