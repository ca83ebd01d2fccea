"""One trial of a sweep: trains the configuration that the searcher suggests, with the function that train.py uses.

The worker composes a trial from overrides that train.py also accepts. Nothing in a trial depends on what the worker did
before, so each trial can be trained again alone: see `TrialRecipe.format_command`.
"""

import contextlib
import math
import shlex
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytorch_lightning as pl
import ray
import torch
from omegaconf import DictConfig
from ray import tune

from handpose.config import SWEEP_GROUPS, compose, override_key, quote_override
from handpose.data.sample import HandBatch
from handpose.errors import UserError
from handpose.garbage import collect_as_usual
from handpose.metrics.target import TargetMetric
from handpose.metrics.validation import make_target_metric
from handpose.schedulers.scheduler import Scheduler
from handpose.sweep.record.settings import LatencyOf, SweepSettings
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.storage.checkpoint_files import CheckpointFiles, open_worker_files
from handpose.sweep.trainable.checkpoint_writer import BackgroundCheckpointIO, save_pictures
from handpose.sweep.trainable.gpu_memory import cap_gpu_memory, check_gpu_is_visible
from handpose.sweep.trainable.process_state import preserve_process_state
from handpose.sweep.trainable.reporting import get_worker_context, report_costs, report_epoch
from handpose.sweep.trainable.trial_cost import measure_costs, split_batch
from handpose.sweep.trainable.utilisation_meter import UtilisationMeter
from handpose.training.callbacks import draw_prediction_pictures
from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import RunFolders, fit
from handpose.training.module import HandPose
from handpose.training.trainer import ProcessGroup

_CHECK_EVERY_STEPS = 20
_COMPLETED_FOLDS = "completed_folds"
_QUIET_OVERRIDES = ("logger=none", "checkpoints.enabled=false")
"""Parts of a training that trials omit; none of them affects a metric."""


@dataclass(frozen=True)
class TrialRecipe:
    """How to compose trials from parameters.

    Attributes:
        overrides: the user's overrides, as train.py takes them.
        locations: overrides that give a worker the paths of the driver.
        max_epochs: number of epochs of the learning rate schedule, of each fold.
        num_threads: number of threads of torch. It equals the cores of a slot, because sums depend on how many threads
            share them.
        num_workers: number of workers that share each batch.
        folds: number of folds that a trial is trained with, one after another.
    """

    overrides: Sequence[str]
    locations: Sequence[str]
    max_epochs: int
    num_threads: int
    num_workers: int = 1
    folds: int = 1

    @property
    def trial_epochs(self) -> int:
        """Number of epochs of a complete trial, over all its folds."""
        return self.max_epochs * self.folds

    def make_overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides for train.py of the trial with these parameters, without its fold."""
        slot = {"trainer.max_epochs": self.max_epochs, "num_threads": self.num_threads}
        return add_param_overrides(self.overrides, {**params, **slot})

    def list_fold_overrides(self, fold: int = 0) -> list[str]:
        """Return the overrides for train.py that hold out a fold; none without folds."""
        return [f"folds.num={self.folds}", f"folds.index={fold}"] if self.folds > 1 else []

    def make_worker_overrides(self, params: Mapping[str, Any], fold: int = 0) -> list[str]:
        """Return the overrides of a fold of the trial in a worker, which has its own folder and leaves no files."""
        fold_overrides = self.list_fold_overrides(fold)
        return [*self.locations, *self.make_overrides(params), *fold_overrides, *_QUIET_OVERRIDES]

    def format_command(self, params: Mapping[str, Any], max_epochs: int | None = None) -> str:
        """Return the command line that trains the trial again, alone, with the same metrics on the same machine.

        With folds, it trains them one after another. The metrics of the trial are their mean.

        Args:
            params: the parameters of the trial.
            max_epochs: number of epochs of the learning rate schedule; None: that of the recipe.
        """
        recipe = self if max_epochs is None else replace(self, max_epochs=max_epochs)
        overrides = recipe.make_overrides(params)
        if self.folds == 1:
            return shlex.join(["python", "train.py", *overrides])
        indices = ",".join(map(str, range(self.folds)))
        return shlex.join(["python", "train.py", "-m", *overrides, f"folds.num={self.folds}", f"folds.index={indices}"])


@dataclass(frozen=True)
class TrainingFunction:
    """Trains the network of a trial: once, or with one fold after another, each from scratch.

    Epochs are counted over all folds. In the first fold, a trial reports what it measures. In a later one it reports
    the mean over the folds that it has completed, which changes only when it completes another one.

    Attributes:
        recipe: how to compose the trial.
        metric: the metric that the sweep optimises.
        checkpoint_every_epochs: epochs between checkpoints; None: save only after the epochs in `rungs`.
        rungs: epochs at which a trial may pause.
        needs_costs: whether to measure costs (`trial_cost.measure_costs`), for constraints or a second objective.
        latency_of: what latency_ms is the time of; see `SweepSettings`.
        comparison_epochs: epochs at which trials are compared; pictures are drawn at these.
        saves_last: whether to save a checkpoint after the last epoch, if any are saved. The trial continues from there
            if the user raises `sweep.max_epochs`.
    """

    recipe: TrialRecipe
    metric: str
    checkpoint_every_epochs: int | None
    rungs: Sequence[int] = ()
    needs_costs: bool = False
    latency_of: LatencyOf = None
    comparison_epochs: Sequence[int] = ()
    saves_last: bool = False

    @classmethod
    def from_settings(
        cls, recipe: TrialRecipe, sweep: SweepSettings, scheduler: Scheduler, *, needs_costs: bool
    ) -> "TrainingFunction":
        """Return the function that a sweep and its scheduler need."""
        rungs = scheduler.rungs if scheduler.needs_checkpoints else ()
        every = sweep.checkpoint_every_epochs
        saves_last = every is not None or scheduler.needs_checkpoints
        return cls(recipe, sweep.metric, every, rungs, needs_costs, sweep.latency_of, scheduler.rungs, saves_last)

    def __call__(self, segment: TrialSegment, /) -> None:
        if segment.max_epochs is not None:
            replace(
                self,
                recipe=replace(self.recipe, max_epochs=segment.max_epochs),
                rungs=segment.rungs if segment.may_pause else (),
                comparison_epochs=segment.rungs,
            )(segment._replace(max_epochs=None))
            return
        started_at = time.perf_counter()
        collect_as_usual()
        if get_worker_context().num_workers > 1:
            with tempfile.TemporaryDirectory(dir=".", prefix="member-") as folder:
                self._train(segment, Path(folder), started_at, is_group=True)
            return
        with preserve_process_state():
            cap_gpu_memory(_get_trial_gpus())
            self._train(segment, Path(tune.get_context().get_trial_dir() or "."), started_at)

    def _train(self, segment: TrialSegment, folder: Path, started_at: float, *, is_group: bool = False) -> None:
        config = self._compose_fold(segment, 0)
        gpus = _get_trial_gpus() if not is_group else len(ray.get_gpu_ids())
        check_gpu_is_visible(config.trainer.accelerator, gpus)
        with self._measure_utilisation(gpus, started_at) as meter, open_worker_files(segment, scratch=folder) as files:
            newest, resume_from = files.fetch_newest(segment.checkpoints) or (None, None)
            callback = TrialReportCallback(
                segment,
                self,
                files=files,
                resumed_from=newest.epoch if newest else 0,
                num_hands=config.pictures.trial_hands,
                meter=meter,
                completed_folds=[] if resume_from is None or self.recipe.folds == 1 else read_folds(resume_from),
            )
            try:
                self._train_folds(config, callback, folder, resume_from, is_group=is_group)
            finally:
                callback.close()

    def _train_folds(
        self,
        config: DictConfig,
        callback: "TrialReportCallback",
        folder: Path,
        resume_from: Path | None,
        *,
        is_group: bool,
    ) -> None:
        """Train the folds that are not completed. After the checkpoint of the end of a fold, the next one begins.

        Args:
            config: the configuration of the first fold.
            callback: reports the epochs. It counts the completed folds.
            folder: where the trainings leave files.
            resume_from: the newest checkpoint of the trial, if it has any.
            is_group: whether several workers train together.
        """
        first, num_folds = len(callback.completed_folds), self.recipe.folds
        if num_folds > 1 and callback.resumed_from == first * self.recipe.max_epochs:
            resume_from = None
        meters = [] if callback.meter is None else [callback.meter]
        for fold in range(first, num_folds):
            for meter in meters:
                meter.begin_start_up()
            with preserve_process_state() if fold > first and not is_group else contextlib.nullcontext():
                fit(
                    self._compose_fold(callback.segment, fold) if fold else config,
                    RunFolders(folder, folder, folder),
                    callbacks=[*meters, callback],
                    quiet=True,
                    resume_from=resume_from if fold == first else None,
                    cache_data=True,
                    process_group=_make_process_group() if is_group else None,
                )
            if len(callback.completed_folds) <= fold:  # it was ended early
                return

    def _compose_fold(self, segment: TrialSegment, fold: int) -> DictConfig:
        overrides = self.recipe.make_worker_overrides(segment.params, fold)
        return split_batch(compose("train", overrides), get_worker_context().num_workers)

    def _measure_utilisation(
        self, gpus: float, started_at: float
    ) -> contextlib.AbstractContextManager[UtilisationMeter | None]:
        """Measure what this worker uses, if it is the one that reports."""
        if get_worker_context().rank:
            return contextlib.nullcontext()
        return UtilisationMeter(cores=self.recipe.num_threads, gpus=gpus, started_at=started_at)

    def is_checkpoint_due(self, epoch: int) -> bool:
        """Return whether a checkpoint is due after this epoch."""
        every, recipe = self.checkpoint_every_epochs, self.recipe
        if epoch >= recipe.trial_epochs:
            return self.saves_last
        is_fold_end = recipe.folds > 1 and epoch % recipe.max_epochs == 0
        return epoch in self.rungs or (every is not None and (epoch % every == 0 or is_fold_end))

    def may_pause_at(self, epoch: int) -> bool:
        """Return whether the segment may end after this epoch, so that its checkpoint belongs to the report."""
        return epoch in self.rungs or epoch >= self.recipe.trial_epochs


def _make_process_group() -> ProcessGroup:
    """Return the process group of the workers that Ray Train has started."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment  # imported here, since few trials need them

    return ProcessGroup(RayDDPStrategy(), RayLightningEnvironment())


def _get_trial_gpus() -> float:
    """Return the number of GPUs of this trial, a fraction if it shares a GPU."""
    resources = tune.get_context().get_trial_resources()
    return float(resources.required_resources.get("GPU", 0)) if resources else 0.0


class TrialReportCallback(pl.Callback):
    """Reports the validation metrics of each epoch to Tune, and saves checkpoints when they are due.

    A checkpoint is written while the next epoch is trained, and reported with that epoch. At epochs where the trial may
    pause, the callback waits for the checkpoint and reports it immediately. Pictures of the first `num_hands`
    validation hands, the same in every trial, are drawn after the last epoch and after the epochs at which trials are
    compared.

    The loss is checked every few steps. If it is not finite, that is reported without waiting for the end of the epoch.
    Ray's own callback saves at every validation and only warns when the metric is missing; this one raises UserError
    then.

    With folds, the same callback is used for the Trainer of each fold. Its checkpoints contain the metrics of the folds
    that are completed, so that a resumed segment reports the same means.

    Args:
        segment: the segment to train.
        training_function: the settings of the training.
        files: where checkpoints are kept.
        resumed_from: epoch of the checkpoint from which the segment was resumed; 0: it started from scratch.
        num_hands: number of hands in the pictures.
        meter: measures what the segment uses, which is reported with each epoch; None: nothing is measured.
        completed_folds: the validation metrics at the end of each fold that was completed before; with one fold always
            empty.
    """

    def __init__(
        self,
        segment: TrialSegment,
        training_function: TrainingFunction,
        *,
        files: CheckpointFiles,
        resumed_from: int,
        num_hands: int = 0,
        meter: UtilisationMeter | None = None,
        completed_folds: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self.segment = segment
        self.training_function = training_function
        self.resumed_from = resumed_from
        self.num_hands = num_hands
        self.meter = meter
        self.completed_folds = list(completed_folds)
        self._earlier_epochs = 0  # of the folds before the one that is trained
        self._files = BackgroundCheckpointIO(files)
        self._is_finite: torch.Tensor | None = None

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self._files.close()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._files
        self._earlier_epochs = len(self.completed_folds) * self.training_function.recipe.max_epochs
        self._files.earlier_epochs = self._earlier_epochs
        self._is_finite = None

    def state_dict(self) -> dict[str, Any]:
        return {_COMPLETED_FOLDS: list(self.completed_folds)} if self.completed_folds else {}

    def _count_epochs(self, trainer: pl.Trainer) -> int:
        """Return the number of the epoch that is trained, counted from 1 over all folds."""
        return self._earlier_epochs + trainer.current_epoch + 1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.training_function.needs_costs and not self.resumed_from and not self._earlier_epochs:
            report_costs(measure_costs(pl_module, latency_of=self.training_function.latency_of))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if get_worker_context().rank:  # the weights of all workers are the same
            return
        # Accumulated on the device and read only every few steps: reading waits for the GPU.
        is_finite = torch.isfinite(outputs["loss"].detach()).all()
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite
        if (batch_idx + 1) % _CHECK_EVERY_STEPS == 0 and not self._is_finite:
            self._report_epoch(self._count_epochs(trainer), {self.training_function.metric: math.nan})
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: HandBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Here the module has the weights that are validated, which may be an average, and the batch is available.
        epoch, recipe = self._count_epochs(trainer), self.training_function.recipe
        last = (recipe.folds - 1) * recipe.max_epochs + (trainer.max_epochs or 0)
        if (
            self.segment.storage is None
            and not get_worker_context().rank
            and self.num_hands
            and batch_idx == 0
            and (epoch == last or epoch in self.training_function.comparison_epochs)
        ):
            pictures = draw_prediction_pictures(cast(HandPose, pl_module), batch, num_hands=self.num_hands)
            save_pictures(pictures, {name: self.segment.make_picture_path(epoch, name) for name in pictures})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.should_stop:
            return
        metric = self.training_function.metric
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if metric not in metrics:
            raise UserError(
                f"sweep.metric={metric} is not measured in validation; there are {', '.join(sorted(metrics))}"
            )
        epoch, is_finite = self._count_epochs(trainer), math.isfinite(metrics[metric])
        if is_finite:
            metrics = self._average_folds(metrics, is_fold_end=trainer.current_epoch + 1 == trainer.max_epochs)
        is_due = is_finite and self.training_function.is_checkpoint_due(epoch)
        may_pause = self.training_function.may_pause_at(epoch)
        if is_due and may_pause:
            self._files.is_needed = True
            self._save_checkpoint(trainer, epoch)
        self._report_epoch(epoch, metrics)
        if not is_finite:
            trainer.should_stop = True
        elif is_due and not may_pause:  # after the report: a trial that it stops needs no checkpoint
            self._save_checkpoint(trainer, epoch)

    def _average_folds(self, metrics: dict[str, float], *, is_fold_end: bool) -> dict[str, float]:
        """Return what the trial reports: in the first fold its metrics, then their means over the completed folds.

        Args:
            metrics: the metrics of this epoch, kept if it is the last one of a fold.
            is_fold_end: whether it is.
        """
        if self.training_function.recipe.folds == 1:
            return metrics
        if is_fold_end:
            self.completed_folds.append(metrics)
        if not self._earlier_epochs:
            return metrics
        names = [name for name in metrics if all(name in fold for fold in self.completed_folds)]
        return {name: fmean(fold[name] for fold in self.completed_folds) for name in names}

    def _save_checkpoint(self, trainer: pl.Trainer, epoch: int) -> None:
        trainer.save_checkpoint(self._files.files.get_local_path(self.segment.make_checkpoint_name(epoch)))

    def _report_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        checkpoint, note = self._files.wait_for_result()
        used = None if self.meter is None else self.meter.take()
        report_epoch(epoch, metrics, resumed_from=self.resumed_from, checkpoint=checkpoint, note=note, utilisation=used)


def read_folds(checkpoint: Path) -> list[dict[str, float]]:
    """Return the validation metrics at the end of each fold that a trial had completed when it saved a checkpoint."""
    states = read_checkpoint(checkpoint)["callbacks"]
    return list(states.get(TrialReportCallback.__qualname__, {}).get(_COMPLETED_FOLDS, []))


def make_recipe(sweep: SweepSettings, overrides: Sequence[str], locations: Sequence[str]) -> TrialRecipe:
    """Make the recipe of the trials of a sweep.

    Args:
        sweep: settings of the sweep.
        overrides: the overrides of every trial, as train.py takes them.
        locations: overrides that give a worker the paths of the driver.
    """
    threads, workers = sweep.cpus_per_trial, sweep.workers_per_trial
    return TrialRecipe(overrides, locations, sweep.max_epochs, threads, workers, sweep.folds)


def select_training_overrides(overrides: Iterable[str]) -> list[str]:
    """Return those overrides of tune.py's command line that train.py also knows."""
    return [item for item in overrides if _get_override_group(override_key(item)) not in SWEEP_GROUPS]


def add_checkpoint_metric(overrides: Sequence[str], config: Any, target: TargetMetric) -> list[str]:
    """Return the overrides with the sweep's metric as `checkpoints.metric`, unless they set that key themselves.

    `train.py best=...` and the retraining then keep the checkpoint with the best value of the sweep's metric.

    Args:
        overrides: the user's overrides for train.py.
        config: the configuration that they compose.
        target: the metric of the sweep.

    Raises:
        UserError: `checkpoints.mode` contradicts the metric.
    """
    if any(override_key(item) == "checkpoints.metric" for item in overrides):
        return list(overrides)
    make_target_metric(target.name, config.checkpoints.mode, group="checkpoints")
    is_default = config.checkpoints.metric == target.name
    return [*overrides, *([] if is_default else [quote_override("checkpoints.metric", target.name)])]


def add_param_overrides(overrides: Iterable[str], params: Mapping[str, Any]) -> list[str]:
    """Return the overrides with these parameters, which replace overrides of the same keys.

    Both cannot stay: Hydra accepts only one override for a group.
    """
    kept = [item for item in overrides if item.partition("=")[0] not in params]
    return [*kept, *(quote_override(key, value) for key, value in params.items())]


def _get_override_group(key: str) -> str:
    return key.replace("/", ".").replace("@", ".").partition(".")[0]
