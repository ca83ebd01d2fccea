"""One trial of a sweep: the configuration that the searcher suggests, trained by the function that train.py uses.

A trial is composed in the worker, from overrides that train.py takes as well, and nothing in it depends on what the
worker did before. So each trial can be trained again alone: `TrialRecipe.command`.
"""

import math
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
from ray import tune

from handpose.config import compose, quote_override
from handpose.errors import UserError
from handpose.sweep.searcher import PARAMS
from handpose.sweep.space import Params
from handpose.training.fit import RunFolders, fit

CHECKPOINT = "trial.ckpt"
_SILENT = ("logger=none", "checkpoints.enabled=false")
"""What trials leave out; none of it touches a metric."""


@dataclass(frozen=True)
class TrialRecipe:
    """How trials are composed from parameters.

    overrides: the user's, as train.py takes them. locations: overrides that lead a worker to the driver's paths.
    max_epochs: of the schedule. num_threads: of torch, the slot's cores, since sums depend on how many threads share
    them.
    """

    overrides: Sequence[str]
    locations: Sequence[str]
    max_epochs: int
    num_threads: int

    def training(self, params: Mapping[str, Any]) -> list[str]:
        """Overrides of the trial with these parameters, for train.py."""
        slot = {"trainer.max_epochs": self.max_epochs, "num_threads": self.num_threads}
        return with_params(self.overrides, {**params, **slot})

    def in_worker(self, params: Mapping[str, Any]) -> list[str]:
        """The same for a worker, which has a folder of its own and leaves no files."""
        return [*self.locations, *self.training(params), *_SILENT]

    def command(self, params: Mapping[str, Any]) -> str:
        """The command line that trains the trial again, alone, with the same metrics on the same machine."""
        return shlex.join(["python", "train.py", *self.training(params)])


class Objective(Protocol):
    """What a trial runs: it trains the parameters and reports each epoch to Tune. Tests have cheap ones."""

    def __call__(self, params: Params, /) -> None: ...


def make_trainable(objective: Objective) -> Callable[[dict[str, Any]], None]:
    """The function that Tune calls in a worker with the searcher's configuration."""

    def trial(config: dict[str, Any]) -> None:
        objective(config[PARAMS])

    return trial


@dataclass(frozen=True)
class TrainingObjective:
    """Trains a trial's network.

    metric: what the sweep optimises. checkpoint_every_epochs: None where no scheduler needs checkpoints.
    """

    recipe: TrialRecipe
    metric: str
    checkpoint_every_epochs: int | None

    def __call__(self, params: Params, /) -> None:
        config = compose("train", self.recipe.in_worker(params))
        folder = Path(tune.get_context().get_trial_dir() or ".")
        callbacks: list[pl.Callback] = [TuneReport(self.metric, self.checkpoint_every_epochs)]
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            fit(config, RunFolders(folder, folder, folder), callbacks=callbacks, quiet=True)
            return
        with checkpoint.as_directory() as directory:
            resume_from = Path(directory) / CHECKPOINT
            fit(config, RunFolders(folder, folder, folder), callbacks=callbacks, quiet=True, resume_from=resume_from)


class TuneReport(pl.Callback):
    """Reports the validation metrics of each epoch to Tune, and ends the trial when its metric is no number any more.

    ASHA never stops a trial whose metric is NaN, which would hold its slot to the last epoch. Unlike Ray's own
    callback, which warns, this one raises UserError when the metric is missing.
    """

    def __init__(self, metric: str, checkpoint_every_epochs: int | None) -> None:
        self.metric = metric
        self.checkpoint_every_epochs = checkpoint_every_epochs

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.metric not in metrics:
            raise UserError(f"sweep.metric={self.metric} is not validated; there are {', '.join(sorted(metrics))}")
        epoch = trainer.current_epoch + 1
        every = self.checkpoint_every_epochs
        if every is not None and epoch % every == 0:
            with tempfile.TemporaryDirectory() as directory:
                trainer.save_checkpoint(Path(directory) / CHECKPOINT)
                report(epoch, metrics, checkpoint=tune.Checkpoint.from_directory(directory))
        else:
            report(epoch, metrics)
        if not math.isfinite(metrics[self.metric]):
            trainer.should_stop = True


def report(epoch: int, metrics: Mapping[str, float], *, checkpoint: Any = None) -> None:
    """Tell Tune the metrics after an epoch, counted from 1. Does not return when the scheduler ends the trial."""
    tune.report({**metrics, "epoch": epoch}, checkpoint=checkpoint)


def training_overrides(overrides: Iterable[str]) -> list[str]:
    """Of the overrides of tune.py's command line those that train.py knows too."""
    return [item for item in overrides if _group(_key(item)) not in _SWEEP_GROUPS]


def with_params(overrides: Iterable[str], params: Mapping[str, Any]) -> list[str]:
    """The overrides with these values in place of what they say of the same keys: Hydra takes a group only once."""
    kept = [item for item in overrides if _key(item) not in params]
    return [*kept, *(quote_override(key, value) for key, value in params.items())]


_SWEEP_GROUPS = ("sweep", "scheduler", "searcher", "ray", "search_space", "hydra")


def _key(override: str) -> str:
    return override.partition("=")[0]


def _group(key: str) -> str:
    return key.lstrip("+~").replace("/", ".").replace("@", ".").partition(".")[0]
