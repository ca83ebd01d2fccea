"""What can be known to go wrong before a sweep, so that no slot is paid for it: raises UserError, in one sentence.

First what needs no Ray: numbers, space, data, plan. Then, with Ray, `preflight`: points of the space are trained for a
few steps in a slot, which also tells what the sweep will cost.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray
import torch
from omegaconf import DictConfig, ListConfig
from ray import cloudpickle

from handpose.config import compose, plain
from handpose.data.shared_memory import batch_bytes, check_shared_memory
from handpose.errors import UserError, explain, free_bytes, naming, size_text
from handpose.locks import locked
from handpose.metrics.validation import target_metric
from handpose.report.preflight import disk_line, points_table
from handpose.report.words import params_text
from handpose.resources import num_cores
from handpose.schema import Unsupported
from handpose.sweep.forecast import cost_lines, retraining, table_rows
from handpose.sweep.gpu_share import Neighbours, choose, cores_a_gpu
from handpose.sweep.nodes import live_resources
from handpose.sweep.probing import RANDOM, Bench, Probed, points_of, probe, without_effect
from handpose.sweep.retention import KEPT_A_TRIAL
from handpose.sweep.rules import Rule
from handpose.sweep.settings import LOCK, RaySettings, SweepSettings
from handpose.sweep.slots import LEAST_PROCESS_MB, Slots, count_slots, memory_line, num_fitting
from handpose.sweep.space import Params, Space, default_point, keys_of, num_grid_points, probes
from handpose.sweep.stretch import Objective
from handpose.sweep.trial import TrialRecipe, with_params
from handpose.sweep.trial_cost import DataSize, one_workers
from handpose.sweep.worker_group import make_trainable
from handpose.training.fit import prepare
from handpose.whole_file import check_writable, nearest


def check_sweep(sweep: SweepSettings, cluster: RaySettings) -> None:
    """Check the metric with its direction, numbers, slots and the folder."""
    target_metric(sweep.metric, sweep.mode, group="sweep")
    _check_numbers(sweep, cluster)
    if cluster.address is None:
        _check_machine(sweep, cluster)
    _check_folder(sweep)


def check_space(space: Space, overrides: Sequence[str], *, is_grid: bool = False, num_workers: int = 1) -> None:
    """Compose the space's corners and some points within, which shows keys that do not exist and impossible values.

    overrides: the user's, for train.py. is_grid: every point is to be listed. num_workers: that share each batch.
    """
    if is_grid:
        num_grid_points(space)
    for params in probes(space):
        try:
            config = one_workers(compose("train", with_params(overrides, params)), num_workers)
        except UserError as error:
            raise UserError(f"{space.file}: {error}") from error
        if config.train_on_val:
            raise UserError(
                "train_on_val=true leaves nothing to choose trials by; retrain.use_val=true is for the winner alone"
            )
        _check_trainer(config.trainer)


_FOR_ONE_RUN = {
    "fast_dev_run": Unsupported(
        [False, 0],
        "it is for train.py; sweep.preflight=only trains points of the search space for a few steps, and "
        "sweep.num_trials=2 with trainer.limit_train_batches=1 and trainer.limit_val_batches=1 is a tiny sweep",
    ),
    "max_steps": Unsupported(
        [-1],
        "schedulers compare trials by epochs; give sweep.max_epochs for the trials, trainer.max_epochs for the "
        "retraining, and trainer.limit_train_batches for shorter epochs",
    ),
    "max_time": Unsupported(
        [None],
        "schedulers compare trials by epochs; sweep.time_budget_s limits the whole sweep, and sweep.max_epochs a trial",
    ),
    "detect_anomaly": Unsupported(
        [False], "it would fail the trials that diverge, which a sweep ends by itself; give it to train.py"
    ),
    "profiler": Unsupported([None], "give it to train.py, with the command line of a trial"),
    "num_nodes": Unsupported([1], "sweep.workers_per_trial lets several processes, on any nodes, share a trial"),
    "strategy": Unsupported(["auto"], "sweep.workers_per_trial lets several processes share a trial"),
}
"""Arguments of Lightning's Trainer that work in train.py, but not in the trials of a sweep."""


def _check_trainer(trainer: DictConfig) -> None:
    for name, unsupported in _FOR_ONE_RUN.items():
        if name in trainer:
            unsupported.check(f"trainer.{name}", plain(trainer)[name], where=" in a sweep")
    devices = trainer.devices
    if (isinstance(devices, int) and devices > 1) or (isinstance(devices, ListConfig) and len(devices) > 1):
        raise UserError(
            f"trainer.devices={devices} is not supported in a sweep: give sweep.workers_per_trial for the trials and "
            "sweep.retrain_devices for the retraining"
        )


class Survey(NamedTuple):
    """What the data of the default configuration are. fingerprint: of the data."""

    fingerprint: str
    size: DataSize


def survey(config: Any) -> Survey:
    """Make the default network and the data of all trials ready, as a run would, and look at them.

    config: composed. Data that is missing or broken, and pictures that the network does not take, show here, before Ray
    is started.
    """
    _, data, _ = prepare(config, stage=None)
    size = DataSize(data.image_size, len(data.splits.train), len(data.splits.val))
    return Survey(data.fingerprint, size)


def prepare_data(config: Any) -> str:
    """The fingerprint of the data, which is made ready with the default network: `survey`."""
    return survey(config).fingerprint


def check_loaders(sweep: SweepSettings, space: Space, overrides: Sequence[str], data: DataSize, slots: Slots) -> None:
    """Check that the loaders of all trials that this machine runs at a time fit into its shared memory.

    Args:
        sweep: its settings.
        space: whose ends are tried where it has to do with loaders.
        overrides: the user's, for train.py.
        data: of the default configuration.
        slots: of this machine.

    Raises:
        UserError: they do not fit.
    """
    configs = [compose("train", list(overrides))]
    if any(key.lstrip("+").startswith(("data", "augment")) for key in keys_of(space)):
        configs += [compose("train", with_params(overrides, params)) for params in probes(space, num_random=0)]
    for config in configs:
        if config.data.num_workers:
            needed = batch_bytes(
                batch_size=one_workers(config, sweep.workers_per_trial).data.batch_size,
                image_size=config.data.image_size or data.image_size,
                masks=config.augment.background > 0,
            )
            check_shared_memory(
                num_workers=config.data.num_workers,
                bytes_per_batch=needed,
                num_processes=max(1, slots.num_slots) * slots.workers,
                processes="workers of trials" if slots.workers > 1 else "trials at a time",
            )


def slots_here(sweep: SweepSettings, cluster: RaySettings) -> Slots | None:
    """The slots of this machine before Ray is started on it; None where a cluster is joined."""
    if cluster.address is not None:
        return None
    here = {"CPU": float(cluster.num_cpus or num_cores()), "GPU": float(torch.cuda.device_count())}
    return count_slots(sweep, [here])


def check_plan(sweep: SweepSettings, rule: Rule, *, validates_every: int) -> None:
    """Check that trials are validated at their last epoch and wherever the rule compares them.

    validates_every: trainer.check_val_every_n_epoch.
    """
    interval = f"trainer.check_val_every_n_epoch={validates_every}"
    if sweep.max_epochs % validates_every:
        raise UserError(
            f"sweep.max_epochs={sweep.max_epochs} must be a multiple of {interval}, or its last epoch is not validated"
        )
    missed = [epoch for epoch in rule.rungs if epoch % validates_every]
    if missed:
        rungs = ", ".join(map(str, rule.rungs))
        raise UserError(
            f"{interval} validates no trial at epoch {missed[0]}, where the scheduler compares them (it does at "
            f"{rungs}); give trainer.check_val_every_n_epoch=1, or make scheduler.grace_period (of pbt: "
            "scheduler.perturbation_interval) a multiple of it"
        )


def _check_numbers(sweep: SweepSettings, cluster: RaySettings) -> None:
    at_least_one = {
        "sweep.num_trials": sweep.num_trials,
        "sweep.max_epochs": sweep.max_epochs,
        "sweep.workers_per_trial": sweep.workers_per_trial,
        "sweep.cpus_per_trial": sweep.cpus_per_trial,
        "sweep.max_concurrent": sweep.max_concurrent,
        "sweep.checkpoint_every_epochs": sweep.checkpoint_every_epochs,
        "sweep.set_aside_after": sweep.set_aside_after,
        "sweep.stop_after_failures": sweep.stop_after_failures,
        "ray.num_cpus": cluster.num_cpus,
    }
    for key, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{key} must be at least 1, but it is {value}")
    above_zero = {
        "sweep.time_budget_s": sweep.time_budget_s,
        "sweep.gpu_hours": sweep.gpu_hours,
        "sweep.hang_timeout_s": sweep.hang_timeout_s,
        "sweep.checkpoint_budget_gb": sweep.checkpoint_budget_gb,
    }
    for key, amount in above_zero.items():
        if amount is not None and amount <= 0:
            raise UserError(f"{key} must be above 0, but it is {amount:g}")
    for key, least in {"sweep.max_retries": sweep.max_retries, "sweep.retry_delay_s": sweep.retry_delay_s}.items():
        if least < 0:
            raise UserError(f"{key} must be at least 0, but it is {least:g}")
    if sweep.explosion_factor is not None and sweep.explosion_factor <= 1:
        raise UserError(f"sweep.explosion_factor must be above 1, but it is {sweep.explosion_factor:g}")
    gpus = sweep.gpus_per_trial
    if sweep.workers_per_trial > 1 and (gpus == "auto" or 0 < (gpus or 0) < 1):
        raise UserError(
            f"sweep.gpus_per_trial={gpus} shares a GPU among trials, but sweep.workers_per_trial="
            f"{sweep.workers_per_trial} gives each trial several; give sweep.gpus_per_trial=1, or one worker"
        )
    if gpus == "auto":
        if sweep.preflight == "off" and sweep.resume is None:
            raise UserError(
                "sweep.gpus_per_trial=auto is found out by the preflight; with sweep.preflight=off give a number"
            )
    elif gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise UserError(f"sweep.gpus_per_trial must be a whole number or a part of one GPU, but it is {gpus:g}")


def _check_machine(sweep: SweepSettings, cluster: RaySettings) -> None:
    num_cpus = cluster.num_cpus or num_cores()
    times = f" for each of sweep.workers_per_trial={sweep.workers_per_trial}" if sweep.workers_per_trial > 1 else ""
    if sweep.cpus_per_trial * sweep.workers_per_trial > num_cpus:
        raise UserError(
            f"sweep.cpus_per_trial={sweep.cpus_per_trial}{times}, but this machine has {num_cpus} for trials"
        )
    gpus, num_gpus = sweep.gpus_per_trial, torch.cuda.device_count()
    if gpus is not None and gpus != "auto" and gpus * sweep.workers_per_trial > num_gpus:
        found = f"{num_gpus} GPU{'' if num_gpus == 1 else 's'}" if num_gpus else "no GPU"
        raise UserError(f"sweep.gpus_per_trial={gpus:g}{times}, but this machine has {found}")


def _check_folder(sweep: SweepSettings) -> None:
    if not re.fullmatch(r"[\w.,=+-]+", sweep.name) or sweep.name.strip(".") == "":
        raise UserError(f"sweep.name={sweep.name} must be the name of a folder: letters, digits and any of _.,=+-")
    folder = sweep.path
    if sweep.resume is None and folder.is_dir() and any(each.name != LOCK for each in folder.iterdir()):
        raise UserError(
            f"there is a sweep in {folder} already; choose another sweep.name, or continue that sweep with "
            f"sweep.resume={folder}"
        )
    try:
        check_writable(folder)
        _check_locks(nearest(folder))
    except OSError as error:
        reason = explain(error, remedy="set DIR_SCRATCH to a folder on a local or shared disk that can be written")
        raise UserError(f"the sweep cannot be kept in {folder} because {reason}") from error


def _check_locks(place: Path) -> None:
    """Raise OSError where the file system does not lock files, or has no links, with which Optuna locks its journal."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".writable-") as folder, naming(place):
        with locked(Path(folder) / LOCK):
            pass
        os.symlink(LOCK, Path(folder) / "link")


# --- with Ray ---------------------------------------------------------------------------------------------------------

_MOST_PICKLED_BYTES = 50_000_000
_BRIEF_S = 60.0
_MEMORY_MARGIN = 1.1
"""A trial takes more main memory than its first steps did (5 % more after two epochs)."""


def preflight(
    slots: Slots,
    *,
    sweep: SweepSettings,
    space: Space,
    recipe: TrialRecipe,
    objective: Objective,
    make_rule: Callable[[], Rule],
    data: DataSize,
    defaults: Mapping[str, Any],
    use_val: bool = False,
    say: Callable[[str], None] = print,
) -> Slots:
    """Train points of the space for a few steps, each as trials are, and say what a trial and the sweep will cost.

    Within a running Ray. slots: that trials will have. objective: what they run. data: of the default configuration.
    defaults: as `default_point` takes them. use_val: the winner is retrained on the validation split too.
    sweep.preflight: `brief` tries the space's ends, two points at random and every option of every choice; `only` more,
    for longer, pretrained weights included; `off` nothing. Returns the slots with the memory that a trial takes, which
    may be fewer than before, and with the share of a GPU that it has found out. Raises UserError, which names the
    parameters, where a point cannot be trained, and where objective, disk, memory or GPU are not up to it.
    """
    if sweep.preflight == "off":
        return slots
    is_brief, rule, default = sweep.preflight == "brief", make_rule(), _default(space, defaults)
    points = points_of(space, num_random=2 if is_brief else 8)
    if not is_brief:
        say(f"trying {len(points)} points of {space.name} on a worker\n")
    with Bench(cpus=slots.cpus, gpus=slots.gpus, recipe=recipe, data=data) as bench:
        check_pickles(objective)  # while the worker imports what it needs
        probed = probe(
            bench,
            points,
            space=space,
            default=default,
            num_steps=3 if is_brief else 8,
            weights=not is_brief,
            time_s=_BRIEF_S if is_brief else math.inf,
        )
        idle = [] if is_brief else list(without_effect(bench, probed, default or probed.points[0].params))
    for cost in probed.costs:
        check_plan(sweep, rule, validates_every=cost.validates_every)
    lines = []
    gpus = slots.gpus
    if sweep.gpus_per_trial == "auto" and gpus:
        gpus, line = _sharing(sweep, slots, recipe, data, probed)
        lines.append(line)
        check_loaders(sweep, space, recipe.overrides, data, replace(slots, gpus=gpus))
    nodes = live_resources()
    slots = count_slots(sweep, nodes, gpus=gpus, process_mb=_process_mb(probed))
    disk, *warnings = _check_disk(sweep, slots, rule, probed)
    warnings += [*_check_gpu_share(slots, probed), *_check_objective(sweep, space, probed)]
    warnings += _warnings(space, probed, idle)
    if not is_brief:
        say(points_table(table_rows(probed)) + "\n")
    again = retraining(sweep, recipe, probed, data, use_val=use_val) if sweep.retrain else None
    lines += [*cost_lines(sweep, probed, make_rule, num_slots=slots.num_slots, retrained=again), disk]
    lines += filter(None, [memory_line(sweep, slots, nodes)])
    say("\n".join([*lines, *(f"note        {warning}" for warning in warnings)]))
    return slots


def _process_mb(probed: Probed) -> float:
    """Main memory that a worker with the most demanding point may take, in MB, as far as it is known."""
    measured = [_MEMORY_MARGIN * cost.process_mb for cost in probed.costs if math.isfinite(cost.process_mb)]
    return max([LEAST_PROCESS_MB, *measured])


def _sharing(
    sweep: SweepSettings, slots: Slots, recipe: TrialRecipe, data: DataSize, probed: Probed
) -> tuple[float, str]:
    """The share of a GPU with the highest throughput, and what was measured, in a line."""
    resources = ray.cluster_resources()
    cores = cores_a_gpu(resources, cpus_per_trial=sweep.cpus_per_trial)
    without_gpu = replace(slots, gpus=0.0, process_mb=_process_mb(probed))
    in_memory = sum(num_fitting(without_gpu, node) for node in live_resources() if node.get("GPU", 0))
    typical = min(probed.points, key=lambda point: point.label != RANDOM)
    neighbours = Neighbours(cpus=sweep.cpus_per_trial, recipe=recipe, data=data, params=typical.params)
    choice = choose(
        max(cost.memory_share for cost in probed.costs),
        most=max(1, min(cores, int(in_memory // resources["GPU"]))),
        steps_per_s=neighbours.steps_per_s,
    )
    return choice.gpus_per_trial, choice.line()


def check_pickles(objective: Objective) -> None:
    """See that what trials run reaches a worker, whole and not as a heavy load; raises UserError."""
    name = type(objective).__name__ if is_dataclass(objective) else getattr(objective, "__qualname__", repr(objective))
    try:
        pickled = cloudpickle.dumps(make_trainable(objective))
        cloudpickle.loads(pickled)
        copied = cloudpickle.loads(cloudpickle.dumps(objective))
    except Exception as error:  # pickle raises whatever the objects in it do
        raise UserError(f"{name} cannot be sent to a worker: {type(error).__name__}: {error}") from error
    if len(pickled) > _MOST_PICKLED_BYTES:
        raise UserError(
            f"{name} has {len(pickled) / 1e6:.0f} MB, which would be sent to every worker; let it read what it needs "
            "there instead of carrying it"
        )
    if is_dataclass(objective) and copied != objective:
        raise UserError(f"{name} does not arrive at a worker as it was sent: it is {copied}, not {objective}")


def _default(space: Space, defaults: Mapping[str, Any]) -> Params | None:
    """Parameters of the default configuration, where it lies in the space."""
    draws = default_point(space, defaults)
    return None if draws is None else space.suggest(optuna.trial.FixedTrial(draws))


def _check_disk(sweep: SweepSettings, slots: Slots, rule: Rule, probed: Probed) -> list[str]:
    """What the disk has for checkpoints, and warnings; raises UserError where it has too little for any sweep."""
    place = nearest(sweep.path)
    free_gb = free_bytes(place) / 1e9
    largest_gb = max(cost.checkpoint_mb for cost in probed.costs) / 1e3
    running_gb = slots.num_slots * KEPT_A_TRIAL * largest_gb
    waiting_gb = sweep.num_trials * largest_gb if rule.needs_checkpoints else 0.0
    needed_gb, budget = running_gb + waiting_gb, f"sweep.checkpoint_budget_gb={sweep.checkpoint_budget_gb:g}"
    if free_gb < min(needed_gb, sweep.checkpoint_budget_gb):
        free, needed, largest = (size_text(1e9 * each) for each in (free_gb, needed_gb, largest_gb))
        raise UserError(
            f"{place} has {free} free, but the sweep's checkpoints need {needed} ({largest} each) within {budget}; "
            "make room, or set DIR_SCRATCH to a folder on another disk"
        )
    line = disk_line(
        checkpoint_mb=1e3 * largest_gb,
        needed_gb=needed_gb,
        budget_gb=sweep.checkpoint_budget_gb,
        free_gb=free_gb,
        folder=str(place),
    )
    if sweep.checkpoint_budget_gb >= needed_gb:
        return [line]
    begin = "trials that wait at a rung begin anew" if rule.needs_checkpoints else "a damaged checkpoint has no other"
    return [line, f"{budget} may be too small: the sweep may hold {needed_gb:.3g} GB, without which {begin}"]


def _check_gpu_share(slots: Slots, probed: Probed) -> list[str]:
    """Warnings where trials that share a GPU do not fit beside each other; raises UserError where none does."""
    num_sharing = int(1 / slots.gpus) if 0 < slots.gpus < 1 else 1
    shares = sorted(cost.memory_share for cost in probed.costs if cost.gpu)
    if num_sharing == 1 or not shares or shares[-1] * num_sharing <= 1:
        return []
    told = (
        f"sweep.gpus_per_trial={slots.gpus:g} puts {num_sharing} trials on a GPU, but one takes up to "
        f"{shares[-1]:.0%} of its memory; a larger sweep.gpus_per_trial or a smaller data.batch_size fits"
    )
    if shares[0] * num_sharing > 1:
        raise UserError(told)
    return [told]


def _check_objective(sweep: SweepSettings, space: Space, probed: Probed) -> list[str]:
    """Warnings where the second objective tells no trial from another; raises UserError where it cannot be measured."""
    name = sweep.second_objective
    if name is None:
        return []
    found = {float(getattr(cost, name)) for cost in probed.costs}
    if not all(map(math.isfinite, found)):
        raise UserError(f"sweep.second_objective={name} cannot be measured on this device; give num_parameters or null")
    if len(found) > 1:
        return []
    return [f"search_space={space.name}: sweep.second_objective={name} is {found.pop():g} at every point tried"]


def _warnings(space: Space, probed: Probed, idle: Sequence[str]) -> Iterator[str]:
    if probed.num_left_out:
        yield f"{probed.num_left_out} more points were not tried, to be brief; sweep.preflight=only tries them all"
    for key in dict.fromkeys(key for cost in probed.costs for key in cost.ignored):
        yield f"search_space={space.name}: {key} has no effect, because every trial has the sweep's own value"
    for key in idle:
        yield f"search_space={space.name}: {key} made no difference to the first steps of the default configuration"
    for point, cost in zip(probed.points, probed.costs, strict=True):
        if not all(map(math.isfinite, cost.trace)):
            where = params_text(point.params)
            yield f"search_space={space.name}: within a few steps of random pictures this is not finite: {where}"
