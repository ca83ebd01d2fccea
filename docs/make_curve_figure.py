"""Make docs/curve_model.png: how the model of learning curves predicts trials that were stopped early.

    PYTHONPATH=. python docs/make_curve_figure.py

The curves are those of benchmarks/curves/default.jsonl. The model knows complete trials, and only the first epochs of
three others; their further course is drawn behind its predictions.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.curve_surrogate import read_curves
from benchmarks.record_curves import CURVES, RECORDINGS
from handpose.search.candidates import CandidatePool
from handpose.search.curve_model import CurveModel
from handpose.search.curve_worth import CurveForecast, ObservedCurve, fit_model, list_decision_epochs
from handpose.search.space import load_space

_FIGURE = Path(__file__).with_name("curve_model.png")
_NUM_KNOWN = 25
_STOPPED = {30: 3, 37: 3, 41: 7}
"""Number of the configuration -> epochs that the model sees."""
_COLORS = ("tab:blue", "tab:orange", "tab:green")


def main() -> None:
    """Draw the figure."""
    recorded = {curve.number: curve for curve in reversed(read_curves(CURVES / "default.jsonl"))}
    known = [recorded[number] for number in sorted(recorded) if number not in _STOPPED][:_NUM_KNOWN]
    stopped = [recorded[number] for number in _STOPPED]
    encoder = CandidatePool(load_space(RECORDINGS["default"].space)).encoder
    vectors = encoder.encode([curve.params for curve in [*known, *stopped]])
    seen = [*(len(curve.losses) for curve in known), *_STOPPED.values()]
    curves = [
        ObservedCurve(vector, dict(enumerate(curve.losses[:num], start=1)))
        for vector, curve, num in zip(vectors, [*known, *stopped], seen, strict=True)
    ]
    max_epochs = len(known[0].losses)
    epochs = list_decision_epochs(max_epochs)
    model = CurveModel(encoder.num_entries, max_epochs)
    fit_model(model, curves, epochs)
    forecast = CurveForecast(model, curves, max_epochs, epochs)

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for curve in known:
        axes.plot(range(1, max_epochs + 1), curve.losses, color="0.85", linewidth=0.8)
    for place, (curve, num, color) in enumerate(
        zip(stopped, _STOPPED.values(), _COLORS, strict=True), start=len(known)
    ):
        later = np.arange(num, max_epochs + 1)
        low, middle, high = forecast.predict_course(place, later)
        axes.fill_between(later, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(later, middle, color=color, linestyle="--")
        axes.plot(range(num, max_epochs + 1), curve.losses[num - 1 :], color=color, linewidth=0.8, alpha=0.6)
        axes.plot(range(1, num + 1), curve.losses[:num], color=color, linewidth=2, marker="o", markersize=3)
    axes.set(xlabel="epoch", ylabel="PA-MPJPE on validation (mm)", xlim=(1, max_epochs))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], color="0.3", linewidth=2, marker="o", markersize=3, label="seen by the model"),
        plt.Line2D([], [], color="0.3", linestyle="--", label="predicted, with 90 % of its uncertainty"),
        plt.Line2D([], [], color="0.3", linewidth=0.8, label="what the training did"),
        plt.Line2D([], [], color="0.85", linewidth=0.8, label=f"{_NUM_KNOWN} complete trials"),
    ]
    axes.legend(handles=handles, frameon=False)
    figure.tight_layout()
    figure.savefig(_FIGURE, dpi=120)


if __name__ == "__main__":
    main()
