"""All that this project uses of Ray although Ray does not document it; no other file imports private parts of Ray.

Each function and name says what it is for and what happens without it. `TRIED` are the versions of Ray that the tests
ran on, which requirements.txt allows and no others; before adding one, run the whole of `.ci/run` on it.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup
from ray._private.ray_logging import stdout_deduplicator
from ray._private.state import state as ray_state

# Raised by Ray Train where the workers of a trial cannot be started: the first when one of them died, the second when
# there was no place for them in time. No fallback: a trial of several workers whose node died would count as failed by
# its own fault.
from ray.train.v2._internal.exceptions import (  # noqa: F401
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.tune.execution.class_cache import DEFAULT_ENV_VARS, ENV_VARS_TO_PROPAGATE
from ray.util.placement_group import placement_group

TRIED = ("2.60.0",)

_REQUEST_TIMEOUT_S = 5.0


def draining_node_ids() -> set[str]:
    """Ids of the nodes that Ray was told to drain, as before a spot machine is taken back; they get no more trials.

    Fallback: no node counts as draining, and its trials are retried when it is gone.
    """
    with contextlib.suppress(Exception):  # whatever another version of Ray raises
        return set(ray_state.get_draining_nodes())
    return set()


def actor_state(actor_id: str) -> tuple[str, bool]:
    """The node id of an actor and whether it is dead, as the head node knows.

    Ray's public call for it asks the dashboard, which a cluster may be without. Fallback: an empty node id, and not
    dead; a failure is then not counted against a node.
    """
    with contextlib.suppress(Exception):  # whatever another version of Ray raises
        actor = ray_state.actor_table(actor_id)
        return str(actor["Address"]["NodeID"]), actor["State"] == "DEAD"
    return "", False


def newest_worker_log(pid: int) -> Path | None:
    """The stderr of this node's worker process with this id, where Ray reports fatal signals.

    Fallback: None; the cause of a worker's death is then not known.
    """
    folder = _logs_folder()
    logs = () if folder is None else folder.glob(f"worker-*-{pid}.err")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


def raylet_log() -> Path | None:
    """What the raylet of this node wrote to stderr, as a shell does that cannot run the interpreter of a worker.

    Fallback: None; the sentence about workers that do not start then names no reason.
    """
    folder = _logs_folder()
    log = None if folder is None else folder / "raylet.err"
    return log if log is not None and log.is_file() else None


def _logs_folder() -> Path | None:
    with contextlib.suppress(Exception):  # whatever another version of Ray raises
        node: Any = ray_worker._global_node  # None where this process has started no Ray, or left it
        return Path(node.get_logs_dir_path())
    return None


def use_token_where_there_is_one() -> None:
    """Show the token of this user to a cluster that is joined by its address; Ray itself does so for `auto` alone.

    No fallback: without it a cluster that wants a token lets nobody in.
    """
    log = logging.getLogger(authentication_token_setup.__name__)
    level = log.level
    log.setLevel(logging.ERROR)  # that a token is used is a warning to Ray
    try:
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        log.setLevel(level)


def hide_driver_messages(pattern: str) -> None:
    """Keep messages of Ray that match the pattern out of the terminal.

    Ray's switch for it, RAY_DEDUP_LOGS_SKIP_REGEX, is read when Ray is imported. Fallback: they are printed.
    """
    stdout_deduplicator.skip_re = re.compile(pattern)


def keep_from_workers(names: Iterable[str]) -> None:
    """Do not hand these environment variables to Tune's workers, which would get them in their argument lists.

    Everybody on a machine can read argument lists. No fallback: without it credentials would leak.
    """
    ENV_VARS_TO_PROPAGATE.difference_update(names)


def make_worker_runtime_env() -> dict[str, Any]:
    """The runtime environment that Tune gives its actors: other actors that share their processes need the same.

    No fallback; without it workers that were started ahead are not used.
    """
    given = {name: os.environ[name] for name in ENV_VARS_TO_PROPAGATE if name in os.environ}
    return {"env_vars": {**DEFAULT_ENV_VARS, **given}}


def prestart_workers(node: Mapping[str, Any], num_workers: int, *, keep_alive_s: int) -> None:
    """Have a node start idle worker processes, as Ray does for itself; `node` is one of `ray.nodes()`.

    Raises whatever another version of Ray raises. Fallback, of the caller: the first trials start some seconds later.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    messages: Any = node_manager_pb2  # whose names are made when it is imported
    language: Any = common_pb2
    environments: Any = runtime_environment_pb2
    request = messages.PrestartWorkersRequest(
        language=language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=environments.RuntimeEnvInfo(serialized_runtime_env=_serialized(make_worker_runtime_env())),
        num_workers=num_workers,
        keep_alive_duration_secs=keep_alive_s,
    )
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_REQUEST_TIMEOUT_S)


def _serialized(environment: dict[str, Any]) -> str:
    """The job's runtime environment with an actor's own, exactly as Ray's core writes it, since it compares hashes."""
    job = dict(ray.get_runtime_context().runtime_env)
    merged = {**job, "env_vars": {**job.get("env_vars", {}), **environment["env_vars"]}}
    return json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def group_start_callback(group_name: str, on_workers_start: Callable[[], None]) -> Any:
    """A callback of Ray Train that names the placement group of its workers and calls a function in each of them.

    on_workers_start: called before torch.distributed is set up. Ray has no setting for the name. No fallback: without
    the name, the resources of a stopped trial are not freed.
    """
    import ray.train.v2._internal.execution.worker_group.worker_group as worker_groups
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class StartCallback(WorkerGroupCallback):
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            worker_groups.placement_group = partial(placement_group, name=group_name)

        def after_execution_group_start(self, execution_group: Any) -> None:
            execution_group.execute(on_workers_start)

    return StartCallback()


def without_group_cleaner(callbacks: Sequence[Any]) -> list[Any]:
    """Ray Train's default callbacks without the one that removes the placement group of a run ended from outside.

    That one asks the dashboard. Without one every trial that was stopped would keep its cores and GPUs, and a process
    that asks for ever; so there is no fallback.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]
