"""Everything undocumented that this project uses of Ray; no other file imports private parts of Ray.

Each function and name says what it is for and what happens without it. `TESTED_VERSIONS` lists the versions of Ray that
the tests ran on. requirements.txt allows only these. Before you add one, run all of `.ci/run` with it.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup
from ray._private.ray_logging import stdout_deduplicator
from ray._private.state import state as ray_state

# Ray Train raises these when it cannot start the workers of a trial: the first when a worker died, the second when no
# resources were free in time. No fallback: otherwise, when a node of a trial with several workers dies, the failure
# would be blamed on the trial.
from ray.train.v2._internal.exceptions import (  # noqa: F401
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.util.placement_group import placement_group

TESTED_VERSIONS = ("2.60.0",)


def list_draining_node_ids() -> set[str]:
    """Return the ids of nodes that Ray drains, for example before a spot machine is taken back. They get no new trials.

    Fallback: no node counts as draining, and trials are retried when their node is gone.
    """
    with contextlib.suppress(Exception):  # whatever another version of Ray raises
        return set(ray_state.get_draining_nodes())
    return set()


class ActorLocation(NamedTuple):
    """Where an actor runs.

    Attributes:
        node_id: the node that it runs on, or ran on when it died; empty if Ray does not know.
        is_dead: whether the actor is dead.
    """

    node_id: str = ""
    is_dead: bool = False


def find_actor(actor_id: str) -> ActorLocation:
    """Return the location of an actor, as the head node knows it.

    Ray's public call asks the dashboard, which a cluster may not have. Fallback: an unknown location; a failure is then
    not counted against a node.
    """
    with contextlib.suppress(Exception):  # whatever another version of Ray raises
        actor = ray_state.actor_table(actor_id)
        return ActorLocation(str(actor["Address"]["NodeID"]), actor["State"] == "DEAD")
    return ActorLocation()


def end_idle_workers(tune_controller: Any) -> None:
    """End the workers that Tune keeps for later trials, so that an autoscaler or another sweep can use their nodes.

    Tune (2.60) ends them only when its searcher has finished, but until the last trial has ended it may be retried.
    Fallback: they hold their resources until the end of the sweep.
    """
    with contextlib.suppress(AttributeError):
        tune_controller._cleanup_cached_actors(force_all=True)


def find_newest_worker_log(pid: int) -> Path | None:
    """Return the stderr file of the worker process with this id on this node. Ray reports fatal signals there.

    Fallback: None; the reason for a worker's death is then unknown.
    """
    folder = _find_logs_folder()
    logs = () if folder is None else folder.glob(f"worker-*-{pid}.err")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


def find_raylet_log() -> Path | None:
    """Return the stderr file of this node's raylet. A shell that cannot run the interpreter of a worker writes there.

    Fallback: None; the message about workers that do not start then names no reason.
    """
    folder = _find_logs_folder()
    log = None if folder is None else folder / "raylet.err"
    return log if log is not None and log.is_file() else None


def _find_logs_folder() -> Path | None:
    with contextlib.suppress(Exception):  # whatever another version of Ray raises
        node: Any = ray_worker._global_node  # None if this process is not connected to Ray
        return Path(node.get_logs_dir_path())
    return None


def use_token_if_set() -> None:
    """Use this user's token when joining a cluster by its address; Ray itself does so only for `auto`.

    No fallback: without the token, a cluster that requires one refuses the connection.
    """
    log = logging.getLogger(authentication_token_setup.__name__)
    level = log.level
    log.setLevel(logging.ERROR)  # Ray logs the use of a token as a warning
    try:
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        log.setLevel(level)


def hide_driver_messages(pattern: str) -> None:
    """Do not print Ray's messages that match the pattern.

    Ray reads its own setting, RAY_DEDUP_LOGS_SKIP_REGEX, when it is imported. Fallback: the messages are printed.
    """
    stdout_deduplicator.skip_re = re.compile(pattern)


def hide_from_workers(names: Iterable[str]) -> None:
    """Do not pass these environment variables to Tune's workers, which would receive them in their argument lists.

    Everyone on a machine can read argument lists. No fallback: without this, credentials would leak.
    """
    ENV_VARS_TO_PROPAGATE.difference_update(names)


def make_group_start_callback(group_name: str, on_workers_start: Callable[[], None]) -> Any:
    """Return a Ray Train callback that names the placement group of the workers and calls a function in each worker.

    Ray has no setting for the name. No fallback: without the name, the resources of a stopped trial are not freed.

    Args:
        group_name: the name of the placement group.
        on_workers_start: called in each worker before torch.distributed is set up.
    """
    import ray.train.v2._internal.execution.worker_group.worker_group as worker_groups
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class StartCallback(WorkerGroupCallback):
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            worker_groups.placement_group = partial(placement_group, name=group_name)

        def after_execution_group_start(self, execution_group: Any) -> None:
            execution_group.execute(on_workers_start)

    return StartCallback()


def remove_group_cleaner(callbacks: Sequence[Any]) -> list[Any]:
    """Return Ray Train's default callbacks without PlacementGroupCleanerCallback.

    That callback removes the placement group of a run that was ended from outside, but it asks the dashboard. Without a
    dashboard, each stopped trial would keep its cores and GPUs, and a process that asks forever. So there is no
    fallback.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]
