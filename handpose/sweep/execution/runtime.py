"""Ray as a sweep needs it: quiet, sized, with the switches that it reads from the environment."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray

from handpose.errors import UserError
from handpose.resources import count_cores, main_memory
from handpose.sweep.controller.slots import memory_for_trials
from handpose.sweep.execution.interpreter import check_interpreter, worker_interpreter
from handpose.sweep.execution.privacy import ensure_token, make_private_folder
from handpose.sweep.execution.ray_internals import hide_driver_messages, keep_from_workers, use_token_where_there_is_one
from handpose.sweep.record.settings import RaySettings, SweepSettings
from handpose.whole_file import home_folder

_OBJECT_STORE_BYTES = 100 * 2**20  # nothing but reports travels; Ray's own choice is a third of the memory

_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its own table, and every error, at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # its CSV, JSON and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they stand in trials.csv
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the trials with a state
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # what a trial costs is reported before it has a metric
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nothing is restored from Tune's snapshots
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # else Tune would start the trial again by itself
}
"""What Ray takes from the environment of the driver only."""

_WORKER_ENVIRONMENT = {
    # A trial that was stopped gets this long to leave its epoch, before the worker is given to the next; Ray's 2 s
    # are not enough for a Lightning loop, and the next trial fails then.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUTF8": "1",  # as the driver (handpose/utf8.py), whatever the locale of a node
}

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""What Tune (Ray 2.60, tune/execution/class_cache.py) would hand to its workers, and they get in their argument lists,
which everybody on the machine can read. Workers have the environment of their node."""


@contextlib.contextmanager
def start_ray(cluster: RaySettings, *, hook: Callable[[], None] | None = None) -> Iterator[None]:
    """Ray, without its noise, for the length of a block; one that runs already is used, and left running.

    hook: what every worker does first, where Ray is started here or joined. Ray that is started here lets in nobody
    without the token, and has a folder of its own.
    """
    if ray.is_initialized():
        yield
        return
    check_interpreter(sys.executable)
    keep_from_workers(_CREDENTIALS)
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"address": cluster.address}
        if cluster.address is None:
            num_cpus = cluster.num_cpus or count_cores()
            settings = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
            settings["object_store_memory"] = _OBJECT_STORE_BYTES
            # Ray itself looks at the quota and the limit of the topmost cgroup only, and not at the affinity.
            settings["_memory"] = memory_for_trials(main_memory())
            settings["_temp_dir"] = str(stack.enter_context(make_private_folder()))
            ensure_token(os.environ, home=home_folder())
        _init_ray(cluster, settings, hook)
        try:
            yield
        finally:
            ray.shutdown()


def _init_ray(cluster: RaySettings, settings: dict[str, Any], hook: Callable[[], None] | None) -> None:
    runtime_env: dict[str, Any] = {"env_vars": dict(_WORKER_ENVIRONMENT)}  # Ray adds to it
    if not (cluster.address or "").startswith("ray://"):  # the workers of Ray's client run elsewhere, without hooks
        runtime_env |= worker_interpreter(sys.executable)
        if hook is not None:
            runtime_env["worker_process_setup_hook"] = hook
    try:
        _check_cluster_answers(cluster.address)
        if cluster.address is not None:  # Ray does it for `auto` alone
            use_token_where_there_is_one()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        if cluster.address is None:
            raise
        raise UserError(
            f"ray.address={cluster.address}: no Ray cluster answers there, or not to this token (~/.ray/auth_token, "
            "RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN); `ray start --head` begins one, and ray.address=null runs the sweep "
            "on this machine"
        ) from error
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # What became of a worker stands in trials.csv.
    hide_driver_messages("A worker died or was killed|has been marked dead|Raylet is terminated")


def _check_cluster_answers(address: str | None) -> None:
    """Ray itself tries an address that nobody listens on for minutes, and tells each try; raises OSError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def limit_cpus(cluster: RaySettings, sweep: SweepSettings) -> RaySettings:
    """Alone on a machine max_concurrent limits the cores too: what runs of a population its scheduler chooses."""
    if cluster.address is not None or sweep.max_concurrent is None:
        return cluster
    num_cpus = min(
        cluster.num_cpus or count_cores(), sweep.max_concurrent * sweep.workers_per_trial * sweep.cpus_per_trial
    )
    return replace(cluster, num_cpus=num_cpus)


@contextlib.contextmanager
def set_ray_environment(**extra: str) -> Iterator[None]:
    """Ray's switches, set for the length of a sweep; what the user has set counts before them."""
    added = {name: value for name, value in (_DRIVER_ENVIRONMENT | extra).items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
