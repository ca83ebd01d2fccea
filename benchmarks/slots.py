"""Measure how much of a sweep's slot time is training: ours against Ray Tune's documented Lightning recipe.

    python benchmarks/slots.py [OVERRIDES OF tune.py] --output benchmarks/results/slots.json

All sides train the same short trials on the same slots: same proposals, network, data, epochs, seed and threads (one).
The plain side (benchmarks/sweeps.py) keeps the defaults of Tune and Lightning, so that Tune starts a process for each
trial. "plain + reuse_actors" does not, which makes it the fair baseline for what a start costs. Each sweep runs in its
own process with a new Ray, the runs of the sides are interleaved, and the figures are medians. The clock runs from the
request for the sweep, before Ray starts and our own checks run, until the last trial ends. The imports of the driver
are excluded on all sides, those of the workers are included. With `fifo` every trial is trained to its end. With `asha`
trials are stopped, by our scheduler and by Ray's, which may stop different ones.

    slot-s       slots x that time
    efficiency   seconds in training steps and validations, divided by slot-s
    starts       from the moment when a slot is free to the first step of its next trial; the first one on each slot
                 starts at the request for the sweep, so that it includes the start of Ray and of the workers
    between      within a trial but not in a step: reports, checkpoints, loops
    at the end   slots without any more work, and the end of the sweep

Goals: ours at least 0.90, and plain at least 2.5 times as many slot-s as ours.
"""

import argparse
import contextlib
import heapq
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from hydra.utils import instantiate  # noqa: E402

from benchmarks.result_files import write_results  # noqa: E402
from benchmarks.sweeps import ON_CPU, MeasuredSweep, Side, make_data, measure_sweep  # noqa: E402
from handpose.config import compose, to_plain_values  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.search.space import Params, flatten_config, load_space  # noqa: E402
from handpose.sweep.audit.audit import compose_choices  # noqa: E402

_SIDES: tuple[Side, ...] = get_args(Side)
_OTHERS = [side for side in _SIDES if side != "ours"]


class SlotTimeAccount(NamedTuple):
    """How the slot-seconds of a sweep were spent, as described above. `start_s` is the median of the later starts."""

    slot_s: float
    efficiency: float
    train_s: float
    val_s: float
    first_starts_s: float
    later_starts_s: float
    between_s: float
    at_end_s: float
    start_s: float
    epochs: int


def main() -> None:
    """Measure all sides in turns, and print how their slot-seconds were spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=24, help="number of trials; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per trial; default: %(default)s")
    parser.add_argument("--batches", type=int, default=15, help="batches per epoch; default: %(default)s")
    parser.add_argument(
        "--slots", type=int, default=count_cores(), help="trials at a time, with one core each; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; default: %(default)s")
    parser.add_argument(
        "--schedulers", nargs="+", choices=["fifo", "asha"], default=["fifo", "asha"], help="schedulers to measure"
    )
    parser.add_argument(
        "--preflight", choices=["off", "brief"], default="off", help="sweep.preflight of our side; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("overrides", nargs="*", help="overrides of tune.py for all sides, KEY=VALUE")
    given = parser.parse_args()
    shared = [
        *ON_CPU,
        "searcher=random",
        f"sweep.num_trials={given.num_trials}",
        f"sweep.max_epochs={given.epochs}",
        f"sweep.preflight={given.preflight}",
        f"trainer.limit_train_batches={given.batches}",
        f"ray.num_cpus={given.slots}",
        *given.overrides,
    ]
    make_data(shared)
    points = list_proposals(shared)
    results = {}
    for scheduler in given.schedulers:
        runs: dict[Side, list[MeasuredSweep]] = {side: [] for side in _SIDES}
        for repeat in range(given.repeats):
            for side in _SIDES if repeat % 2 == 0 else _SIDES[::-1]:
                runs[side].append(measure_sweep(side, [*shared, f"scheduler={scheduler}"], points))
        results[scheduler] = summarise(runs)
        print(format_table(scheduler, results[scheduler]), flush=True)
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    write_results(given.output, {"settings": settings, "schedulers": results})


def list_proposals(overrides: Sequence[str]) -> list[Params]:
    """List the proposals of our searcher without any results, as with searcher=random."""
    config = compose("tune", overrides)
    sweep = instantiate(config.sweep)
    with tempfile.TemporaryDirectory() as folder:
        searcher = instantiate(config.searcher)(
            space=load_space(config.search_space),
            folder=Path(folder),
            name=sweep.name,
            metric=sweep.metric,
            mode=sweep.target.mode,
            max_epochs=sweep.max_epochs,
            seed=sweep.seed,
            defaults=flatten_config(to_plain_values(config)) | compose_choices(overrides),
        )
        with contextlib.closing(searcher):
            return [searcher.suggest(number) for number in range(sweep.num_trials)]


def account_slot_time(sweep: MeasuredSweep) -> SlotTimeAccount:
    """Account for the slot-seconds of a sweep. The next trial takes the slot that has been free the longest."""
    free = [sweep.started] * sweep.num_slots
    starts = []
    for trial in sweep.trials:
        starts.append(trial.first_step - heapq.heapreplace(free, trial.last))
    train_s = sum(trial.train_s for trial in sweep.trials)
    val_s = sum(trial.val_s for trial in sweep.trials)
    later = starts[sweep.num_slots :]
    return SlotTimeAccount(
        slot_s=sweep.slot_s,
        efficiency=(train_s + val_s) / sweep.slot_s,
        train_s=train_s,
        val_s=val_s,
        first_starts_s=sum(starts[: sweep.num_slots]),
        later_starts_s=sum(later),
        between_s=sum(trial.last - trial.first_step for trial in sweep.trials) - train_s - val_s,
        at_end_s=sum(sweep.ended - each for each in free),
        start_s=statistics.median(later) if later else 0.0,
        epochs=sum(len(trial.values) for trial in sweep.trials),
    )


def summarise(runs: Mapping[Side, Sequence[MeasuredSweep]]) -> dict[str, Any]:
    """Compute the medians of each side, and the slot-seconds and values of the others compared with ours."""
    accounts = {side: [account_slot_time(sweep) for sweep in runs[side]] for side in _SIDES}
    medians = {
        side: {
            name: statistics.median(getattr(each, name) for each in accounts[side]) for name in SlotTimeAccount._fields
        }
        for side in _SIDES
    }
    ratios = {
        side: [other.slot_s / own.slot_s for own, other in zip(accounts["ours"], accounts[side], strict=True)]
        for side in _OTHERS
    }
    return {
        "medians": medians,
        "over_ours": {side: statistics.median(ratios[side]) for side in _OTHERS},
        "ratios": ratios,
        "runs": {side: [each._asdict() for each in accounts[side]] for side in _SIDES},
        "trials": {side: [len(sweep.trials) for sweep in runs[side]] for side in _SIDES},
        "differences": {side: find_largest_difference(runs["ours"][0], runs[side][0]) for side in _OTHERS},
    }


def find_largest_difference(one: MeasuredSweep, other: MeasuredSweep) -> float:
    """Return the largest difference between values of the same parameters at the same epoch, if both sides have it."""
    first, second = _collect_values(one), _collect_values(other)
    return max((abs(first[key] - second[key]) for key in first.keys() & second.keys()), default=0.0)


def _collect_values(sweep: MeasuredSweep) -> dict[tuple[str, int], float]:
    """Return (parameters, epoch) -> metric."""
    keyed = [(repr(sorted(trial.params.items())), trial.values) for trial in sweep.trials]
    return {(params, epoch): value for params, values in keyed for _, epoch, value in values}


def format_table(scheduler: str, figures: Mapping[str, Any]) -> str:
    """Format the figures of one scheduler as a table."""
    lines = [f"{scheduler:34}" + "".join(f"{side:>22}" for side in _SIDES)]
    rows = (
        ("slot-s", "slot_s", 1),
        ("  in training steps", "train_s", 1),
        ("  in validations", "val_s", 1),
        ("  first starts", "first_starts_s", 1),
        ("  later starts", "later_starts_s", 1),
        ("  between", "between_s", 1),
        ("  at the end", "at_end_s", 1),
        ("efficiency", "efficiency", 3),
        ("a later start, median", "start_s", 2),
        ("epochs trained", "epochs", 0),
    )
    for head, name, digits in rows:
        lines.append(f"{head:34}" + "".join(f"{figures['medians'][side][name]:22.{digits}f}" for side in _SIDES))
    for head, name, form in (
        ("slot-s over ours", "over_ours", ".2f"),
        ("difference of a value", "differences", ".2g"),
    ):
        cells = "".join(f"{figures[name][side]:22{form}}" for side in _OTHERS)
        lines.append(f"{head:34}{'':22}{cells}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
