"""How a sweep uses the nodes of its cluster: how many trials run at a time, and the nodes that it requests."""

from collections.abc import Sequence
from dataclasses import replace

from handpose.report.terminal import SweepView
from handpose.sweep.controller.controller import SweepController
from handpose.sweep.controller.slots import (
    NodeCapacity,
    Slots,
    count_all_slots,
    count_fitting_workers,
    recount_slots,
)
from handpose.sweep.execution.autoscaling import NodeRequests
from handpose.sweep.execution.fair_share import ClusterShare
from handpose.sweep.execution.nodes import Node, NodeWatcher, list_live_resources
from handpose.sweep.record.settings import RaySettings


class ClusterUse:
    """Adapts the slots of a sweep to its cluster.

    Their number changes when nodes join or leave, when the user changes it, and with the sweep's part of a cluster that
    other sweeps use, too.

    Args:
        cluster: settings of the cluster.
        slots: the resources that a trial holds.
        state: decides what runs next.
        view: shows the changes.

    Attributes:
        nodes: watches the nodes, and adapts the slots when they change.
    """

    def __init__(self, cluster: RaySettings, slots: Slots, state: SweepController, view: SweepView) -> None:
        self._slots, self._state, self._view = slots, state, view
        self._names_by_id: dict[str, str] | None = None
        self._requests = NodeRequests(slots) if cluster.autoscale else None
        self._share: ClusterShare | None = None
        if cluster.address is not None and cluster.weight is not None:
            self._share = ClusterShare(cluster.weight)
            self._share.num_slots = count_all_slots(slots, list_live_resources())
            self._share.join(state.count_trials_to_run())
        self.nodes = NodeWatcher(self._follow_nodes)
        if self._share is not None and self._share.part.num_others:
            self.nodes.refresh(at_once=True)
            self._show_share(self._share)

    def refresh(self) -> None:
        """Follow the sweep's part of the cluster, and request nodes. Call it several times a second."""
        if self._share is not None:
            self._follow_share(self._share)
        if self._requests is not None:
            self._request_nodes(self._requests)

    def keeps_idle_workers(self) -> bool:
        """Return whether idle workers may wait for later trials: no autoscaler and no other sweep wants their place."""
        return self._requests is None and (self._share is None or not self._share.part.num_others)

    def close(self) -> None:
        """Withdraw the requests, and leave the cluster to the other sweeps."""
        if self._share is not None:
            self._share.close()
        if self._requests is not None:
            self._state.history.table.num_requested = 0
            self._requests.close()

    def _follow_nodes(self, alive: Sequence[Node]) -> None:
        state, slots = self._state, self._slots
        fitting = {node.id: node for node in alive if count_fitting_workers(slots, node.resources)}
        capacity = NodeCapacity.from_nodes(((node.name, node.resources) for node in alive), slots)
        usable = state.find_usable_nodes(capacity)
        resources = [node.resources for node in fitting.values() if node.name in usable]
        now = recount_slots(state.history.settings, slots, resources)
        if self._share is not None:
            self._share.num_slots = count_all_slots(slots, resources)
            own = self._share.part.count_slots(self._share.num_slots)
            now = replace(now, num_slots=min(now.num_slots, own))
        state.resize(now.num_slots, capacity)
        state.history.table.num_slots = max(1, now.num_slots)
        if self._names_by_id is not None:
            lost = [f"node {name} is gone" for node_id, name in self._names_by_id.items() if node_id not in fitting]
            joined = [f"node {node.name} has joined" for node in fitting.values() if node.id not in self._names_by_id]
            left = f"{now.num_slots} trials at a time" if fitting else "no node is left; the sweep waits for one"
            if lost or joined:
                self._view.show_note(f"{', '.join([*lost, *joined])}: {left}")
        self._names_by_id = {node.id: node.name for node in fitting.values()}

    def _follow_share(self, share: ClusterShare) -> None:
        before = share.part.num_others
        if not share.refresh(self._state.count_trials_to_run()):
            return
        self.nodes.notify()
        if share.part.num_others != before:
            self._show_share(share)

    def _show_share(self, share: ClusterShare) -> None:
        num, own = share.part.num_others, self._state.history.table.num_slots
        others = "another sweep uses" if num == 1 else f"{num} other sweeps use" if num else "no other sweep uses"
        self._view.show_note(f"{others} the cluster: {own} of {share.num_slots} trials at a time")

    def _request_nodes(self, requests: NodeRequests) -> None:
        table = self._state.history.table
        before = table.num_requested
        table.num_requested = requests.update(self._state.count_trials_without_slot())
        if table.num_requested and not before:
            self._view.show_note(f"nodes for {table.num_requested} more at a time are requested from the autoscaler")
        elif before and not table.num_requested:
            self._view.show_note("no more nodes are requested from the autoscaler")
