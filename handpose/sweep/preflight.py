"""What can be known to go wrong before a sweep, so that no slot is paid for it: raises UserError, in one sentence."""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from handpose.config import compose
from handpose.errors import UserError
from handpose.sweep.settings import RaySettings, SweepSettings
from handpose.sweep.space import Space, grid_points, probes
from handpose.sweep.trial import with_params
from handpose.training.fit import prepare


def check_sweep(sweep: SweepSettings, ray: RaySettings) -> None:
    """Numbers, slots and the folder."""
    _check_numbers(sweep, ray)
    if ray.address is None:
        _check_machine(sweep, ray)
    _check_folder(sweep)


def check_space(space: Space, overrides: Sequence[str], *, is_grid: bool = False) -> None:
    """Compose the space's corners and some points within, which shows keys that do not exist and impossible values.

    overrides: the user's, for train.py. is_grid: every point is to be listed.
    """
    if is_grid:
        grid_points(space)
    for params in probes(space):
        try:
            compose("train", with_params(overrides, params))
        except UserError as error:
            raise UserError(f"{space.file}: {error}") from error


def prepare_data(config: Any) -> str:
    """Make the default network and the data of all trials ready, as a run would; returns the data's fingerprint.

    config: composed. Data that is missing or broken, and pictures that the network does not take, show here, before Ray
    is started.
    """
    return prepare(config, stage=None).data.fingerprint


def _check_numbers(sweep: SweepSettings, ray: RaySettings) -> None:
    at_least_one = {
        "sweep.num_trials": sweep.num_trials,
        "sweep.max_epochs": sweep.max_epochs,
        "sweep.cpus_per_trial": sweep.cpus_per_trial,
        "sweep.max_concurrent": sweep.max_concurrent,
        "sweep.checkpoint_every_epochs": sweep.checkpoint_every_epochs,
        "ray.num_cpus": ray.num_cpus,
    }
    for key, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{key} must be at least 1, but it is {value}")
    if sweep.time_budget_s is not None and sweep.time_budget_s <= 0:
        raise UserError(f"sweep.time_budget_s must be above 0, but it is {sweep.time_budget_s:g}")
    gpus = sweep.gpus_per_trial
    if gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise UserError(f"sweep.gpus_per_trial must be a whole number or a part of one GPU, but it is {gpus:g}")
    if not sweep.metric.startswith("val/"):
        raise UserError(f"sweep.metric={sweep.metric} is no validation metric; those begin with val/")


def _check_machine(sweep: SweepSettings, ray: RaySettings) -> None:
    num_cpus = ray.num_cpus or num_cores()
    if sweep.cpus_per_trial > num_cpus:
        raise UserError(f"sweep.cpus_per_trial={sweep.cpus_per_trial}, but this machine has {num_cpus} for trials")
    num_gpus = torch.cuda.device_count()
    if (sweep.gpus_per_trial or 0) > num_gpus:
        found = f"{num_gpus} GPU{'' if num_gpus == 1 else 's'}" if num_gpus else "no GPU"
        raise UserError(f"sweep.gpus_per_trial={sweep.gpus_per_trial:g}, but this machine has {found}")


def num_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_folder(sweep: SweepSettings) -> None:
    if not re.fullmatch(r"[\w.,=+-]+", sweep.name) or sweep.name.strip(".") == "":
        raise UserError(f"sweep.name={sweep.name} must be the name of a folder: letters, digits and any of _.,=+-")
    folder = sweep.path
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"there is a sweep in {folder} already; choose another sweep.name, or remove that folder")
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"the folder {folder} cannot be made in {place}; set DIR_SCRATCH to a folder that can be written"
        )
