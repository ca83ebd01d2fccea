"""Compare search methods: the slot-seconds until a target is reached, on surrogates of recorded trainings.

    python benchmarks/search.py --output benchmarks/results/search.json
    python benchmarks/search.py --spaces default --methods "random" "ASHA + TPE" --slots 16 --seeds 20
    python benchmarks/search.py --spaces default --methods "SMAC: MultiFidelityFacade" --slots 16 --seeds 4

Every method searches the same surrogate (benchmarks/curve_surrogate.py) on a simulated clock. Slots train trials epoch
by epoch; an epoch costs the predicted processor seconds of the configuration, and each start or resumption of a trial
--start-seconds before. Cost is in slot-seconds: the time on the clock multiplied by the number of slots, whether they
are busy or idle. Every method pays the same for a start: what Ray's `reuse_actors` saves on real ones is not simulated.

The surrogates need scikit-learn; Syne Tune, SMAC, NePS and TuneBOHB (benchmarks/search_peers.py) need their packages.
All are in requirements-benchmarks.txt. Without --methods, those whose package is missing are left out. Their models may
take minutes per search.

A method sees losses with the noise of seeds, but is judged by the losses without it: a target is reached when such a
loss of a trial is at most that of the best of 100 (or 400) fully trained random configurations at their last epoch.
Regret after a budget is that of the pick, the best reported value at the largest number of epochs, relative to the best
of 20,000 random configurations: the difference of the logarithms.

A search that does not reach a target within --max-trainings full trainings counts with that cost, so that its figures
are lower bounds; the table has how often it did. `oracle` trains one configuration, the best of 20,000. A search can be
faster if a cheaper configuration reaches the target, too.

A right prior is centred at that configuration, and a wrong one at the worst of the 20,000. Their ratios to the same
method without a prior are printed below the table.

Ratios to the --baseline are geometric means over the seeds that both have, with 95 % bootstrap intervals. They
describe the chance of the search and of the seeds of the trainings, not other data sets.

All methods with 100 seeds take days. With --courses FILE every search is appended to a file of JSON lines, and searches
that are in it are not run again, so that the tables can be made in several calls, with more seeds for methods that cost
little. Delete the file after a change of a method. With --minutes no search begins after that time. A table has the
methods of --methods with as many seeds as have been run.
"""

import argparse
import contextlib
import heapq
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.asha_modes import compute_mean  # noqa: E402
from benchmarks.curve_surrogate import CurveSurrogate, read_curves  # noqa: E402
from benchmarks.record_curves import CURVES, RECORDINGS  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from benchmarks.search_methods import METHODS as OWN_METHODS  # noqa: E402
from benchmarks.search_methods import WITH_PRIOR, WITHOUT_PRIOR, Method, OurMethod, Task  # noqa: E402
from benchmarks.search_peers import PEERS  # noqa: E402
from handpose.errors import UserError  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.search.points import draw_trial  # noqa: E402
from handpose.search.space import Params, Space, load_space  # noqa: E402

METHODS = [*OWN_METHODS, *PEERS]
BASELINE = "Ray: ASHA + OptunaSearch"
_NUM_REFERENCE = 20_000
_TARGETS = (100, 400)


class World:
    """What is searched: a space, and the surrogate of its trainings.

    Args:
        name: name of the recording.

    Attributes:
        space: the search space.
        surrogate: predicts the curves.
        targets: number of random configurations -> the least loss of so many at the last epoch, the median over draws.
        best: the least loss of all reference configurations.
        best_params: the parameters of the best reference configuration.
        worst_params: those of the worst one, or of one that diverges.
        mean_training_s: mean processor seconds of a full training of a random configuration.
        num_recorded: number of recorded trainings.
    """

    def __init__(self, name: str) -> None:
        from optuna.samplers import RandomSampler

        recording = RECORDINGS[name]
        self.name, self.overrides = name, tuple(recording.overrides)
        self.space: Space = load_space(recording.space)
        curves = read_curves(CURVES / f"{name}.jsonl")
        self.num_recorded = len(curves)
        self.surrogate = CurveSurrogate(curves, self.space)
        sampler = RandomSampler(seed=0)
        drawn = [draw_trial(self.space, sampler)[1] for _ in range(_NUM_REFERENCE)]
        last = np.concatenate([self.surrogate.predict(drawn[k : k + 1000])[:, -1] for k in range(0, len(drawn), 1000)])
        rng = np.random.default_rng(0)
        self.targets = {num: float(np.median(rng.choice(last, (2000, num)).min(1))) for num in _TARGETS}
        self.best = float(last.min())
        self.best_params, self.worst_params = drawn[int(last.argmin())], drawn[int(last.argmax())]
        seconds = self.surrogate.predict_epoch_seconds(drawn[:2000])
        self.mean_training_s = float(seconds.mean()) * self.surrogate.num_epochs


class Course(NamedTuple):
    """A simulated search.

    Attributes:
        costs: target -> slot-seconds until it was reached; infinite if it was not.
        regrets: budget in full trainings -> regret of the pick.
        num_trials: number of trials that were started.
        decision_s: mean seconds that the method took for a proposal or decision.
    """

    costs: Mapping[int, float]
    regrets: Mapping[float, float]
    num_trials: int
    decision_s: float


def simulate(
    world: World, method: Method, *, num_slots: int, start_s: float, seed: int, max_trainings: float
) -> Course:
    """Run a method until the hardest target is reached, and at least as long as the largest budget lasts."""
    num_epochs = world.surrogate.num_epochs
    budgets = [budget for budget in (5, 10, 20) if budget <= max_trainings]
    limit_s = max_trainings * world.mean_training_s / num_slots
    trials: dict[Any, _Trial] = {}
    running: list[tuple[float, int, Any]] = []
    costs = dict.fromkeys(world.targets, math.inf)
    regrets: dict[float, float] = {}
    order, clock, spent_s, num_calls = itertools.count(), 0.0, 0.0, 0
    pick: tuple[int, float, float] = (0, -math.inf, math.inf)  # epochs, -loss, regret at the last epoch
    num_free = num_slots
    while clock < limit_s:
        while num_free:
            _set_time(method, clock)
            began = time.perf_counter()
            found = method.next_trial()
            spent_s, num_calls = spent_s + time.perf_counter() - began, num_calls + 1
            if found is None:
                break
            name, params = found
            if params is not None:
                trials[name] = _Trial.start(world, params, np.random.default_rng([seed, len(trials)]))
            num_free -= 1
            heapq.heappush(running, (clock + start_s + trials[name].epoch_s, next(order), name))
        if not running:
            break
        clock, _, name = heapq.heappop(running)
        trial = trials[name]
        for budget in budgets:
            if clock * num_slots > budget * world.mean_training_s and budget not in regrets:
                regrets[budget] = pick[2]
        trial.epochs += 1
        loss, true = trial.losses[trial.epochs - 1], trial.means[trial.epochs - 1]
        for target, value in world.targets.items():
            if true <= value and math.isinf(costs[target]):
                costs[target] = clock * num_slots
        if math.isfinite(loss):
            pick = max(pick, (trial.epochs, -loss, math.log(trial.means[-1] / world.best)))
        _set_time(method, clock)
        began = time.perf_counter()
        decision = method.report(name, trial.epochs, float(loss))
        spent_s, num_calls = spent_s + time.perf_counter() - began, num_calls + 1
        if decision == "continue" and trial.epochs < num_epochs and math.isfinite(loss):
            heapq.heappush(running, (clock + trial.epoch_s, next(order), name))
        else:
            num_free += 1
        if len(regrets) == len(budgets) and not any(map(math.isinf, costs.values())):
            break
    for budget in budgets:
        regrets.setdefault(budget, pick[2])
    return Course(costs, regrets, len(trials), spent_s / max(num_calls, 1))


def _set_time(method: Method, clock: float) -> None:
    if isinstance(method, OurMethod):  # the others do not ask for the time
        method.now = clock


class _Trial:
    def __init__(self, means: np.ndarray, losses: np.ndarray, epoch_s: float) -> None:
        self.means, self.losses, self.epoch_s, self.epochs = means, losses, epoch_s, 0

    @classmethod
    def start(cls, world: World, params: Params, rng: np.random.Generator) -> "_Trial":
        means = world.surrogate.predict([params])[0]
        return cls(means, means * world.surrogate.draw_noise(rng), world.surrogate.predict_epoch_seconds([params])[0])


# --- runs and results -------------------------------------------------------------------------------------------------


_worlds: list[World] = []  # of a worker process


def run_once(name: str, num_slots: int, seed: int, given: argparse.Namespace) -> Course:
    """Simulate one search of one method, in a worker process."""
    world = _worlds[0]
    task = Task(world.space, world.overrides, world.surrogate.num_epochs, num_slots, seed)
    with contextlib.closing(PEERS[name].make(task) if name in PEERS else OWN_METHODS[name](task, world)) as method:
        return simulate(
            world,
            method,
            num_slots=num_slots,
            start_s=given.start_seconds,
            seed=seed,
            max_trainings=given.max_trainings,
        )


class SearchKey(NamedTuple):
    """What identifies a search, apart from the code of the method.

    Attributes:
        space: name of the recording.
        num_recorded: number of recorded trainings from which the surrogate was made.
        num_slots: number of slots.
        method: name of the method.
        seed: seed of the search.
        start_seconds: seconds to start or resume a trial.
        max_trainings: end of the search, in full trainings.
    """

    space: str
    num_recorded: int
    num_slots: int
    method: str
    seed: int
    start_seconds: float
    max_trainings: float


class CourseFile:
    """The searches that have been run, and the file to which they are appended.

    Args:
        path: a file of JSON lines, which may not exist yet; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._courses: dict[SearchKey, Course] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                key, (costs, regrets, *rest) = json.loads(line)
                numbers = {int(target): cost for target, cost in costs.items()}
                course = Course(numbers, {int(budget): regret for budget, regret in regrets.items()}, *rest)
                self._courses[SearchKey(*key)] = course

    def __contains__(self, key: SearchKey) -> bool:
        return key in self._courses

    def add(self, key: SearchKey, course: Course) -> None:
        """Keep a search."""
        self._courses[key] = course
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, course]) + "\n")

    def select(self, first: SearchKey) -> list[Course]:
        """Return the courses of the search with the key `first` and of all with the next seeds, without a gap."""
        keys = (first._replace(seed=seed) for seed in itertools.count(first.seed))
        return [self._courses[key] for key in itertools.takewhile(self.__contains__, keys)]


def run_searches(
    pool: ProcessPoolExecutor, keys: Sequence[SearchKey], given: argparse.Namespace
) -> Iterator[tuple[SearchKey, Course]]:
    """Run searches in the order of their keys until the time is over, and yield each when it has ended."""
    futures: dict[Future[Course], SearchKey] = {
        pool.submit(run_once, key.method, num_slots=key.num_slots, seed=key.seed, given=given): key for key in keys
    }
    for future in as_completed(futures):
        if not future.cancelled():
            yield futures[future], future.result()
        if time.monotonic() > given.end:
            for other in futures:
                other.cancel()


def summarise(courses: Mapping[str, Sequence[Course]], limit_slot_s: float, baseline: str = BASELINE) -> dict[str, Any]:
    """Return the figures of each method: costs of the targets, their ratios to the baseline, and regrets."""
    rows: dict[str, Any] = {}
    for name, runs in courses.items():
        row: dict[str, Any] = {"seeds": len(runs), "decision_s": statistics.mean(run.decision_s for run in runs)}
        for target in _TARGETS:
            costs = [min(run.costs[target], limit_slot_s) for run in runs]
            row[f"target_{target}"] = {
                "reached": sum(math.isfinite(run.costs[target]) for run in runs),
                "slot_s": statistics.median(costs),
                "over_baseline": _compute_ratio(costs, courses.get(baseline), target, limit_slot_s),
                "costs": [round(cost, 1) for cost in costs],
            }
            if name in WITH_PRIOR:
                others = courses.get(WITHOUT_PRIOR)
                row[f"target_{target}"]["over_no_prior"] = _compute_ratio(costs, others, target, limit_slot_s)
        row["regret"] = {budget: statistics.mean(run.regrets[budget] for run in runs) for budget in runs[0].regrets}
        row["trials"] = statistics.mean(run.num_trials for run in runs)
        rows[name] = row
    return rows


def _compute_ratio(
    costs: Sequence[float], baseline: Sequence[Course] | None, target: int, limit_slot_s: float
) -> tuple[float, float, float] | None:
    if baseline is None:
        return None
    others = [min(run.costs[target], limit_slot_s) for run in baseline]
    logs = [math.log(cost / other) for cost, other in zip(costs, others, strict=False)]
    return compute_mean(logs, transform=np.exp)


def format_table(space: str, num_slots: int, rows: Mapping[str, Any]) -> str:
    """Format the figures of a space and a number of slots."""
    if not rows:
        return f"{space}, {num_slots} slots: no searches have been run"
    budgets = list(next(iter(rows.values()))["regret"])
    heads = [*("reached", "slot-s", "x baseline"), *("reached", "slot-s", "x baseline")]
    heads += [f"regret {budget}" for budget in budgets] + ["trials", "s/decision"]
    lines = [f"{f'{space}, {num_slots} slots':34}" + "".join(f"{head:>18}" for head in heads)]
    for name, row in rows.items():
        cells = []
        for target in _TARGETS:
            found = row[f"target_{target}"]
            ratio = found["over_baseline"]
            cells += [f"{found['reached']}/{row['seeds']}", f"{found['slot_s']:.0f}"]
            cells.append("-" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]")
        cells += [f"{row['regret'][budget]:.3f}" for budget in budgets]
        cells += [f"{row['trials']:.0f}", f"{row['decision_s']:.4f}"]
        lines.append(f"{name:34}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join([*lines, *_format_prior_ratios(rows)]) + "\n"


def _format_prior_ratios(rows: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in rows.keys() & WITH_PRIOR.keys():
        ratios = {target: rows[name][f"target_{target}"]["over_no_prior"] for target in _TARGETS}
        if all(ratios.values()):
            cells = [f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] (target {n})" for n, ratio in ratios.items()]
            lines.append(f"{name} / {WITHOUT_PRIOR}: {', '.join(cells)}")
    return sorted(lines)


def select_methods(names: Sequence[str] | None) -> list[str]:
    """Return the methods to run: the given ones, or None for all whose packages are installed.

    Raises:
        UserError: the package of a given method is not installed.
    """
    missing = [
        name for name in (METHODS if names is None else names) if name in PEERS and not PEERS[name].is_installed()
    ]
    if not missing:
        return list(METHODS if names is None else names)
    if names is None:
        print(f"left out, their packages are not installed (see requirements-benchmarks.txt): {', '.join(missing)}\n")
        return [name for name in METHODS if name not in missing]
    modules = ", ".join(dict.fromkeys(module for name in missing for module in PEERS[name].modules))
    raise UserError(
        f"--methods: {', '.join(missing)} cannot run, because {modules} cannot be imported; see "
        "requirements-benchmarks.txt for how to install them"
    )


def main() -> None:
    """Simulate every method on every space with every number of slots, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=list(RECORDINGS), choices=RECORDINGS, help="recordings")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="methods; default: all whose packages are installed"
    )
    parser.add_argument(
        "--baseline", default=BASELINE, choices=METHODS, help="the ratios are to this method; default: %(default)s"
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of slots")
    parser.add_argument("--seeds", type=int, default=100, help="searches of each method; default: %(default)s")
    parser.add_argument("--start-seconds", type=float, default=1.0, help="seconds to start or resume a trial")
    parser.add_argument("--max-trainings", type=float, default=100.0, help="end of a search, in full trainings")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="searches at a time; default: one per core")
    parser.add_argument("--courses", type=Path, help="file of searches that have been run; new ones are appended")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no search begins after so many minutes")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    try:
        given.methods = select_methods(given.methods)
    except UserError as error:
        parser.error(str(error))
    given.end = time.monotonic() + 60 * given.minutes
    results: dict[str, Any] = {}
    done = CourseFile(given.courses)
    for space in given.spaces:
        world = World(space)
        limit_s = given.max_trainings * world.mean_training_s
        with ProcessPoolExecutor(given.jobs, initializer=_worlds.append, initargs=(world,)) as pool:
            for num_slots in given.slots:
                key_of = partial(
                    SearchKey,
                    space,
                    world.num_recorded,
                    num_slots,
                    start_seconds=given.start_seconds,
                    max_trainings=given.max_trainings,
                )
                keys = [key_of(method=name, seed=seed) for seed in range(given.seeds) for name in given.methods]
                if time.monotonic() < given.end:
                    for key, course in run_searches(pool, [key for key in keys if key not in done], given):
                        done.add(key, course)
                courses = {name: done.select(key_of(method=name, seed=0)) for name in given.methods}
                rows = summarise({name: found for name, found in courses.items() if found}, limit_s, given.baseline)
                results.setdefault(space, {})[num_slots] = rows
                print(format_table(space, num_slots, rows), flush=True)
    left_out = ("output", "jobs", "courses", "minutes", "end")
    settings = {name: value for name, value in vars(given).items() if name not in left_out}
    write_results(given.output, {"settings": settings, "spaces": results})


if __name__ == "__main__":
    main()
