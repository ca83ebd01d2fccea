"""The protocol of searchers, which propose trials and learn from their results."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from handpose.search.space import Params

EndState = Literal["complete", "stopped", "diverged", "failed", "infeasible"]


class TrialSnapshot(NamedTuple):
    """A trial as the events of the sweep describe it.

    Attributes:
        number: the number of the trial.
        state: its state in the table of trials.
        params: its parameters, as the searcher proposed them.
        values: epoch -> metric.
        costs: the measured costs by name.
    """

    number: int
    state: str
    params: Params
    values: Mapping[int, float]
    costs: Mapping[str, float] = {}


class Searcher(Protocol):
    """Protocol of a searcher: it proposes trials and is notified of their results. Every call can be repeated.

    `OptunaSearcher` documents the methods.

    Attributes:
        first_number: the number of the first trial that it proposes.
        num_points: the largest number of trials that it proposes; None if there is no limit.
        constraints: cost -> upper limit.
        warm_start: for each earlier sweep, a summary of what was imported, to be shown to the user.
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
