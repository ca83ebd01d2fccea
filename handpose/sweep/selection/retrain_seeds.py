"""Retrain the winner with several seeds, and combine what its networks predict on the test split."""

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handpose.config import compose, quote_override
from handpose.evaluation.ensemble import combine_split_predictions
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.submission import EXPECTED_ERRORS_FILE, PREDICTIONS_FILE, read_course, read_expected_errors
from handpose.files import read_json, write_json
from handpose.sweep.analysis.read_sweep import COMBINED_FOLDER
from handpose.sweep.record.settings import RetrainSettings
from handpose.sweep.selection.retrain import Retraining
from handpose.training.checkpoints import read_best_loss
from handpose.training.fit import write_test_results


def retrain_over_seeds(
    folder: Path,
    settings: RetrainSettings,
    retrain: Callable[..., dict[str, float]],
    *,
    find_end: Callable[[int], float] | None = None,
) -> dict[str, float]:
    """Retrain the winner once for each seed. If there are several, combine their test predictions.

    The first retraining is in `retrain/`, as without further seeds, and the others are in `retrain/seed_SEED`. Each is
    resumed if it was interrupted. The means of the test metrics over the seeds, and the predictions of the chosen
    networks, are in `retrain/combined`.

    Args:
        folder: folder of the sweep.
        settings: what is retrained.
        retrain: calls `retrain_winner` with the arguments `seed` and `find_end`.
        find_end: when everything has to be finished; see `retrain_winner`. The seeds share the time evenly.

    Returns:
        The metrics of the first retraining.
    """
    seeds = list_seeds(folder, settings.seeds)
    metrics = [
        retrain(seed=seed if position else None, find_end=_limit_to_part(find_end, num_left=len(seeds) - position))
        for position, seed in enumerate(seeds)
    ]
    if len(seeds) > 1:
        _combine(folder, seeds, settings)
    else:  # of an earlier process, which had several
        shutil.rmtree(folder / "retrain" / COMBINED_FOLDER, ignore_errors=True)
    return metrics[0]


def list_seeds(folder: Path, num: int) -> list[int]:
    """List the seeds with which a winner is retrained: that of its configuration, and the following ones."""
    first = compose("train", [quote_override("best", str(folder / "best.yaml"))]).seed
    return [(first + number) % 2**32 for number in range(num)]


def _limit_to_part(find_end: Callable[[int], float] | None, *, num_left: int) -> Callable[[int], float] | None:
    """Return a function that gives a retraining its part of the time that is left for so many."""
    if find_end is None or num_left == 1:
        return find_end

    def find_part(num_gpus: int) -> float:
        now, end = time.time(), find_end(num_gpus)
        return end if end == math.inf else now + (end - now) / num_left

    return find_part


def _combine(folder: Path, seeds: Sequence[int], settings: RetrainSettings) -> None:
    """Write the test predictions of the chosen networks, and the means of the metrics over the seeds.

    Nothing is done if they have been written already.
    """
    runs = [Retraining(folder, seed if position else None) for position, seed in enumerate(seeds)]
    records = [read_json(run.place / "metrics.json") for run in runs]
    chosen = _choose_runs(runs, settings)
    place = folder / "retrain" / COMBINED_FOLDER
    about: dict[str, Any] = {
        "predict": settings.predict,
        "checkpoints": [os.path.relpath(_find_tested_checkpoint(run), place) for run in chosen],
        "predicted_by": [seeds[runs.index(run)] for run in chosen],
        "test_time": records[0].get("test_time"),
        "seeds": {str(seed): record["metrics"] for seed, record in zip(seeds, records, strict=True)},
        **summarise_metrics([record["metrics"] for record in records]),
    }
    file = place / "metrics.json"
    newest = max((run.place / "metrics.json").stat().st_mtime for run in runs)
    if file.is_file() and file.stat().st_mtime >= newest and about.items() <= read_json(file).items():
        return
    place.mkdir(exist_ok=True)
    if not all((run.place / PREDICTIONS_FILE).is_file() for run in chosen):  # of a test split with 2-D keypoints
        write_json(file, {**about, "metrics": {}}, indent=2)
        return
    predicted = combine_split_predictions([_read_predictions(run.place) for run in chosen])
    checkpoint = _find_tested_checkpoint(chosen[0])
    config = compose(
        "train", [quote_override("best", str(folder / "best.yaml")), *runs[0].list_overrides(use_val=settings.use_val)]
    )
    write_test_results(config, checkpoint, place, predicted, about)


def _read_predictions(place: Path) -> SplitPredictions:
    """Read the test predictions of a retraining. Those of earlier versions have no expected errors."""
    xyz_m, file = read_course(place / PREDICTIONS_FILE), place / EXPECTED_ERRORS_FILE
    return SplitPredictions(xyz_m, read_expected_errors(file) if file.is_file() else np.full(xyz_m.shape[:2], np.nan))


def _choose_runs(runs: Sequence[Retraining], settings: RetrainSettings) -> Sequence[Retraining]:
    if settings.predict == "ensemble":
        return runs
    if settings.predict == "first":
        return runs[:1]
    return [min(runs, key=lambda run: read_best_loss(_find_tested_checkpoint(run)))]


def _find_tested_checkpoint(run: Retraining) -> Path:
    return run.checkpoints / Path(read_json(run.place / "metrics.json")["checkpoint"]).name


def summarise_metrics(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Compute the mean and the standard deviation between seeds of every metric of the test split.

    Args:
        metrics: name -> value for each seed.

    Returns:
        `mean` and `deviation`, each name -> value; None where a seed has no finite value.
    """
    names = [name for name in metrics[0] if name.startswith("test/")]
    values = {name: [_to_float(each.get(name)) for each in metrics] for name in names}
    is_finite = {name: bool(np.isfinite(found).all()) for name, found in values.items()}
    return {
        "mean": {name: statistics.fmean(values[name]) if is_finite[name] else None for name in names},
        "deviation": {name: statistics.stdev(values[name]) if is_finite[name] else None for name in names},
    }


def _to_float(value: float | None) -> float:
    return math.nan if value is None else float(value)
