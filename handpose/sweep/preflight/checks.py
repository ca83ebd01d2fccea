"""Checks that find mistakes before a sweep starts, so that they use no slot.

These checks need no Ray: settings, search space, data and the plan of the sweep. Each one raises a UserError of one
sentence. `preflight.py` then trains a few points of the space with Ray, which also shows what the sweep will cost.
"""

import os
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from handpose.config import compose, instantiate_key, to_plain_values
from handpose.data.shared_memory import check_shared_memory, compute_batch_bytes
from handpose.errors import UserError, add_file_name, explain_file_error
from handpose.files import check_writable, find_nearest_existing
from handpose.locks import hold_lock
from handpose.metrics.validation import make_target_metric
from handpose.resources import count_cores
from handpose.schedulers.scheduler import Scheduler
from handpose.schema import RestrictedArgument
from handpose.search.searcher import Searcher, count_points
from handpose.search.space import Space, generate_probe_params, list_keys
from handpose.sweep.analysis.report import check_scientific_key
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.controller.slots import Slots, count_slots
from handpose.sweep.record.settings import LOCK, RaySettings, SweepSettings
from handpose.sweep.storage.stored_sweep import check_store_url
from handpose.sweep.trainable.trial import add_checkpoint_metric, add_param_overrides, select_training_overrides
from handpose.sweep.trainable.trial_cost import DataSize, split_batch
from handpose.training.fit import prepare_run


def check_sweep(sweep: SweepSettings, cluster: RaySettings) -> None:
    """Check the settings that need neither the space nor the data.

    These are the metric and its direction, the GPUs of a trial, the resources of this machine (unless the sweep joins a
    cluster) and the folder of the sweep.

    Raises:
        UserError: a setting is invalid, or the folder cannot hold the sweep.
    """
    check_settings(sweep)
    if cluster.autoscale and cluster.address is None:
        raise UserError("ray.autoscale=true needs a cluster with an autoscaler: give its ray.address, for example auto")
    if cluster.address is None:
        _check_machine(sweep, cluster)
    _check_folder(sweep)


def check_settings(sweep: SweepSettings) -> None:
    """Check the settings of a sweep on their own: its name, metric, direction, GPUs of a trial, and the store's URL.

    Raises:
        UserError: a setting is invalid.
    """
    _check_name(sweep.name)
    make_target_metric(sweep.metric, sweep.mode, group="sweep")
    _check_gpus(sweep)
    if sweep.storage is not None:
        check_store_url(sweep.storage)


class SearchParts(NamedTuple):
    """What decides which trials a sweep runs, as configured.

    Attributes:
        overrides: the overrides of every trial, for train.py.
        make_scheduler: returns a new scheduler.
        searcher: makes a searcher.
        num_points: how many trials the searcher can propose; None: any number, or it is not known yet.
    """

    overrides: list[str]
    make_scheduler: Callable[[], Scheduler]
    searcher: partial[Searcher]
    num_points: int | None


def check_search(
    config: DictConfig,
    sweep: SweepSettings,
    space: Space,
    overrides: Sequence[str],
    *,
    first_space: Space | None = None,
) -> SearchParts:
    """Check the search space, scheduler and searcher of a sweep together.

    This needs neither the data nor the machines of the sweep. So the launchers do it before they submit a job.

    Args:
        config: the composed configuration.
        sweep: the settings in it.
        space: the search space.
        overrides: the user's overrides for tune.py.
        first_space: the search space with which the sweep began, if the user has changed it: the scheduler is made with
            it, and the events then tell the scheduler of the change.

    Raises:
        UserError: they contain a mistake, or do not fit together.
    """
    overrides = add_checkpoint_metric(select_training_overrides(overrides), config, sweep.target)
    check_space(space, overrides, num_workers=sweep.workers_per_trial)
    check_scientific_key(config.report.scientific, space)
    make_scheduler = bind_scheduler(instantiate(config.scheduler), sweep, first_space or space)
    searcher = instantiate(config.searcher)
    num_points = count_points(searcher, space, repeats=make_scheduler().perturbs_params)
    num_points = num_points if first_space is None else None  # trials of earlier spaces count, too
    validation_interval = config.trainer.check_val_every_n_epoch
    check_validation_epochs(sweep, make_scheduler(), validation_interval=validation_interval)
    return SearchParts(overrides, make_scheduler, searcher, num_points)


def check_space(space: Space, overrides: Sequence[str], *, num_workers: int = 1) -> None:
    """Compose configurations at the corners of the space and at some points within it.

    This finds configuration keys that do not exist and values that are not allowed.

    Args:
        space: the search space.
        overrides: the user's overrides for train.py.
        num_workers: number of workers that share each batch.

    Raises:
        UserError: a configuration is invalid, trials have no validation split, or the trainer has an argument that
            sweeps do not support.
    """
    for params in generate_probe_params(space):
        try:
            config = split_batch(compose("train", add_param_overrides(overrides, params)), num_workers)
        except UserError as error:
            raise UserError(f"{space.file}: {error}") from error
        if config.test or config.resume:
            raise UserError(
                "test=true and resume=true are for train.py; a sweep is resumed by sweep.resume=FOLDER, and its winner "
                "is tested at its end"
            )
        if config.train_on_val:
            raise UserError(
                "train_on_val=true leaves no validation split to compare trials by; retrain.use_val=true uses it "
                "for the winner only"
            )
        folds = config.folds
        if folds.num > 1 or folds.index:
            raise UserError(
                f"folds.num={folds.num} and folds.index={folds.index} are for train.py; a sweep trains its trials with "
                "all folds if you give sweep.folds"
            )
        _check_trainer(config.trainer)


_FOR_ONE_RUN = {
    "fast_dev_run": RestrictedArgument(
        [False, 0],
        "it is for train.py; sweep.preflight=only trains points of the search space for a few steps, and "
        "sweep.num_trials=2 with trainer.limit_train_batches=1 and trainer.limit_val_batches=1 is a tiny sweep",
    ),
    "max_steps": RestrictedArgument(
        [-1],
        "schedulers compare trials by epochs; give sweep.max_epochs for the trials, trainer.max_epochs for the "
        "retraining, and trainer.limit_train_batches for shorter epochs",
    ),
    "max_time": RestrictedArgument(
        [None],
        "schedulers compare trials by epochs; sweep.time_budget_s limits the whole sweep, and sweep.max_epochs a trial",
    ),
    "detect_anomaly": RestrictedArgument(
        [False], "it would make diverging trials fail, which a sweep ends by itself; use it with train.py"
    ),
    "profiler": RestrictedArgument([None], "give it to train.py, with the command line of a trial"),
    "num_nodes": RestrictedArgument([1], "sweep.workers_per_trial lets several processes, on any nodes, share a trial"),
    "strategy": RestrictedArgument(["auto"], "sweep.workers_per_trial lets several processes share a trial"),
}
"""Arguments of Lightning's Trainer that train.py supports but the trials of a sweep do not."""


def _check_trainer(trainer: DictConfig) -> None:
    for name, unsupported in _FOR_ONE_RUN.items():
        if name in trainer:
            unsupported.check_value(f"trainer.{name}", to_plain_values(trainer)[name], where=" in a sweep")
    devices = trainer.devices
    if (isinstance(devices, int) and devices > 1) or (isinstance(devices, ListConfig) and len(devices) > 1):
        raise UserError(
            f"trainer.devices={devices} is not supported in a sweep: give sweep.workers_per_trial for the trials and "
            "sweep.retrain_devices for the retraining"
        )


class DataSummary(NamedTuple):
    """The data of the default configuration.

    Attributes:
        fingerprint: hash that identifies the data.
        size: image size and number of images.
    """

    fingerprint: str
    size: DataSize


def summarise_data(config: Any) -> DataSummary:
    """Prepare the data and the default network as a run would, and describe the data.

    Missing or broken data, and images that the network does not accept, are reported here, before Ray starts.

    Args:
        config: the composed configuration.
    """
    _, data, _ = prepare_run(config, stage=None)
    size = DataSize(data.image_size, len(data.splits.train), len(data.splits.val))
    return DataSummary(data.fingerprint, size)


def check_loaders(sweep: SweepSettings, space: Space, overrides: Sequence[str], data: DataSize, slots: Slots) -> None:
    """Check that the data loaders of all concurrent trials on this machine fit into its shared memory.

    Args:
        sweep: settings of the sweep.
        space: search space. Its ends and options are checked too if it searches keys of `data` or `augment`.
        overrides: the user's overrides for train.py.
        data: size of the data of the default configuration.
        slots: slots of this machine.

    Raises:
        UserError: they do not fit.
    """
    configs = [compose("train", list(overrides))]
    if any(key.lstrip("+").startswith(("data", "augment")) for key in list_keys(space)):
        configs += [
            compose("train", add_param_overrides(overrides, params))
            for params in generate_probe_params(space, num_random=0)
        ]
    for config in configs:
        if config.data.num_workers:
            needed = compute_batch_bytes(
                batch_size=split_batch(config, sweep.workers_per_trial).data.batch_size,
                image_size=config.data.image_size or data.image_size,
                masks=instantiate_key(config, "augment").needs_masks,
            )
            check_shared_memory(
                num_workers=config.data.num_workers,
                bytes_per_batch=needed,
                num_processes=max(1, slots.num_slots) * slots.num_workers,
                processes="workers of trials" if slots.num_workers > 1 else "trials at a time",
            )


def slots_here(sweep: SweepSettings, cluster: RaySettings) -> Slots | None:
    """Count the slots of this machine before Ray starts; None if the sweep joins a running cluster."""
    if cluster.address is not None:
        return None
    here = {"CPU": float(cluster.num_cpus or count_cores()), "GPU": float(torch.cuda.device_count())}
    return count_slots(sweep, [here])


def check_validation_epochs(sweep: SweepSettings, scheduler: Scheduler, *, validation_interval: int) -> None:
    """Check that trials are validated at their last epoch and at every epoch where the scheduler compares them.

    Args:
        sweep: settings of the sweep.
        scheduler: its `rungs` are the epochs at which it compares trials.
        validation_interval: epochs between validations, `trainer.check_val_every_n_epoch`.

    Raises:
        UserError: one of these epochs is not validated.
    """
    interval = f"trainer.check_val_every_n_epoch={validation_interval}"
    if sweep.max_epochs % validation_interval:
        raise UserError(
            f"sweep.max_epochs={sweep.max_epochs} must be a multiple of {interval}, because otherwise its last epoch "
            "is not validated"
        )
    missed = [epoch for epoch in scheduler.rungs if epoch % validation_interval]
    if missed:
        rungs = ", ".join(map(str, scheduler.rungs))
        raise UserError(
            f"{interval} validates no trial at epoch {missed[0]}, where the scheduler compares them (it does at "
            f"{rungs}); give trainer.check_val_every_n_epoch=1, or make the option of the scheduler that sets these "
            "epochs a multiple of it, if there is one (scheduler.grace_period, scheduler.perturbation_interval)"
        )


def check_gpu_hours(gpu_hours: float | None, slots: Slots) -> None:
    """Raise UserError if `budget.gpu_hours` is given although trials use no GPU.

    Args:
        gpu_hours: its value.
        slots: slots of the trials.
    """
    if gpu_hours is not None and not slots.gpus:
        raise UserError(f"budget.gpu_hours={gpu_hours:g} limits nothing: trials use no GPU; give budget.hours instead")


def list_allowed_epochs(
    sweep: SweepSettings,
    bind_scheduler: Callable[[SweepSettings], Callable[[], Scheduler]],
    *,
    validation_intervals: Collection[int],
) -> list[int]:
    """List the numbers of epochs, up to `sweep.max_epochs`, that the scheduler and the validation allow for a trial.

    Args:
        sweep: settings of the sweep.
        bind_scheduler: returns a function that makes schedulers for the given settings.
        validation_intervals: epochs between validations, of the trials that were measured.
    """

    def is_allowed(max_epochs: int) -> bool:
        changed = replace(sweep, max_epochs=max_epochs)
        try:
            scheduler = bind_scheduler(changed)()
            for interval in set(validation_intervals):
                check_validation_epochs(changed, scheduler, validation_interval=interval)
        except UserError:
            return False
        return True

    return [epochs for epochs in range(1, sweep.max_epochs + 1) if is_allowed(epochs)]


def _check_gpus(sweep: SweepSettings) -> None:
    gpus = sweep.gpus_per_trial
    if sweep.workers_per_trial > 1 and (gpus == "auto" or 0 < (gpus or 0) < 1):
        raise UserError(
            f"sweep.gpus_per_trial={gpus} shares a GPU among trials, but sweep.workers_per_trial="
            f"{sweep.workers_per_trial} gives each trial several; give sweep.gpus_per_trial=1, or one worker"
        )
    if gpus == "auto":
        if sweep.preflight == "off" and sweep.resume is None:
            raise UserError(
                "sweep.gpus_per_trial=auto is determined by the preflight; give a number with sweep.preflight=off"
            )
    elif gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise UserError(f"sweep.gpus_per_trial must be a whole number or a part of one GPU, but it is {gpus:g}")


def _check_machine(sweep: SweepSettings, cluster: RaySettings) -> None:
    num_cpus = cluster.num_cpus or count_cores()
    times = f" for each of sweep.workers_per_trial={sweep.workers_per_trial}" if sweep.workers_per_trial > 1 else ""
    if sweep.cpus_per_trial * sweep.workers_per_trial > num_cpus:
        raise UserError(
            f"sweep.cpus_per_trial={sweep.cpus_per_trial}{times}, but this machine has {num_cpus} for trials"
        )
    gpus, num_gpus = sweep.gpus_per_trial, torch.cuda.device_count()
    if gpus is not None and gpus != "auto" and gpus * sweep.workers_per_trial > num_gpus:
        found = f"{num_gpus} GPU{'' if num_gpus == 1 else 's'}" if num_gpus else "no GPU"
        raise UserError(f"sweep.gpus_per_trial={gpus:g}{times}, but this machine has {found}")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.,=+-]+", name) or name.strip(".") == "":
        raise UserError(f"sweep.name={name} must be the name of a folder: letters, digits and any of _.,=+-")


def _check_folder(sweep: SweepSettings) -> None:
    folder = sweep.path
    if sweep.resume is None and folder.is_dir() and any(each.name != LOCK for each in folder.iterdir()):
        raise UserError(
            f"{folder} already has a sweep; choose another sweep.name, or continue that sweep with "
            f"sweep.resume={folder}"
        )
    try:
        check_writable(folder)
        _check_locks(find_nearest_existing(folder))
    except OSError as error:
        reason = explain_file_error(
            error, remedy="set DIR_SCRATCH to a folder on a local or shared disk that can be written"
        )
        raise UserError(f"the sweep cannot be kept in {folder} because {reason}") from error


def _check_locks(place: Path) -> None:
    """Raise OSError if the file system does not support file locks or symbolic links.

    Optuna locks its journal with a symbolic link.
    """
    with tempfile.TemporaryDirectory(dir=place, prefix=".writable-") as folder, add_file_name(place):
        with hold_lock(Path(folder) / LOCK):
            pass
        os.symlink(LOCK, Path(folder) / "link")
