"""Trials with a clock on their steps, as the workers of a measured sweep run them: ours, or those of plain Ray Tune.

This is separate from benchmarks/sweeps.py, so that workers do not import what only a driver needs.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback

from handpose.config import compose
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.trainable.trial import TrainingFunction, TrialRecipe
from handpose.training.build import build_training
from handpose.training.module import HandPose


@dataclass(frozen=True)
class ClockedSegment:
    """The times of a trial, or of one segment of it.

    Attributes:
        params: the parameters of the trial.
        first_step: when the first step began, in seconds since 1970.
        last: when the last validation ended, in seconds since 1970.
        train_s: seconds spent in training steps.
        val_s: seconds spent in validations.
        values: time, epoch and metric of each validation.
    """

    params: Mapping[str, Any]
    first_step: float
    last: float
    train_s: float
    val_s: float
    values: Sequence[tuple[float, int, float]]


@dataclass(frozen=True)
class ClockedObjective(TrainingFunction):
    """Trains a trial as in a sweep, and clocks its steps.

    Attributes:
        clocks: the folder for the measured times.
    """

    clocks: str = ""

    def __call__(self, segment: TrialSegment, /) -> None:
        with clock_trainer(Path(self.clocks) / f"{segment.name}.json", segment.params, self.metric):
            super().__call__(segment)


def make_plain_trainable(
    recipe: TrialRecipe, *, metric: str, reported_as: str, clocks: str
) -> Callable[[dict[str, Any]], None]:
    """Make the function that plain Ray Tune runs: the same trial, with a Trainer as a user would configure it.

    Args:
        recipe: composes the configuration of a trial.
        metric: the name of the metric in Lightning.
        reported_as: its name in Tune.
        clocks: the folder for the measured times.
    """

    def train(config: dict[str, Any]) -> None:
        params = config.get("params", config)
        composed = compose("train", recipe.make_worker_overrides(params))
        module, data = build_training(composed)
        data.setup("fit")
        module.axes.fit(torch.from_numpy(data.splits.train.xyz_m).float())
        training = {name: value for name, value in composed.trainer.items() if name in _TRAINER_KEYS}
        trainer = pl.Trainer(
            **training,
            enable_progress_bar=False,
            callbacks=[TuneReportCheckpointCallback({reported_as: metric}, on="validation_end")],
        )
        with clock_trainer(Path(clocks) / f"{tune.get_context().get_trial_id()}.json", params, metric):
            trainer.fit(module, datamodule=data)

    return train


_TRAINER_KEYS = (
    "max_epochs",
    "accelerator",
    "devices",
    "precision",
    "gradient_clip_val",
    "check_val_every_n_epoch",
    "limit_train_batches",
    "limit_val_batches",
)
"""The Trainer arguments of the configuration that change what is trained."""


@contextlib.contextmanager
def clock_trainer(file: Path, params: Mapping[str, Any], metric: str) -> Iterator[None]:
    """Clock the Trainer that fits our module within the block. The module passes the callback to Lightning."""
    clock = StepClock(file, params, metric)
    with mock.patch.object(HandPose, "configure_callbacks", return_value=[clock]):
        yield


class StepClock(pl.Callback):
    """Clocks training steps and validations. It writes its times after every validation, because a trial may end there.

    A step lasts from on_train_batch_start to on_train_batch_end, on the CPU. A sanity check does not count as a
    validation. Work of other callbacks after a validation, such as reporting and saving a checkpoint, is not included.
    """

    def __init__(self, file: Path, params: Mapping[str, Any], metric: str) -> None:
        self._file, self._params, self._metric = file, params, metric
        self._train_s = self._val_s = self._began = 0.0
        self._first_step: float | None = None
        self._values: list[tuple[float, int, float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # First in the list, so that its hooks are called first.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._began = time.perf_counter()
        self._first_step = self._first_step or time.time()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._train_s += time.perf_counter() - self._began

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._val_s += time.perf_counter() - self._began
        value = float(trainer.callback_metrics[self._metric])
        self._values.append((time.time(), trainer.current_epoch + 1, value))
        self._write()

    def _write(self) -> None:
        first_step = self._first_step or self._values[0][0]
        done = ClockedSegment(self._params, first_step, self._values[-1][0], self._train_s, self._val_s, self._values)
        self._file.write_text(json.dumps(asdict(done)), encoding="utf-8")
