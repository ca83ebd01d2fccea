"""Pictures of test hands with their predictions, for the report of a sweep."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from handpose import drawing
from handpose.data.datamodule import PackedHands
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.scores import compute_joint_errors
from handpose.files import write_atomically, write_json
from handpose.geometry import project, project_lengths

HANDS_FOLDER, HANDS_FILE = "hands", "hands.json"
NUM_PER_KIND = 6


def write_hand_pictures(folder: Path, dataset: PackedHands, predicted: SplitPredictions) -> None:
    """Write the folder hands/: one JPEG per hand, and hands.json, which lists them with their errors.

    The hands are the worst and the best by PA-MPJPE. If the true joints are not known, they are spread evenly over the
    split.

    Args:
        folder: the folder in which hands/ is made.
        dataset: the images of the split.
        predicted: the predictions, in the order of the dataset.
    """
    truth_m, predicted_m = dataset.annotations.xyz_m, predicted.xyz_m
    errors_mm = None
    if truth_m is not None:
        errors_mm = compute_joint_errors(predicted_m, truth_m, dataset.intrinsics.numpy()).aligned_mm.mean(axis=1)
    chosen = choose_hands(len(predicted_m), errors_mm)
    hands_folder = folder / HANDS_FOLDER
    listed = []
    for number, (kind, index) in enumerate(chosen):
        file = f"{kind}_{number:02d}.jpg"
        with write_atomically(hands_folder / file) as part:
            Image.fromarray(_draw_hand(dataset, index, predicted, truth_m)).save(part, "JPEG", quality=85)
        error_mm = None if errors_mm is None else float(errors_mm[index])
        listed.append(
            {"file": file, "kind": kind, "name": dataset.annotations.files[index].stem, "pa_mpjpe_mm": error_mm}
        )
    write_json(hands_folder / HANDS_FILE, listed, indent=1)


def choose_hands(
    num: int, errors_mm: NDArray[np.floating] | None, *, most: int = NUM_PER_KIND
) -> Sequence[tuple[str, int]]:
    """Choose the hands to show: the worst, worst first, then the best, best first. No hand is chosen twice.

    Args:
        num: number of hands.
        errors_mm: (N,) errors in mm; None if they are not known: then the hands are spread evenly.
        most: largest number of hands of each kind.

    Returns:
        The kind (`worst`, `best` or `other`) and the index of each hand.
    """
    if errors_mm is None:
        return [("other", int(index)) for index in np.unique(np.linspace(0, num - 1, min(num, most)).round())]
    order = np.argsort(-errors_mm, kind="stable")
    worst = order[: min(most, -(-num // 2))]
    best = order[::-1][: min(most, num // 2)]
    return [*(("worst", int(index)) for index in worst), *(("best", int(index)) for index in best)]


def compute_radii_px(
    predicted: SplitPredictions, chosen: NDArray[np.int64], camera: torch.Tensor
) -> drawing.FloatArray:
    """Compute how large the expected errors of some hands look in their images: (M, K) pixels.

    Args:
        predicted: the predictions of the split.
        chosen: (M,) positions of the hands in the split.
        camera: (M, 3, 3) intrinsics of their images.
    """
    lengths, xyz = (
        torch.from_numpy(np.asarray(each[chosen], np.float64)) for each in (predicted.error_m, predicted.xyz_m)
    )
    return project_lengths(lengths, xyz, camera).numpy()


def _draw_hand(
    dataset: PackedHands, index: int, predicted: SplitPredictions, truth_m: NDArray[np.floating] | None
) -> drawing.PixelArray:
    batch = dataset[np.array([index])]
    camera = batch.intrinsics.double()

    def seen(xyz_m: NDArray[np.floating]) -> NDArray[np.floating]:
        return project(torch.from_numpy(np.asarray(xyz_m[[index]], dtype=np.float64)), camera).numpy()

    picture = drawing.draw_predictions(
        batch.image.permute(0, 2, 3, 1).numpy(),
        seen(predicted.xyz_m),
        None if truth_m is None else seen(truth_m),
        radii_px=compute_radii_px(predicted, np.array([index]), camera),
        columns=1,
    )
    return picture[: picture.shape[1]]  # images are square; this cuts off the legend below
