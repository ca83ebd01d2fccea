"""Asks the autoscaler of a Ray cluster (KubeRay, `ray up`) for the nodes that a sweep could use.

An autoscaler starts nodes for what waits: a placement group that does not fit. A sweep sends only as many trials as
fit, so nothing of it ever waits. `NodeRequests` therefore keeps placement groups of its own that wait, one for each
further trial that could run. As soon as one gets its place, it is removed, and a trial takes the place. Without
requests the autoscaler takes idle nodes back. Requests contain no memory, because types of nodes need not state theirs.

`ray.autoscaler.sdk.request_resources` is not used: each call replaces the requests of all other programs on the
cluster, and what it asks for stays when the program is killed. Placement groups end with the program that made them.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from handpose.errors import UserError
from handpose.sweep.controller.slots import Slots, recount_slots
from handpose.sweep.execution.nodes import list_live_resources
from handpose.sweep.record.settings import RaySettings, SweepSettings

_MAX_REQUESTS = 100
"""Largest number of placement groups that wait; when nodes have joined, there are new ones."""
_EVERY_S = 1.0
_AFTER_PLACED_S = 5.0
"""Seconds until new requests after one got its place: as long as it takes until the new node is counted."""
_print_line = partial(print, flush=True)


class NodeRequests:
    """Requests for places for further trials, which wait in Ray until the autoscaler has started nodes.

    Args:
        slots: the resources that a trial holds.
        clock: returns monotonic seconds.
    """

    def __init__(self, slots: Slots, *, clock: Callable[[], float] = time.monotonic) -> None:
        worker = {"CPU": float(slots.cpus), "GPU": slots.gpus} if slots.gpus else {"CPU": float(slots.cpus)}
        self._bundles = [worker] * slots.num_workers
        self._waiting: list[PlacementGroup] = []
        self._clock = clock
        self._next_update = 0.0

    def update(self, num_wanted: int) -> int:
        """Let this many requests wait from now on. It has an effect at most once a second.

        Args:
            num_wanted: number of trials that could run in addition to those that have a slot.

        Returns:
            The number of requests that wait.
        """
        if self._clock() < self._next_update:
            return len(self._waiting)
        self._next_update = self._clock() + _EVERY_S
        with contextlib.suppress(RayError):  # the next call tries again
            self._replace_requests(num_wanted)
        return len(self._waiting)

    def _replace_requests(self, num_wanted: int) -> None:
        waiting: list[PlacementGroup] = []
        placed: list[PlacementGroup] = []
        for group in self._waiting:
            (waiting if placement_group_table(group).get("state") == "PENDING" else placed).append(group)
        if placed:
            self._next_update += _AFTER_PLACED_S - _EVERY_S
        num_wanted = min(max(num_wanted, 0), _MAX_REQUESTS)
        for group in [*placed, *waiting[num_wanted:]]:
            remove_placement_group(group)
        self._waiting = waiting[:num_wanted]
        self._waiting += [placement_group(self._bundles) for _ in range(num_wanted - len(self._waiting))]

    def close(self) -> None:
        """Withdraw all requests."""
        with contextlib.suppress(RayError):  # without the cluster they are gone, too
            for group in self._waiting:
                remove_placement_group(group)
        self._waiting = []


def wait_for_node(
    sweep: SweepSettings,
    cluster: RaySettings,
    *,
    list_nodes: Callable[[], Sequence[Mapping[str, float]]] = list_live_resources,
    print_line: Callable[[str], None] = _print_line,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait until a trial fits on the nodes of the cluster. Nodes for one trial are requested meanwhile.

    Args:
        sweep: settings of the sweep.
        cluster: settings of the cluster. Without `autoscale` nothing is done.
        list_nodes: lists the resources of the live nodes.
        print_line: prints a line for the user.
        sleep: waits so many seconds.
        clock: returns monotonic seconds.

    Raises:
        UserError: no node has joined in time, or it is not known whether a trial needs a GPU.
    """
    if not cluster.autoscale:
        return
    asked = sweep.gpus_per_trial
    if asked is None and not any(node.get("GPU") for node in list_nodes()):
        raise UserError(
            "ray.autoscale=true: give sweep.gpus_per_trial=1, or 0 for trials without a GPU; the nodes that have not "
            "been started yet cannot be looked at"
        )
    gpus = 1.0 if asked is None or asked == "auto" else asked
    slots = Slots(0, sweep.cpus_per_trial, gpus, sweep.workers_per_trial, process_mb=0.0)
    if recount_slots(sweep, slots, list_nodes()).num_slots:
        return
    needs = f"{sweep.cpus_per_trial} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    each = f" for each of its {sweep.workers_per_trial} workers" if sweep.workers_per_trial > 1 else ""
    print_line(f"the cluster has no node for a trial ({needs}{each}): waiting for the autoscaler to start one")
    requests, began = NodeRequests(slots, clock=clock), clock()
    try:
        while not recount_slots(sweep, slots, list_nodes()).num_slots:
            if clock() - began > cluster.node_timeout_s:
                raise UserError(
                    f"no node for a trial ({needs}{each}) has joined the cluster within "
                    f"ray.node_timeout_s={cluster.node_timeout_s:g} s; `ray status` shows what the autoscaler does, "
                    "and whether it has a type of node that is large enough"
                )
            requests.update(1)
            sleep(_EVERY_S)
    finally:
        requests.close()
