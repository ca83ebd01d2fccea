"""Divides a Ray cluster between the sweeps that run on it at the same time.

Each sweep tells an actor regularly how much of the cluster it could use. The actor answers how much it may use: the
parts are proportional to the weights of the sweeps, and what one sweep cannot use is divided between the others
(weighted max-min fairness). The actor has a fixed name, so the sweeps need not know each other. It does not reserve
anything: a sweep with more trials than its part starts no further ones, and none is interrupted. Other programs on the
cluster are not counted.
"""

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_NAME, _NAMESPACE = "sweeps", "handpose_fair_share_1"
"""The number is that of the messages: versions that differ in them do not share."""
_EVERY_S = 2.0
_FORGOTTEN_AFTER_S = 60.0
"""Seconds after which a sweep that says nothing, because its process was killed, has no part any more."""
_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 30.0
_RESTART_S = 3 * _EVERY_S
"""Seconds in which an actor that was started again may not know all sweeps yet."""
_ERRORS = (RayError, ValueError, ConnectionError)
"""What Ray raises if the actor ends just now, or its client has lost the connection."""


class Part(NamedTuple):
    """The part of a cluster that a sweep may use.

    Attributes:
        fraction: between 0 and 1.
        is_rounded_up: whether the number of slots is rounded up; it is for one of the sweeps.
        num_others: number of other sweeps on the cluster.
    """

    fraction: float = 1.0
    is_rounded_up: bool = True
    num_others: int = 0

    def count_slots(self, num_slots: int) -> int:
        """Return how many of the slots of the whole cluster the sweep may use: at least one, if there are any."""
        exact = self.fraction * num_slots
        num = math.ceil(exact - 1e-6) if self.is_rounded_up else math.floor(exact + 1e-6)
        return min(max(num, 1), num_slots)


class _Request(NamedTuple):
    weight: float
    wanted: float
    at_s: float


class ShareKeeper:
    """Knows the sweeps of a cluster, and divides it between them.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Request] = {}

    def update(self, sweep: str, weight: float, wanted: float) -> Part:
        """Return the part of a sweep.

        Args:
            sweep: identifies the sweep.
            weight: its weight, above 0.
            wanted: the fraction of the cluster that it could use now.
        """
        now = self._clock()
        self._requests[sweep] = _Request(weight, wanted, now)
        self._requests = {name: each for name, each in self._requests.items() if now - each.at_s <= _FORGOTTEN_AFTER_S}
        parts = divide_fairly(
            {name: each.wanted for name, each in self._requests.items()},
            {name: each.weight for name, each in self._requests.items()},
        )
        return Part(parts[sweep], sweep == min(self._requests), len(self._requests) - 1)

    def leave(self, sweep: str) -> int:
        """Forget a sweep that has ended, and return how many are left."""
        self._requests.pop(sweep, None)
        return len(self._requests)


def divide_fairly(wanted: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Divide the whole, 1, in proportion to weights. Nobody gets more than is wanted, unless all get that.

    Args:
        wanted: name -> fraction that could be used.
        weights: name -> weight, above 0.

    Returns:
        Name -> fraction. What is left if all get what they want is divided by weight, too, for what they want next.
    """
    parts: dict[str, float] = {}
    left, open_names = 1.0, set(wanted)
    while open_names:
        per_weight = left / sum(weights[name] for name in open_names)
        content = {name for name in open_names if wanted[name] <= per_weight * weights[name]}
        if not content or content == open_names:
            parts |= {name: per_weight * weights[name] for name in open_names}
            break
        parts |= {name: wanted[name] for name in content}
        left -= sum(wanted[name] for name in content)
        open_names -= content
    return parts


class ClusterShare:
    """The part of the cluster that this sweep may use: the whole, until Ray has told it.

    Args:
        weight: weight of this sweep.
        find_keeper: returns the actor that divides the cluster.
        clock: returns monotonic seconds.

    Attributes:
        part: the newest part.
        num_slots: number of this sweep's trials that fit on the whole cluster.
    """

    def __init__(
        self,
        weight: float,
        *,
        find_keeper: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.part, self.num_slots = Part(), 0
        self._weight = weight
        self._find_keeper = find_keeper or _find_keeper
        self._clock = clock
        self._name = uuid.uuid4().hex
        self._keeper: Any = None
        self._answer: Any = None
        self._next_update = 0.0
        self._asked_at = 0.0
        self._trusted_from = 0.0

    def join(self, num_trials: int) -> None:
        """Say that the sweep begins, and wait some seconds for its part."""
        self.refresh(num_trials)
        if self._answer is not None:
            ray.wait([self._answer], timeout=_TIMEOUT_S)
        self.refresh(num_trials)

    def refresh(self, num_trials: int) -> bool:
        """Say how much could be used, and read the last answer. Does not wait for Ray; call it often.

        Args:
            num_trials: number of trials that could run now, with any number of slots.

        Returns:
            Whether the part has changed.
        """
        before, now = self.part, self._clock()
        try:
            if self._answer is not None and ray.wait([self._answer], timeout=0.0)[0]:
                answer, self._answer = self._answer, None
                part = ray.get(answer)
                if now >= self._trusted_from:
                    self.part = part
            if self._answer is not None and now - self._asked_at > _ANSWER_TIMEOUT_S:
                self._keeper, self._answer = None, None
            if self._answer is None and now >= self._next_update:
                self._next_update, self._asked_at = now + _EVERY_S, now
                self._keeper = self._keeper or self._find_keeper()
                wanted = min(1.0, num_trials / self.num_slots) if self.num_slots else 0.0
                self._answer = self._keeper.update.remote(self._name, self._weight, wanted)
        except _ERRORS:  # its node is gone: it is started again on another one
            self._keeper, self._answer, self._trusted_from = None, None, now + _RESTART_S
        return self.part != before

    def close(self) -> None:
        """Give the part to the others at once."""
        if self._keeper is None:
            return
        with contextlib.suppress(*_ERRORS):
            if not ray.get(self._keeper.leave.remote(self._name), timeout=_TIMEOUT_S):
                ray.kill(self._keeper)  # a sweep that begins just now starts it again
        self._keeper = None


def _find_keeper() -> Any:
    """Return the actor that divides the cluster. The first sweep starts it, if possible on the node of its driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"name": _NAME, "namespace": _NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    return ray.remote(num_cpus=0)(ShareKeeper).options(**options, scheduling_strategy=here).remote()
