"""Which configuration a sweep ends with: the best of its trials, or the best mean of a few finalists over fresh seeds.

    python benchmarks/selection.py --output benchmarks/results/selection.json

Both have the same budget of epochs. `best trial` spends all of it on trials and takes the one with the best value among
those trained longest. `confirmed` ends its trials earlier, by what it needs to train the `sweep.confirm.top_k` best and
the default configuration `sweep.confirm.seeds` times to the end, and takes the best mean of those.

Nothing is trained. A sweep on four slots is replayed with the schedulers of the project (asha in mode `stop`) over
learning curves of known quality: a configuration lies between two recorded ones that are neighbours in rank
(benchmarks/curves), its curve between theirs, and its true quality is where that curve ends. What a training reports is
the curve plus one draw of normal noise, which stands for its seed; what is drawn for the finalists is drawn afresh.
`random` proposals are drawn evenly from the ranks, `model` proposals crowd at the better end (the cube of the former,
of ranks from 0 to 1), as those of a sampler that has learned. The default configuration is the first trial, as in our
sweeps, and has the rank that it has among the recorded ones.

Regret is the true quality of the pick less that of the best configuration that there is. Optimism is the true quality
of the pick less what the sweep had measured of it: how much worse it is than it looked. Intervals are 95 % of the mean
over repetitions (bootstrap); the gain is that of the differences, since both methods see the same trials.
"""

import argparse
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.asha_modes import CURVES, Curve, compute_mean, read_curves  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.config import compose, to_plain_values  # noqa: E402
from handpose.schedulers.asha import Asha  # noqa: E402
from handpose.schedulers.scheduler import Fifo, Scheduler  # noqa: E402
from handpose.search.space import flatten_config  # noqa: E402

_NUM_SLOTS = 4
_CROWDING = {"random": 1.0, "model": 3.0}


class RecordedTrial(NamedTuple):
    """A configuration. losses: after each epoch, as its training reports them. true_quality: its quality at the end."""

    losses: Sequence[float]
    true_quality: float


class ReplayedSweep(NamedTuple):
    """A replayed sweep. order: the trial that was trained for an epoch, one after the other."""

    trials: Sequence[RecordedTrial]
    order: Sequence[int]
    max_epochs: int

    def rank_trials(self, budget: int) -> list[tuple[int, float]]:
        """(trial, value) when so many epochs have been trained: the most trained first, and among equals the best."""
        reached = Counter(self.order[: max(budget, 0)])
        values = {trial: self.trials[trial].losses[epoch - 1] for trial, epoch in reached.items()}
        order = sorted(reached, key=lambda trial: (-reached[trial], values[trial], trial))
        return [(trial, values[trial]) for trial in order]


class MethodPick(NamedTuple):
    """What a method ends with: its true quality, and what had been measured of it."""

    true_quality: float
    measured: float


def main() -> None:
    """Replay many sweeps for each case, pick by both methods, and print what the picks are worth."""
    confirm = compose("tune", []).sweep.confirm
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8], help="of a seed, in mm")
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 100, 200], help="in trainings to the end")
    parser.add_argument("--top-k", type=int, default=confirm.top_k)
    parser.add_argument("--seeds", type=int, default=confirm.seeds)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    pool, max_epochs = read_curves(CURVES)
    cases = [
        run_case(pool, max_epochs, given, scheduler=scheduler, proposals=proposals, noise_mm=noise_mm)
        for scheduler in ("fifo", "asha")
        for proposals in _CROWDING
        for noise_mm in given.noise
    ]
    rows = [row for each in cases for row in each]
    print(format_table(rows))
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    write_results(given.output, {"curves": CURVES.name, "settings": settings, "cases": rows})


def run_case(
    pool: Sequence[Curve],
    max_epochs: int,
    given: argparse.Namespace,
    *,
    scheduler: str,
    proposals: str,
    noise_mm: float,
) -> list[dict[str, Any]]:
    """Figures for each budget."""
    ranked = sorted(pool, key=lambda curve: curve.losses[-1])
    default_rank = compute_default_rank(ranked)
    picks: dict[int, list[tuple[MethodPick, MethodPick]]] = {budget: [] for budget in given.budgets}
    for seed in range(given.repetitions):
        rng = np.random.default_rng(seed)
        sweep = replay_sweep(
            ranked,
            rng,
            scheduler=_make_scheduler(scheduler, max_epochs, seed),
            budget=max(given.budgets) * max_epochs,
            crowding=_CROWDING[proposals],
            noise_mm=noise_mm,
            default_rank=default_rank,
            max_epochs=max_epochs,
        )
        for budget in given.budgets:
            epochs = budget * max_epochs
            confirmed = pick_confirmed(sweep, epochs, rng, top_k=given.top_k, num_seeds=given.seeds, noise_mm=noise_mm)
            picks[budget].append((pick_best_trial(sweep, epochs), confirmed))
    best, default = ranked[0].losses[-1], _interpolate_curve(ranked, default_rank)[-1]
    named = {"scheduler": scheduler, "proposals": proposals, "noise_mm": noise_mm}
    return [
        named | {"budget": budget} | summarise_picks(pairs, best=best, default=default)
        for budget, pairs in picks.items()
    ]


def _make_scheduler(scheduler: str, max_epochs: int, seed: int) -> Scheduler:
    if scheduler == "fifo":
        return Fifo()
    return Asha(mode="stop", grace_period=1, reduction_factor=3, brackets=1, max_epochs=max_epochs, seed=seed)


# --- the sweep --------------------------------------------------------------------------------------------------------


def replay_sweep(
    ranked: Sequence[Curve],
    rng: np.random.Generator,
    *,
    scheduler: Scheduler,
    budget: int,
    crowding: float,
    noise_mm: float,
    default_rank: float,
    max_epochs: int,
) -> ReplayedSweep:
    """Replay a sweep of so many epochs, its slots taking turns. ranked: recorded curves, the best first."""
    trials: list[RecordedTrial] = []
    order: list[int] = []
    running: deque[tuple[int, int]] = deque()  # (trial, epochs trained)
    while len(order) < budget:
        while len(running) < _NUM_SLOTS:
            losses = _interpolate_curve(ranked, float(rng.uniform() ** crowding) if trials else default_rank)
            scheduler.on_trial_start(len(trials), {})
            running.append((len(trials), 0))
            trials.append(RecordedTrial((losses + noise_mm * rng.standard_normal()).tolist(), float(losses[-1])))
        trial, epochs = running.popleft()
        order.append(trial)
        decision = scheduler.on_trial_result(trial, epochs + 1, trials[trial].losses[epochs])
        if decision == "continue" and epochs + 1 < max_epochs:
            running.append((trial, epochs + 1))
    return ReplayedSweep(trials, order, max_epochs)


def _interpolate_curve(ranked: Sequence[Curve], rank: float) -> np.ndarray:
    """The curve of a configuration at this rank, 0 the best to 1 the worst: between those of its neighbours."""
    place = rank * (len(ranked) - 1)
    below = min(int(place), len(ranked) - 2)
    first, second = (np.array(curve.losses) for curve in ranked[below : below + 2])
    return first + (place - below) * (second - first)


def compute_default_rank(ranked: Sequence[Curve]) -> float:
    """The rank of the default configuration among the recorded ones, 0 to 1."""
    defaults = flatten_config(to_plain_values(compose("train", [])))
    place = next(
        (i for i, curve in enumerate(ranked) if all(defaults[key] == value for key, value in curve.params.items())), 0
    )
    return place / (len(ranked) - 1)


# --- the methods ------------------------------------------------------------------------------------------------------


def pick_best_trial(sweep: ReplayedSweep, budget: int) -> MethodPick:
    """The best of the trials that the budget allows."""
    trial, value = sweep.rank_trials(budget)[0]
    return MethodPick(sweep.trials[trial].true_quality, value)


def pick_confirmed(
    sweep: ReplayedSweep, budget: int, rng: np.random.Generator, *, top_k: int, num_seeds: int, noise_mm: float
) -> MethodPick:
    """The best mean over fresh seeds of finalists and default, trial 0; trials get what that leaves of the budget."""
    ranked = sweep.rank_trials(budget - (top_k + 1) * num_seeds * sweep.max_epochs)
    chosen = list(dict.fromkeys([*(trial for trial, _ in ranked[:top_k]), 0]))
    true = np.array([sweep.trials[trial].true_quality for trial in chosen])
    means = true + noise_mm * rng.standard_normal((num_seeds, len(chosen))).mean(axis=0)
    picked = int(np.argmin(means))
    return MethodPick(float(true[picked]), float(means[picked]))


# --- what it says -----------------------------------------------------------------------------------------------------


def summarise_picks(pairs: Sequence[tuple[MethodPick, MethodPick]], *, best: float, default: float) -> dict[str, Any]:
    """Of (best trial, confirmed): regret, optimism, how often the pick is worse than the default; and the gain."""
    methods = dict(zip(("best trial", "confirmed"), zip(*pairs, strict=True), strict=True))
    gains = [trial.true_quality - confirmed.true_quality for trial, confirmed in pairs]
    return {
        "methods": {
            name: {
                "regret_mm": compute_mean([pick.true_quality - best for pick in picks]),
                "optimism_mm": compute_mean([pick.true_quality - pick.measured for pick in picks]),
                "worse_than_default": float(np.mean([pick.true_quality > default + 1e-9 for pick in picks])),
            }
            for name, picks in methods.items()
        },
        "gain_mm": compute_mean(gains),
    }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures, to read; the last column says which method ends with the better configuration."""
    heads = (
        "regret, best trial",
        "regret, confirmed",
        "gain of confirming",
        "optimism, best trial",
        "worse than default",
    )
    lines = [f"{'scheduler':10}{'proposals':10}{'noise mm':>9}{'budget':>7}" + "".join(f"{head:>23}" for head in heads)]
    for row in rows:
        trial, confirmed = row["methods"]["best trial"], row["methods"]["confirmed"]
        cells = (
            _format_cell(trial["regret_mm"]),
            _format_cell(confirmed["regret_mm"]),
            _format_cell(row["gain_mm"]),
            _format_cell(trial["optimism_mm"]),
            f"{trial['worse_than_default']:.0%} / {confirmed['worse_than_default']:.0%}",
        )
        head = f"{row['scheduler']:10}{row['proposals']:10}{row['noise_mm']:>9g}{row['budget']:>7}"
        low, high = row["gain_mm"][1:]
        better = "confirmed" if low > 0 else "best trial" if high < 0 else "-"
        lines.append(head + "".join(f"{cell:>23}" for cell in cells) + f"   {better}")
    return "\n".join(lines) + "\n"


def _format_cell(estimate: Sequence[float]) -> str:
    mean, low, high = estimate
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
