"""Decides whether a failure is the fault of the trial or of the node, from what else happens there and on other nodes.

On a node with a broken GPU, a full disk or a missing mount, one trial after the other fails. Since its slots are
quickly free again, such a node receives more trials than others. Without quarantine, one bad node of fifty uses up the
retries of most trials.
"""

from collections import Counter
from collections.abc import Iterable

from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.record.events import Event, NodeQuarantined, SweepOpened


def find_quarantined_nodes(events: Iterable[Event]) -> set[str]:
    """Return the nodes that the last process that ran the sweep has quarantined."""
    found: set[str] = set()
    for event in events:
        if isinstance(event, SweepOpened):
            found.clear()
        elif isinstance(event, NodeQuarantined):
            found.add(event.node)
    return found


class NodeHealth:
    """The failures on each node since its last report, and the quarantined nodes.

    An empty node name means that the node is unknown; it is ignored.

    Args:
        limit: number of different trials whose failures quarantine a node; None: no node is quarantined.

    Attributes:
        quarantined_nodes: names of the quarantined nodes.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._failures: dict[str, Counter[int]] = {}
        self._working_nodes: set[str] = set()
        self.quarantined_nodes: set[str] = set()

    def reset(self) -> None:
        """Forget everything when another process runs the sweep, since nodes may have been repaired or replaced."""
        self._failures.clear()
        self._working_nodes.clear()
        self.quarantined_nodes.clear()

    def record_report(self, node: str) -> None:
        """Record that a trial has reported from a node. Earlier failures there were not the node's fault."""
        self._failures.pop(node, None)
        if node:
            self._working_nodes.add(node)

    def record_failure(self, node: str, trial: int) -> None:
        """Record that a trial has failed on a node."""
        if node:
            self._failures.setdefault(node, Counter())[trial] += 1

    def forget_failures(self, trial: int) -> None:
        """Forget the failures of a trial that the user retries."""
        for failed in self._failures.values():
            failed.pop(trial, None)

    def list_failed_trials(self, node: str) -> list[int]:
        """Return the numbers of the trials that have failed on a node since its last report, ascending."""
        return sorted(self._failures.get(node, ()))

    def quarantine(self, node: str) -> Counter[int]:
        """Quarantine a node.

        Returns:
            Trial -> number of its failures on the node. They were not the trial's fault.
        """
        self.quarantined_nodes.add(node)
        self._working_nodes.discard(node)
        return self._failures.pop(node, Counter())

    def is_excusable(self, node: str, trial: int) -> bool:
        """Return whether a new failure of the trial may be the node's fault and does not count for now.

        The first failure of a trial on a node does not count while trials work on other nodes. A second failure there
        counts. When any trial reports from the node, all failures there count.
        """
        if node in self.quarantined_nodes:
            return True
        return (
            bool(self._limit and self._find_other_working_nodes(node))
            and not self._failures.get(node, Counter())[trial]
        )

    def count_excused_failures(self, trial: int) -> int:
        """Return how many failures of the trial do not count for now.

        One failure is excused for each node that has not reported since the failure, while other nodes work.
        """
        return sum(
            bool(self._find_other_working_nodes(node)) and trial in failed for node, failed in self._failures.items()
        )

    def should_quarantine(self, node: str, trial: int, *, capacity: NodeCapacity) -> bool:
        """Return whether a new failure of the trial, which has not been recorded yet, should quarantine the node.

        A node is not quarantined if no trial would fit on the other nodes, or if no other node works.

        Args:
            node: name of the node.
            trial: number of the trial.
            capacity: capacity of all nodes of the cluster.
        """
        if self._limit is None or not node or node in self.quarantined_nodes:
            return False
        if not self._find_other_working_nodes(node) & capacity.find_nodes_without({*self.quarantined_nodes, node}):
            return False
        return len({*self._failures.get(node, ()), trial}) >= self._limit

    def find_usable_nodes(self, capacity: NodeCapacity) -> set[str]:
        """Return the nodes that are not quarantined, or all nodes if no trial fits on those."""
        return capacity.find_nodes_without(self.quarantined_nodes) or capacity.nodes

    def find_nodes_to_avoid(self, trial: int, *, capacity: NodeCapacity) -> tuple[str, ...]:
        """Return the nodes on which the trial should not run.

        These are the quarantined nodes and those on which the trial has failed. If the trial would not fit on the other
        nodes, only the quarantined nodes are avoided, or else only those on which it has failed, or else none.
        """
        failed_on = {node for node, failed in self._failures.items() if trial in failed}
        for unwanted in (self.quarantined_nodes | failed_on, self.quarantined_nodes, failed_on):
            if capacity.find_nodes_without(unwanted):
                return tuple(sorted(unwanted & capacity.nodes))
        return ()

    def _find_other_working_nodes(self, node: str) -> set[str]:
        return self._working_nodes - {node}
