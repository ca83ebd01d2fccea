"""A plot of the percentage of correct keypoints (PCK) against the error threshold."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from handpose.files import write_atomically

MAX_MM = 50.0


def draw_pck(path: Path, errors_mm: Mapping[str, NDArray[np.floating]]) -> None:
    """Write a PNG with one curve per kind of error: the fraction of joints whose error is at most the threshold.

    Args:
        path: the file.
        errors_mm: name of the kind -> errors in mm, of any shape.
    """
    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xlabel="error, mm", ylabel="share of joints", xlim=(0, MAX_MM), ylim=(0, 1), title="Correct keypoints (PCK)"
    )
    thresholds = np.linspace(0.0, MAX_MM, 201)
    for name, errors in errors_mm.items():
        within = np.searchsorted(np.sort(errors, axis=None), thresholds, side="right") / errors.size
        area = np.trapezoid(within, thresholds) / MAX_MM
        axes.plot(thresholds, within, label=f"{name} (AUC {area:.3f})")
    axes.grid(color="0.9")
    axes.legend(loc="lower right")
    with write_atomically(path) as part:
        figure.savefig(part, format="png")
