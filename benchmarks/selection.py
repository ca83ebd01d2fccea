"""Compare two ways to choose the configuration of a sweep: its best trial, or the best mean of a few finalists.

    python benchmarks/selection.py --output benchmarks/results/selection.json

Both have the same budget of epochs. `best trial` spends all of it on trials, and selects the best value among those
trained longest. `confirmed` ends its trials earlier. It uses the rest to train the `sweep.confirm.top_k` best ones and
the default configuration to the end with `sweep.confirm.seeds` new seeds each, and selects the best mean.

Nothing is trained. A sweep on four slots is replayed with the schedulers of the project (asha in mode `stop`) over
learning curves of known quality. A configuration lies between two recorded ones of consecutive rank
(benchmarks/curves), its curve lies between theirs, and its true quality is the end of this curve. A training reports
the curve plus one draw of normal noise, which represents its seed. The finalists get new draws. `random` proposals are
uniform over the ranks. `model` proposals are concentrated at the better end (the cube of uniform ranks from 0 to 1),
like those of a sampler that has learnt. The default configuration is the first trial, as in our sweeps, and has its
rank among the recorded ones.

Regret is the true quality of the pick minus that of the best configuration. Optimism is the true quality of the pick
minus the value that the sweep measured: how much worse it is than it looked. Intervals are 95 % intervals of the mean
over repetitions (bootstrap). That of the gain is over paired differences, because both methods see the same trials.
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
    """A configuration.

    Attributes:
        losses: the loss after each epoch, as its training reports it.
        true_quality: the loss at the end, without noise.
    """

    losses: Sequence[float]
    true_quality: float


class ReplayedSweep(NamedTuple):
    """A replayed sweep.

    Attributes:
        trials: all trials.
        order: for each trained epoch, in order, the index of its trial.
        max_epochs: number of epochs of a complete trial.
    """

    trials: Sequence[RecordedTrial]
    order: Sequence[int]
    max_epochs: int

    def rank_trials(self, budget: int) -> list[tuple[int, float]]:
        """Rank the trials after so many epochs: the longest trained first, then the best.

        Returns:
            (trial, value) of each trial.
        """
        reached = Counter(self.order[: max(budget, 0)])
        values = {trial: self.trials[trial].losses[epoch - 1] for trial, epoch in reached.items()}
        order = sorted(reached, key=lambda trial: (-reached[trial], values[trial], trial))
        return [(trial, values[trial]) for trial in order]


class MethodPick(NamedTuple):
    """The result of a method: the true quality of its pick, and the value measured for it."""

    true_quality: float
    measured: float


def main() -> None:
    """Replay many sweeps for each case, pick with both methods, and print the quality of the picks."""
    confirm = compose("tune", []).sweep.confirm
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repetitions", type=int, default=200, help="number of simulated sweeps for each case; default: %(default)s"
    )
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8], help="standard deviations between seeds, in mm"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 100, 200], help="budgets, in full trainings")
    parser.add_argument("--top-k", type=int, default=confirm.top_k, help="number of finalists; default: %(default)s")
    parser.add_argument(
        "--seeds", type=int, default=confirm.seeds, help="number of new seeds of each finalist; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
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
    """Compute the figures for each budget."""
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
    """Replay a sweep of so many epochs, in which the slots take turns. `ranked` has the curves, the best first."""
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
    """Interpolate the curve at a rank between 0 (best) and 1 (worst)."""
    position = rank * (len(ranked) - 1)
    below = min(int(position), len(ranked) - 2)
    first, second = (np.array(curve.losses) for curve in ranked[below : below + 2])
    return first + (position - below) * (second - first)


def compute_default_rank(ranked: Sequence[Curve]) -> float:
    """Return the rank of the default configuration among the recorded ones, from 0 to 1."""
    defaults = flatten_config(to_plain_values(compose("train", [])))
    position = next(
        (i for i, curve in enumerate(ranked) if all(defaults[key] == value for key, value in curve.params.items())), 0
    )
    return position / (len(ranked) - 1)


# --- the methods ------------------------------------------------------------------------------------------------------


def pick_best_trial(sweep: ReplayedSweep, budget: int) -> MethodPick:
    """Pick the best of the trials within the budget."""
    trial, value = sweep.rank_trials(budget)[0]
    return MethodPick(sweep.trials[trial].true_quality, value)


def pick_confirmed(
    sweep: ReplayedSweep, budget: int, rng: np.random.Generator, *, top_k: int, num_seeds: int, noise_mm: float
) -> MethodPick:
    """Pick the best mean over new seeds among the finalists and the default, trial 0.

    The trials get the rest of the budget.
    """
    ranked = sweep.rank_trials(budget - (top_k + 1) * num_seeds * sweep.max_epochs)
    chosen = list(dict.fromkeys([*(trial for trial, _ in ranked[:top_k]), 0]))
    true = np.array([sweep.trials[trial].true_quality for trial in chosen])
    means = true + noise_mm * rng.standard_normal((num_seeds, len(chosen))).mean(axis=0)
    picked = int(np.argmin(means))
    return MethodPick(float(true[picked]), float(means[picked]))


# --- results ----------------------------------------------------------------------------------------------------------


def summarise_picks(pairs: Sequence[tuple[MethodPick, MethodPick]], *, best: float, default: float) -> dict[str, Any]:
    """Summarise for both methods regret, optimism and how often the pick is worse than the default, and the gain."""
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
    """Format the figures. The last column has the method that finds the better configuration."""
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
