"""Watches the nodes of a cluster while a sweep runs: nodes join, leave, or are lost all at once."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import ray

from handpose.sweep.execution.ray_internals import list_draining_node_ids

_REFRESH_EVERY_S = 1.0
_HEAD_EVERY_S = 2.0
_HEAD_TIMEOUT_S = 30.0
"""How long the head may be silent. After 60 s Ray (2.60) ends the driver by itself, with status 1."""
_ENDING_TIMEOUT_S = 4.0
"""The same for a sweep that was told to end. scancel tells Ray, too, and kills all processes 30 s later by default."""


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's id.
        name: the name to show to users.
        resources: all resources of the node, used or free.
    """

    id: str
    name: str
    resources: Mapping[str, float]


def list_live_nodes() -> list[Node]:
    """List the nodes of this process's cluster, without those that are being drained: they get no new trials."""
    alive, leaving = filter(itemgetter("Alive"), ray.nodes()), list_draining_node_ids()
    return [
        Node(each["NodeID"], _get_node_name(each), each["Resources"]) for each in alive if each["NodeID"] not in leaving
    ]


def list_live_resources() -> list[Mapping[str, float]]:
    """List the resources of each live node, used or free."""
    return [node.resources for node in list_live_nodes()]


def sum_resources() -> Mapping[str, float]:
    """Return resource -> amount on all nodes together, used or free."""
    return dict(ray.cluster_resources())


def _get_node_name(node: Mapping[str, Any]) -> str:
    """Return the name given by `ray start --node-name`, otherwise the host's name."""
    name, host = node["NodeName"], node["NodeManagerHostname"]
    return str(host if name in ("", node["NodeManagerAddress"]) else name)


class NodeWatcher:
    """Checks regularly which nodes the cluster has.

    Args:
        on_change: called with the live nodes whenever they have changed.
        list_nodes: lists the live nodes.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        on_change: Callable[[Sequence[Node]], None],
        *,
        list_nodes: Callable[[], Sequence[Node]] = list_live_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_change = on_change
        self._list_nodes = list_nodes
        self._clock = clock
        self._next_refresh = 0.0
        self._alive: Sequence[Node] = ()
        self._names: dict[str, str] = {}

    def refresh(self, *, at_once: bool = False) -> None:
        """Check the nodes, at most once in a certain time, and call `on_change` if they have changed.

        Args:
            at_once: check now in any case.
        """
        if not at_once and self._clock() < self._next_refresh:
            return
        alive = sorted(self._list_nodes(), key=lambda node: node.id)
        self._next_refresh = self._clock() + _REFRESH_EVERY_S
        self._names.update((node.id, node.name) for node in alive)
        if alive != self._alive:
            self._alive = alive
            self._on_change(alive)

    def notify(self) -> None:
        """Call `on_change` again with the nodes of the last check."""
        self._on_change(self._alive)

    def get_name(self, node_id: str) -> str:
        """Return the name of a node, which may be gone; empty if it is unknown."""
        if node_id and node_id not in self._names:
            self.refresh(at_once=True)
        return self._names.get(node_id, "")

    def get_ids(self, names: Collection[str]) -> list[str]:
        """Return the ids of the live nodes with these names."""
        return [node.id for node in self._alive if node.name in names]

    def is_alive(self, node_id: str) -> bool:
        return any(node.id == node_id for node in self._alive)


@contextlib.contextmanager
def watch_head(on_lost: Callable[[], None], *, is_ending: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Call `on_lost`, in its own thread, when the head of the cluster has not answered for half a minute.

    If `is_ending` returns true, because the sweep was told to end, some seconds are enough. Ray's calls block during
    that time, so no other code can notice it. A head that cannot be reached from the start, for example through Ray's
    client, is not watched.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    is_over = threading.Event()
    arguments = ((host.strip("[]"), int(port)), on_lost, is_over, is_ending)
    thread = threading.Thread(target=_poll_head, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _poll_head(
    address: tuple[str, int],
    on_lost: Callable[[], None],
    is_over: threading.Event,
    is_ending: Callable[[], bool] = lambda: False,
) -> None:
    if not _can_connect(address):
        return
    heard = time.monotonic()
    while not is_over.wait(_HEAD_EVERY_S):
        if _can_connect(address):
            heard = time.monotonic()
        elif time.monotonic() - heard >= (_ENDING_TIMEOUT_S if is_ending() else _HEAD_TIMEOUT_S):
            on_lost()
            return


def _can_connect(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_HEAD_EVERY_S).close()
    except OSError:
        return False
    return True
