"""Checks that every node of a cluster can access the storage of a sweep."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from handpose.errors import UserError
from handpose.sweep.execution.nodes import list_live_nodes
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.storage.checkpoint_files import explain_unshared_folder
from handpose.sweep.storage.object_store import ObjectStore

_NODE_TIMEOUT_S = 300.0


def check_nodes(sweep: SweepSettings) -> None:
    """Check that every node of the running Ray cluster can use the sweep's store, or sees its folder.

    Raises:
        UserError: a node cannot; the message names it.
    """
    nodes = list_live_nodes()
    if len(nodes) == 1:
        return
    with contextlib.ExitStack() as stack:
        found: tuple[Callable[[Any], str], Any] = (_explain_unusable_store, sweep.storage)
        if sweep.storage is None:
            found = (explain_unshared_folder, stack.enter_context(_write_marker_file(sweep.path)))
        probe = ray.remote(num_cpus=0)(found[0])
        there = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
        answers = [probe.options(scheduling_strategy=node).remote(found[1]) for node in there]
        for node, answer in zip(nodes, answers, strict=True):
            with contextlib.suppress(RayError):  # the node was lost or hangs: the sweep continues without it
                if said := ray.get(answer, timeout=_NODE_TIMEOUT_S):
                    raise UserError(f"node {node.name} {said}")


def _explain_unusable_store(url: str) -> str:
    """Return why this node cannot use a store; empty if it can."""
    try:
        ObjectStore(url).check()
    except UserError as error:
        return f"cannot use sweep.storage: {error}; nodes take their credentials from their own environment"
    return ""


@contextlib.contextmanager
def _write_marker_file(folder: Path) -> Iterator[Path]:
    """Create a file in a sweep's folder within the block. Folders that were created for it are removed afterwards."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as file:
            yield Path(file.name)
    finally:
        with contextlib.suppress(OSError):  # another process has created files there
            for each in made:
                each.rmdir()
