"""The winner of a sweep once more, with its full schedule, by the road of train.py; it goes on where it was cut off."""

import contextlib
import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import yaml

from handpose.config import compose, quote_override
from handpose.errors import UserError
from handpose.sweep.run import SweepInterruptedError, resume_command
from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import RunFolders, prepare_folders, train_and_test

_WINNER = "overrides.json"
"""Of the configuration that is retrained."""


def retrain(folder: Path) -> dict[str, float]:
    """Train best.yaml of the sweep in that folder as train.py would, and test it; returns metrics of both.

    A retraining that was cut off goes on from its last checkpoint; of one that was finished the figures are read. One
    of another winner is put aside, as retrain_1.
    """
    place = folder / "retrain"
    winner = yaml.safe_load((folder / "best.yaml").read_text())["overrides"]
    _put_aside(place, winner)
    if (place / "metrics.json").is_file():
        metrics: dict[str, float] = json.loads((place / "metrics.json").read_text())["metrics"]
        return metrics
    places = {"logs": place, "checkpoints": place / "checkpoints", "predictions": place}
    overrides = [quote_override(f"paths.{name}", str(path)) for name, path in places.items()]
    best = quote_override("best", str(folder / "best.yaml"))
    config = compose("train", [best, *overrides])
    config = compose("train", [best, *overrides, *_where_it_was(place / "checkpoints", config.trainer.max_epochs)])
    folders = RunFolders(place, place / "checkpoints", place) if place.exists() else prepare_folders(config)
    (place / _WINNER).write_text(json.dumps(winner))
    try:
        with _terminable():
            result = train_and_test(config, folders)
    except KeyboardInterrupt as error:
        raise SweepInterruptedError(f"the retraining was interrupted; to go on: {resume_command(folder)}") from error
    return (result.training.metrics if result.training else {}) | result.test_metrics


def _put_aside(place: Path, winner: list[str]) -> None:
    """A sweep that was given more trials may have another winner; what the one before left is kept under a number."""
    if not place.exists():
        return
    file = place / _WINNER
    if not file.is_file() or json.loads(file.read_text()) != winner:
        numbered = (place.with_name(f"{place.name}_{number}") for number in itertools.count(1))
        place.rename(next(path for path in numbered if not path.exists()))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _where_it_was(checkpoints: Path, max_epochs: int) -> list[str]:
    """Overrides that go on from the last checkpoint, or only test the best one when all epochs are done."""
    try:
        epochs = read_checkpoint(checkpoints / "last.ckpt")["epoch"] + 1
    except UserError:  # none yet, or not a whole one
        return []
    if epochs < max_epochs:
        return [quote_override("model.checkpoint_path", str(checkpoints / "last.ckpt"))]
    best = max(checkpoints.glob("best-*.ckpt"), key=lambda file: file.stat().st_mtime)
    return [quote_override("model.checkpoint_path", str(best)), "test=true"]
