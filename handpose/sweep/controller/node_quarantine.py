"""Whether a failure is the trial's or the node's fault, by what else happens on that node and elsewhere.

A broken GPU, a full disk or a missing mount fails one trial after the other, the faster the more often its slots are
free: left alone, one bad node of fifty spends the tries of most trials.
"""

from collections import Counter
from collections.abc import Iterable

from handpose.sweep.controller.slots import NodeCapacity
from handpose.sweep.record.events import Event, Opened, SetAside


def find_quarantined_nodes(events: Iterable[Event]) -> set[str]:
    """The nodes that the process which ran the sweep last has set aside."""
    found: set[str] = set()
    for event in events:
        if isinstance(event, Opened):
            found.clear()
        elif isinstance(event, SetAside):
            found.add(event.node)
    return found


class NodeHealth:
    """Which trials have failed on a node since its last report, and which nodes are set aside.

    limit: so many different trials; None: no node is ever set aside. A node without a name is none.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._failures: dict[str, Counter[int]] = {}
        self._working_nodes: set[str] = set()
        self.quarantined_nodes: set[str] = set()

    def reset(self) -> None:
        """Another process runs the sweep: nodes may have been mended, or exchanged."""
        self._failures.clear()
        self._working_nodes.clear()
        self.quarantined_nodes.clear()

    def record_report(self, node: str) -> None:
        """A trial reported from there: what failed there before was not the node's fault."""
        self._failures.pop(node, None)
        if node:
            self._working_nodes.add(node)

    def record_failure(self, node: str, trial: int) -> None:
        if node:
            self._failures.setdefault(node, Counter())[trial] += 1

    def quarantine(self, node: str) -> Counter[int]:
        """Nothing more is to run there; returns how often each trial has failed there, which was not its fault."""
        self.quarantined_nodes.add(node)
        self._working_nodes.discard(node)
        return self._failures.pop(node, Counter())

    def is_excusable(self, node: str, trial: int) -> bool:
        """Whether a failure of the trial there is not counted for now: its first there, while trials work elsewhere.

        A second one there is, and all are when another trial reports from there.
        """
        if node in self.quarantined_nodes:
            return True
        return (
            bool(self._limit and self._find_other_working_nodes(node))
            and not self._failures.get(node, Counter())[trial]
        )

    def count_excused_failures(self, trial: int) -> int:
        """How many failures of the trial do not count, as long as their nodes have not reported since."""
        return sum(
            bool(self._find_other_working_nodes(node)) and trial in failed for node, failed in self._failures.items()
        )

    def should_quarantine(self, node: str, trial: int, *, capacity: NodeCapacity) -> bool:
        """Whether a failure of the trial there, which has not been told yet, is one too many.

        room: of the cluster. A node without which no trial fits is never set aside.
        """
        if self._limit is None or not node or node in self.quarantined_nodes:
            return False
        if not self._find_other_working_nodes(node) & capacity.find_nodes_without({*self.quarantined_nodes, node}):
            return False
        return len({*self._failures.get(node, ()), trial}) >= self._limit

    def find_usable_nodes(self, capacity: NodeCapacity) -> set[str]:
        """The nodes that are not set aside; all, where no trial fits onto these."""
        return capacity.find_nodes_without(self.quarantined_nodes) or capacity.nodes

    def find_nodes_to_avoid(self, trial: int, *, capacity: NodeCapacity) -> tuple[str, ...]:
        """Nodes where the trial is not to run: those set aside, and where it has failed; if it fits elsewhere."""
        failed_on = {node for node, failed in self._failures.items() if trial in failed}
        for unwanted in (self.quarantined_nodes | failed_on, self.quarantined_nodes, failed_on):
            if capacity.find_nodes_without(unwanted):
                return tuple(sorted(unwanted & capacity.nodes))
        return ()

    def _find_other_working_nodes(self, node: str) -> set[str]:
        return self._working_nodes - {node}
