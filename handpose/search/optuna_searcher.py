"""What proposes the next configuration, and the truthful record of what became of it: an Optuna study.

What a trial reports reaches the study with its epoch, and each trial stands there in the state it deserves:

    RUNNING   a stretch of it runs
    WAITING   it waits at a rung, for a retry, or for the sweep to go on
    COMPLETE  trained to sweep.max_epochs
    PRUNED    stopped before, which is ranked by (epoch, value); or it costs more than the constraints allow
    FAIL      diverged, failed for good, or ended before it reported anything; no sampler learns from it

With a second objective the study has two directions, and a trial's values are the metric and the cost. Its front, as
Optuna and optuna-dashboard show it, is made of complete trials.

A proposal is a pure function of the sweep's seed, the trial's number and what the study holds: each one has a sampler
of its own. So no generator's state has to be saved, and a sweep that was killed proposes what it would have proposed.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseGASampler, BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from handpose.errors import UserError
from handpose.search.distributions import count_values, parse_label
from handpose.search.points import (
    FinitePoints,
    count_possible_trials,
    draw_trial,
    find_finite_points,
    order_grid_points,
    place_values,
)
from handpose.search.sampler_view import PENDING_TRIAL_ID, SamplerView, make_pending_trial
from handpose.search.searcher import EndState, TrialSnapshot
from handpose.search.space import Params, Space, count_grid_points
from handpose.search.study import (
    PARAMS_ATTRIBUTE,
    close_storage,
    compute_excess,
    create_study,
    find_study,
    get_trial_params,
    open_storage,
    parse_limits,
)
from handpose.search.warm_start import Conditions, InitialTrials, prepare_initial_trials
from handpose.values import same, written

_STUDY_STATES: Mapping[str, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}
_MAX_ENDED_TRIALS = 1000
"""Ended trials that TPE is shown at most, since it looks at all of them for each proposal: 76 ms at 10,000 trials.

Those that it takes for good are at most 25, with two objectives a tenth, and are among the best that it is shown.
"""
_MAX_LISTED_VALUES = 100_000
_MAX_DRAWS = 5
"""How often a proposal is drawn that an earlier trial has."""
_MAX_RANDOM_DRAWS = 20
"""And after that, by the random sampler, in a space whose points cannot be listed."""
_PLAN_ATTRIBUTE = "plan"
_WARM_START_ATTRIBUTE = "warm_start"
"""User attributes of the study: what is tried first and where the sweep's own trials begin; of the earlier sweeps."""


class OptunaSearcher:
    """Proposes configurations, and keeps the study of what became of them. Every call can be repeated.

    space: what is drawn. folder: of the study, which is journal.log in it unless there is a `storage`, the URL of a
    database. name: of the study. metric, mode: what is optimised. second_objective: a cost of which as little as
    possible is wanted, beside it. max_epochs: full fidelity. seed: of all that is drawn. defaults: configuration key ->
    value of the default configuration, which is tried first where it lies in the space; where the space leaves a key
    alone, it holds for all trials. fingerprint: of the data. resume: the study is there, unless the sweep was killed
    before it was whole.

    sampler: makes a sampler from a seed; without one every point of the space is tried once. first: configurations to
    try next after the default; what they leave out is the default's. warm_start: folders of earlier sweeps, and
    warm_start_points: how many of one's best to try first when their values cannot be brought in. constraints: cost ->
    upper limit, or None. repeats: trials may have the same parameters where a space has no others left, because they
    change on the way.

    Trials before `first_number` were brought in from earlier sweeps, and `warm_start`
    says of each of those what became of it. `constraints` are those with a limit. Raises UserError for a mistake in
    any of it.
    """

    def __init__(
        self,
        *,
        space: Space,
        folder: Path,
        name: str,
        metric: str,
        mode: Literal["min", "max"],
        max_epochs: int,
        seed: int,
        defaults: Mapping[str, Any],
        second_objective: str | None = None,
        fingerprint: str | None = None,
        resume: bool = False,
        sampler: Callable[..., BaseSampler] | None = None,
        storage: str | None = None,
        first: list[dict[str, Any]] | None = None,
        warm_start: list[str] | None = None,
        warm_start_points: int = 0,
        constraints: dict[str, float | None] | None = None,
        repeats: bool = False,
    ) -> None:
        self._repeats = repeats
        self.constraints = parse_limits(constraints or {})
        self._space, self._name, self._seed, self._second_objective = space, name, seed, second_objective
        self._make_sampler = _resolve_sampler(sampler, num_objectives=1 if second_objective is None else 2)
        self._check_sampler(warm_start or [])
        begins_with = partial(
            prepare_initial_trials,
            space,
            Conditions(metric, mode, max_epochs, fingerprint, defaults),
            second_objective=second_objective,
            first=first or [],
            warm_start=warm_start or [],
            num_points=warm_start_points,
            limits=self.constraints,
        )
        initial_trials = None if resume else begins_with()  # a mistake in it shows before there is any file
        self._storage = open_storage(storage, folder)
        found = find_study(self._storage, name) if resume else None
        if found is None or _PLAN_ATTRIBUTE not in self._storage.get_study_user_attrs(found):
            found = self._create_study(found, metric, mode, initial_trials or begins_with(), storage)
        self._study_id = found
        attributes = self._storage.get_study_user_attrs(found)
        self.warm_start: list[dict[str, Any]] = attributes[_WARM_START_ATTRIBUTE]
        self.first_number: int = attributes[_PLAN_ATTRIBUTE]["first_number"]
        points: list[Params] = attributes[_PLAN_ATTRIBUTE]["points"]
        self._first_points = order_grid_points(space, points, seed) if sampler is None else points
        stored = self._storage.get_all_trials(found, deepcopy=False)
        self._trial_ids = [trial._trial_id for trial in stored]  # by number
        self._imported_params = set(map(_make_params_key, stored[: self.first_number]))
        self._tried_params = set(map(_make_params_key, stored[self.first_number :]))
        self._next_number = None if resume else self.first_number

    @property
    def study(self) -> optuna.Study:
        """The study as it is now."""
        return optuna.load_study(study_name=self._name, storage=self._storage)

    @cached_property
    def num_points(self) -> int | None:
        """How many trials with different parameters there can be; None: any number, or they may repeat."""
        return count_possible_trials(self._space, is_grid=self._make_sampler is None, repeats=self._repeats)

    def suggest(self, number: int) -> Params | None:
        """The parameters of the trial with the next number, counted from `first_number`; None: a grid has no more.

        One that was asked for before a crash is given again. Raises UserError where the space fails; then nothing is
        kept, and the number is still the next.
        """
        assert number >= self.first_number
        if number < len(self._trial_ids):
            params = self._repeat_suggestion(number)
        else:
            index = number - self.first_number
            point = self._first_points[index] if index < len(self._first_points) else None
            if point is None and self._make_sampler is None:
                return None
            trial, params = self._propose(number, point)
            self._store_trial(number, trial)
        self._next_number = max(self._next_number or 0, number + 1)
        return params

    def on_segment_start(self, number: int) -> None:
        """A stretch of the trial runs."""
        self._set_state(self._get_trial(number), TrialState.RUNNING)

    def on_trial_wait(self, number: int) -> None:
        """The trial does not run, and may go on later."""
        self._set_state(self._get_trial(number), TrialState.WAITING)

    def on_trial_result(self, number: int, epoch: int, value: float) -> None:
        """The metric after an epoch. One that is not finite is not kept: such a trial fails, and teaches nothing."""
        self._store_values(self._get_trial(number), {epoch: value})

    def on_trial_cost(self, number: int, costs: Mapping[str, float]) -> None:
        """What the trial costs; kept with how far it is over each limit, as a part of the limit."""
        self._store_costs(self._get_trial(number), costs)

    def on_trial_end(self, number: int, state: EndState) -> None:
        """How the trial ended. Its value is the one that was reported last."""
        trial = self._get_trial(number)
        self._set_state(trial, *self._get_outcome(state, trial.intermediate_values, trial.user_attrs))

    def restore_trials(self, snapshots: Iterable[TrialSnapshot]) -> None:
        """Make the study agree with the sweep's events, where a crash came between the two.

        What the study lacks is added. A trial that the events do not know fails, unless it is the next to be asked for.
        """
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        known = {trial.number: trial for trial in snapshots}
        for number in sorted(known):
            if number < len(stored):
                self._update_trial(stored[number], known[number])
            else:
                self._store_trial(number, self._rebuild_trial(known[number]))
        self._next_number = max(known, default=self.first_number - 1) + 1
        self._fail_unknown(stored, {*known, self._next_number})

    def close(self) -> None:
        """Leave no trial running in the study, and close it."""
        if self._next_number is not None:  # otherwise it was never told what runs
            stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
            for trial in stored[: self._next_number]:
                if trial.state == TrialState.RUNNING:
                    self._set_state(trial, TrialState.WAITING)
            self._fail_unknown(stored, range(self._next_number))
            self._next_number = None
        close_storage(self._storage)

    # --- proposals ----------------------------------------------------------------------------------------------------

    def _propose(self, number: int, point: Params | None) -> tuple[FrozenTrial, Params]:
        """A new trial with all its draws, as it is to be stored. point: draws that are decided.

        With the same training seed, equal parameters give the same training. So a proposal that an earlier trial has is
        drawn again a few times, and after that, where the points of the space can be listed, one is taken that no trial
        has. A point that is to be tried first may repeat a trial of an earlier sweep: only own trials can win.
        """
        view = SamplerView(
            self._storage,
            self._study_id,
            make_pending_trial(number, point),
            second_objective=self._second_objective,
            constraints=self.constraints,
            completes_infeasible=self._completes_infeasible,
            max_ended=self._max_ended,
        )
        decided = [None] * self._num_draws if point is None else [point, point, *[None] * self._num_draws]
        for attempt, given in enumerate(decided):
            drawn = self._draw_trial(view, number, given, self._build_sampler(number, attempt))
            if self._make_sampler is None or not self._is_tried(drawn[1], besides_imported=given is not None):
                return drawn
        untried = self._find_untried_point(number)
        for attempt in range(len(decided), len(decided) + _MAX_RANDOM_DRAWS):
            drawn = self._draw_trial(view, number, untried, RandomSampler(seed=self._derive_seed(number, attempt)))
            if untried is not None or not self._is_tried(drawn[1], besides_imported=True):
                break
        return drawn

    def _draw_trial(
        self, view: SamplerView, number: int, point: Params | None, sampler: BaseSampler
    ) -> tuple[FrozenTrial, Params]:
        pending = make_pending_trial(number, point)
        view.set_pending_trial(pending)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study = optuna.load_study(study_name=self._name, storage=view, sampler=sampler)
            params = self._space.sample(optuna.Trial(study, PENDING_TRIAL_ID))
        if not same(params, {name: parse_label(value) for name, value in pending.params.items()}):
            pending.set_user_attr(PARAMS_ATTRIBUTE, params)
        return pending, params

    def _is_tried(self, params: Params, *, besides_imported: bool = False) -> bool:
        """Whether an earlier trial has these parameters. besides_imported: one of this sweep's own."""
        text = written(params)
        return text in self._tried_params or (text in self._imported_params and not besides_imported)

    def _find_untried_point(self, number: int) -> Params | None:
        """The draws of a point that no trial has, or at least none of this sweep; None where none can be found."""
        points = self._finite_points
        if points is None:
            return None
        seed = self._derive_seed(number)
        found = points.find_untried(self._tried_params | self._imported_params, seed=seed)
        found = found or points.find_untried(self._tried_params, seed=seed)
        return None if found is None else found.draws

    @cached_property
    def _finite_points(self) -> FinitePoints | None:
        return find_finite_points(self._space)

    def _derive_seed(self, number: int, attempt: int = 0) -> int:
        if self._seed < 0:
            raise UserError(f"sweep.seed must be at least 0, but it is {self._seed}")
        entropy = [self._seed, number, attempt] if attempt else [self._seed, number]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _build_sampler(self, number: int, attempt: int = 0) -> BaseSampler:
        seed = self._derive_seed(number, attempt)
        if self._make_sampler is None:
            return RandomSampler(seed=seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                sampler = self._make_sampler(seed=seed)
                if isinstance(sampler, QMCSampler):  # the trials are points of one sequence
                    sampler = self._make_sampler(seed=self._seed, independent_sampler=RandomSampler(seed=seed))
        except (TypeError, ValueError) as error:
            raise _make_sampler_error(error) from error
        return sampler

    def _check_sampler(self, warm_start: Sequence[str]) -> None:
        """Draw once; raises UserError for values that the sampler does not take."""
        # These two learn what is infeasible from complete trials only, and what is never trained is never complete.
        sampler = self._build_sampler(0)
        self._completes_infeasible = isinstance(sampler, (GPSampler, BaseGASampler))
        self._max_ended = _MAX_ENDED_TRIALS if isinstance(sampler, TPESampler) else None
        self._num_draws = 2 if isinstance(sampler, GPSampler) else _MAX_DRAWS  # it finds the same maximum again
        if self._make_sampler is None:
            count_grid_points(self._space)
            if warm_start:
                raise UserError(
                    "searcher=grid tries every point once, whatever is known: leave out searcher.warm_start"
                )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                num_objectives = 1 if self._second_objective is None else 2
                pending, _ = draw_trial(self._space, self._build_sampler(0), num_objectives=num_objectives)
        except TypeError as error:
            raise _make_sampler_error(error) from error
        except ValueError as error:
            if self._second_objective is None:
                raise
            raise UserError(
                f"sweep.second_objective={self._second_objective}: {type(sampler).__name__} proposes for one objective "
                "alone; give searcher=optuna, nsga2, gp, qmc or random"
            ) from error
        if isinstance(sampler, GPSampler):
            _check_list_lengths(pending.distributions)

    def _repeat_suggestion(self, number: int) -> Params:
        trial = self._get_trial(number)
        if trial.state.is_finished():
            raise RuntimeError(f"trial {number} of the study {self._name} has ended, but the sweep's events lack it")
        return get_trial_params(trial)

    # --- the record ---------------------------------------------------------------------------------------------------

    def _get_trial(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._trial_ids[number])

    def _store_trial(self, number: int, trial: FrozenTrial) -> None:
        """Store a trial under its number; numbers that were left out fail."""
        while len(self._trial_ids) < number:
            self._trial_ids.append(self._storage.create_new_trial(self._study_id, create_trial(state=TrialState.FAIL)))
        self._trial_ids.append(self._storage.create_new_trial(self._study_id, trial))
        self._tried_params.add(_make_params_key(trial))

    def _set_state(self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None = None) -> None:
        if trial.state != state and not trial.state.is_finished():
            self._storage.set_trial_state_values(trial._trial_id, state, values)

    def _store_values(self, trial: FrozenTrial, values: Mapping[int, float]) -> None:
        if not trial.state.is_finished():
            for epoch, value in _keep_finite(values).items():
                if epoch not in trial.intermediate_values:
                    self._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)

    def _store_costs(self, trial: FrozenTrial, costs: Mapping[str, float]) -> None:
        if not trial.state.is_finished():
            costs = _keep_finite(costs)
            for name, cost in costs.items():
                if name not in trial.user_attrs:
                    self._storage.set_trial_user_attr(trial._trial_id, name, cost)
            for key, part in compute_excess(costs, self.constraints).items():
                if key not in trial.system_attrs:
                    self._storage.set_trial_system_attr(trial._trial_id, key, part)

    def _update_trial(self, trial: FrozenTrial, snapshot: TrialSnapshot) -> None:
        self._store_costs(trial, snapshot.costs)
        self._store_values(trial, snapshot.values)
        self._set_state(trial, *self._get_outcome(snapshot.state, _keep_finite(snapshot.values), snapshot.costs))

    def _rebuild_trial(self, snapshot: TrialSnapshot) -> FrozenTrial:
        """A trial that the study lost, as far as the events have it."""
        draws, distributions = self._recover_draws(snapshot.params)
        values, costs = _keep_finite(snapshot.values), _keep_finite(snapshot.costs)
        state, reached = self._get_outcome(snapshot.state, values, costs)
        return create_trial(
            state=state,
            values=reached,
            params=draws,
            distributions=distributions,
            user_attrs={**costs, PARAMS_ATTRIBUTE: snapshot.params},
            system_attrs=compute_excess(costs, self.constraints),
            intermediate_values=values,
        )

    def _get_outcome(
        self, state: str, values: Mapping[int, float], costs: Mapping[str, float]
    ) -> tuple[TrialState, list[float] | None]:
        """The state and values in the study for a state of the table, what was reported and what was measured."""
        if state == "running":
            return TrialState.RUNNING, None
        if state not in _STUDY_STATES:
            return TrialState.WAITING, None
        reached = [values[max(values)]] if values else None
        if reached and self._second_objective is not None:
            cost = costs.get(self._second_objective, math.nan)
            reached = [*reached, cost] if math.isfinite(cost) else None
        if _STUDY_STATES[state] == TrialState.FAIL or (reached is None and state != "infeasible"):
            return TrialState.FAIL, None
        return _STUDY_STATES[state], reached

    def _recover_draws(self, params: Params) -> tuple[Params, dict[str, BaseDistribution]]:
        """The draws that led to these parameters, with their ranges; none where they cannot be told from them."""
        with contextlib.suppress(UserError):
            placed = place_values(self._space, params)
            if same(placed.params, params):
                return placed.draws, placed.distributions
        return {}, {}

    def _fail_unknown(self, stored: Sequence[FrozenTrial], expected_numbers: Iterable[int]) -> None:
        expected_numbers = set(expected_numbers)
        for trial in stored[self.first_number :]:
            if trial.number not in expected_numbers:
                self._set_state(trial, TrialState.FAIL)

    def _create_study(
        self, incomplete_id: int | None, metric: str, mode: str, initial_trials: InitialTrials, storage: str | None
    ) -> int:
        if incomplete_id is not None:
            self._storage.delete_study(incomplete_id)
        second = {} if self._second_objective is None else {self._second_objective: "min"}
        study_id = create_study(self._storage, self._name, {metric: mode, **second}, url=storage)
        self._storage.set_study_user_attr(study_id, _WARM_START_ATTRIBUTE, initial_trials.import_summaries)
        for trial in initial_trials.trials:
            self._storage.create_new_trial(study_id, trial)
        plan = {"first_number": len(initial_trials.trials), "points": initial_trials.points}
        self._storage.set_study_user_attr(study_id, _PLAN_ATTRIBUTE, plan)  # the last: with it the study is whole
        return study_id


def _check_list_lengths(distributions: Mapping[str, BaseDistribution]) -> None:
    """Raise UserError where GPSampler, which lists the values of each range of steps, would need much memory."""
    for name, distribution in distributions.items():
        count = count_values(distribution) or 0
        if count > _MAX_LISTED_VALUES:
            raise UserError(
                f"searcher=gp lists the {count} values of {name}, and takes at most {_MAX_LISTED_VALUES}; give "
                f"{name} larger "
                "steps or an interval, or use searcher=optuna"
            )


def _make_params_key(trial: FrozenTrial) -> str:
    """The parameters of a trial as they are compared."""
    return written(get_trial_params(trial))


def _resolve_sampler(
    sampler: Callable[..., BaseSampler] | None, *, num_objectives: int
) -> Callable[..., BaseSampler] | None:
    """TPE with `multivariate: null` decided, by Optuna's own default, but with the `group` that goes with it.

    For two objectives it looks for each parameter by itself: in a made-up sweep the front was better by that (0.96 of
    the volume that there is, and 0.93 together, after the epochs of 90 whole trials).
    """
    if not isinstance(sampler, partial) or sampler.func is not TPESampler:
        return sampler
    given = sampler.keywords
    if given.get("multivariate", True) is not None:
        return sampler
    together = num_objectives == 1
    return partial(sampler, multivariate=together, group=together and given.get("group", False))


def _make_sampler_error(error: Exception) -> UserError:
    return UserError(f"searcher.sampler: {' '.join(str(error).split())} (its values stand in configs/searcher/)")


def _keep_finite(values: Mapping[Any, float]) -> dict[Any, float]:
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}
