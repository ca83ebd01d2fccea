"""Runs a sweep: Tune asks the searcher for trials and obeys the scheduler, the recorder writes it all down."""

import contextlib
import logging
import os
import random
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import ray
from ray import tune
from ray._private.ray_logging import stdout_deduplicator
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from handpose.errors import UserError
from handpose.report.table import TrialTable
from handpose.report.terminal import sweep_view
from handpose.sweep.preflight import num_cores
from handpose.sweep.provenance import write_yaml
from handpose.sweep.recorder import Recorder, run_name
from handpose.sweep.scheduler import PopulationBasedTraining
from handpose.sweep.searcher import OptunaSearcher
from handpose.sweep.settings import RaySettings, SweepSettings
from handpose.sweep.space import Params, Space, default_point
from handpose.sweep.trial import Objective, make_trainable

_CHECKPOINTS_A_TRIAL = 4  # Ray keeps all; a population may still go on from one that is a few steps old
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing but reports travels; Ray's own choice is a third of the memory

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its own table, and every error, at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its CSV, JSON and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they stand in trials.csv
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the trials with a state
}
"""What Ray takes from the environment of the driver only."""

_WORKER_ENVIRONMENT = {
    # A trial that was stopped gets this long to leave its epoch, before the worker is given to the next; Ray's 2 s
    # are not enough for a Lightning loop, and the next trial fails then.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class SweepInterruptedError(Exception):
    """The sweep was ended by hand (SIGINT or SIGTERM); its trials are told and written down."""


@dataclass(frozen=True)
class Slots:
    """Trials at a time, and what each of them holds."""

    num_slots: int
    cpus: int
    gpus: float


def run_sweep(
    *,
    sweep: SweepSettings,
    cluster: RaySettings,
    space: Space,
    searcher: Callable[..., OptunaSearcher],
    scheduler: TrialScheduler,
    objective: Objective,
    command: Callable[[Params], str],
    defaults: Mapping[str, Any],
    description: Mapping[str, Any],
) -> TrialTable:
    """Try configurations from the space until all trials are done or the budget is spent; returns the table of trials.

    searcher: as configured, still without the space. objective: what a trial runs. command: the command line that
    trains parameters again. defaults: configuration key -> value of the default configuration, which is tried first
    where it lies in the space. description: kept as sweep.yaml. Ray is started and shut down, unless it runs already.
    Raises UserError where a trial does not fit into what Ray has, and SweepInterruptedError.
    """
    with _environment(), ray_runtime(_limited(cluster, sweep)):  # before any file is made: it may not answer
        slots = count_slots(sweep, ray.cluster_resources())
        folder = sweep.path
        first = default_point(space, defaults)
        asked = searcher(
            space=space,
            folder=folder / "study",
            name=sweep.name,
            metric=sweep.metric,
            mode=sweep.mode,
            max_epochs=sweep.max_epochs,
            seed=sweep.seed,
            first=[first] if first else [],
        )
        write_yaml(folder / "sweep.yaml", description)
        num_trials = min(sweep.num_trials, asked.num_points or sweep.num_trials)
        table = TrialTable(sweep.metric, sweep.mode, num_trials, sweep.max_epochs)
        view = sweep_view(f"sweep {sweep.name}  ·  {space.name}", time_budget_s=sweep.time_budget_s)
        table.num_slots = slots.num_slots
        view.refresh(table)
        stop = _Stop(sweep.max_epochs)
        with contextlib.closing(view), contextlib.closing(asked), _interruptible(stop):
            recorder = Recorder(
                table,
                folder=folder,
                numbers=asked.numbers,
                command=command,
                view=view,
                is_interrupted=lambda: stop.is_requested,
            )
            _tuner(sweep, slots, num_trials, asked, scheduler, objective, recorder, stop).fit()
        if stop.is_requested:
            raise SweepInterruptedError(f"the sweep was interrupted; what it found lies in {folder}")
        return table


def _tuner(
    sweep: SweepSettings,
    slots: Slots,
    num_trials: int,
    searcher: OptunaSearcher,
    scheduler: TrialScheduler,
    objective: Objective,
    recorder: Recorder,
    stopper: tune.Stopper,
) -> tune.Tuner:
    # A population trains side by side, taking turns; every other sweep holds as many trials as there are slots.
    num_live = num_trials if isinstance(scheduler, PopulationBasedTraining) else slots.num_slots
    resources = {"cpu": slots.cpus, "gpu": slots.gpus}
    random.seed(sweep.seed)  # Ray's schedulers draw from the global generators: ASHA its brackets, PBT its parents
    np.random.seed(sweep.seed)
    numbers = searcher.numbers

    def name(trial: Trial) -> str:  # Ray copies it for every trial, so that it must not hold the searcher
        return run_name(numbers[trial.trial_id])

    return tune.Tuner(
        tune.with_resources(make_trainable(objective), resources),
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=num_trials,
            max_concurrent_trials=num_live,
            time_budget_s=sweep.time_budget_s,
            reuse_actors=True,  # the larger part of a short trial is a fresh process importing torch
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(sweep.path),
            stop=stopper,
            callbacks=[recorder],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_CHECKPOINTS_A_TRIAL),
            verbose=0,
        ),
    )


def count_slots(sweep: SweepSettings, resources: Mapping[str, float]) -> Slots:
    """How many trials fit into what Ray has; raises UserError where none does."""
    gpus = sweep.gpus_per_trial if sweep.gpus_per_trial is not None else float(resources.get("GPU", 0) >= 1)
    num_slots = int(resources.get("CPU", 0) // sweep.cpus_per_trial)
    if gpus:
        num_slots = min(num_slots, _gpu_slots(resources.get("GPU", 0), gpus))
    if num_slots < 1:
        raise UserError(
            f"no trial fits: sweep.cpus_per_trial={sweep.cpus_per_trial} and sweep.gpus_per_trial={gpus:g}, but Ray "
            f"has {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs"
        )
    num_slots = num_slots if sweep.max_concurrent is None else min(num_slots, sweep.max_concurrent)
    return Slots(num_slots, sweep.cpus_per_trial, gpus)


def _gpu_slots(num_gpus: float, per_trial: float) -> int:
    return int(num_gpus * int(1 / per_trial) if per_trial < 1 else num_gpus // per_trial)


@contextlib.contextmanager
def ray_runtime(cluster: RaySettings) -> Iterator[None]:
    """Ray, without its noise, for the length of a block; one that runs already is used, and left running."""
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        num_cpus = cluster.num_cpus or num_cores()
        settings = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        settings["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        _check_answers(cluster.address)
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            **settings,
        )
    except (OSError, RuntimeError, ValueError) as error:
        if cluster.address is None:
            raise
        raise UserError(
            f"ray.address={cluster.address}: no Ray cluster answers there; `ray start --head` begins one, and without "
            "ray.address the sweep runs on this machine"
        ) from error
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # What became of a worker stands in trials.csv. Ray's switch for it, RAY_DEDUP_LOGS_SKIP_REGEX, is read on import.
    stdout_deduplicator.skip_re = re.compile("A worker died or was killed")
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Ray itself tries an address that nobody listens on for minutes, and tells each try; raises OSError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _limited(cluster: RaySettings, sweep: SweepSettings) -> RaySettings:
    """Alone on a machine max_concurrent limits the cores too: what runs of a population its scheduler chooses."""
    if cluster.address is not None or sweep.max_concurrent is None:
        return cluster
    num_cpus = min(cluster.num_cpus or num_cores(), sweep.max_concurrent * sweep.cpus_per_trial)
    return replace(cluster, num_cpus=num_cpus)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Ray's switches, set for the length of a sweep; what the user has set counts before them."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _Stop(tune.Stopper):
    """Ends a trial at its last epoch, and the experiment at the next step once it is asked to.

    A population would pause a trial there, and then send it on with nothing left to train.
    """

    def __init__(self, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self.is_requested = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return result["epoch"] >= self._max_epochs

    def stop_all(self) -> bool:
        return self.is_requested


@contextlib.contextmanager
def _interruptible(stop: _Stop) -> Iterator[None]:
    """SIGINT and SIGTERM end the sweep in good order; a second one acts as it always does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.is_requested = True
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        restore()
