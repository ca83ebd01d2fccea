"""Measure how well the model of learning curves predicts the ends of trainings that were stopped early.

    python benchmarks/curve_predictions.py --output benchmarks/results/curve_predictions.json

The model behind searcher=curves and scheduler=freeze_thaw sees recorded trainings (benchmarks/curves/): one half of
them complete, of the other half the first epochs only. The table has, for the other half, at the last epoch

- the rank correlation (Spearman) of the predicted with the recorded losses, and that of the losses at the last epoch
  seen, by which ASHA compares trials;
- the root mean square error of the logarithm of the prediction;
- how many of the recorded losses are in the interval that should have 90 % of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.curve_surrogate import RecordedCurve, read_curves  # noqa: E402
from benchmarks.record_curves import CURVES, RECORDINGS  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.search.candidates import CandidatePool  # noqa: E402
from handpose.search.curve_model import CurveModel  # noqa: E402
from handpose.search.curve_worth import CurveForecast, ObservedCurve, fit_model, list_decision_epochs  # noqa: E402
from handpose.search.encoding import ParamsEncoder  # noqa: E402
from handpose.search.space import load_space  # noqa: E402


class Predictions(NamedTuple):
    """Predicted and recorded losses at the last epoch, of the trainings that were stopped.

    Attributes:
        low, middle, high: ends and middle of the interval with 90 % of the probability (n,).
        recorded: what the trainings reached (n,).
        last_seen: the loss at the last epoch that the model has seen (n,).
    """

    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray
    recorded: np.ndarray
    last_seen: np.ndarray


def predict_ends(
    complete: Sequence[RecordedCurve], stopped: Sequence[RecordedCurve], encoder: ParamsEncoder, *, num_seen: int
) -> Predictions:
    """Predict the ends of trainings.

    Args:
        complete: trainings of which the model sees all epochs.
        stopped: trainings of which it sees the first ones.
        encoder: the encoder of their space.
        num_seen: number of the first ones.
    """
    max_epochs = len(complete[0].losses)
    lengths = [max_epochs] * len(complete) + [num_seen] * len(stopped)
    vectors = encoder.encode([curve.params for curve in [*complete, *stopped]])
    curves = [
        ObservedCurve(vector, dict(enumerate(curve.losses[:length], start=1)))
        for vector, curve, length in zip(vectors, [*complete, *stopped], lengths, strict=True)
    ]
    epochs = list_decision_epochs(max_epochs)
    model = CurveModel(encoder.num_entries, max_epochs)
    fit_model(model, curves, epochs)
    forecast = CurveForecast(model, curves, max_epochs, epochs)
    last = np.array([max_epochs])
    courses = [forecast.predict_course(place, last)[:, 0] for place in range(len(complete), len(curves))]
    recorded = np.array([curve.losses[-1] for curve in stopped])
    low, middle, high = np.transpose(courses)
    last_seen = np.array([curve.losses[num_seen - 1] for curve in stopped])
    return Predictions(low, middle, high, recorded, last_seen)


def measure(name: str, *, num_trials: int, num_seen: int, repeats: int) -> dict[str, float]:
    """Return the figures of a recording: means over random choices of the trainings."""
    from scipy.stats import spearmanr

    all_curves = read_curves(CURVES / f"{name}.jsonl")
    max_epochs = max(len(curve.losses) for curve in all_curves)
    by_number = {curve.number: curve for curve in reversed(all_curves) if len(curve.losses) == max_epochs}
    encoder = CandidatePool(load_space(RECORDINGS[name].space)).encoder
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(repeats):
        chosen = [by_number[number] for number in rng.permutation(sorted(by_number))[:num_trials]]
        found = predict_ends(chosen[num_trials // 2 :], chosen[: num_trials // 2], encoder, num_seen=num_seen)
        rows.append(
            [
                spearmanr(found.middle, found.recorded).statistic,
                spearmanr(found.last_seen, found.recorded).statistic,
                np.mean(np.log(found.middle / found.recorded) ** 2),
                np.mean((found.low <= found.recorded) & (found.recorded <= found.high)),
            ]
        )
    rank, last_rank, square, coverage = np.mean(rows, axis=0)
    return {"rank": rank, "rank_of_last_seen": last_rank, "error": float(np.sqrt(square)), "coverage": coverage}


def main() -> None:
    """Print a line for each recording and number of epochs seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=list(RECORDINGS), choices=RECORDINGS, help="recordings")
    parser.add_argument("--seen", type=int, nargs="+", default=[1, 3, 9], help="epochs seen of a stopped training")
    parser.add_argument("--trials", type=int, default=40, help="trainings that the model sees; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="choices of the trainings; default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    results = []
    print(f"{'':12}{'seen':>6}{'rank correlation':>20}{'of the last seen':>20}{'error of log':>16}{'in 90 %':>10}")
    for name in given.spaces:
        for num_seen in given.seen:
            found = measure(name, num_trials=given.trials, num_seen=num_seen, repeats=given.repeats)
            results.append({"space": name, "seen": num_seen, **found})
            rank, last_rank, error, coverage = found.values()
            print(f"{name:12}{num_seen:6}{rank:20.3f}{last_rank:20.3f}{error:16.3f}{coverage:10.2f}", flush=True)
    settings = {"trials": given.trials, "repeats": given.repeats}
    write_results(given.output, {"settings": settings, "predictions": results})


if __name__ == "__main__":
    main()
