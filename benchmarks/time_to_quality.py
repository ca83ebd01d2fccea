"""Measure the cost of matching random search: slot-seconds until its best PA-MPJPE is reached.

    python benchmarks/time_to_quality.py --output benchmarks/results/time_to_quality.json             real training
    python benchmarks/time_to_quality.py --replay --output benchmarks/results/time_to_quality_replay.json

Random search trains its trials to the end. Its best validation PA-MPJPE, at any epoch, is the target of a seed. The
cost of a method is slots x seconds from the start of its sweep until a trial first reports a value at least as good, at
any epoch. A method that never does counts with the cost of its whole sweep, so that its figure is then a lower bound;
the table has the number of seeds that reached the target. For random search itself it is the moment when it finds its
best value, which it cannot know; the cost of its whole sweep is in the table too.

Methods: ASHA with the proposals of random search, and more of them; ASHA with Optuna's TPE as in tune.py (mode `stop`,
the default, and `promote`), and freeze-thaw with the model of learning curves, all of which start with the default
configuration; Ray's ASHAScheduler and OptunaSearch, plain (benchmarks/sweeps.py), with our grace period and reduction
factor, and the same with TuneConfig(reuse_actors=True), so that Tune does not start a process for each trial.

In real training there is a second cost, `trained`: the seconds of training and validation of all trials until then. It
leaves out starts and idle slots, so that only the search is compared.

Real training is on a small version of the real task: synthetic hands of 64 px, few batches per epoch, nine epochs, and
the space in benchmarks/spaces/small.yaml. The clock of each sweep starts before Ray does.

--replay trains nothing. Slots run through 57 recorded learning curves (benchmarks/curves), as in asha_modes.py, with
many seeds. Random search draws --random-trials of them, ASHA without a model draws all of them in the same order. A
model's proposal is mapped to the nearest recorded configuration that has not been tried (depth, sigma and learning
rate, each in units of its range, the latter two by their logarithms). The model is told the values of that
configuration for its proposal. So models are at a disadvantage: their observations are blurred, and the nearest
configuration may be far away. All methods pay the same --start-seconds per trial segment, so that only the search is
compared; `reuse_actors` would make no difference and is left out.

Goals: ours at most a third of random search, and not worse than plain.
"""

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.asha_modes import CURVES, Curve, compute_mean, draw_curves, read_curves, replay_sweep  # noqa: E402
from benchmarks.clock import ClockedSegment  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from benchmarks.sweeps import ON_CPU, REUSING, Side, make_data, make_distributions, measure_sweep  # noqa: E402
from handpose.config import compose, quote_override, to_plain_values  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.schedulers.asha import Asha  # noqa: E402
from handpose.schedulers.scheduler import Fifo, Scheduler, SchedulerDecision, SegmentStart  # noqa: E402
from handpose.search.optuna_searcher import OptunaSearcher  # noqa: E402
from handpose.search.searcher import TrialSnapshot  # noqa: E402
from handpose.search.space import Params, flatten_config, load_space  # noqa: E402

RANDOM, PLAIN = "random search", "Ray's ASHA + OptunaSearch"
PLAIN_REUSING = "the same + reuse_actors"
METHODS: Mapping[str, tuple[Side, Sequence[str]]] = {
    RANDOM: ("ours", ("scheduler=fifo", "searcher=random")),
    "ASHA + random": ("ours", ("scheduler=asha", "searcher=random")),
    "ASHA + TPE, ours": ("ours", ("scheduler=asha", "searcher=tpe")),
    "the same, promote": ("ours", ("scheduler=asha", "scheduler.mode=promote", "searcher=tpe")),
    "freeze-thaw + curves": ("ours", ("scheduler=freeze_thaw", "searcher=curves")),
    PLAIN: ("plain", ("scheduler=asha", "searcher=tpe")),
    PLAIN_REUSING: (REUSING, ("scheduler=asha", "searcher=tpe")),
}

_METRIC = "val/pa_mpjpe_mm"
_SPACE = REPOSITORY / "benchmarks" / "spaces" / "curves.yaml"
_SMALL = (
    "data.source.num_train=800",
    "data.source.num_eval=60",
    "data.image_size=64",
    "data.batch_size=16",
    "sweep.preflight=off",
    quote_override("search_space", str(REPOSITORY / "benchmarks" / "spaces" / "small.yaml")),
)


class SweepCourse(NamedTuple):
    """The course of a sweep.

    Attributes:
        reports: (slot-seconds, metric) of each report, in order.
        slot_s: cost of the whole sweep in slot-seconds.
        trained: seconds of training and validation of all trials up to each report; empty if nothing is trained.
    """

    reports: Sequence[tuple[float, float]]
    slot_s: float
    trained: Sequence[float] = ()

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
    """Run every method with every seed, in real training or on recorded curves, and print the cost of the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", action="store_true", help="replay recorded learning curves instead of training")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: 5, or 100 with --replay")
    parser.add_argument("--slots", type=int, help="trials at a time; default: the number of cores, or 4 with --replay")
    parser.add_argument("--random-trials", type=int, help="trials of random search; default: 16, or 32 with --replay")
    parser.add_argument(
        "--num-trials",
        type=int,
        default=24,
        help="trials of the other methods; default: %(default)s; with --replay: all recorded configurations",
    )
    parser.add_argument(
        "--epochs", type=int, default=9, help="epochs per trial; default: %(default)s; with --replay: as recorded"
    )
    parser.add_argument("--batches", type=int, default=14, help="batches per epoch; default: %(default)s")
    parser.add_argument(
        "--start-seconds",
        type=float,
        default=1.0,
        help="with --replay: cost of starting or resuming a trial; default: %(default)s",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods in real training")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("overrides", nargs="*", help="overrides of tune.py for all methods, KEY=VALUE")
    given = parser.parse_args()
    given.seeds = given.seeds or (100 if given.replay else 5)
    given.random_trials = given.random_trials or (32 if given.replay else 16)
    given.slots = given.slots or (4 if given.replay else count_cores())
    if missing := {RANDOM, PLAIN} - set(given.methods):
        parser.error(f"--methods: the others are compared with {' and '.join(sorted(missing))}")
    courses = replay_sweeps(given) if given.replay else run_real_sweeps(given)
    results = summarise(courses)
    print(format_table(results, given.seeds))
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    write_results(given.output, {"settings": settings, **results})


# --- real training ----------------------------------------------------------------------------------------------------


def run_real_sweeps(given: argparse.Namespace) -> dict[str, list[SweepCourse]]:
    """Run real sweeps, and return the courses of each method in the order of the seeds.

    Each seed starts with another method.
    """
    courses: dict[str, list[SweepCourse]] = {name: [] for name in given.methods}
    with tempfile.TemporaryDirectory() as folder:
        shared = [
            *ON_CPU,
            *_SMALL,
            quote_override("paths.data", f"{folder}/data"),
            quote_override("paths.packed", f"{folder}/packed"),
            f"sweep.max_epochs={given.epochs}",
            f"trainer.limit_train_batches={given.batches}",
            f"ray.num_cpus={given.slots}",
            *given.overrides,
        ]
        make_data(shared)
        for seed in range(given.seeds):
            names = list(given.methods)
            for name in names[seed % len(names) :] + names[: seed % len(names)]:
                num_trials = given.random_trials if name == RANDOM else given.num_trials
                side, own = METHODS[name]
                courses[name].append(_run_sweep(side, [*shared, *own, f"sweep.num_trials={num_trials}"], seed))
                print(f"seed {seed}  {name}: best {courses[name][-1].best:.2f} mm", file=sys.stderr, flush=True)
    return courses


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


# --- recorded curves --------------------------------------------------------------------------------------------------


def replay_sweeps(given: argparse.Namespace) -> dict[str, list[SweepCourse]]:
    """Replay sweeps, and return the courses of each method in the order of the seeds."""
    pool, max_epochs = read_curves(CURVES)
    slots = {"num_slots": given.slots, "start_s": given.start_seconds, "max_epochs": max_epochs}
    methods: dict[str, Callable[[int], SweepCourse]] = {
        RANDOM: lambda seed: _replay(Fifo(), draw_curves(pool, seed, 1.0)[: given.random_trials], **slots),
        "ASHA + random": lambda seed: _replay(
            _make_asha("stop", seed, max_epochs), draw_curves(pool, seed, 1.0), **slots
        ),
        "ASHA + TPE, ours": lambda seed: _replay_with_searcher(OurSearcher, pool, "stop", seed, **slots),
        "the same, promote": lambda seed: _replay_with_searcher(OurSearcher, pool, "promote", seed, **slots),
        PLAIN: lambda seed: _replay_with_searcher(RaySearcher, pool, "stop", seed, **slots),
    }
    return {name: [run(seed) for seed in range(given.seeds)] for name, run in methods.items()}


def _make_asha(mode: Any, seed: int, max_epochs: int) -> Asha:
    return Asha(mode=mode, grace_period=1, reduction_factor=3, brackets=1, max_epochs=max_epochs, seed=seed)


def _replay(scheduler: Scheduler, curves: Sequence[Curve], **slots: Any) -> SweepCourse:
    steps = replay_sweep(scheduler, curves, **slots).steps
    return SweepCourse([(step.slot_s, curves[step.trial].losses[step.epoch - 1]) for step in steps], steps[-1].slot_s)


def _replay_with_searcher(
    searcher: "type[OurSearcher] | type[RaySearcher]", pool: Sequence[Curve], mode: str, seed: int, **slots: Any
) -> SweepCourse:
    with contextlib.closing(searcher(seed, slots["max_epochs"])) as asked:
        scheduler = InformingScheduler(_make_asha(mode, seed, slots["max_epochs"]), asked, slots["max_epochs"])
        return _replay(scheduler, NearestCurves(pool, asked.suggest), **slots)


class OurSearcher:
    """Our searcher as configured."""

    def __init__(self, seed: int, max_epochs: int) -> None:
        from hydra.utils import instantiate

        config = compose("tune", ["searcher=tpe"])
        self._folder = tempfile.TemporaryDirectory()
        self._searcher: OptunaSearcher = instantiate(config.searcher)(
            space=load_space(str(_SPACE)),
            folder=Path(self._folder.name),
            name="replay",
            metric=_METRIC,
            mode="min",
            max_epochs=max_epochs,
            seed=seed,
            defaults=flatten_config(to_plain_values(config)),
        )
        self._snapshots: dict[int, TrialSnapshot] = {}

    def suggest(self, number: int) -> Params:
        params = self._searcher.suggest(number)
        assert params is not None, "only a grid has an end"
        self._snapshots[number] = TrialSnapshot(number, "running", params, {})
        return params

    def on_segment_start(self, number: int) -> None:
        self._update(number, state="running")

    def on_trial_result(self, number: int, epoch: int, value: float) -> None:
        self._update(number, values={**self._snapshots[number].values, epoch: value})

    def on_trial_wait(self, number: int) -> None:
        self._update(number, state="paused")

    def on_trial_end(self, number: int, state: str) -> None:
        self._update(number, state=state)

    def _update(self, number: int, **changes: Any) -> None:
        self._snapshots[number] = self._snapshots[number]._replace(**changes)
        self._searcher.on_trial_update(self._snapshots[number])

    def close(self) -> None:
        self._searcher.close()
        self._folder.cleanup()


class RaySearcher:
    """Ray's OptunaSearch with its defaults, informed as by Tune: a stopped trial counts as complete, too."""

    def __init__(self, seed: int, max_epochs: int) -> None:
        from ray.tune.search.optuna import OptunaSearch

        space = make_distributions(load_space(str(_SPACE)))
        self._searcher = OptunaSearch(space, metric=_METRIC, mode="min", seed=seed)
        self._last: dict[int, dict[str, Any]] = {}

    def suggest(self, number: int) -> Params:
        params = self._searcher.suggest(str(number))
        assert params is not None, "it proposes as often as it is asked"
        return params

    def on_segment_start(self, number: int) -> None:
        """Do nothing: Tune does not inform the searcher."""

    def on_trial_result(self, number: int, epoch: int, value: float) -> None:
        self._last[number] = {_METRIC: value, "training_iteration": epoch}
        self._searcher.on_trial_result(str(number), self._last[number])

    def on_trial_wait(self, number: int) -> None:
        """Do nothing: no trial pauses."""

    def on_trial_end(self, number: int, state: Any) -> None:
        self._searcher.on_trial_complete(str(number), self._last.get(number))

    def close(self) -> None:
        """Do nothing: there are no resources."""


class InformingScheduler(Fifo):
    """A scheduler that informs a searcher of everything."""

    def __init__(self, scheduler: Scheduler, searcher: OurSearcher | RaySearcher, max_epochs: int) -> None:
        self.rungs, self.needs_checkpoints, self.supports_two_objectives = (
            scheduler.rungs,
            scheduler.needs_checkpoints,
            scheduler.supports_two_objectives,
        )
        self.perturbs_params = scheduler.perturbs_params
        self.selects_only_at_rungs = scheduler.selects_only_at_rungs
        self._rule, self._searcher, self._max_epochs = scheduler, searcher, max_epochs

    def on_trial_start(self, trial: int, params: Params) -> None:
        self._searcher.on_segment_start(trial)
        self._rule.on_trial_start(trial, params)

    def on_trial_cost(self, trial: int, cost: float) -> None:
        self._rule.on_trial_cost(trial, cost)

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        decision = self._rule.on_trial_result(trial, epoch, loss)
        self._searcher.on_trial_result(trial, epoch, loss)
        if epoch == self._max_epochs or decision == "stop":
            self._searcher.on_trial_end(trial, "complete" if epoch == self._max_epochs else "stopped")
        elif decision == "pause":
            self._searcher.on_trial_wait(trial)
        return decision

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        return self._rule.choose_trial_to_resume(can_start_trial=can_start_trial)

    def on_trial_resume(self, start: SegmentStart) -> None:
        self._searcher.on_segment_start(start.trial)
        self._rule.on_trial_resume(start)

    def on_trial_end(self, trial: int) -> None:
        self._searcher.on_trial_end(trial, "diverged")
        self._rule.on_trial_end(trial)


class NearestCurves(Sequence[Curve]):
    """The curves of a pool in the order in which a searcher asks for them: each time the nearest remaining one.

    A curve is chosen when it is first accessed, which the replay does when a slot is free.
    """

    def __init__(self, pool: Sequence[Curve], ask: Callable[[int], Params]) -> None:
        self._left, self._size, self._ask = list(pool), len(pool), ask
        self._chosen: list[Curve] = []
        extent = np.ptp([_to_point(curve.params) for curve in pool], axis=0)
        self._range = np.where(extent > 0, extent, 1.0)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: Any) -> Any:
        if number >= self._size:
            raise IndexError(number)
        while number >= len(self._chosen):
            point = _to_point(self._ask(len(self._chosen)))
            distances = [np.linalg.norm((_to_point(curve.params) - point) / self._range) for curve in self._left]
            self._chosen.append(self._left.pop(int(np.argmin(distances))))
        return self._chosen[number]


def _to_point(params: Params) -> np.ndarray:
    """Return the coordinates of a configuration: depth, and the decimal logarithms of sigma and learning rate."""
    logarithms = [math.log10(params[name]) for name in ("heatmap.sigma", "optimizer.lr")]
    return np.array([params["model.decoder.depth"], *logarithms])


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(courses: Mapping[str, Sequence[SweepCourse]]) -> dict[str, Any]:
    """Summarise each method: how often it reached the target, the cost, and its ratio to random search and to plain."""
    targets = [course.best for course in courses[RANDOM]]
    costs = {
        name: [course.compute_cost_of(target) for course, target in zip(runs, targets, strict=True)]
        for name, runs in courses.items()
    }
    trained = {
        name: [course.compute_training_of(target) for course, target in zip(runs, targets, strict=True)]
        for name, runs in courses.items()
        if all(course.trained for course in runs)
    }
    return {
        "targets_mm": targets,
        "methods": {
            name: {
                "trained_s": statistics.median(cost for cost, _ in trained[name]) if trained else None,
                "trained_over_plain": _compute_ratio(trained[name], trained[PLAIN]) if trained else None,
                "reached": sum(is_reached for _, is_reached in paid),
                "slot_s": statistics.median(cost for cost, _ in paid),
                "over_random": _compute_ratio(paid, costs[RANDOM]),
                "over_plain": _compute_ratio(paid, costs[PLAIN]),
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
    heads = ("reached", "slot-s, median", "x random search", "x plain", "trained, x plain", "whole, slot-s", "best, mm")
    lines = [f"{f'{num_seeds} seeds':28}" + "".join(f"{head:>19}" for head in heads)]
    for name, row in results["methods"].items():
        cells = (
            f"{row['reached']}/{num_seeds}",
            f"{row['slot_s']:.0f}",
            _format_interval(row["over_random"]),
            _format_interval(row["over_plain"]),
            _format_interval(row["trained_over_plain"]),
            f"{row['whole_slot_s']:.0f}",
            f"{row['best_mm']:.2f}",
        )
        lines.append(f"{name:28}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines) + "\n"


def _format_interval(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


if __name__ == "__main__":
    main()
