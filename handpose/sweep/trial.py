"""One trial of a sweep: the configuration that the searcher suggests, trained by the function that train.py uses.

A trial is composed in the worker, from overrides that train.py takes as well, and nothing in it depends on what the
worker did before. So each trial can be trained again alone: `TrialRecipe.command`.
"""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from ray import tune

from handpose.config import compose, quote_override
from handpose.errors import UserError
from handpose.sweep.events import Saved
from handpose.sweep.retention import newest_whole, saved
from handpose.sweep.rules import Rule
from handpose.sweep.settings import SweepSettings
from handpose.sweep.stretch import Stretch, measured, report
from handpose.sweep.trial_cost import costs
from handpose.training.fit import RunFolders, fit

_LOOK_EVERY_STEPS = 20
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


@dataclass(frozen=True)
class TrainingObjective:
    """Trains a trial's network.

    metric: what the sweep optimises. checkpoint_every_epochs: None: only after `rungs`, epochs at which a trial may
    pause. measures: costs (`trial_cost.costs`) that constraints need.
    """

    recipe: TrialRecipe
    metric: str
    checkpoint_every_epochs: int | None
    rungs: Sequence[int] = ()
    measures: bool = False

    @classmethod
    def of(cls, recipe: TrialRecipe, sweep: SweepSettings, rule: Rule, *, measures: bool) -> "TrainingObjective":
        """As a sweep and its scheduler need it."""
        rungs = rule.rungs if rule.needs_checkpoints else ()
        return cls(recipe, sweep.metric, sweep.checkpoint_every_epochs, rungs, measures)

    def __call__(self, stretch: Stretch, /) -> None:
        config = compose("train", self.recipe.in_worker(stretch.params))
        folder = Path(tune.get_context().get_trial_dir() or ".")
        newest = newest_whole(stretch.checkpoints, Path(stretch.folder))
        callback = TuneReport(stretch, self, resumed_from=newest.epoch if newest else 0)
        resume_from = Path(stretch.folder) / newest.file if newest else None
        fit(config, RunFolders(folder, folder, folder), callbacks=[callback], quiet=True, resume_from=resume_from)

    def saves(self, epoch: int) -> bool:
        """Whether a checkpoint is due after this epoch, the last one of all not being asked."""
        every = self.checkpoint_every_epochs
        return epoch in self.rungs or (every is not None and epoch % every == 0)


class TuneReport(pl.Callback):
    """Reports the validation metrics of each epoch to Tune, with a checkpoint where one is due.

    Training that leaves the numbers is reported at once, not at the end of its epoch. Unlike Ray's own callback, which
    saves at every validation and only warns when the metric is missing, this one raises UserError then.
    """

    def __init__(self, stretch: Stretch, objective: TrainingObjective, *, resumed_from: int) -> None:
        self.stretch = stretch
        self.objective = objective
        self.resumed_from = resumed_from
        self._is_finite: torch.Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.objective.measures and not self.resumed_from:
            measured(costs(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Added up on the device, and looked at now and then only: reading it waits for the GPU.
        is_finite = torch.isfinite(outputs["loss"].detach()).all()
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite
        if (batch_idx + 1) % _LOOK_EVERY_STEPS == 0 and not self._is_finite:
            report(trainer.current_epoch + 1, {self.objective.metric: math.nan}, resumed_from=self.resumed_from)
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.should_stop:
            return
        metric = self.objective.metric
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if metric not in metrics:
            raise UserError(f"sweep.metric={metric} is not validated; there are {', '.join(sorted(metrics))}")
        epoch = trainer.current_epoch + 1
        checkpoint, note = None, ""
        if math.isfinite(metrics[metric]) and epoch < (trainer.max_epochs or 0) and self.objective.saves(epoch):
            try:
                checkpoint = self._save(trainer, epoch)
            except UserError as error:  # as of a full disk: until there is another, the one before is gone on from
                note = str(error)
        report(epoch, metrics, resumed_from=self.resumed_from, checkpoint=checkpoint, note=note)
        if not math.isfinite(metrics[metric]):
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, epoch: int) -> Saved:
        file = self.stretch.checkpoint_file(epoch)
        trainer.save_checkpoint(file)
        return saved(file, folder=Path(self.stretch.folder), epoch=epoch)


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
