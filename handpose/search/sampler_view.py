"""The trials that a sampler sees while it proposes a new one, and the storage that shows them."""

import copy
import heapq
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.pareto import rank_points
from handpose.search.distributions import round_to_distribution
from handpose.search.space import Params, Space
from handpose.search.study import get_last_value

_PENDING_TRIAL_ID = -1
"""Identifier of the trial that is being proposed, which is in no other storage yet."""

_STUDY_NAME = "view"
_STUDY_PREFIX = "study:"
_RELATIVE_PARAMS_INFIX = ":relative_params:"


class SamplerView(InMemoryStorage):
    """A storage that shows trials to a sampler while it proposes a new one, the pending trial.

    The pending trial is in no other storage. So a proposal can be stored in one step, and a crash never leaves half of
    it. What the sampler stores for the study (QMC stores its position in the sequence) is kept in the pending trial
    too.

    Args:
        directions: the directions of the study.
        list_trials: returns the trials to show, as `show_trials` does. Called at most once, when a sampler asks.
    """

    def __init__(
        self, directions: Sequence[StudyDirection], list_trials: Callable[[], list[FrozenTrial]] = lambda: []
    ) -> None:
        super().__init__()
        self.create_new_study(directions, _STUDY_NAME)
        self._list_trials = list_trials
        self._pending: FrozenTrial | None = None

    def draw(
        self, space: Space, sampler: BaseSampler, *, number: int = 0, point: Mapping[str, Any] | None = None
    ) -> tuple[FrozenTrial, Params]:
        """Draw a trial.

        The position in a sequence (of QMC) that an earlier draw has used remains used.

        Args:
            space: the search space.
            sampler: the sampler to draw with.
            number: the number of the trial.
            point: name -> value of the draws that are fixed.

        Returns:
            The trial, which has all its draws, and its parameters.
        """
        before = {} if self._pending is None else self._pending.system_attrs
        kept = {key: value for key, value in before.items() if key.startswith(_STUDY_PREFIX)}
        fixed = {"fixed_params": point} if point else {}  # as Study.enqueue_trial stores it
        self._pending = create_trial(state=TrialState.RUNNING, system_attrs={**fixed, **kept})
        self._pending.number, self._pending._trial_id = number, _PENDING_TRIAL_ID
        study = optuna.Study(_STUDY_NAME, self, sampler=sampler)
        return self._pending, space.sample(optuna.Trial(study, _PENDING_TRIAL_ID))

    def count_visible_trials(self, states: Container[TrialState]) -> int:
        """Count the trials in these states that a sampler sees besides the pending one."""
        return sum(trial.state in states for trial in self.visible_trials)

    @cached_property
    def visible_trials(self) -> list[FrozenTrial]:
        """The trials that a sampler sees besides the pending one."""
        return self._list_trials()

    @property
    def _trials(self) -> list[FrozenTrial]:
        return [*self.visible_trials, *([] if self._pending is None else [self._pending])]

    def _get_pending(self, trial_id: int) -> FrozenTrial:
        assert trial_id == _PENDING_TRIAL_ID
        assert self._pending is not None
        return self._pending

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.copy(self._get_pending(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {
            key.removeprefix(_STUDY_PREFIX): value
            for trial in self._trials
            for key, value in trial.system_attrs.items()
            if key.startswith(_STUDY_PREFIX)
        }

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.set_trial_system_attr(_PENDING_TRIAL_ID, f"{_STUDY_PREFIX}{key}", value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        pending = self._get_pending(trial_id)
        if _RELATIVE_PARAMS_INFIX not in key:  # TPE's early notice to other workers, not needed here
            pending.system_attrs = {**pending.system_attrs, key: value}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        pending = self._get_pending(trial_id)
        pending.user_attrs = {**pending.user_attrs, key: value}

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        pending = self._get_pending(trial_id)
        value = distribution.to_external_repr(param_value_internal)
        if isinstance(distribution, (FloatDistribution, IntDistribution)):
            value = round_to_distribution(value, distribution)  # samplers compute 0.1 + 2 * 0.1
        pending.params = {**pending.params, param_name: value}
        pending.distributions = {**pending.distributions, param_name: distribution}


def show_trials(
    trials: Sequence[FrozenTrial],
    direction: StudyDirection,
    *,
    second_objective: str | None = None,
    constraints: Collection[str] = (),
    completes_infeasible: bool = False,
    max_ended: int | None = None,
) -> list[FrozenTrial]:
    """Return trials of a sweep's study as a sampler should see them.

    A waiting trial is shown like a trial that was stopped at its last report. A waiting trial without a report is shown
    as running. A trial without draws, such as one that lies outside a later search space of the sweep, is shown as
    failed: a sampler could not tell where its value belongs, and some would draw each parameter by itself.

    With one objective, Optuna ranks stopped trials by epoch and value. With two it cannot: TPE of Optuna 5.0 raises if
    such trials have reports, and keeps their order if they have none. So the reports are removed, and the stopped
    trials are sorted, the best first: by epoch, and within an epoch by fronts (`handpose.pareto.rank_points`), as ASHA
    does. In both cases TPE ranks stopped trials after all complete ones. Samplers that use only complete trials learn
    nothing from stopped ones.

    Args:
        trials: the trials of the study, by number.
        direction: the better direction of the metric.
        second_objective: the user attribute with the second value of a trial, if there are two objectives.
        constraints: names of the constraints. A trial that was not measured for all of them is shown as failed.
        completes_infeasible: show a trial above a limit as complete, with the median as an uninformative value.
        max_ended: the largest number of ended trials to show: a tenth of them are the best ones, the others the newest.
    """
    has_two_objectives = second_objective is not None
    sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
    ranking = _TrialRanking(sign, bool(constraints), has_two_objectives)
    shown = list(_show_outcomes(trials, frozenset(constraints), completes_infeasible, second_objective))
    if max_ended is not None:
        shown = _limit_trials(shown, max_ended, ranking)
    return _sort_stopped_trials(shown, ranking) if has_two_objectives else shown


def rank_trials(
    trials: Sequence[FrozenTrial],
    direction: StudyDirection,
    *,
    second_objective: str | None = None,
    constraints: Collection[str] = (),
) -> list[FrozenTrial]:
    """Return trials, the best first and failed ones last, as TPE ranks them.

    Args:
        trials: trials as `show_trials` returns them, without running ones.
        direction: the better direction of the metric.
        second_objective: the second objective, if there are two.
        constraints: names of the constraints.
    """
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    others = [trial for trial in trials if trial.state != TrialState.FAIL]
    sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
    return [*_TrialRanking(sign, bool(constraints), second_objective is not None).rank_trials(others), *failed]


def _show_outcomes(
    trials: Sequence[FrozenTrial],
    constraints: frozenset[str],
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
        if not trial.params:
            state, shown = TrialState.FAIL, None
        elif constraints and state in (TrialState.COMPLETE, TrialState.PRUNED):
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
            yield from (valued[index] for index in rank_points(points))
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
