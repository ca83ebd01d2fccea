"""Whether expected errors can be trusted: their calibration, and whether they find the joints that are wrong.

Sparsification (Ilg et al. 2018, arXiv:1802.07095) leaves out the joints with the largest expected errors first. If the
expected errors are any good, the mean error of the others falls, at best as if the true errors had been known.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr

from handpose.files import write_atomically
from handpose.skeleton import ROOT

_NUM_BINS = 10
_FRACTIONS = np.linspace(0.0, 0.95, 20)
LEFT_OUT = 0.2
"""Fraction of the joints that is left out for the figure in the terminal."""

Errors = NDArray[np.float64]


def compute_confidence_scores(expected_mm: Errors, observed_mm: Errors) -> dict[str, Any] | None:
    """Compare expected errors with the true ones. The root joint is left out, because its root-relative error is 0.

    Args:
        expected_mm: (N, K) expected errors; NaN if they are not known.
        observed_mm: (N, K) true errors relative to the root.

    Returns:
        Plain values; None if the expected errors are not known.
            mean_expected_mm, mean_observed_mm: the means.
            bins: for ten groups of joints, from the smallest expected errors to the largest, the mean expected and the
                mean true error.
            calibration_error_mm: mean difference of the two over the bins.
            sparsification: fraction of the joints left out -> mean true error of the others, for the order by expected
                errors (`by_expected_mm`), and for the order by true errors (`by_observed_mm`).
            sparsification_error: area between these two curves, relative to the mean error; 0 is perfect.
            gain_without_least_confident: by which part the mean error falls without the least confident 20 %.
            rank_correlation: of expected and true errors (Spearman).
    """
    others = np.arange(expected_mm.shape[1]) != ROOT
    expected, observed = expected_mm[:, others].ravel(), observed_mm[:, others].ravel()
    if not np.isfinite(expected).all() or not len(expected):
        return None
    order = np.lexsort((np.random.default_rng(0).random(len(expected)), expected))  # equal ones at random
    bins = [part for part in np.array_split(order, _NUM_BINS) if len(part)]
    rows = [{"expected_mm": float(expected[part].mean()), "observed_mm": float(observed[part].mean())} for part in bins]
    gaps = np.array([abs(row["expected_mm"] - row["observed_mm"]) for row in rows])
    by_expected, by_observed = (_sparsify(observed, each) for each in (order, observed.argsort(kind="stable")))
    mean = float(observed.mean())
    left = _sparsify(observed, order, fractions=np.array([LEFT_OUT]))[0]
    return {
        "mean_expected_mm": float(expected.mean()),
        "mean_observed_mm": mean,
        "bins": rows,
        "calibration_error_mm": float(np.average(gaps, weights=[len(part) for part in bins])),
        "sparsification": {
            "left_out": _FRACTIONS.tolist(),
            "by_expected_mm": by_expected.tolist(),
            "by_observed_mm": by_observed.tolist(),
        },
        "sparsification_error": float(np.trapezoid(by_expected - by_observed, _FRACTIONS) / mean) if mean else 0.0,
        "gain_without_least_confident": float(1.0 - left / mean) if mean else 0.0,
        "rank_correlation": _correlate(expected, observed),
    }


def _sparsify(errors: Errors, order: NDArray[np.int64], *, fractions: NDArray[np.float64] = _FRACTIONS) -> Errors:
    """Return the mean error of what is left when a fraction of the errors, the last ones of an order, is left out."""
    means = errors[order].cumsum() / np.arange(1, len(errors) + 1)
    return means[np.maximum(np.round(len(errors) * (1.0 - fractions)).astype(int), 1) - 1]


def _correlate(expected: Errors, observed: Errors) -> float:
    if np.ptp(expected) == 0.0 or np.ptp(observed) == 0.0:
        return float("nan")
    return float(spearmanr(expected, observed).statistic)


def draw_confidence(path: Path, scores: dict[str, Any]) -> None:
    """Write a PNG with the calibration and the sparsification.

    Args:
        path: the file.
        scores: from `compute_confidence_scores`.
    """
    figure = Figure(figsize=(9.6, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    expected, observed = ([row[key] for row in scores["bins"]] for key in ("expected_mm", "observed_mm"))
    most = 1.05 * max(*expected, *observed)
    left.plot([0, most], [0, most], color="0.7", label="perfect")
    left.plot(expected, observed, marker="o", label="ten groups of joints")
    left.set(xlabel="expected error, mm", ylabel="true error, mm", xlim=(0, most), ylim=(0, most), title="Calibration")
    fractions = 100.0 * np.array(scores["sparsification"]["left_out"])
    for key, label in (
        ("by_expected_mm", "by expected error"),
        ("by_observed_mm", "by true error (the best possible)"),
    ):
        right.plot(fractions, scores["sparsification"][key], label=label)
    right.axhline(scores["mean_observed_mm"], color="0.7", label="at random")
    right.set(xlabel="joints left out, %", ylabel="mean error of the others, mm", xlim=(0, 95), title="Sparsification")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.legend()
    with write_atomically(path) as part:
        figure.savefig(part, format="png")
