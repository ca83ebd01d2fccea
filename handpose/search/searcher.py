"""The protocol of searchers: they propose trials and learn from their results."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from handpose.search.space import Params

EndState = Literal["complete", "stopped", "diverged", "failed", "infeasible"]


class TrialSnapshot(NamedTuple):
    """What the sweep's events say of a trial.

    state: of the table. params: as they were asked. values: epoch -> metric. costs: as they were measured.
    """

    number: int
    state: str
    params: Params
    values: Mapping[int, float]
    costs: Mapping[str, float] = {}


class Searcher(Protocol):
    """Proposes trials, and hears what becomes of them; every call can be repeated. See OptunaSearcher.

    `num_points`: how many trials it proposes at most; None: any number. `warm_start`: of earlier sweeps, to be told.
    """

    first_number: int

    @property
    def num_points(self) -> int | None: ...
    @property
    def constraints(self) -> Mapping[str, float]: ...
    @property
    def warm_start(self) -> Sequence[Mapping[str, Any]]: ...
    def suggest(self, number: int, /) -> Params | None: ...
    def on_segment_start(self, number: int, /) -> None: ...
    def on_trial_cost(self, number: int, costs: Mapping[str, float], /) -> None: ...
    def on_trial_result(self, number: int, epoch: int, value: float, /) -> None: ...
    def on_trial_wait(self, number: int, /) -> None: ...
    def on_trial_end(self, number: int, state: EndState, /) -> None: ...
    def restore_trials(self, snapshots: Sequence[TrialSnapshot], /) -> None: ...
    def close(self) -> None: ...
