"""What a sampler is shown of a sweep's study while it proposes a trial."""

import copy
import heapq
import math
import statistics
from collections.abc import Collection, Container, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from handpose.sweep.study import last_value

PENDING = -1
"""Identifier of the trial that is being proposed, which no storage has yet."""

_OF_STUDY = "study:"
_SHARED = ":relative_params:"


class SamplerView(BaseStorage):
    """A study as a sampler sees it while it proposes one trial, the pending one; nothing is written to the storage.

    So a proposal is written with all it consists of at once, and there are no halves after a crash. What the sampler
    keeps for the study (QMC its place in the sequence) goes with the trial too.

    pending: takes what is drawn. A trial that waits counts with the values it has reported, like one that was stopped
    there; before it has any, it counts as running. constraints: names; of a trial that has not been measured against
    all of them nothing is learnt. completes_infeasible: one that is over a limit appears complete, with a value that
    says nothing, the median. max_ended: so many ended trials are shown at most, a tenth of them the best ones, the
    others the newest.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        pending: FrozenTrial,
        *,
        constraints: Collection[str] = (),
        completes_infeasible: bool = False,
        max_ended: int | None = None,
    ) -> None:
        self._storage = storage
        self._study_id = study_id
        self._pending = pending
        self._constraints = frozenset(constraints)
        self._completes_infeasible = completes_infeasible
        self._max_ended = max_ended

    @cached_property
    def _trials(self) -> list[FrozenTrial]:
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        shown = list(_shown(stored, self._constraints, completes_infeasible=self._completes_infeasible))
        if self._max_ended is not None:
            minimizes = self._storage.get_study_directions(self._study_id)[0] == StudyDirection.MINIMIZE
            limited = bool(self._constraints)
            shown = _bounded(shown, self._max_ended, sign=1.0 if minimizes else -1.0, limited=limited)
        return [*shown, self._pending]

    # What it answers differently from the storage.

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.copy(self._pending) if trial_id == PENDING else self._storage.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        attributes = dict(self._storage.get_study_system_attrs(study_id))
        for trial in self._trials:
            for key, value in trial.system_attrs.items():
                if key.startswith(_OF_STUDY):
                    attributes[key.removeprefix(_OF_STUDY)] = value
        return attributes

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._pending.system_attrs = {**self._pending.system_attrs, f"{_OF_STUDY}{key}": value}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        assert trial_id == PENDING
        if _SHARED not in key:  # drawn in advance, for others to see; here the trial shows itself whole
            self._pending.system_attrs = {**self._pending.system_attrs, key: value}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        assert trial_id == PENDING
        self._pending.user_attrs = {**self._pending.user_attrs, key: value}

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        assert trial_id == PENDING
        value = distribution.to_external_repr(param_value_internal)
        self._pending.params = {**self._pending.params, param_name: value}
        self._pending.distributions = {**self._pending.distributions, param_name: distribution}

    # What it passes on.

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._storage.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(study_id)

    def get_all_studies(self) -> list[Any]:
        return self._storage.get_all_studies()

    # What no sampler does.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        raise NotImplementedError

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        raise NotImplementedError

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        raise NotImplementedError

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        raise NotImplementedError

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        raise NotImplementedError


def pending_trial(number: int, point: dict[str, Any] | None) -> FrozenTrial:
    """A trial that is to be proposed. point: draws by name that are decided already."""
    return FrozenTrial(
        number=number,
        trial_id=PENDING,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={"fixed_params": point} if point else {},  # as Study.enqueue_trial has it
        intermediate_values={},
    )


def _shown(
    trials: Sequence[FrozenTrial], constraints: frozenset[str], *, completes_infeasible: bool
) -> Iterator[FrozenTrial]:
    values = [trial.value for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    for trial in trials:
        state, value = trial.state, trial.value
        if state == TrialState.WAITING:
            state = TrialState.PRUNED if trial.intermediate_values else TrialState.RUNNING
            value = last_value(trial)
        if constraints and state in (TrialState.COMPLETE, TrialState.PRUNED):
            if not constraints <= trial.constraints.keys():
                state, value = TrialState.FAIL, None
            elif completes_infeasible and values and any(excess > 0 for excess in trial.constraints.values()):
                state, value = TrialState.COMPLETE, statistics.median(values)
        yield trial if (state, value) == (trial.state, trial.value) else _with(trial, state, value)


def _bounded(trials: list[FrozenTrial], limit: int, *, sign: float, limited: bool) -> list[FrozenTrial]:
    """Without the ended trials that are neither among the best nor among the newest.

    sign: 1.0 where less is better. limited: whether there are constraints.
    """
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= limit:
        return trials

    def rank(trial: FrozenTrial) -> tuple[float, float, float]:
        """As TPE ranks: what is allowed before what is not, then what was trained further, then the better."""
        over = sum(excess for excess in trial.constraints.values() if excess > 0) if limited else 0.0
        epochs = math.inf if trial.state == TrialState.COMPLETE else max(trial.intermediate_values, default=-1)
        return over, -epochs, sign * trial.values[0] if trial.values else math.inf

    best = {trial.number for trial in heapq.nsmallest(limit // 10, ended, key=rank)}
    others = [trial.number for trial in ended if trial.number not in best]
    left_out = set(others[: len(ended) - limit])
    return [trial for trial in trials if trial.number not in left_out]


def _with(trial: FrozenTrial, state: TrialState, value: float | None) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.state, changed.values = state, None if value is None else [value]
    return changed
