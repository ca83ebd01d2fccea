"""The view of a sweep's study that a sampler gets while it proposes a trial."""

import copy
import heapq
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from handpose.pareto import best_first
from handpose.search.distributions import round_to_distribution
from handpose.search.study import get_last_value

PENDING_TRIAL_ID = -1
"""Identifier of the trial that is being proposed, which is in no storage yet."""

_STUDY_PREFIX = "study:"
_RELATIVE_PARAMS_INFIX = ":relative_params:"


class SamplerView(BaseStorage):
    """A storage that shows a study to a sampler while it proposes one trial, the pending trial.

    Nothing is written to the underlying storage. So a proposal can be stored in one step, and a crash never leaves half
    of it. What the sampler stores for the study (QMC stores its position in the sequence) is kept in the pending trial
    too.

    A waiting trial is shown like a trial that was stopped at its last report. A waiting trial without a report is shown
    as running.

    With one objective, Optuna ranks stopped trials by epoch and value. With two it cannot: TPE of Optuna 5.0 raises if
    such trials have reports, and keeps their order if they have none. So the view removes the reports and sorts the
    stopped trials, the best first: by epoch, and within an epoch by fronts (`handpose.pareto.best_first`), as ASHA
    does. In both cases TPE ranks stopped trials after all complete ones. Samplers that use only complete trials learn
    nothing from stopped ones.

    Args:
        storage: the underlying storage.
        study_id: the identifier of the study.
        pending: the trial that is proposed. It receives the draws.
        second_objective: the user attribute with the second value of a trial, if there are two objectives.
        constraints: names of the constraints. A trial that was not measured for all of them is shown as failed.
        completes_infeasible: show a trial above a limit as complete, with the median as an uninformative value.
        max_ended: the largest number of ended trials to show: a tenth of them are the best ones, the others the newest.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        pending: FrozenTrial,
        *,
        second_objective: str | None = None,
        constraints: Collection[str] = (),
        completes_infeasible: bool = False,
        max_ended: int | None = None,
    ) -> None:
        self._storage = storage
        self._study_id = study_id
        self._pending = pending
        self._second_objective = second_objective
        self._constraints = frozenset(constraints)
        self._completes_infeasible = completes_infeasible
        self._max_ended = max_ended

    def set_pending_trial(self, pending: FrozenTrial) -> None:
        """Replace the pending trial. The previous one's position in a sequence (of QMC) remains used."""
        kept = {key: value for key, value in self._pending.system_attrs.items() if key.startswith(_STUDY_PREFIX)}
        pending.system_attrs = {**pending.system_attrs, **kept}
        self._pending = pending

    @property
    def _trials(self) -> list[FrozenTrial]:
        return [*self._visible_trials, self._pending]

    @cached_property
    def _visible_trials(self) -> list[FrozenTrial]:
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        shown = list(
            _show_trials(
                stored,
                self._constraints,
                completes_infeasible=self._completes_infeasible,
                second_objective=self._second_objective,
            )
        )
        minimizes = self._storage.get_study_directions(self._study_id)[0] == StudyDirection.MINIMIZE
        merit = _TrialRanking(1.0 if minimizes else -1.0, bool(self._constraints), self._second_objective is not None)
        if self._max_ended is not None:
            shown = _limit_trials(shown, self._max_ended, merit)
        if self._second_objective is not None:
            shown = _sort_stopped_trials(shown, merit)
        return shown

    # Methods that answer differently from the storage.

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.copy(self._pending) if trial_id == PENDING_TRIAL_ID else self._storage.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        attributes = dict(self._storage.get_study_system_attrs(study_id))
        for trial in self._trials:
            for key, value in trial.system_attrs.items():
                if key.startswith(_STUDY_PREFIX):
                    attributes[key.removeprefix(_STUDY_PREFIX)] = value
        return attributes

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._pending.system_attrs = {**self._pending.system_attrs, f"{_STUDY_PREFIX}{key}": value}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        assert trial_id == PENDING_TRIAL_ID
        if _RELATIVE_PARAMS_INFIX not in key:  # TPE's early notice to other workers, not needed here
            self._pending.system_attrs = {**self._pending.system_attrs, key: value}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        assert trial_id == PENDING_TRIAL_ID
        self._pending.user_attrs = {**self._pending.user_attrs, key: value}

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        assert trial_id == PENDING_TRIAL_ID
        value = distribution.to_external_repr(param_value_internal)
        if isinstance(distribution, (FloatDistribution, IntDistribution)):
            value = round_to_distribution(value, distribution)  # samplers compute 0.1 + 2 * 0.1
        self._pending.params = {**self._pending.params, param_name: value}
        self._pending.distributions = {**self._pending.distributions, param_name: distribution}

    # Methods that forward to the storage.

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

    # Methods that no sampler calls.

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


def make_pending_trial(number: int, point: dict[str, Any] | None) -> FrozenTrial:
    """Make a trial that is to be proposed.

    Args:
        number: the number of the trial.
        point: name -> value of the draws that are fixed.
    """
    return FrozenTrial(
        number=number,
        trial_id=PENDING_TRIAL_ID,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={"fixed_params": point} if point else {},  # as Study.enqueue_trial stores it
        intermediate_values={},
    )


def _show_trials(
    trials: Sequence[FrozenTrial],
    constraints: frozenset[str],
    *,
    completes_infeasible: bool,
    second_objective: str | None,
) -> Iterator[FrozenTrial]:
    def values(trial: FrozenTrial, value: float | None) -> list[float] | None:
        """Return all values of a trial with this value of the metric, or None if one of them is missing."""
        if second_objective is None or value is None:
            return None if value is None else [value]
        cost = trial.user_attrs.get(second_objective)
        return None if cost is None else [value, cost]

    complete = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE and trial.values]
    for trial in trials:
        state, shown = trial.state, trial.values
        if state == TrialState.WAITING:
            state = TrialState.PRUNED if trial.intermediate_values else TrialState.RUNNING
            shown = values(trial, get_last_value(trial))
        if constraints and state in (TrialState.COMPLETE, TrialState.PRUNED):
            if not constraints <= trial.constraints.keys():
                state, shown = TrialState.FAIL, None
            elif completes_infeasible and complete and _sum_excess(trial) > 0:
                state, shown = TrialState.COMPLETE, values(trial, statistics.median(complete))
        yield trial if (state, shown) == (trial.state, trial.values) else _replace_outcome(trial, state, shown)


class _TrialRanking(NamedTuple):
    """Ranking of ended trials as TPE ranks them: by excess over the limits, then by epochs, then by value.

    Attributes:
        sign: 1.0 if a smaller metric is better, else -1.0.
        has_constraints: whether the sweep has constraints.
        has_two_objectives: whether the sweep has two objectives.
    """

    sign: float
    has_constraints: bool
    has_two_objectives: bool

    def rank_trials(self, trials: Iterable[FrozenTrial], limit: int | None = None) -> list[FrozenTrial]:
        """Return the trials, the best first, or only the best `limit` of them."""
        if not self.has_two_objectives:
            number = sys.maxsize if limit is None else limit
            return heapq.nsmallest(number, trials, key=lambda trial: (*self._get_class(trial), self._get_loss(trial)))
        return list(islice(self._rank_by_fronts(trials), limit))

    def _rank_by_fronts(self, trials: Iterable[FrozenTrial]) -> Iterator[FrozenTrial]:
        classes: defaultdict[tuple[float, float], list[FrozenTrial]] = defaultdict(list)
        for trial in trials:
            classes[self._get_class(trial)].append(trial)
        for _, alike in sorted(classes.items()):
            valued = [trial for trial in alike if trial.values]
            points = [(self._get_loss(trial), trial.values[1]) for trial in valued]
            yield from (valued[index] for index in best_first(points))
            yield from (trial for trial in alike if not trial.values)

    def _get_class(self, trial: FrozenTrial) -> tuple[float, float]:
        epochs = math.inf if trial.state == TrialState.COMPLETE else max(trial.intermediate_values, default=-1)
        return _sum_excess(trial) if self.has_constraints else 0.0, -epochs

    def _get_loss(self, trial: FrozenTrial) -> float:
        return self.sign * trial.values[0] if trial.values else math.inf


def _sum_excess(trial: FrozenTrial) -> float:
    """Return how far a trial is above its limits, in total."""
    return sum(excess for excess in trial.constraints.values() if excess > 0)


def _limit_trials(trials: list[FrozenTrial], limit: int, ranking: _TrialRanking) -> list[FrozenTrial]:
    """Remove the ended trials that are neither among the best `limit // 10` nor among the newest."""
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= limit:
        return trials
    best = {trial.number for trial in ranking.rank_trials(ended, limit // 10)}
    others = [trial.number for trial in ended if trial.number not in best]
    left_out = set(others[: len(ended) - limit])
    return [trial for trial in trials if trial.number not in left_out]


def _sort_stopped_trials(trials: Sequence[FrozenTrial], ranking: _TrialRanking) -> list[FrozenTrial]:
    """Sort the stopped trials among their positions, the best first, and remove their reports."""
    stopped = iter(ranking.rank_trials(trial for trial in trials if trial.state == TrialState.PRUNED))
    return [_drop_reports(next(stopped)) if trial.state == TrialState.PRUNED else trial for trial in trials]


def _drop_reports(trial: FrozenTrial) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.intermediate_values = {}
    return changed


def _replace_outcome(trial: FrozenTrial, state: TrialState, values: list[float] | None) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.state, changed.values = state, values
    return changed
