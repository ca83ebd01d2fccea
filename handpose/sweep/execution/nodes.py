"""The nodes of a cluster while a sweep runs: they come, go, and may be lost all at once."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import ray

from handpose.sweep.execution.ray_internals import actor_state, draining_node_ids

_REFRESH_EVERY_S = 1.0
_HEAD_EVERY_S = 5.0
_HEAD_TIMEOUT_S = 30.0
"""Ray (2.60) ends the driver by itself, with status 1, when the head has been silent for 60 s."""


@dataclass(frozen=True)
class Node:
    """A node that is alive. name: as people know it. resources: all that it has, taken or free."""

    id: str
    name: str
    resources: Mapping[str, float]


def list_live_nodes() -> list[Node]:
    """Of the cluster that this process belongs to; without those that are to be taken away, which get nothing more."""
    alive, leaving = filter(itemgetter("Alive"), ray.nodes()), draining_node_ids()
    return [
        Node(each["NodeID"], _get_node_name(each), each["Resources"]) for each in alive if each["NodeID"] not in leaving
    ]


def list_live_resources() -> list[Mapping[str, float]]:
    """What each node that is alive has, taken or free."""
    return [node.resources for node in list_live_nodes()]


def cluster_resources() -> Mapping[str, float]:
    """Resource -> its amount on all nodes together, taken or free."""
    return dict(ray.cluster_resources())


def _get_node_name(node: Mapping[str, Any]) -> str:
    """That it was started with (`ray start --node-name`), else its host's."""
    name, host = node["NodeName"], node["NodeManagerHostname"]
    return str(host if name in ("", node["NodeManagerAddress"]) else name)


class NodeWatcher:
    """Looks at the cluster now and then.

    changed: is called with the nodes that are alive whenever there are others than before. look: at the cluster.
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
        """Tell of nodes that came or went; may be called far more often than it looks."""
        if not at_once and self._clock() < self._next_refresh:
            return
        alive = sorted(self._list_nodes(), key=lambda node: node.id)
        self._next_refresh = self._clock() + _REFRESH_EVERY_S
        self._names.update((node.id, node.name) for node in alive)
        if alive != self._alive:
            self._alive = alive
            self._on_change(alive)

    def notify(self) -> None:
        """Of the nodes that were there when it last looked, again."""
        self._on_change(self._alive)

    def get_name(self, node_id: str) -> str:
        """Of a node, also of one that is gone; empty where it is not known."""
        if node_id and node_id not in self._names:
            self.refresh(at_once=True)
        return self._names.get(node_id, "")

    def get_ids(self, names: Collection[str]) -> list[str]:
        """Of the nodes with these names that are alive."""
        return [node.id for node in self._alive if node.name in names]

    def is_alive(self, node_id: str) -> bool:
        return any(node.id == node_id for node in self._alive)


class ActorLocation(NamedTuple):
    """Of an actor. node_id: that it runs on, or ran on when it died; empty where Ray does not know."""

    node_id: str = ""
    is_dead: bool = False


def find_actor(actor_id: str) -> ActorLocation:
    """The node of an actor, as the head node knows."""
    return ActorLocation(*actor_state(actor_id))


@contextlib.contextmanager
def watch_head(on_lost: Callable[[], None]) -> Iterator[None]:
    """Call `lost`, in a thread of its own, when the head of the cluster has not answered for half a minute.

    Ray's calls wait for it meanwhile, so that nobody else can tell. A head that cannot be reached from the start, as
    behind Ray's client, is not watched.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    is_over = threading.Event()
    thread = threading.Thread(target=_poll_head, args=((host.strip("[]"), int(port)), on_lost, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _poll_head(address: tuple[str, int], on_lost: Callable[[], None], is_over: threading.Event) -> None:
    if not _can_connect(address):
        return
    heard = time.monotonic()
    while not is_over.wait(_HEAD_EVERY_S):
        if _can_connect(address):
            heard = time.monotonic()
        elif time.monotonic() - heard >= _HEAD_TIMEOUT_S:
            on_lost()
            return


def _can_connect(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_HEAD_EVERY_S).close()
    except OSError:
        return False
    return True
