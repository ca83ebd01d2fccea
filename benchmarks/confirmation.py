"""Measure how often the statements of a confirmation are right, in simulations with known true means.

    python benchmarks/confirmation.py --output benchmarks/results/confirmation.json

A confirmation trains some configurations with the same few seeds, and the one with the best mean wins. Here nothing is
trained. The value of configuration i with seed j is drawn as mean of i + effect of seed j + noise; the last two
together have variance 1. The results of handpose/sweep/selection/paired_means.py are compared with the truth, over

- 2 to 11 configurations with 2 to 5 seeds (one seed gives no interval and no claim);
- true means that are all equal, spread evenly over two standard deviations, or equal except for a best one, which is
  five standard deviations better. The last configuration represents the default one;
- the fraction of the variance that comes from the seeds and is therefore common to all configurations;
- normal noise, noise with heavy tails (t with 5 degrees of freedom), skewed noise (gamma, skewness 1), and noise that
  violates the assumptions: exponential (skewness 2), and normal noise whose standard deviation differs between
  configurations: three times as large for the best one or for half of them, or zero for half of them.

Each line of the table is the worst of its cases, over the numbers of configurations and the true means:

coverage    how often the interval of the winner's mean contains its true mean. `ours` is compared with an interval that
            ignores that the winner was selected (t, Satterthwaite's degrees of freedom), the same with Bonferroni's
            correction, and the interval of one seed that is held out from the selection. Goal: at least 0.93 if the
            assumptions hold.
width       mean of half of that interval over the cases, in standard deviations of a run
bias        bias of the winner's mean, and what remains after subtracting `optimism`: the largest in absolute value
gain        coverage of the winner's gain over the default, if the default has not won
wrong       how often any difference to the winner is outside its interval. For equal means, this is how often a
            difference is claimed that does not exist. Goal: 0.05 if the assumptions hold.

With 2,000 repetitions a proportion of 0.05 has a standard error of 0.005, and the worst of the 18 cases of a line is
typically off by two of them.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.result_files import write_results  # noqa: E402
from handpose.sweep.selection.paired_means import (  # noqa: E402
    compute_difference_half_width,
    compute_mean_half_width,
    estimate_optimism,
)

_ERROR = 0.05
_SHARES = (0.0, 0.5, 0.9)
_MEANS = ("equal", "spread", "one best")
_NOISES = ("normal", "t5", "skewed", "exponential")
_UNEQUAL = ("one noisy", "half noisy", "half silent")
_METHODS = ("ours", "uncorrected", "Bonferroni", "held out")
_MOST_OPTIMISM = 200
"""Number of repetitions for which the optimism is estimated, because this is done one by one."""


class ConfirmationCase(NamedTuple):
    """A kind of confirmation.

    Attributes:
        noise: the distribution of the noise.
        deviations: which configurations have a standard deviation other than 1.
        num: number of configurations.
        num_seeds: number of seeds.
        means: the pattern of the true means.
        common_share: fraction of the variance that comes from the seeds.
    """

    noise: str
    deviations: str
    num: int
    num_seeds: int
    means: str
    common_share: float


def main() -> None:
    """Simulate every case, and print the worst of each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repetitions",
        type=int,
        default=2000,
        help="number of simulated confirmations for each case; default: %(default)s",
    )
    parser.add_argument(
        "--configurations",
        type=int,
        nargs="+",
        default=[2, 3, 4, 6, 8, 11],
        help="numbers of configurations to simulate",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[2, 3, 4, 5], help="numbers of training seeds to simulate"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation; default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    rows = []
    for index, case in enumerate(list_cases(given.configurations, given.seeds)):
        rng = np.random.default_rng([given.seed, index])
        rows.append(case._asdict() | _round_values(simulate(case, rng, given.repetitions)))
    print(format_table(rows))
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    write_results(given.output, {"settings": settings, "cases": rows}, indent=None)


def list_cases(nums: Sequence[int], nums_seeds: Sequence[int]) -> Iterator[ConfirmationCase]:
    """Yield all cases, those with equal variances first."""
    kinds = [*((noise, "equal") for noise in _NOISES), *(("normal", deviations) for deviations in _UNEQUAL)]
    for (noise, deviations), share, num_seeds, num, means in itertools.product(
        kinds, _SHARES, nums_seeds, nums, _MEANS
    ):
        yield ConfirmationCase(noise, deviations, num, num_seeds, means, share)


def simulate(case: ConfirmationCase, rng: np.random.Generator, repetitions: int) -> dict[str, Any]:
    """Draw confirmations, in which the smallest mean wins, and compare their statements with the truth."""
    true = _make_means(case)
    values = _draw_values(case, true, rng, repetitions)
    means, every = values.mean(axis=2), np.arange(repetitions)
    winner = means.argmin(axis=1)
    error = means[every, winner] - true[winner]
    widths = {
        "ours": compute_mean_half_width(values),
        "uncorrected": _compute_satterthwaite_width(values, 1),
        "Bonferroni": _compute_satterthwaite_width(values, case.num),
    }
    coverage = {name: float(np.mean(np.abs(error) <= width)) for name, width in widths.items()}
    held_out_error, widths["held out"] = _hold_out_seed(values, true)
    coverage["held out"] = float(np.mean(np.abs(held_out_error) <= widths["held out"]))
    wrong = np.abs((means - true) - error[:, None]) > compute_difference_half_width(values)[:, None]
    has_gain = winner != case.num - 1
    gain_error = (means[:, -1] - true[-1] - error)[has_gain]
    few = values[:_MOST_OPTIMISM]
    corrections = [estimate_optimism(each, range(case.num), mode="min") or 0.0 for each in few]
    return {
        "coverage": coverage,
        "half_width": {name: float(width.mean()) for name, width in widths.items()},
        "bias": float(error.mean()),
        "bias_left": float(error.mean() + np.mean(corrections)),
        "gain_coverage": 1 - float(wrong[has_gain, -1].mean()) if has_gain.any() else None,
        "gain_bias": float(gain_error.mean()) if has_gain.any() else None,
        "wrong_differences": float(wrong.any(axis=1).mean()),
    }


# --- random draws -----------------------------------------------------------------------------------------------------


def _make_means(case: ConfirmationCase) -> NDArray[np.float64]:
    """Return the true means of the configurations, the best first and the default last."""
    if case.means == "spread":
        return np.linspace(0.0, 2.0, case.num)
    return np.where(np.arange(case.num) == 0, 0.0, 5.0 if case.means == "one best" else 0.0)


def _draw_values(
    case: ConfirmationCase, true: NDArray[np.float64], rng: np.random.Generator, repetitions: int
) -> NDArray[np.float64]:
    """Draw values of the shape (repetitions, configurations, seeds)."""
    of_seeds = _draw_noise(case.noise, rng, (repetitions, 1, case.num_seeds))
    own = _draw_noise(case.noise, rng, (repetitions, case.num, case.num_seeds)) * _make_deviations(case)[:, None]
    return true[:, None] + np.sqrt(case.common_share) * of_seeds + np.sqrt(1 - case.common_share) * own


def _draw_noise(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw noise with mean 0 and variance 1."""
    if kind == "t5":
        return rng.standard_t(5, shape) / np.sqrt(5 / 3)
    if kind == "skewed":
        return (rng.gamma(4.0, 1.0, shape) - 4.0) / 2.0
    return rng.exponential(1.0, shape) - 1.0 if kind == "exponential" else rng.standard_normal(shape)


def _make_deviations(case: ConfirmationCase) -> NDArray[np.float64]:
    """Return the standard deviation of each configuration's noise, before the fraction of the seeds is subtracted."""
    place = np.arange(case.num)
    if case.deviations == "one noisy":
        return np.where(place == 0, 3.0, 1.0)
    half = place < case.num // 2
    return np.where(half, {"half noisy": 3.0, "half silent": 0.0}.get(case.deviations, 1.0), 1.0)


# --- other intervals --------------------------------------------------------------------------------------------------


def _compute_satterthwaite_width(values: NDArray[np.float64], num_comparisons: int) -> NDArray[np.float64]:
    """Return half the width of the t interval from the pooled variance within configurations."""
    variance, freedom = _pool_variances(values)
    return t.ppf(1 - _ERROR / 2 / num_comparisons, freedom) * np.sqrt(variance / values.shape[2])


def _pool_variances(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the variance over seeds, pooled over the configurations, and Satterthwaite's degrees of freedom."""
    _, num, num_seeds = values.shape
    of_seeds = values.mean(axis=1).var(axis=1, ddof=1)
    variance = values.var(axis=2, ddof=1).mean(axis=1)
    own = variance - of_seeds
    freedom = variance**2 / (of_seeds**2 / (num_seeds - 1) + own**2 / (num - 1) / (num_seeds - 1))
    return variance, freedom


def _hold_out_seed(
    values: NDArray[np.float64], true: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return error and half width if the last seed is not used for the selection. The variance is that of all seeds."""
    variance, _ = _pool_variances(values)
    winner = values[:, :, :-1].mean(axis=2).argmin(axis=1)
    error = values[np.arange(len(values)), winner, -1] - true[winner]
    return error, t.ppf(1 - _ERROR / 2, values.shape[2] - 1) * np.sqrt(variance)


# --- results ----------------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the worst of each group of cases."""
    heads = [f"coverage {name}" for name in _METHODS] + [f"width {name}" for name in _METHODS]
    heads += ["bias", "bias left", "gain", "wrong"]
    lines = ["| noise | deviations | seeds' share | seeds | " + " | ".join(heads) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(heads) + 4)) + " |")
    for key, group in itertools.groupby(
        rows, key=lambda row: (row["noise"], row["deviations"], row["common_share"], row["num_seeds"])
    ):
        lines.append("| " + " | ".join([*map(str, key), *_format_worst(list(group))]) + " |")
    return "\n".join(lines)


def _round_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Round to four decimals, which is more than the repetitions can resolve."""
    return {
        name: _round_values(value) if isinstance(value, Mapping) else None if value is None else round(value, 4)
        for name, value in content.items()
    }


def _format_worst(group: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [f"{min(row['coverage'][name] for row in group):.3f}" for name in _METHODS]
    cells += [f"{np.mean([row['half_width'][name] for row in group]):.2f}" for name in _METHODS]
    cells += [f"{max((row[name] for row in group), key=abs):+.2f}" for name in ("bias", "bias_left")]
    gains = [row["gain_coverage"] for row in group if row["gain_coverage"] is not None]
    return [*cells, f"{min(gains):.3f}", f"{max(row['wrong_differences'] for row in group):.3f}"]


if __name__ == "__main__":
    main()
