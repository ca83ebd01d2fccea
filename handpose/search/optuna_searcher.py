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
from handpose.search.distributions import from_label, num_values
from handpose.search.points import FinitePoints, draw, finite_points, grid_in_order, most_trials, place
from handpose.search.sampler_view import PENDING, SamplerView, pending_trial
from handpose.search.searcher import EndState, Known
from handpose.search.space import Params, Space, num_grid_points
from handpose.search.study import (
    PARAMS,
    close_storage,
    create_study,
    excess,
    find_study,
    limits_of,
    open_storage,
    params_of,
)
from handpose.search.warm_start import Beginning, Conditions, begin
from handpose.values import same, written

_ENDED: Mapping[str, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}
_MOST_ENDED = 1000
"""Ended trials that TPE is shown at most, since it looks at all of them for each proposal: 76 ms at 10,000 trials.

Those that it takes for good are at most 25, with two objectives a tenth, and are among the best that it is shown.
"""
_MOST_LISTED = 100_000
_MOST_DRAWS = 5
"""How often a proposal is drawn that an earlier trial has."""
_MOST_RANDOM_DRAWS = 20
"""And after that, by the random sampler, in a space whose points cannot be listed."""
_PLAN = "plan"
_WARM_START = "warm_start"
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
        self.constraints = limits_of(constraints or {})
        self._space, self._name, self._seed, self._second_objective = space, name, seed, second_objective
        self._make_sampler = _settled(sampler, num_objectives=1 if second_objective is None else 2)
        self._check_sampler(warm_start or [])
        begins_with = partial(
            begin,
            space,
            Conditions(metric, mode, max_epochs, fingerprint, defaults),
            second_objective=second_objective,
            first=first or [],
            warm_start=warm_start or [],
            num_points=warm_start_points,
            limits=self.constraints,
        )
        beginning = None if resume else begins_with()  # a mistake in it shows before there is any file
        self._storage = open_storage(storage, folder)
        found = find_study(self._storage, name) if resume else None
        if found is None or _PLAN not in self._storage.get_study_user_attrs(found):
            found = self._create(found, metric, mode, beginning or begins_with(), storage)
        self._study_id = found
        attributes = self._storage.get_study_user_attrs(found)
        self.warm_start: list[dict[str, Any]] = attributes[_WARM_START]
        self.first_number: int = attributes[_PLAN]["first_number"]
        points: list[Params] = attributes[_PLAN]["points"]
        self._planned = grid_in_order(space, points, seed) if sampler is None else points
        stored = self._storage.get_all_trials(found, deepcopy=False)
        self._ids = [trial._trial_id for trial in stored]  # by number
        self._imported = set(map(_tried_in, stored[: self.first_number]))
        self._tried = set(map(_tried_in, stored[self.first_number :]))
        self._num_known = None if resume else self.first_number

    @property
    def study(self) -> optuna.Study:
        """The study as it is now."""
        return optuna.load_study(study_name=self._name, storage=self._storage)

    @cached_property
    def num_points(self) -> int | None:
        """How many trials with different parameters there can be; None: any number, or they may repeat."""
        return most_trials(self._space, is_grid=self._make_sampler is None, repeats=self._repeats)

    def ask(self, number: int) -> Params | None:
        """The parameters of the trial with the next number, counted from `first_number`; None: a grid has no more.

        One that was asked for before a crash is given again. Raises UserError where the space fails; then nothing is
        kept, and the number is still the next.
        """
        assert number >= self.first_number
        if number < len(self._ids):
            params = self._again(number)
        else:
            index = number - self.first_number
            point = self._planned[index] if index < len(self._planned) else None
            if point is None and self._make_sampler is None:
                return None
            trial, params = self._proposal(number, point)
            self._add(number, trial)
        self._num_known = max(self._num_known or 0, number + 1)
        return params

    def began(self, number: int) -> None:
        """A stretch of the trial runs."""
        self._move(self._trial(number), TrialState.RUNNING)

    def waits(self, number: int) -> None:
        """The trial does not run, and may go on later."""
        self._move(self._trial(number), TrialState.WAITING)

    def reported(self, number: int, epoch: int, value: float) -> None:
        """The metric after an epoch. One that is not finite is not kept: such a trial fails, and teaches nothing."""
        self._report(self._trial(number), {epoch: value})

    def measured(self, number: int, costs: Mapping[str, float]) -> None:
        """What the trial costs; kept with how far it is over each limit, as a part of the limit."""
        self._measure(self._trial(number), costs)

    def ended(self, number: int, state: EndState) -> None:
        """How the trial ended. Its value is the one that was reported last."""
        trial = self._trial(number)
        self._move(trial, *self._outcome(state, trial.intermediate_values, trial.user_attrs))

    def align(self, trials: Iterable[Known]) -> None:
        """Make the study agree with the sweep's events, where a crash came between the two.

        What the study lacks is added. A trial that the events do not know fails, unless it is the next to be asked for.
        """
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        known = {trial.number: trial for trial in trials}
        for number in sorted(known):
            if number < len(stored):
                self._amend(stored[number], known[number])
            else:
                self._add(number, self._recorded(known[number]))
        self._num_known = max(known, default=self.first_number - 1) + 1
        self._fail_unknown(stored, {*known, self._num_known})

    def close(self) -> None:
        """Leave no trial running in the study, and close it."""
        if self._num_known is not None:  # otherwise it was never told what runs
            stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
            for trial in stored[: self._num_known]:
                if trial.state == TrialState.RUNNING:
                    self._move(trial, TrialState.WAITING)
            self._fail_unknown(stored, range(self._num_known))
            self._num_known = None
        close_storage(self._storage)

    # --- proposals ----------------------------------------------------------------------------------------------------

    def _proposal(self, number: int, point: Params | None) -> tuple[FrozenTrial, Params]:
        """A new trial with all its draws, as it is to be stored. point: draws that are decided.

        With the same training seed, equal parameters give the same training. So a proposal that an earlier trial has is
        drawn again a few times, and after that, where the points of the space can be listed, one is taken that no trial
        has. A point that is to be tried first may repeat a trial of an earlier sweep: only own trials can win.
        """
        view = SamplerView(
            self._storage,
            self._study_id,
            pending_trial(number, point),
            second_objective=self._second_objective,
            constraints=self.constraints,
            completes_infeasible=self._completes_infeasible,
            max_ended=self._max_ended,
        )
        decided = [None] * self._num_draws if point is None else [point, point, *[None] * self._num_draws]
        for attempt, given in enumerate(decided):
            drawn = self._drawn(view, number, given, self._sampler(number, attempt))
            if self._make_sampler is None or not self._is_tried(drawn[1], besides_imported=given is not None):
                return drawn
        untried = self._untried(number)
        for attempt in range(len(decided), len(decided) + _MOST_RANDOM_DRAWS):
            drawn = self._drawn(view, number, untried, RandomSampler(seed=self._seed_of(number, attempt)))
            if untried is not None or not self._is_tried(drawn[1], besides_imported=True):
                break
        return drawn

    def _drawn(
        self, view: SamplerView, number: int, point: Params | None, sampler: BaseSampler
    ) -> tuple[FrozenTrial, Params]:
        pending = pending_trial(number, point)
        view.redraw(pending)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study = optuna.load_study(study_name=self._name, storage=view, sampler=sampler)
            params = self._space.suggest(optuna.Trial(study, PENDING))
        if not same(params, {name: from_label(value) for name, value in pending.params.items()}):
            pending.set_user_attr(PARAMS, params)
        return pending, params

    def _is_tried(self, params: Params, *, besides_imported: bool = False) -> bool:
        """Whether an earlier trial has these parameters. besides_imported: one of this sweep's own."""
        text = written(params)
        return text in self._tried or (text in self._imported and not besides_imported)

    def _untried(self, number: int) -> Params | None:
        """The draws of a point that no trial has, or at least none of this sweep; None where none can be found."""
        points = self._finite_points
        if points is None:
            return None
        seed = self._seed_of(number)
        found = points.first_without(self._tried | self._imported, seed=seed)
        found = found or points.first_without(self._tried, seed=seed)
        return None if found is None else found.draws

    @cached_property
    def _finite_points(self) -> FinitePoints | None:
        return finite_points(self._space)

    def _seed_of(self, number: int, attempt: int = 0) -> int:
        if self._seed < 0:
            raise UserError(f"sweep.seed must be at least 0, but it is {self._seed}")
        entropy = [self._seed, number, attempt] if attempt else [self._seed, number]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _sampler(self, number: int, attempt: int = 0) -> BaseSampler:
        seed = self._seed_of(number, attempt)
        if self._make_sampler is None:
            return RandomSampler(seed=seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                sampler = self._make_sampler(seed=seed)
                if isinstance(sampler, QMCSampler):  # the trials are points of one sequence
                    sampler = self._make_sampler(seed=self._seed, independent_sampler=RandomSampler(seed=seed))
        except (TypeError, ValueError) as error:
            raise _refused(error) from error
        return sampler

    def _check_sampler(self, warm_start: Sequence[str]) -> None:
        """Draw once; raises UserError for values that the sampler does not take."""
        # These two learn what is infeasible from complete trials only, and what is never trained is never complete.
        sampler = self._sampler(0)
        self._completes_infeasible = isinstance(sampler, (GPSampler, BaseGASampler))
        self._max_ended = _MOST_ENDED if isinstance(sampler, TPESampler) else None
        self._num_draws = 2 if isinstance(sampler, GPSampler) else _MOST_DRAWS  # it finds the same maximum again
        if self._make_sampler is None:
            num_grid_points(self._space)
            if warm_start:
                raise UserError(
                    "searcher=grid tries every point once, whatever is known: leave out searcher.warm_start"
                )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                num_objectives = 1 if self._second_objective is None else 2
                pending, _ = draw(self._space, self._sampler(0), num_objectives=num_objectives)
        except TypeError as error:
            raise _refused(error) from error
        except ValueError as error:
            if self._second_objective is None:
                raise
            raise UserError(
                f"sweep.second_objective={self._second_objective}: {type(sampler).__name__} proposes for one objective "
                "alone; give searcher=optuna, nsga2, gp, qmc or random"
            ) from error
        if isinstance(sampler, GPSampler):
            _check_lists(pending.distributions)

    def _again(self, number: int) -> Params:
        trial = self._trial(number)
        if trial.state.is_finished():
            raise RuntimeError(f"trial {number} of the study {self._name} has ended, but the sweep's events lack it")
        return params_of(trial)

    # --- the record ---------------------------------------------------------------------------------------------------

    def _trial(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._ids[number])

    def _add(self, number: int, trial: FrozenTrial) -> None:
        """Store a trial under its number; numbers that were left out fail."""
        while len(self._ids) < number:
            self._ids.append(self._storage.create_new_trial(self._study_id, create_trial(state=TrialState.FAIL)))
        self._ids.append(self._storage.create_new_trial(self._study_id, trial))
        self._tried.add(_tried_in(trial))

    def _move(self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None = None) -> None:
        if trial.state != state and not trial.state.is_finished():
            self._storage.set_trial_state_values(trial._trial_id, state, values)

    def _report(self, trial: FrozenTrial, values: Mapping[int, float]) -> None:
        if not trial.state.is_finished():
            for epoch, value in _finite(values).items():
                if epoch not in trial.intermediate_values:
                    self._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)

    def _measure(self, trial: FrozenTrial, costs: Mapping[str, float]) -> None:
        if not trial.state.is_finished():
            costs = _finite(costs)
            for name, cost in costs.items():
                if name not in trial.user_attrs:
                    self._storage.set_trial_user_attr(trial._trial_id, name, cost)
            for key, part in excess(costs, self.constraints).items():
                if key not in trial.system_attrs:
                    self._storage.set_trial_system_attr(trial._trial_id, key, part)

    def _amend(self, trial: FrozenTrial, known: Known) -> None:
        self._measure(trial, known.costs)
        self._report(trial, known.values)
        self._move(trial, *self._outcome(known.state, _finite(known.values), known.costs))

    def _recorded(self, known: Known) -> FrozenTrial:
        """A trial that the study lost, as far as the events have it."""
        draws, distributions = self._draws(known.params)
        values, costs = _finite(known.values), _finite(known.costs)
        state, reached = self._outcome(known.state, values, costs)
        return create_trial(
            state=state,
            values=reached,
            params=draws,
            distributions=distributions,
            user_attrs={**costs, PARAMS: known.params},
            system_attrs=excess(costs, self.constraints),
            intermediate_values=values,
        )

    def _outcome(
        self, state: str, values: Mapping[int, float], costs: Mapping[str, float]
    ) -> tuple[TrialState, list[float] | None]:
        """The state and values in the study for a state of the table, what was reported and what was measured."""
        if state == "running":
            return TrialState.RUNNING, None
        if state not in _ENDED:
            return TrialState.WAITING, None
        reached = [values[max(values)]] if values else None
        if reached and self._second_objective is not None:
            cost = costs.get(self._second_objective, math.nan)
            reached = [*reached, cost] if math.isfinite(cost) else None
        if _ENDED[state] == TrialState.FAIL or (reached is None and state != "infeasible"):
            return TrialState.FAIL, None
        return _ENDED[state], reached

    def _draws(self, params: Params) -> tuple[Params, dict[str, BaseDistribution]]:
        """The draws that led to these parameters, with their ranges; none where they cannot be told from them."""
        with contextlib.suppress(UserError):
            placed = place(self._space, params)
            if same(placed.params, params):
                return placed.draws, placed.distributions
        return {}, {}

    def _fail_unknown(self, stored: Sequence[FrozenTrial], known: Iterable[int]) -> None:
        known = set(known)
        for trial in stored[self.first_number :]:
            if trial.number not in known:
                self._move(trial, TrialState.FAIL)

    def _create(self, half_made: int | None, metric: str, mode: str, beginning: Beginning, storage: str | None) -> int:
        if half_made is not None:
            self._storage.delete_study(half_made)
        second = {} if self._second_objective is None else {self._second_objective: "min"}
        study_id = create_study(self._storage, self._name, {metric: mode, **second}, url=storage)
        self._storage.set_study_user_attr(study_id, _WARM_START, beginning.account)
        for trial in beginning.trials:
            self._storage.create_new_trial(study_id, trial)
        plan = {"first_number": len(beginning.trials), "points": beginning.points}
        self._storage.set_study_user_attr(study_id, _PLAN, plan)  # the last: with it the study is whole
        return study_id


def _check_lists(distributions: Mapping[str, BaseDistribution]) -> None:
    """Raise UserError where GPSampler, which lists the values of each range of steps, would need much memory."""
    for name, distribution in distributions.items():
        count = num_values(distribution) or 0
        if count > _MOST_LISTED:
            raise UserError(
                f"searcher=gp lists the {count} values of {name}, and takes at most {_MOST_LISTED}; give {name} larger "
                "steps or an interval, or use searcher=optuna"
            )


def _tried_in(trial: FrozenTrial) -> str:
    """The parameters of a trial as they are compared."""
    return written(params_of(trial))


def _settled(sampler: Callable[..., BaseSampler] | None, *, num_objectives: int) -> Callable[..., BaseSampler] | None:
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


def _refused(error: Exception) -> UserError:
    return UserError(f"searcher.sampler: {' '.join(str(error).split())} (its values stand in configs/searcher/)")


def _finite(values: Mapping[Any, float]) -> dict[Any, float]:
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}
