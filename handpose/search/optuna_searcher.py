"""The searcher that proposes configurations with an Optuna sampler and records every trial in an Optuna study.

The study stores each reported value with its epoch. The state of a trial in the study means:

    RUNNING   a segment of the trial is running
    WAITING   the trial waits at a rung, for a retry, or until the sweep is resumed
    COMPLETE  trained to sweep.max_epochs
    PRUNED    stopped early and ranked by (epoch, value); or its cost is above a constraint
    FAIL      diverged, failed for good, or ended before it reported anything; samplers do not learn from it

With a second objective the study has two directions, and the values of a trial are the metric and the cost. Optuna and
optuna-dashboard build the Pareto front from complete trials only.

A proposal is a pure function of the sweep's seed, the trial's number and the content of the study, because each
proposal gets a new sampler. So no generator state has to be saved, and a killed sweep, once resumed, proposes what it
would have proposed without the interruption.
"""

import contextlib
import inspect
import math
import random
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

from handpose.errors import UserError, join_lines
from handpose.plain_values import is_same, to_json_text
from handpose.search.candidates import CandidatePool
from handpose.search.curve_sampler import CurveSampler
from handpose.search.distributions import count_values, parse_label
from handpose.search.points import (
    FinitePoints,
    SpacePlacement,
    count_possible_trials,
    draw_trial,
    find_finite_points,
    find_most_probable_point,
    has_different_value,
    order_grid_points,
    place_added_point,
    place_configuration,
    place_values,
)
from handpose.search.prior_sampler import (
    PriorSampler,
    compute_prior_probability,
    limit_prior_probability,
    sum_log_densities,
)
from handpose.search.sampler_view import SamplerView, rank_trials, show_trials
from handpose.search.searcher import Searcher, TrialSnapshot
from handpose.search.space import Params, Space, count_grid_points
from handpose.search.study import (
    ORIGIN_ATTRIBUTE,
    PARAMS_ATTRIBUTE,
    PLACED_ATTRIBUTE,
    PLAN_ATTRIBUTE,
    RAISED_EPOCHS_ATTRIBUTE,
    SPACE_ATTRIBUTE,
    STUDY_ID_ATTRIBUTE,
    SWEEP_ATTRIBUTE,
    close_storage,
    compute_excess,
    create_study,
    find_study,
    get_placed_params,
    get_trial_params,
    keep_constraints,
    make_study_name,
    open_storage,
    parse_limits,
)
from handpose.search.warm_start import Conditions, InitialTrials, prepare_initial_trials

_STUDY_STATES: Mapping[str, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}
_MAX_ENDED_TRIALS = 1000
"""The largest number of ended trials shown to TPE and CurveSampler, which read all of them for each proposal.

At 10,000 trials that would take 76 ms and 700 ms. TPE counts at most 25 trials as good (with two objectives, a tenth of
them). These are among the best trials shown. CurveSampler's model has fewer trials anyway.
"""
_MAX_LISTED_VALUES = 100_000
_MAX_DRAWS = 5
"""The largest number of draws from the sampler for one proposal, if each draw repeats an earlier trial."""
_MAX_RANDOM_DRAWS = 20
"""The largest number of further draws from the random sampler, in a space whose points cannot be listed."""
_PRIOR_PROBABILITY = 0.2
_NUM_PRIOR_DRAWS = 2
"""The number of draws from the prior for one proposal, before the sampler is asked."""
_ADDED_ORIGIN = "added by the user"
_WARM_START_ATTRIBUTE = "warm_start"
"""User attribute of the study: a summary of the import from each earlier sweep."""


class OptunaSearcher(Searcher):
    """Searcher that proposes configurations with an Optuna sampler and keeps the study. Every call can be repeated.

    Args:
        space: the search space to draw from.
        folder: the folder of the study, whose file there is journal.log. Not used when `storage` is given.
        name: the name of the study.
        metric: the metric to optimise.
        mode: `min` or `max`, the better direction of the metric.
        max_epochs: the number of epochs of a complete trial.
        folds: the number of folds that a complete trial is trained with.
        seed: the seed of everything that is drawn.
        defaults: configuration key -> value of the default configuration. It is tried first if it lies in the space.
            Keys that the space does not search have this value in every trial.
        second_objective: a cost to minimise as well.
        fingerprint: the fingerprint of the data set.
        resume: the study exists already. If the sweep was killed before the study was complete, it is made again.
        sampler: makes a sampler from a seed. Without it every point of the space is tried once.
        storage: the URL of a database for the study.
        points_to_evaluate: configurations to try right after the default one. Keys that they leave out have their
            default values.
        warm_start: folders of earlier sweeps.
        warm_start_points: how many of the best configurations of each earlier sweep to try first, chosen among the
            trials whose values are not comparable and so cannot be imported.
        constraints: cost -> upper limit, or None for no limit.
        repeats: a finite space does not limit the number of trials, because parameters change during training.
        prior_probability: the probability that a proposal is drawn from the prior of the search space before there are
            results. It rises if the best ones are where the prior says, falls if they are not, and falls with their
            number. 0 ignores the prior. None: 0.2.

    Attributes:
        first_number: the number of the first trial of this sweep. Lower numbers are trials of earlier sweeps.
        warm_start: for each earlier sweep, a summary of what was imported.
        constraints: the constraints that have a limit.

    Raises:
        UserError: an argument is invalid.
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
        points_to_evaluate: list[dict[str, Any]] | None = None,
        warm_start: list[str] | None = None,
        warm_start_points: int = 0,
        constraints: dict[str, float | None] | None = None,
        repeats: bool = False,
        prior_probability: float | None = None,
        folds: int = 1,
    ) -> None:
        self._repeats, self._defaults = repeats, defaults
        self._epoch_seconds: dict[int, float] = {}
        self._added_numbers: set[int] = set()
        self._given_prior_probability = _parse_prior_probability(prior_probability)
        self._prior_probability = self._given_prior_probability if space.priors else 0.0
        self.constraints = parse_limits(constraints or {})
        self._space, self._name, self._seed, self._second_objective = space, name, seed, second_objective
        self._sweep_name, self._max_epochs, self._folds = name, max_epochs, folds
        self._raised_epochs: int | None = None
        self._space_number = 1
        self._objectives = {metric: mode} | ({} if second_objective is None else {second_objective: "min"})
        self._resolved_sampler = _resolve_sampler(sampler, space, num_objectives=len(self._objectives))
        self._make_sampler = self._bind_sampler(space)
        sampler_kind = self._check_sampler(space, has_warm_start=bool(warm_start))
        # These two learn infeasibility from complete trials only, and a trial that is never trained is never complete.
        self._completes_infeasible = issubclass(sampler_kind, (GPSampler, BaseGASampler))
        self._max_ended = _MAX_ENDED_TRIALS if issubclass(sampler_kind, (TPESampler, CurveSampler)) else None
        self._num_draws = 2 if issubclass(sampler_kind, GPSampler) else _MAX_DRAWS  # it finds the same maximum again
        prepare_trials = partial(
            prepare_initial_trials,
            space,
            Conditions(metric, mode, max_epochs, fingerprint, defaults, folds),
            second_objective=second_objective,
            first=points_to_evaluate or [],
            warm_start=warm_start or [],
            num_points=warm_start_points,
            limits=self.constraints,
            tries_prior=self._prior_probability > 0,
        )
        initial_trials = None if resume else prepare_trials()  # before a file exists: it reports mistakes
        self._storage = open_storage(storage, folder)
        found = find_study(self._storage, name) if resume else None
        if found is None or PLAN_ATTRIBUTE not in self._storage.get_study_user_attrs(found):
            found = self._create_study(found, initial_trials or prepare_trials(), storage)
        self._study_id = found
        self._read_study()
        self._next_number = None if resume else self.first_number

    def _bind_sampler(self, space: Space) -> Callable[..., BaseSampler] | None:
        """Return what makes a sampler, with what it needs to know of the search; None: a grid."""
        if self._resolved_sampler is None:
            return None
        search = {"pool": CandidatePool(space), "max_epochs": self._max_epochs, "epoch_seconds": self._epoch_seconds}
        return _bind_search(self._resolved_sampler, **search, folds=self._folds)

    def _read_study(self) -> None:
        """Read the plan of the study, and the parameters of its trials."""
        attributes = self._storage.get_study_user_attrs(self._study_id)
        self.warm_start: list[dict[str, Any]] = attributes[_WARM_START_ATTRIBUTE]
        plan = attributes[PLAN_ATTRIBUTE]
        self.first_number: int = plan["first_number"]
        self._start: int = plan.get("start", self.first_number)
        points: list[Params] = plan["points"]
        self._first_points = (
            order_grid_points(self._space, points, self._seed) if self._resolved_sampler is None else points
        )
        self._origins: list[str] = plan.get("origins", [])
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        self._trial_ids = [trial._trial_id for trial in stored]  # by number
        self._imported_params = set(map(_make_params_key, stored[: self.first_number]))
        self._tried_params = set(map(_make_params_key, stored[self.first_number :]))
        before = stored[self.first_number : self._start]
        self._tried_before = {_make_params_key(trial) for trial in before if trial.params}

    @property
    def study(self) -> optuna.Study:
        """The study with its current content."""
        return optuna.load_study(study_name=self._name, storage=self._storage)

    @classmethod
    def count_points(cls, space: Space, *, repeats: bool, **options: Any) -> int | None:
        """Return the number of points of a finite space, unless trials may repeat parameters."""
        return count_possible_trials(space, is_grid=options.get("sampler") is None, repeats=repeats)

    @cached_property
    def num_points(self) -> int | None:  # type: ignore[override]
        """The number of trials with different parameters; None if it is unlimited or trials may repeat parameters.

        After a change of the search space, the earlier trials count as well.
        """
        return self._count_points(self._space, self._start - self.first_number, len(self._tried_before))

    def _count_points(self, space: Space, num_before: int, num_tried: int) -> int | None:
        """Return how many trials there can be, if some were proposed from earlier spaces and have tried its points."""
        num_points = self.count_points(space, repeats=self._repeats, sampler=self._make_sampler)
        return None if num_points is None else num_before + num_points - num_tried

    def suggest(self, number: int) -> Params | None:
        """Return the parameters of the trial with the next number.

        A trial that was proposed before a crash is proposed again with the same parameters.

        Args:
            number: the number of the trial, counted from `first_number`.

        Returns:
            Configuration key -> value, or None if a grid has no points left.

        Raises:
            UserError: the space fails. Nothing is stored, and the number remains the next one.
            RuntimeError: the study has this trial and it has ended, but the events of the sweep lack it.
        """
        assert number >= self.first_number
        if number < len(self._trial_ids):
            params = self._repeat_suggestion(number)
        else:
            index = self._find_place(number)
            point = self._first_points[index] if index < len(self._first_points) else None
            if point is None and self._make_sampler is None:
                return None
            trial, params = self._propose(number, point)
            self._store_trial(number, trial)
        self._next_number = max(self._next_number or 0, number + 1)
        return params

    def check_point(self, params: Mapping[str, Any]) -> None:
        """Check a configuration that the user adds.

        Raises:
            UserError: it is not in the space; or it has been tried, or will be, and would give the same training.
        """
        if self._make_sampler is None:
            raise UserError("add: searcher=grid tries every configuration of the search space")
        draws = place_added_point(self._space, params, self._defaults)
        complete = place_values(self._space, {**self._defaults, **draws})
        is_decided = not (complete.out_of_range or complete.missing)
        if is_decided and not self._repeats and self._is_tried(complete.params, besides_imported=True):
            raise UserError("add: a trial of the sweep has this configuration, and would give the same training again")

    def suggest_point(self, number: int, params: Mapping[str, Any]) -> Params | None:
        """Return the parameters of the trial with the next number, with the values that the user has added.

        Parameters that are left out have their default values, or are drawn if those are out of range.

        Args:
            number: the number of the trial, counted from `first_number`.
            params: configuration key -> value.

        Returns:
            Configuration key -> value; None if the number was used for a proposal before a crash.

        Raises:
            UserError: the space fails. Nothing is stored.
        """
        if number < len(self._trial_ids):
            if self._get_trial(number).user_attrs.get(ORIGIN_ATTRIBUTE) != _ADDED_ORIGIN:
                return None
            suggested = self._repeat_suggestion(number)
        else:
            draws = place_added_point(self._space, params, self._defaults)
            view = self._make_view()
            trial, suggested = self._draw_trial(view, number, draws, self._build_sampler(number))
            trial.set_user_attr(ORIGIN_ATTRIBUTE, _ADDED_ORIGIN)
            self._store_trial(number, trial)
        self._added_numbers.add(number)
        self._next_number = max(self._next_number or 0, number + 1)
        return suggested

    def _find_place(self, number: int) -> int:
        """Return how many trials the searcher itself has proposed from its space before the one with this number."""
        return number - self._start - sum(self._start <= added < number for added in self._added_numbers)

    def explain_suggestion(self, number: int) -> str:
        """Return the origin that the study stores with the trial. Studies of earlier versions have none."""
        return str(self._get_trial(number).user_attrs.get(ORIGIN_ATTRIBUTE, super().explain_suggestion(number)))

    def on_trial_update(self, trial: TrialSnapshot) -> None:
        """Store what has changed in a trial, unless it has ended in the study."""
        self._record_unstored(trial)
        self._update_trial(self._get_trial(trial.number), trial)

    def on_max_epochs(self, max_epochs: int) -> None:
        """Go on with a study in which the trials that were complete have not ended.

        It is a copy of the study so far, which remains as it is, because Optuna does not change a trial that has ended.
        If the sweep was killed before the copy was whole, it is made again.

        Args:
            max_epochs: the new number of epochs of a complete trial.
        """
        self._raised_epochs = self._max_epochs = max_epochs
        self._make_sampler = self._bind_sampler(self._space)

        def convert(trial: FrozenTrial) -> FrozenTrial:
            return _reopen_trial(trial) if trial.number >= self.first_number else _demote_trial(trial)

        attributes = self._storage.get_study_user_attrs(self._study_id)
        self._go_on_with_copy(convert, attributes[PLAN_ATTRIBUTE])

    def check_space(self, space: Space, trials: Sequence[TrialSnapshot]) -> int | None:
        """Check that the sampler supports the space, and that not all of its points have been tried.

        Args:
            space: the search space.
            trials: all trials of the sweep.

        Returns:
            What `num_points` is after `on_space`.

        Raises:
            UserError: the searcher cannot go on with the space.
        """
        if self._resolved_sampler is None:
            raise UserError("searcher=grid tries every configuration of its search space, which cannot be changed")
        self._check_sampler(space, has_warm_start=bool(self.warm_start))
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        placed = [
            self._place(space, trial.params, stored[trial.number] if trial.number < len(stored) else None)
            for trial in trials
        ]
        num_tried = len({to_json_text(each.params) for each in placed if each is not None})
        num_points = self._count_points(space, len(trials), num_tried)
        if num_points == len(trials):
            raise UserError(f"every configuration of {space.file} has been tried already")
        return num_points

    def on_space(self, space: Space, trials: Sequence[TrialSnapshot]) -> None:
        """Go on with a study of the trials so far in which draws are those of another space.

        Trials that the space does not contain have no draws, so that the sampler does not learn from them. Points to
        try first that have not been tried remain if the space contains them. A sampler that keeps a state, such as the
        generation of a genetic algorithm, begins anew.

        Args:
            space: the search space.
            trials: the trials that were proposed before.
        """
        start = self.first_number + len(trials)
        self._added_numbers = {trial.number for trial in trials if trial.is_added}
        plan = self._plan_space(space, start)
        self._space_number += 1
        self._space = space
        self._prior_probability = self._given_prior_probability if space.priors else 0.0
        self._make_sampler = self._bind_sampler(space)
        self._go_on_with_copy(partial(self._move_trial, start=start), plan)

    def _plan_space(self, space: Space, start: int) -> dict[str, Any]:
        """Return the plan of the study of another space, whose first trial has the number `start`."""
        points, origins = [], []
        for index in range(self._find_place(start), len(self._first_points)):
            point = self._move_point(space, self._first_points[index])
            if point is not None:
                points.append(point)
                origins.append(self._get_point_origin(index))
        if space.priors and self._given_prior_probability:
            points.append(find_most_probable_point(space, self._defaults))
            origins.append("the most probable configuration of the prior")
        return {"first_number": self.first_number, "points": points, "origins": origins, "start": start}

    def _move_point(self, space: Space, point: Params) -> Params | None:
        """Return the draws of a point to try first in another space; None if the space does not contain it."""
        values = {name: parse_label(value) for name, value in point.items()}
        try:
            placed = place_values(space, {**self._defaults, **values})
        except UserError:  # the space rejects what stands for the missing values
            return None
        there, here = {**self._defaults, **values}, {**self._defaults, **placed.params}
        if any(name in placed.out_of_range or has_different_value(name, there, here) for name in point):
            return None
        return placed.drop_draws([*placed.out_of_range, *placed.missing])

    def _move_trial(self, trial: FrozenTrial, *, start: int) -> FrozenTrial | None:
        """Return a trial with its draws in the present space; None if it was proposed from an earlier one, too late."""
        if trial.number >= start:
            return None
        if _is_skipped(trial):
            return trial
        kept = trial if trial.number < self.first_number else _reopen_trial(trial)
        params = get_trial_params(trial)
        draws, distributions, attributes = self._describe_params(params, trial)
        others = (PARAMS_ATTRIBUTE, PLACED_ATTRIBUTE)
        moved = create_trial(
            state=kept.state,
            values=kept.values,
            params=draws,
            distributions=distributions,
            user_attrs={name: each for name, each in trial.user_attrs.items() if name not in others} | attributes,
            system_attrs=keep_constraints(trial.system_attrs),
            intermediate_values=trial.intermediate_values,
        )
        moved.datetime_start = kept.datetime_start or moved.datetime_start
        moved.datetime_complete = kept.datetime_complete or moved.datetime_complete
        return moved

    def _describe_params(
        self, params: Params, trial: FrozenTrial | None = None
    ) -> tuple[Params, dict[str, BaseDistribution], dict[str, Params]]:
        """Return the draws of a trial of an earlier space in the present one, their distributions, and its attributes.

        Args:
            params: its parameters.
            trial: the trial in the earlier study; None if the study lacks it.
        """
        placed = self._place(self._space, params, trial)
        if placed is None:
            return {}, {}, {PARAMS_ATTRIBUTE: params}
        drawn = {name: parse_label(value) for name, value in placed.draws.items()}
        attributes = {} if is_same(params, drawn) else {PARAMS_ATTRIBUTE: params}
        if not is_same(params, placed.params):
            attributes[PLACED_ATTRIBUTE] = placed.params
        return placed.draws, placed.distributions, attributes

    def _place(self, space: Space, params: Params, trial: FrozenTrial | None) -> SpacePlacement | None:
        draws = {} if trial is None else {name: parse_label(value) for name, value in trial.params.items()}
        return place_configuration(space, params, self._defaults, draws=draws)

    def _go_on_with_copy(self, convert: Callable[[FrozenTrial], FrozenTrial | None], plan: Mapping[str, Any]) -> None:
        """Go on with a copy of the study. If the sweep was killed before the copy was whole, it is made again.

        Args:
            convert: returns the copy of a trial; None to leave it out.
            plan: the plan of the copy.
        """
        name = make_study_name(self._sweep_name, max_epochs=self._raised_epochs, space=self._space_number)
        found = find_study(self._storage, name)
        if found is None or PLAN_ATTRIBUTE not in self._storage.get_study_user_attrs(found):
            found = self._copy_study(found, name, convert, plan)
        self._study_id, self._name = found, name
        for cached in ("num_points", "_finite_points"):
            vars(self).pop(cached, None)
        self._read_study()

    def _copy_study(
        self,
        incomplete_id: int | None,
        name: str,
        convert: Callable[[FrozenTrial], FrozenTrial | None],
        plan: Mapping[str, Any],
    ) -> int:
        if incomplete_id is not None:
            self._storage.delete_study(incomplete_id)
        before = self._storage.get_study_user_attrs(self._study_id)
        study_id = create_study(self._storage, name, self._objectives, url=None)
        for trial in self._storage.get_all_trials(self._study_id, deepcopy=False):
            if (copied := convert(trial)) is not None:
                self._storage.create_new_trial(study_id, copied)
        attributes: dict[str, Any] = {SWEEP_ATTRIBUTE: self._sweep_name}
        attributes |= {} if self._raised_epochs is None else {RAISED_EPOCHS_ATTRIBUTE: self._raised_epochs}
        attributes |= {} if self._space_number == 1 else {SPACE_ATTRIBUTE: self._space_number}
        attributes |= {key: before[key] for key in (_WARM_START_ATTRIBUTE, STUDY_ID_ATTRIBUTE) if key in before}
        for key, value in {**attributes, PLAN_ATTRIBUTE: plan}.items():  # the last one marks a complete study
            self._storage.set_study_user_attr(study_id, key, value)
        return study_id

    def restore_trials(self, trials: Iterable[TrialSnapshot]) -> None:
        """Make the study agree with the events of the sweep, which a crash may have left ahead of or behind the study.

        What the study lacks is added. A trial of the study that the events lack is marked as failed, unless it has the
        number that is proposed next.

        Args:
            trials: all trials of the sweep, as the events describe them.
        """
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        expected = {trial.number: trial for trial in trials}
        for number in sorted(expected):
            self._record_unstored(expected[number])
            if number < len(stored):
                self._update_trial(stored[number], expected[number])
            else:
                self._store_trial(number, self._rebuild_trial(expected[number]))
        self._next_number = max(expected, default=self.first_number - 1) + 1
        self._fail_unknown(stored, {*expected, self._next_number})

    def close(self) -> None:
        """Set running trials of the study to waiting, mark those that the events lack as failed, and close it."""
        if self._next_number is not None:  # None: the trials were never restored
            stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
            for trial in stored[: self._next_number]:
                if trial.state == TrialState.RUNNING:
                    self._set_state(trial, TrialState.WAITING)
            self._fail_unknown(stored, range(self._next_number))
            self._next_number = None
        close_storage(self._storage)

    # --- proposals ----------------------------------------------------------------------------------------------------

    def _propose(self, number: int, point: Params | None) -> tuple[FrozenTrial, Params]:
        """Return a new trial with all its draws, ready to be stored, and its parameters.

        With the same training seed, equal parameters give the same training. So a proposal that repeats an earlier
        trial is drawn again a few times. After that, if the points of the space can be listed, an untried point is
        taken. A point to try first may repeat a trial of an earlier sweep, because only own trials can win.

        With some probability the first draws are from the prior of the space.

        Args:
            number: the number of the trial.
            point: draws that are fixed, by name.
        """
        view = self._make_view()
        decided = [None] * self._num_draws if point is None else [point, point, *[None] * self._num_draws]
        num_from_prior = _NUM_PRIOR_DRAWS if point is None and self._chooses_prior(number, view) else 0
        decided = [*[None] * num_from_prior, *decided]
        for attempt, given in enumerate(decided):
            sampler = self._build_sampler(number, attempt)
            if attempt < num_from_prior:
                sampler = PriorSampler(sampler, self._space.priors, seed=self._derive_seed(number, attempt))
            pending, params = self._draw_trial(view, number, given, sampler)
            if self._make_sampler is None or not self._is_tried(params, besides_imported=given is not None):
                origin = _describe_sampler(sampler, view) if given is None else self._describe_point(number)
                pending.set_user_attr(ORIGIN_ATTRIBUTE, origin)
                return pending, params
        untried = self._find_untried_point(number)
        for attempt in range(len(decided), len(decided) + _MAX_RANDOM_DRAWS):
            random_sampler = RandomSampler(seed=self._derive_seed(number, attempt))
            pending, params = self._draw_trial(view, number, untried, random_sampler)
            if untried is not None or not self._is_tried(params, besides_imported=True):
                break
        what = "a random draw" if untried is None else "a point that no trial has tried"
        pending.set_user_attr(ORIGIN_ATTRIBUTE, f"{what}, because {type(sampler).__name__} repeated earlier trials")
        return pending, params

    def _make_view(self) -> SamplerView:
        """Make the view of the study in which a sampler draws a trial."""
        directions = self._storage.get_study_directions(self._study_id)
        return SamplerView(
            directions,
            lambda: show_trials(
                self._storage.get_all_trials(self._study_id, deepcopy=False),
                directions[0],
                second_objective=self._second_objective,
                constraints=self.constraints,
                completes_infeasible=self._completes_infeasible,
                max_ended=self._max_ended,
            ),
        )

    def _chooses_prior(self, number: int, view: SamplerView) -> bool:
        """Return whether the trial with this number is drawn from the prior of the space."""
        if not self._prior_probability:
            return False
        chance = random.Random(f"prior {self._seed} {number}").random()
        tried = [trial for trial in view.visible_trials if trial.params and trial.state != TrialState.RUNNING]
        if chance >= limit_prior_probability(len(tried), initial=self._prior_probability):  # densities take a while
            return False
        ranked = rank_trials(
            tried,
            self._storage.get_study_directions(self._study_id)[0],
            second_objective=self._second_objective,
            constraints=self.constraints,
        )
        densities = (sum_log_densities(self._space.priors, trial.params, trial.distributions) for trial in ranked)
        return chance < compute_prior_probability(list(densities), initial=self._prior_probability)

    def _describe_point(self, number: int) -> str:
        """Return the origin of a point that was decided before the trial was proposed."""
        if self._make_sampler is None:
            return "the next point of the grid"
        return self._get_point_origin(self._find_place(number))

    def _get_point_origin(self, index: int) -> str:
        return self._origins[index] if index < len(self._origins) else "a point to try first"

    def _draw_trial(
        self, view: SamplerView, number: int, point: Params | None, sampler: BaseSampler
    ) -> tuple[FrozenTrial, Params]:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            pending, params = view.draw(self._space, sampler, number=number, point=point)
        if not is_same(params, {name: parse_label(value) for name, value in pending.params.items()}):
            pending.set_user_attr(PARAMS_ATTRIBUTE, params)
        return pending, params

    def _is_tried(self, params: Params, *, besides_imported: bool = False) -> bool:
        """Whether an earlier trial has these parameters. besides_imported: count only own trials of this sweep."""
        text = to_json_text(params)
        return text in self._tried_params or (text in self._imported_params and not besides_imported)

    def _find_untried_point(self, number: int) -> Params | None:
        """Return the draws of a point that no trial has, or at least no trial of this sweep; None if there is none."""
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
        return self._make_new_sampler(self._make_sampler, self._derive_seed(number, attempt))

    def _make_new_sampler(self, make_sampler: Callable[..., BaseSampler] | None, seed: int) -> BaseSampler:
        if make_sampler is None:
            return RandomSampler(seed=seed)
        try:
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                sampler = make_sampler(seed=seed)
                if isinstance(sampler, QMCSampler):  # all trials are points of one sequence, with one seed
                    sampler = make_sampler(seed=self._seed, independent_sampler=RandomSampler(seed=seed))
        except (TypeError, ValueError) as error:
            raise _make_sampler_error(error) from error
        return sampler

    def _check_sampler(self, space: Space, *, has_warm_start: bool) -> type[BaseSampler]:
        """Draw once with a new sampler, and return its class.

        Raises:
            UserError: the sampler rejects its options, the space or the number of objectives.
        """
        sampler = self._make_new_sampler(self._bind_sampler(space), self._derive_seed(0))
        if self._make_sampler is None:
            count_grid_points(space)
            if self._prior_probability:
                raise UserError(
                    f"searcher=grid tries every point once, so the prior in {space.file} has no effect; remove "
                    "it there, or give searcher.prior_probability=0, or use searcher=tpe"
                )
            if has_warm_start:
                raise UserError(
                    "searcher=grid tries every point once and cannot learn from other sweeps; leave out "
                    "searcher.warm_start"
                )
        try:
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                num_objectives = 1 if self._second_objective is None else 2
                pending, _ = draw_trial(space, sampler, num_objectives=num_objectives)
        except TypeError as error:
            raise _make_sampler_error(error) from error
        except ValueError as error:
            if self._second_objective is None:
                raise
            raise UserError(
                f"sweep.second_objective={self._second_objective}: {type(sampler).__name__} supports one objective "
                "only; give searcher=tpe, nsga2, gp, qmc or random"
            ) from error
        if isinstance(sampler, GPSampler):
            _check_list_lengths(pending.distributions)
        return type(sampler)

    def _repeat_suggestion(self, number: int) -> Params:
        trial = self._get_trial(number)
        if trial.state.is_finished():
            raise RuntimeError(
                f"trial {number} of the study {self._name} has ended, but it is missing in the events of the sweep"
            )
        return get_trial_params(trial)

    # --- records of trials --------------------------------------------------------------------------------------------

    def _get_trial(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._trial_ids[number])

    def _store_trial(self, number: int, trial: FrozenTrial) -> None:
        """Store a trial under its number. Skipped numbers get failed trials."""
        while len(self._trial_ids) < number:
            self._trial_ids.append(self._storage.create_new_trial(self._study_id, create_trial(state=TrialState.FAIL)))
        self._trial_ids.append(self._storage.create_new_trial(self._study_id, trial))
        self._tried_params.add(_make_params_key(trial))

    def _set_state(self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None = None) -> None:
        if trial.state != state and not trial.state.is_finished():
            self._storage.set_trial_state_values(trial._trial_id, state, values)

    def _update_trial(self, trial: FrozenTrial, snapshot: TrialSnapshot) -> None:
        """Store what the study lacks of a trial, unless the trial has ended there."""
        if trial.state.is_finished():
            return
        values, costs = _keep_finite(snapshot.values), _keep_finite(snapshot.costs)
        for name, cost in costs.items():
            if name not in trial.user_attrs:
                self._storage.set_trial_user_attr(trial._trial_id, name, cost)
        for key, excess in compute_excess(costs, self.constraints).items():
            if key not in trial.system_attrs:
                self._storage.set_trial_system_attr(trial._trial_id, key, excess)
        for epoch, value in values.items():
            if epoch not in trial.intermediate_values:
                self._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)
        self._set_state(trial, *self._get_outcome(snapshot.state, values, costs))

    def _record_unstored(self, snapshot: TrialSnapshot) -> None:
        """Remember what the study does not store: how long an epoch takes, and whether the user has added the trial."""
        if snapshot.is_added:
            self._added_numbers.add(snapshot.number)
        if snapshot.epoch_seconds is not None:
            self._epoch_seconds[snapshot.number] = snapshot.epoch_seconds

    def _rebuild_trial(self, snapshot: TrialSnapshot) -> FrozenTrial:
        """Rebuild a trial that the study lacks from the events."""
        draws, distributions, attributes = self._recover_draws(snapshot)
        values, costs = _keep_finite(snapshot.values), _keep_finite(snapshot.costs)
        state, reached = self._get_outcome(snapshot.state, values, costs)
        return create_trial(
            state=state,
            values=reached,
            params=draws,
            distributions=distributions,
            user_attrs={**costs, PARAMS_ATTRIBUTE: snapshot.params, **attributes},
            system_attrs=compute_excess(costs, self.constraints),
            intermediate_values=values,
        )

    def _get_outcome(
        self, state: str, values: Mapping[int, float], costs: Mapping[str, float]
    ) -> tuple[TrialState, list[float] | None]:
        """Return the study's state and values of a trial.

        Args:
            state: the state in the table of trials.
            values: epoch -> metric, if it is finite.
            costs: the measured costs by name, if they are finite.
        """
        if state == "running":
            return TrialState.RUNNING, None
        if state not in _STUDY_STATES:
            return TrialState.WAITING, None
        reached = [values[max(values)]] if values else None
        if reached and self._second_objective is not None:
            cost = costs.get(self._second_objective)
            reached = None if cost is None else [*reached, cost]
        if _STUDY_STATES[state] == TrialState.FAIL or (reached is None and state != "infeasible"):
            return TrialState.FAIL, None
        return _STUDY_STATES[state], reached

    def _recover_draws(self, snapshot: TrialSnapshot) -> tuple[Params, dict[str, BaseDistribution], dict[str, Params]]:
        """Return the draws of a trial, their distributions, and attributes; empty if its parameters do not tell."""
        if snapshot.number < self._start and self._space_number > 1:
            return self._describe_params(snapshot.params)
        with contextlib.suppress(UserError):
            placed = place_values(self._space, snapshot.params)
            if is_same(placed.params, snapshot.params):
                return placed.draws, placed.distributions, {}
        return {}, {}, {}

    def _fail_unknown(self, stored: Sequence[FrozenTrial], expected_numbers: Iterable[int]) -> None:
        expected_numbers = set(expected_numbers)
        for trial in stored[self.first_number :]:
            if trial.number not in expected_numbers:
                self._set_state(trial, TrialState.FAIL)

    def _create_study(self, incomplete_id: int | None, initial_trials: InitialTrials, storage: str | None) -> int:
        if incomplete_id is not None:
            self._storage.delete_study(incomplete_id)
        study_id = create_study(self._storage, self._name, self._objectives, url=storage)
        self._storage.set_study_user_attr(study_id, _WARM_START_ATTRIBUTE, initial_trials.import_summaries)
        for trial in initial_trials.trials:
            self._storage.create_new_trial(study_id, trial)
        plan = {
            "first_number": len(initial_trials.trials),
            "points": initial_trials.points,
            "origins": initial_trials.origins,
        }
        self._storage.set_study_user_attr(study_id, PLAN_ATTRIBUTE, plan)  # last: it marks a complete study
        return study_id


def _is_skipped(trial: FrozenTrial) -> bool:
    """Return whether a trial stands for a number that no trial of the sweep has."""
    return not trial.params and not trial.user_attrs


def _reopen_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a copy of a trial that has not ended; `restore_trials` gives it its state. A skipped number stays one."""
    return trial if _is_skipped(trial) else _copy_with_state(trial, TrialState.WAITING, None)


def _demote_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a copy of a trial of an earlier sweep, which was complete there but has too few epochs now."""
    return trial if trial.state != TrialState.COMPLETE else _copy_with_state(trial, TrialState.PRUNED, trial.values)


def _copy_with_state(trial: FrozenTrial, state: TrialState, values: list[float] | None) -> FrozenTrial:
    return create_trial(
        state=state,
        values=values,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )


def _check_list_lengths(distributions: Mapping[str, BaseDistribution]) -> None:
    """Raise UserError for a long stepped range: GPSampler lists all its values, which would need much memory."""
    for name, distribution in distributions.items():
        count = count_values(distribution) or 0
        if count > _MAX_LISTED_VALUES:
            raise UserError(
                f"searcher=gp lists the {count} values of {name}, and takes at most {_MAX_LISTED_VALUES}; give "
                f"{name} larger steps or an interval, or use searcher=tpe"
            )


def _describe_sampler(sampler: BaseSampler, view: SamplerView) -> str:
    """Return the name of a sampler, and whether it has drawn at random because it knows too few trials.

    Samplers that learn have the number of trials that they need as `_n_startup_trials` (Optuna 5.0). TPE counts
    complete and stopped trials, and so does CMA-ES with `consider_pruned_trials`; the others count complete trials.
    """
    if isinstance(sampler, PriorSampler):
        if sampler.drawn:
            return f"drawn from the prior of {', '.join(sorted(sampler.drawn))}"
        sampler = sampler.sampler
    if isinstance(sampler, CurveSampler):
        return sampler.explain_choice()
    name, num_needed = type(sampler).__name__, getattr(sampler, "_n_startup_trials", 0)
    if not num_needed:
        return name
    counts_stopped = isinstance(sampler, TPESampler) or getattr(sampler, "_consider_pruned_trials", False)
    states = {TrialState.COMPLETE, TrialState.PRUNED} if counts_stopped else {TrialState.COMPLETE}
    is_random = view.count_visible_trials(states) < num_needed
    return f"a random start-up trial of {name}, which needs {num_needed} results" if is_random else name


def _parse_prior_probability(probability: float | None) -> float:
    if probability is None:
        return _PRIOR_PROBABILITY
    if isinstance(probability, bool) or not 0 <= probability <= 1:
        raise UserError(
            f"searcher.prior_probability must be a number from 0 to 1, or null, but it is {probability}; 0 ignores "
            "the prior of the search space"
        )
    return float(probability)


def _make_params_key(trial: FrozenTrial) -> str:
    """Return the parameters of a trial as text, for comparison with those of other trials in the space of the study."""
    return to_json_text(get_placed_params(trial))


def _resolve_sampler(
    sampler: Callable[..., BaseSampler] | None, space: Space, *, num_objectives: int
) -> Callable[..., BaseSampler] | None:
    """Replace CurveSampler by TPE if there are two objectives, and `multivariate: null` of TPE by a value.

    CurveSampler is the default, and has one objective only. `multivariate: null` was the default: true with one
    objective, false with two. Sweeps that were begun with it continue with the same proposals. `group` works only with
    true.

    Raises:
        UserError: an option of CurveSampler is unknown or out of range.
    """
    if not isinstance(sampler, partial):
        return sampler
    given = sampler.keywords
    if sampler.func is CurveSampler and num_objectives > 1:
        try:  # its options are checked although it is replaced
            sampler(pool=CandidatePool(space), max_epochs=1, epoch_seconds={})
        except (TypeError, ValueError) as error:
            raise _make_sampler_error(error) from error
        return partial(TPESampler, n_startup_trials=given["n_startup_trials"], constant_liar=True)
    if sampler.func is not TPESampler:
        return sampler
    if given.get("multivariate", True) is not None:
        return sampler
    together = num_objectives == 1
    return partial(sampler, multivariate=together, group=together and given.get("group", False))


def _bind_search(make_sampler: Callable[..., BaseSampler], **available: Any) -> Callable[..., BaseSampler]:
    """Bind what a sampler asks for by name; Optuna's own ask for none of it."""
    # Of the class, because a partial that is given an unknown option has no signature.
    asked = inspect.signature(getattr(make_sampler, "func", make_sampler)).parameters
    return partial(make_sampler, **{name: value for name, value in available.items() if name in asked})


def _make_sampler_error(error: Exception) -> UserError:
    return UserError(f"searcher.sampler: {join_lines(error)} (its values are in configs/searcher/)")


def _keep_finite(values: Mapping[Any, float]) -> dict[Any, float]:
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}
