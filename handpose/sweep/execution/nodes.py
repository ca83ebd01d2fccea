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

_LOOK_EVERY_S = 1.0
_HEAD_EVERY_S = 5.0
_HEAD_PATIENCE_S = 30.0
"""Ray (2.60) ends the driver by itself, with status 1, when the head has been silent for 60 s."""


@dataclass(frozen=True)
class Node:
    """A node that is alive. name: as people know it. resources: all that it has, taken or free."""

    id: str
    name: str
    resources: Mapping[str, float]


def live_nodes() -> list[Node]:
    """Of the cluster that this process belongs to; without those that are to be taken away, which get nothing more."""
    alive, leaving = filter(itemgetter("Alive"), ray.nodes()), draining_node_ids()
    return [Node(each["NodeID"], _name(each), each["Resources"]) for each in alive if each["NodeID"] not in leaving]


def live_resources() -> list[Mapping[str, float]]:
    """What each node that is alive has, taken or free."""
    return [node.resources for node in live_nodes()]


def cluster_resources() -> Mapping[str, float]:
    """Resource -> its amount on all nodes together, taken or free."""
    return dict(ray.cluster_resources())


def _name(node: Mapping[str, Any]) -> str:
    """That it was started with (`ray start --node-name`), else its host's."""
    name, host = node["NodeName"], node["NodeManagerHostname"]
    return str(host if name in ("", node["NodeManagerAddress"]) else name)


class Nodes:
    """Looks at the cluster now and then.

    changed: is called with the nodes that are alive whenever there are others than before. look: at the cluster.
    """

    def __init__(
        self,
        changed: Callable[[Sequence[Node]], None],
        *,
        look: Callable[[], Sequence[Node]] = live_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed = changed
        self._look = look
        self._clock = clock
        self._next_look = 0.0
        self._alive: Sequence[Node] = ()
        self._names: dict[str, str] = {}

    def refresh(self, *, at_once: bool = False) -> None:
        """Tell of nodes that came or went; may be called far more often than it looks."""
        if not at_once and self._clock() < self._next_look:
            return
        alive = sorted(self._look(), key=lambda node: node.id)
        self._next_look = self._clock() + _LOOK_EVERY_S
        self._names.update((node.id, node.name) for node in alive)
        if alive != self._alive:
            self._alive = alive
            self._changed(alive)

    def tell(self) -> None:
        """Of the nodes that were there when it last looked, again."""
        self._changed(self._alive)

    def name(self, node_id: str) -> str:
        """Of a node, also of one that is gone; empty where it is not known."""
        if node_id and node_id not in self._names:
            self.refresh(at_once=True)
        return self._names.get(node_id, "")

    def ids(self, names: Collection[str]) -> list[str]:
        """Of the nodes with these names that are alive."""
        return [node.id for node in self._alive if node.name in names]

    def is_alive(self, node_id: str) -> bool:
        return any(node.id == node_id for node in self._alive)


class Whereabouts(NamedTuple):
    """Of an actor. node_id: that it runs on, or ran on when it died; empty where Ray does not know."""

    node_id: str = ""
    is_dead: bool = False


def whereabouts(actor_id: str) -> Whereabouts:
    """The node of an actor, as the head node knows."""
    return Whereabouts(*actor_state(actor_id))


@contextlib.contextmanager
def watched_head(lost: Callable[[], None]) -> Iterator[None]:
    """Call `lost`, in a thread of its own, when the head of the cluster has not answered for half a minute.

    Ray's calls wait for it meanwhile, so that nobody else can tell. A head that cannot be reached from the start, as
    behind Ray's client, is not watched.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    is_over = threading.Event()
    thread = threading.Thread(target=_watch, args=((host.strip("[]"), int(port)), lost, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _watch(address: tuple[str, int], lost: Callable[[], None], is_over: threading.Event) -> None:
    if not _answers(address):
        return
    heard = time.monotonic()
    while not is_over.wait(_HEAD_EVERY_S):
        if _answers(address):
            heard = time.monotonic()
        elif time.monotonic() - heard >= _HEAD_PATIENCE_S:
            lost()
            return


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_HEAD_EVERY_S).close()
    except OSError:
        return False
    return True
