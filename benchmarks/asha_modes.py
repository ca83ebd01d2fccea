"""Compare the two modes of ASHA, and random search without early stopping, on recorded learning curves of our network.

    python benchmarks/asha_modes.py --output asha_modes.json
    python benchmarks/asha_modes.py --slots 4 --start-seconds 10 --reduction-factor 2

A sweep is replayed with the schedulers of handpose/schedulers on a simulated clock: slots train configurations whose
loss after every epoch is known. Each seed draws a subset of the recorded configurations in random order, the same for
all schedulers. Cost is in slot-seconds: the time on the clock multiplied by the number of slots, whether they are busy
or idle. An epoch costs the recorded time of the fastest trial with the same decoder depth, because the machine did
other work while it recorded. Each segment of a trial, whether it starts the trial or resumes it from a checkpoint,
costs --start-seconds before its first epoch. This is the time to compose the configuration, build the network and read
the checkpoint in a warm worker, measured at 1 s for this network.

Regret is that of the pick: the configuration that would be retrained if the sweep ended at this cost (the best of those
trained longest). It is the pick's loss at the full budget minus the loss there of the best configuration that could be
drawn. Intervals are 95 % intervals of the mean over seeds (bootstrap), and of the geometric mean for ratios. They
describe the effect of the order of the configurations, not the results for another network or data set.

    python benchmarks/asha_modes.py --record FOLDER_OF_A_SWEEP

converts a finished sweep (scheduler=fifo searcher=random) to benchmarks/curves/decoder_27_epochs.json. The head of this
file has the command that recorded it.
"""

import argparse
import csv
import heapq
import json
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from handpose.files import to_json, write_json  # noqa: E402
from handpose.schedulers.asha import Asha  # noqa: E402
from handpose.schedulers.scheduler import Fifo, Scheduler  # noqa: E402
from handpose.search.space import Params, find_space  # noqa: E402

CURVES = REPOSITORY / "benchmarks" / "curves" / "decoder_27_epochs.json"
_BUDGETS = (125, 250, 500, 1000, 2000, 4000)
_REGRETS_MM = (1.0, 0.5, 0.25)
_DEPTH = "model.decoder.depth"


class Curve(NamedTuple):
    """A recorded trial.

    Attributes:
        params: its parameters.
        losses: the loss after each epoch, up to the last finite one.
        epoch_s: seconds per epoch.
    """

    params: Params
    losses: tuple[float, ...]
    epoch_s: float


class Step(NamedTuple):
    """A report in a replayed sweep.

    Attributes:
        slot_s: cost of the sweep so far, in slot-seconds.
        trial: the trial that reports.
        epoch: its epoch.
        pick: the trial that would be retrained after this report.
    """

    slot_s: float
    trial: int
    epoch: int
    pick: int


@dataclass(frozen=True)
class SweepReplay:
    """A replayed sweep, run until no configurations are left.

    Attributes:
        steps: all reports, in order.
        num_segments: number of trial segments.
        regrets_mm: regret of each trial at the full budget, in mm.
        max_epochs: number of epochs of a complete trial.
    """

    steps: Sequence[Step]
    num_segments: int
    regrets_mm: Sequence[float]
    max_epochs: int

    def compute_regret_at(self, slot_s: float) -> float:
        """Return the regret of the pick at this cost. Before the first report, it is the mean regret of all trials."""
        picks = [step.pick for step in self.steps if step.slot_s <= slot_s]
        return self.regrets_mm[picks[-1]] if picks else float(np.mean(self.regrets_mm))

    def compute_cost_of(self, regret_mm: float) -> float | None:
        """Return the slot-seconds until a trial with at most this regret is complete; None if there is none."""
        return next(
            (
                step.slot_s
                for step in self.steps
                if step.epoch == self.max_epochs and self.regrets_mm[step.trial] <= regret_mm
            ),
            None,
        )


def main() -> None:
    """Record curves, or replay recorded ones and print the costs of the modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", type=Path, metavar="SWEEP_FOLDER", help="write --curves from the trials of this sweep, and exit"
    )
    parser.add_argument("--curves", type=Path, default=CURVES, help="file of recorded learning curves")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16], help="numbers of slots to simulate")
    parser.add_argument("--seeds", type=int, default=100, help="number of simulated sweeps; default: %(default)s")
    parser.add_argument(
        "--share",
        type=float,
        default=0.75,
        help="fraction of the recorded configurations in each sweep; default: %(default)s",
    )
    parser.add_argument(
        "--start-seconds", type=float, default=1.0, help="cost of starting or resuming a trial; default: %(default)s"
    )
    parser.add_argument("--grace-period", type=int, default=1, help="grace_period of ASHA; default: %(default)s")
    parser.add_argument(
        "--reduction-factor", type=float, default=3, help="reduction_factor of ASHA; default: %(default)s"
    )
    parser.add_argument("--brackets", type=int, default=1, help="brackets of ASHA; default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    if given.record:
        print(f"{record_curves(given.record, given.curves)} curves in {given.curves}")
        return
    curves, max_epochs = read_curves(given.curves)
    halving = {name: getattr(given, name) for name in ("grace_period", "reduction_factor", "brackets")}
    results = {}
    for num_slots in given.slots:
        replays = {
            name: [
                replay_sweep(
                    make(seed),
                    draw_curves(curves, seed, given.share),
                    num_slots=num_slots,
                    start_s=given.start_seconds,
                    max_epochs=max_epochs,
                )
                for seed in range(given.seeds)
            ]
            for name, make in _make_schedulers(max_epochs, halving).items()
        }
        results[num_slots] = summarise(replays)
        print(format_table(num_slots, results[num_slots]), flush=True)
    if given.output:
        settings = {name: value for name, value in vars(given).items() if name not in ("record", "curves", "output")}
        content = {"curves": given.curves.name, "num_curves": len(curves), "settings": settings, "slots": results}
        write_json(given.output, content, indent=1)


def _make_schedulers(max_epochs: int, halving: Mapping[str, Any]) -> dict[str, Callable[[int], Scheduler]]:
    def asha(mode: Any, seed: int) -> Scheduler:
        return Asha(mode=mode, max_epochs=max_epochs, seed=seed, **halving)

    return {"stop": partial(asha, "stop"), "promote": partial(asha, "promote"), "no stopping": lambda seed: Fifo()}


def draw_curves(curves: Sequence[Curve], seed: int, share: float) -> list[Curve]:
    """Draw a fraction of the curves in random order."""
    return random.Random(seed).sample(curves, round(share * len(curves)))


# --- replay of a sweep ------------------------------------------------------------------------------------------------


def replay_sweep(
    scheduler: Scheduler, curves: Sequence[Curve], *, num_slots: int, start_s: float, max_epochs: int
) -> SweepReplay:
    """Run a sweep over the curves, in their order, until none is left to start or resume."""
    clock, num_begun, num_segments, num_free = 0.0, 0, 0, num_slots
    trained: defaultdict[int, int] = defaultdict(int)
    running: list[tuple[float, int]] = []  # (end of its epoch, trial)
    ranks: dict[int, tuple[int, float, int]] = {}
    steps: list[Step] = []
    while True:
        while num_free:
            start = scheduler.choose_trial_to_resume(can_start_trial=num_begun < len(curves))
            if start is not None:
                trial = start.trial
                scheduler.on_trial_resume(start)
            elif num_begun < len(curves):
                trial = num_begun
                scheduler.on_trial_start(trial, curves[trial].params)
                num_begun += 1
            else:
                break
            num_free -= 1
            num_segments += 1
            heapq.heappush(running, (clock + start_s + curves[trial].epoch_s, trial))
        if not running:
            return SweepReplay(steps, num_segments, _compute_regrets(curves, max_epochs), max_epochs)
        clock, trial = heapq.heappop(running)
        if trained[trial] == len(curves[trial].losses):  # the trial diverged in this epoch
            scheduler.on_trial_end(trial)
            ranks.pop(trial, None)
            num_free += 1
            continue
        loss = curves[trial].losses[trained[trial]]
        trained[trial] += 1
        ranks[trial] = (-trained[trial], loss, trial)  # as in select_winner: the longest trained first, then the best
        steps.append(Step(clock * num_slots, trial, trained[trial], min(ranks.values())[-1]))
        if scheduler.on_trial_result(trial, trained[trial], loss) == "continue" and trained[trial] < max_epochs:
            heapq.heappush(running, (clock + curves[trial].epoch_s, trial))
        else:
            num_free += 1


def _compute_regrets(curves: Sequence[Curve], max_epochs: int) -> list[float]:
    """Compute the regret of each curve at the full budget. A diverged one counts as the worst that did not diverge."""
    finals = [curve.losses[-1] if len(curve.losses) == max_epochs else None for curve in curves]
    known = [final for final in finals if final is not None]
    return [(max(known) if final is None else final) - min(known) for final in finals]


# --- results ----------------------------------------------------------------------------------------------------------


def summarise(replays: Mapping[str, Sequence[SweepReplay]]) -> dict[str, Any]:
    """Summarise regret by cost, cost by regret, and the cost of the whole sweep. Ratios of costs are over `stop`."""
    return {
        "regret_mm": {
            name: {budget: compute_mean([each.compute_regret_at(budget) for each in runs]) for budget in _BUDGETS}
            for name, runs in replays.items()
        },
        "cost_slot_s": {
            name: {regret: _summarise_cost(runs, replays["stop"], regret) for regret in _REGRETS_MM}
            for name, runs in replays.items()
        },
        "whole_sweep": {
            name: {
                "slot_s": compute_mean([each.steps[-1].slot_s for each in runs]),
                "epochs": compute_mean([len(each.steps) for each in runs]),
                "complete": compute_mean([sum(step.epoch == each.max_epochs for step in each.steps) for each in runs]),
                "segments": compute_mean([each.num_segments for each in runs]),
                "regret_mm": compute_mean([each.regrets_mm[each.steps[-1].pick] for each in runs]),
            }
            for name, runs in replays.items()
        },
    }


def _summarise_cost(runs: Sequence[SweepReplay], reference: Sequence[SweepReplay], regret_mm: float) -> dict[str, Any]:
    pairs = [
        (run.compute_cost_of(regret_mm), other.compute_cost_of(regret_mm))
        for run, other in zip(runs, reference, strict=True)
    ]
    reached = [cost for cost, _ in pairs if cost is not None]
    both = np.array([(cost, other) for cost, other in pairs if cost is not None and other is not None])
    return {
        "reached": len(reached) / len(pairs),
        "slot_s": compute_mean(reached),
        "over_stop": compute_mean(np.log(both[:, 0] / both[:, 1]), transform=np.exp) if len(both) else None,
    }


def compute_mean(
    values: Sequence[float] | np.ndarray, *, transform: Callable[[Any], Any] = float
) -> tuple[float, float, float] | None:
    """Return the mean and its 95 % bootstrap interval (mean, low, high); None if there are no values."""
    if not len(values):
        return None
    sample = np.asarray(values, dtype=float)
    means = np.random.default_rng(0).choice(sample, (2000, len(sample))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return tuple(round(float(transform(each)), 4) for each in (sample.mean(), low, high))  # type: ignore[return-value]


def format_table(num_slots: int, figures: Mapping[str, Any]) -> str:
    """Format the figures for one number of slots."""
    lines = [f"{num_slots} slot(s)", "", _format_row("regret of the pick, mm, at slot-seconds", map(str, _BUDGETS))]
    for name, by_budget in figures["regret_mm"].items():
        lines.append(_format_row(name, (_format_cell(by_budget[budget], 2) for budget in _BUDGETS)))
    lines += [
        "",
        _format_row("slot-seconds until a full trial is within", (f"{regret:g} mm" for regret in _REGRETS_MM)),
    ]
    for name, by_regret in figures["cost_slot_s"].items():
        lines.append(_format_row(name, (_format_cell(by_regret[regret]["slot_s"], 0) for regret in _REGRETS_MM)))
        lines.append(_format_row("  reached in", (f"{by_regret[regret]['reached']:.0%}" for regret in _REGRETS_MM)))
        if name != "stop":
            cells = (_format_cell(by_regret[regret]["over_stop"], 2) for regret in _REGRETS_MM)
            lines.append(_format_row("  cost relative to stop, if both reach it", cells))
    columns = ("slot_s", "epochs", "complete", "segments", "regret_mm")
    lines += ["", _format_row("the whole sweep", columns)]
    for name, whole in figures["whole_sweep"].items():
        lines.append(
            _format_row(name, (_format_cell(whole[column], 2 if column == "regret_mm" else 0) for column in columns))
        )
    return "\n".join(lines) + "\n"


def _format_row(head: str, cells: Any) -> str:
    return f"{head:41}" + "".join(f"{cell:>19}" for cell in cells)


def _format_cell(figure: tuple[float, float, float] | None, digits: int) -> str:
    if figure is None:
        return "-"
    mean, low, high = (f"{each:.{digits}f}" for each in figure)
    return f"{mean} [{low}, {high}]"


# --- recorded curves --------------------------------------------------------------------------------------------------


def read_curves(file: Path) -> tuple[list[Curve], int]:
    """Read the recorded trials, and the number of epochs of a complete one."""
    content = json.loads(file.read_text(encoding="utf-8"))
    trials, max_epochs = content["trials"], content["max_epochs"]
    cheapest: dict[Any, float] = {}
    for trial in trials:
        depth = trial["params"][_DEPTH]
        num_epochs = min(len(trial["losses"]) + 1, max_epochs)  # a diverged trial ended in its next epoch
        cheapest[depth] = min(cheapest.get(depth, float("inf")), trial["seconds"] / num_epochs)
    curves = [Curve(each["params"], tuple(each["losses"]), cheapest[each["params"][_DEPTH]]) for each in trials]
    return curves, max_epochs


def record_curves(sweep: Path, file: Path) -> int:
    """Write the trials of a sweep without early stopping as curves, and return their number.

    Trials that neither finished nor diverged are left out.
    """
    description = yaml.safe_load((sweep / "sweep.yaml").read_text(encoding="utf-8"))
    overrides = dict(item.partition("=")[::2] for item in shlex.split(description["command_line"])[2:])
    space = find_space(overrides["search_space"])
    with (sweep / "trials.csv").open(newline="", encoding="utf-8") as rows:
        by_number = {int(row["number"]): row for row in csv.DictReader(rows)}
    storage = JournalStorage(JournalFileBackend(str(sweep / "study" / "journal.log")))
    study = optuna.load_study(study_name=None, storage=storage)
    trials = [
        {
            "params": trial.params,
            "seconds": float(by_number[trial.number]["seconds"]),
            "losses": _take_finite_prefix(trial.intermediate_values),
        }
        for trial in study.trials
        if trial.number in by_number and by_number[trial.number]["state"] in ("complete", "diverged")
    ]
    head = {
        "command": shlex.join(["python", "tune.py", *_drop_folder(overrides, space)]),
        "recorded": f"{len(trials)} of {overrides.get('sweep.num_trials', 'the')} trials",
        "search_space": yaml.safe_load(space.read_text(encoding="utf-8")),
        "metric": study.metric_names[0] if study.metric_names else "",
        "versions": description["versions"],
        "data_fingerprint": description["data_fingerprint"],
        "seconds": "of the whole trial; the machine was shared, so that they vary with what else ran",
        "max_epochs": int(overrides["sweep.max_epochs"]),
    }
    lines = ",\n".join(to_json(trial) for trial in trials)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(head, indent=1)[:-2] + f',\n "trials": [\n{lines}\n]}}\n', encoding="utf-8")
    return len(trials)


def _take_finite_prefix(values: Mapping[int, float]) -> list[float]:
    losses: list[float] = []
    while np.isfinite(value := values.get(len(losses) + 1, np.nan)):
        losses.append(round(value, 4))
    return losses


def _drop_folder(overrides: Mapping[str, str], space: Path) -> list[str]:
    named = {**overrides, "search_space": space.name}
    return [f"{key}={value}" for key, value in named.items()]


if __name__ == "__main__":
    main()
