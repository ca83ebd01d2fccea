"""Starts Ray as a sweep needs it: without noise, with the right size, and with Ray's environment variables set."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray

from handpose.errors import UserError
from handpose.files import find_home_folder
from handpose.resources import count_cores, measure_memory
from handpose.sweep.controller.slots import compute_trial_memory
from handpose.sweep.execution.interpreter import check_interpreter, find_worker_interpreter
from handpose.sweep.execution.privacy import ensure_token, make_private_folder
from handpose.sweep.execution.ray_internals import hide_driver_messages, hide_from_workers, use_token_if_set
from handpose.sweep.record.settings import RaySettings, SweepSettings

_OBJECT_STORE_BYTES = 100 * 2**20  # it holds only reports; Ray's default is a third of the memory

_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its own table, and every error, at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files of Tune
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in trials.csv
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our handler records how each trial ended
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # costs are reported before there is a metric
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nothing is restored from Tune's snapshots
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # otherwise Tune would retry by itself
}
"""Variables that Ray reads only in the driver."""

_WORKER_ENVIRONMENT = {
    # Seconds that a stopped trial has to leave its epoch before the worker gets the next trial. Ray's default of 2 s is
    # not enough for a Lightning loop, and the next trial would fail.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUTF8": "1",  # as in the driver (handpose/utf8.py), whatever the node's locale
}

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Variables that Tune (Ray 2.60, tune/execution/class_cache.py) would pass to its workers.

The workers would get them in their argument lists, which everyone on the machine can read. Workers use the environment
of their node instead.
"""


@contextlib.contextmanager
def start_ray(cluster: RaySettings) -> Iterator[None]:
    """Run Ray, without its noise, within the block. A Ray that already runs is used and stays running.

    A Ray that is started here admits only processes that have the token, and has its own folder. Its workers have the
    usual priority, unless RAY_worker_niceness is set.

    Args:
        cluster: which cluster to use.
    """
    if ray.is_initialized():
        yield
        return
    check_interpreter(sys.executable)
    hide_from_workers(_CREDENTIALS)
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {"address": cluster.address}
        if cluster.address is None:
            num_cpus = cluster.num_cpus or count_cores()
            settings = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
            settings["object_store_memory"] = _OBJECT_STORE_BYTES
            # Ray by itself reads the CPU quota and the memory limit of the topmost cgroup only, and no CPU affinity.
            settings["_memory"] = compute_trial_memory(measure_memory())
            settings["_temp_dir"] = str(stack.enter_context(make_private_folder()))
            ensure_token(os.environ, home=find_home_folder())
            # Ray's default of 15 leaves a worker a thirtieth of a core beside other programs that compute.
            stack.enter_context(set_ray_environment(RAY_worker_niceness="0"))
        _init_ray(cluster, settings)
        try:
            yield
        finally:
            ray.shutdown()


def _init_ray(cluster: RaySettings, settings: dict[str, Any]) -> None:
    runtime_env: dict[str, Any] = {"env_vars": dict(_WORKER_ENVIRONMENT)}  # a copy, since Ray changes it
    if not (cluster.address or "").startswith("ray://"):  # workers of Ray's client run elsewhere
        runtime_env |= find_worker_interpreter(sys.executable)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_cluster_answers(cluster.address)
        if cluster.address is not None:  # Ray does this only for `auto`
            use_token_if_set()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        if cluster.address is None:
            raise
        raise UserError(
            f"ray.address={cluster.address}: no Ray cluster answers there, or it does not accept this token "
            f"(~/.ray/auth_token, "
            "RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN); `ray start --head` starts a cluster; ray.address=null runs "
            "the sweep on this machine"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set one that ends the process at once, and leaves it there
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # trials.csv says what happened to a worker.
    hide_driver_messages("A worker died or was killed|has been marked dead|Raylet is terminated")


def _check_cluster_answers(address: str | None) -> None:
    """Raise OSError if nobody listens at the address: Ray would try for minutes and print each attempt."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def limit_cpus(cluster: RaySettings, sweep: SweepSettings) -> RaySettings:
    """Limit Ray's cores to those that `max_concurrent` trials need, if Ray is started on this machine."""
    if cluster.address is not None or sweep.max_concurrent is None:
        return cluster
    num_cpus = min(
        cluster.num_cpus or count_cores(), sweep.max_concurrent * sweep.workers_per_trial * sweep.cpus_per_trial
    )
    return replace(cluster, num_cpus=num_cpus)


@contextlib.contextmanager
def set_ray_environment(**extra: str) -> Iterator[None]:
    """Set Ray's environment variables within the block. Variables that the user has set take precedence."""
    added = {name: value for name, value in (_DRIVER_ENVIRONMENT | extra).items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
