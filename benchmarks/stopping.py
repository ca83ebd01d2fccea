"""Measure what `sweep.stop_when` promises: the expected gain of further trials against the gain that they bring.

    python benchmarks/stopping.py --output benchmarks/results/stopping.json

Searches run on surrogates of recorded trainings, as in benchmarks/search.py, and are never ended early. Whenever the
rule of `sweep.stop_when` (handpose/sweep/controller/stopping_rule.py) would estimate the gain of doubling the number of
trials, the estimate is compared with what the best trial gains until there are that many: the best reported value at
the last epoch gives the trial, and its loss without the differences between seeds counts. An estimate after which the
search does not reach twice as many trials counts in neither table.

The first table has the mean of both by the size of the estimate, with a 95 % bootstrap interval over searches. The
second has, for values of `sweep.stop_when`, how many searches it would end, after how many trials, how much of the
slot-time it saves, and what doubling the number of trials would then have gained (mean, and in how many searches more
than `sweep.stop_when`).
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.asha_modes import compute_mean  # noqa: E402
from benchmarks.curve_surrogate import LOSS  # noqa: E402
from benchmarks.record_curves import RECORDINGS  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from benchmarks.search import World, simulate  # noqa: E402
from benchmarks.search_methods import Decision, OurMethod, Task  # noqa: E402
from handpose.metrics.target import TargetMetric  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.sweep.controller.stopping_rule import StoppingRule  # noqa: E402

CHOICES = {
    "ASHA + curves": ("scheduler=asha", "searcher=curves"),
    "ASHA + TPE": ("scheduler=asha", "searcher=tpe"),
    "freeze-thaw + curves": ("scheduler=freeze_thaw", "searcher=curves"),
}
EDGES = (0.0, 0.03, 0.1, 0.3, 1.0, math.inf)
LIMITS = (0.03, 0.1, 0.3)


class Moment(NamedTuple):
    """A search at the time of an estimate.

    Attributes:
        slot_s: slot-seconds spent.
        num_trials: number of trials started.
        best: the loss of the best trial, without the differences between seeds.
        expected: the estimated gain; None if there is none yet.
    """

    slot_s: float
    num_trials: int
    best: float
    expected: float | None


class WatchedMethod(OurMethod):
    """A method of this project whose gain is estimated now and then.

    Args:
        task: what is searched.
        world: tells the losses without the differences between seeds.
        choices: overrides that select the scheduler and the searcher.

    Attributes:
        moments: what was estimated.
    """

    def __init__(self, task: Task, world: World, *choices: str) -> None:
        super().__init__(task, *choices)
        target = TargetMetric(LOSS, "min")
        self._rule = StoppingRule(task.space, target=target, max_epochs=task.max_epochs, seed=task.seed)
        self._world, self._num_slots, self._num_reports = world, task.num_slots, 0
        self.moments: list[Moment] = []

    def report(self, trial: int, epoch: int, loss: float) -> Decision:
        decision = super().report(trial, epoch, loss)
        self._num_reports += 1
        if self._rule.is_due(self._num_reports):
            snapshots = list(self._snapshots.values())
            expected = self._rule.estimate_gain(snapshots)
            complete = [each for each in snapshots if self._max_epochs in each.values]
            if complete:
                best = min(complete, key=lambda each: each.values[self._max_epochs])
                loss = float(self._world.surrogate.predict([best.params])[0, -1])
                self.moments.append(Moment(self.now * self._num_slots, len(snapshots), loss, expected))
        return decision


_worlds: list[World] = []  # of a worker process


def run_once(name: str, seed: int, given: argparse.Namespace) -> list[Moment]:
    """Simulate one search, in a worker process."""
    world = _worlds[0]
    world.targets = {0: 0.0}  # never reached, so that the search goes on to its end
    task = Task(world.space, world.overrides, world.surrogate.num_epochs, given.slots, seed)
    method = WatchedMethod(task, world, *CHOICES[name])
    try:
        simulate(world, method, num_slots=given.slots, start_s=1.0, seed=seed, max_trainings=given.max_trainings)
    finally:
        method.close()
    return method.moments


class Pair(NamedTuple):
    """An estimate, and what came of it."""

    search: int
    slot_s: float
    num_trials: int
    expected: float
    gained: float


def pair_estimates(search: int, moments: Sequence[Moment]) -> list[Pair]:
    """Pair the estimates of a search with the gains, as far as it has twice as many trials later."""
    pairs = []
    for moment in moments:
        later = next((each for each in moments if each.num_trials >= 2 * moment.num_trials), None)
        if moment.expected is not None and later is not None:
            gained = moment.best - later.best
            pairs.append(Pair(search, moment.slot_s, moment.num_trials, moment.expected, gained))
    return pairs


def summarise_estimates(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return the mean estimate and gain, by the size of the estimate."""
    rows = []
    for low, high in itertools.pairwise(EDGES):
        inside = [pair for pair in pairs if low <= pair.expected < high]
        if not inside:
            continue
        searches = sorted({pair.search for pair in inside})
        means = [np.mean([pair.gained for pair in inside if pair.search == search]) for search in searches]
        rows.append(
            {
                "from": low,
                "to": high,
                "estimates": len(inside),
                "searches": len(searches),
                "expected": float(np.mean([pair.expected for pair in inside])),
                "gained": compute_mean([float(mean) for mean in means]),
            }
        )
    return rows


def summarise_limits(searches: Sequence[Sequence[Pair]], total_slot_s: float) -> list[dict[str, Any]]:
    """Return what values of `sweep.stop_when` would have done."""
    rows = []
    for limit in LIMITS:
        ends = [next((pair for pair in pairs if pair.expected < limit), None) for pairs in searches]
        ended = [pair for pair in ends if pair is not None]
        row: dict[str, Any] = {"stop_when": limit, "searches": len(searches), "ended": len(ended)}
        if ended:
            row |= {
                "trials": float(np.median([pair.num_trials for pair in ended])),
                "saved": float(np.mean([1 - pair.slot_s / total_slot_s for pair in ended])),
                "missed": float(np.mean([pair.gained for pair in ended])),
                "missed_more": float(np.mean([pair.gained > limit for pair in ended])),
            }
        rows.append(row)
    return rows


def format_tables(title: str, estimates: Sequence[dict[str, Any]], limits: Sequence[dict[str, Any]]) -> str:
    """Format both tables of a method."""
    lines = [title, f"{'expected gain in mm':>22}{'estimates':>11}{'mean':>9}{'gained, mean':>14}{'95 %':>18}"]
    for row in estimates:
        mean, low, high = row["gained"]
        size = f"{row['from']:g} to {row['to']:g}"
        lines.append(
            f"{size:>22}{row['estimates']:11}{row['expected']:9.3f}{mean:14.3f}{f'[{low:.3f}, {high:.3f}]':>18}"
        )
    lines.append(f"{'sweep.stop_when':>22}{'ended':>11}{'trials':>9}{'saved':>9}{'missed, mm':>14}{'missed more':>14}")
    for row in limits:
        line = f"{row['stop_when']:>22g}{row['ended']:>6} of {row['searches']}"
        if row["ended"]:
            line += f"{row['trials']:9.0f}{row['saved']:9.0%}{row['missed']:14.3f}{row['missed_more']:14.0%}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate the searches, and print two tables for each space and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=list(RECORDINGS), choices=RECORDINGS, help="recordings")
    parser.add_argument("--methods", nargs="+", default=list(CHOICES), choices=CHOICES, help="methods")
    parser.add_argument("--slots", type=int, default=4, help="trials at a time; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=40, help="searches of each method; default: %(default)s")
    parser.add_argument("--max-trainings", type=float, default=60.0, help="end of a search, in full trainings")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="searches at a time; default: one per core")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for space in given.spaces:
        world = World(space)
        with ProcessPoolExecutor(given.jobs, initializer=_worlds.append, initargs=(world,)) as pool:
            for name in given.methods:
                courses = list(pool.map(partial(run_once, name, given=given), range(given.seeds)))
                searches = [pair_estimates(number, moments) for number, moments in enumerate(courses)]
                estimates = summarise_estimates([pair for pairs in searches for pair in pairs])
                limits = summarise_limits(searches, given.max_trainings * world.mean_training_s)
                results.setdefault(space, {})[name] = {"estimates": estimates, "limits": limits}
                print(format_tables(f"{space}, {name}, {given.slots} slots", estimates, limits), flush=True)
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "jobs")}
    write_results(given.output, {"settings": settings, "spaces": results})


if __name__ == "__main__":
    main()
