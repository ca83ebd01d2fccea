"""The interface of searchers, which propose trials and learn from their results. configs/searcher selects one."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from handpose.errors import UserError
from handpose.search.space import Params, Space


class TrialSnapshot(NamedTuple):
    """A trial as the events of the sweep describe it.

    Attributes:
        number: the number of the trial.
        state: its state. `running`, `waiting` (for a retry or until the sweep is resumed) and `paused` (at a rung)
            trials have not ended. The others have: `complete`, `stopped` (early), `diverged`, `failed` (for good), or
            `infeasible` (a cost is above its limit).
        params: its parameters, as the searcher proposed them.
        values: epoch -> metric. A value of a diverged trial may be infinite or NaN.
        costs: the measured costs by name.
        epoch_seconds: median seconds of an epoch, without the starts of segments; None if it is not known.
        is_added: whether the user has added it while the sweep ran, so that `suggest` did not choose its parameters.
    """

    number: int
    state: str
    params: Params
    values: Mapping[int, float]
    costs: Mapping[str, float] = {}
    epoch_seconds: float | None = None
    is_added: bool = False


class Searcher:
    """Base class of searchers. Only `suggest` has to be written; a searcher that learns also writes `on_trial_update`.

    A YAML file in configs/searcher names the class as `_target_`, with `_partial_: true` and the options of its
    constructor. The sweep adds those of the following arguments that the constructor has:

    - space: the search space. Its `sample` draws from an `optuna.trial.BaseTrial`. Its `priors` say where the author of
      the space believes that the best values lie (handpose/search/prior_sampler.py); it is empty without such beliefs.
    - defaults: configuration key -> value of the default configuration.
    - metric, mode: the metric to optimise, and `min` or `max`, its better direction.
    - second_objective: the name of a cost to minimise as well, or None.
    - max_epochs: the number of epochs of a complete trial, over all its folds.
    - folds: the number of folds that a complete trial is trained with; 1 without folds.
    - seed: the seed of everything that is drawn.
    - repeats: trials may have the parameters of earlier ones, because parameters change during training.
    - name, folder, resume: the name of the sweep, a folder for the searcher's own files, and whether the sweep is
      resumed. To find mistakes before Ray is started, the searcher is first created with a temporary folder, and with
      storage=None if it has this argument.
    - fingerprint: the fingerprint of the data set.

    The constructor raises `handpose.errors.UserError` if it cannot search the space. An interrupted sweep is resumed
    with a new searcher. So a proposal must depend on nothing but the options, the number of the trial, and the newest
    snapshots of the other trials; in particular on no generator that is not seeded anew for each proposal.

    Attributes:
        first_number: the number of the first trial that the searcher proposes.
        num_points: the largest number of trials that it proposes; None if there is no limit.
        constraints: cost -> upper limit. A trial above a limit is not trained.
        warm_start: for each earlier sweep, a summary of what was imported, to be shown to the user.
    """

    first_number: int = 0
    num_points: int | None = None
    constraints: Mapping[str, float] = {}
    warm_start: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def count_points(cls, space: Space, *, repeats: bool, **options: Any) -> int | None:
        """Return what `num_points` of a searcher with these options is; None also if it is not known.

        Called before a searcher is created and before the data are prepared.

        Args:
            space: the search space.
            repeats: trials may have the parameters of earlier ones.
            options: the options of the YAML file.

        Raises:
            UserError: the searcher cannot search the space.
        """
        return None

    def suggest(self, number: int, /) -> Params | None:
        """Return the parameters of a new trial.

        Numbers ascend by one from `first_number`. When the sweep is resumed, the last number may come again.

        Args:
            number: the number of the trial.

        Returns:
            Configuration key -> value; None if no points are left.
        """
        raise NotImplementedError

    def check_point(self, params: Mapping[str, Any], /) -> None:
        """Check a configuration that the user adds to the running sweep. This changes nothing.

        Args:
            params: configuration key -> value. Keys may be left out.

        Raises:
            UserError: the searcher cannot use it. By default it never can.
        """
        raise UserError(f"{type(self).__name__} cannot try a configuration that is given while the sweep runs")

    def suggest_point(self, number: int, params: Mapping[str, Any], /) -> Params | None:
        """Use a configuration that the user has added, and `check_point` has accepted, for a new trial.

        When the sweep is resumed, the last number may come again.

        Args:
            number: the number of the trial.
            params: configuration key -> value.

        Returns:
            All parameters of the trial; None if `suggest` has been called for this number before a crash. Then the
            number belongs to that proposal.
        """
        raise NotImplementedError

    def explain_suggestion(self, number: int, /) -> str:
        """Return where the parameters of a trial come from, in a few words; by default the name of the class.

        Called after `suggest` or `suggest_point`. The sweep stores the words; nothing depends on them.

        Args:
            number: the number of the trial.
        """
        return type(self).__name__

    def on_trial_update(self, trial: TrialSnapshot, /) -> None:
        """Learn from a trial that has changed. The same snapshot may come again, and must then change nothing.

        A trial that has ended may go on, if the user retries or keeps it.
        """

    def on_max_epochs(self, max_epochs: int, /) -> None:
        """Handle that the user has raised the number of epochs of a complete trial. By default, do nothing.

        `restore_trials` follows with all trials: those that were complete have not ended any more.

        Args:
            max_epochs: the new number.
        """

    def check_space(self, space: Space, trials: Sequence[TrialSnapshot], /) -> int | None:
        """Check another search space, from which the user wants the next trials. This changes nothing.

        Args:
            space: the search space.
            trials: all trials of the sweep.

        Returns:
            What `num_points` is after `on_space`: the trials that the sweep has, and how many can follow.

        Raises:
            UserError: the searcher cannot go on with the space. By default it never can.
        """
        raise UserError(f"{type(self).__name__} cannot go on with another search space")

    def on_space(self, space: Space, trials: Sequence[TrialSnapshot], /) -> None:
        """Propose from another search space from now on. `restore_trials` follows with all trials.

        When the sweep is resumed, this and `on_max_epochs` are called again, in the order of the user's commands.

        Args:
            space: the search space, which `check_space` has accepted.
            trials: the trials that were proposed before. A later proposal that the searcher has stored is void.
        """
        raise NotImplementedError

    def restore_trials(self, trials: Sequence[TrialSnapshot], /) -> None:
        """Learn from all trials of the sweep.

        Called when it is started or resumed, and after `on_max_epochs` and `on_space`.
        """
        for trial in trials:
            self.on_trial_update(trial)

    def close(self) -> None:
        """Release resources. May be called twice."""


def count_points(searcher: partial[Searcher], space: Space, *, repeats: bool) -> int | None:
    """Return what `Searcher.count_points` gives for a searcher as its YAML file configures it.

    Args:
        searcher: what the file makes: the class with its options.
        space: the search space.
        repeats: trials may have the parameters of earlier ones.

    Raises:
        UserError: the file does not name a searcher, or the searcher cannot search the space.
    """
    made = getattr(searcher, "func", None)
    if not (isinstance(made, type) and issubclass(made, Searcher)):
        raise UserError(
            "searcher: the file in configs/searcher must name a subclass of handpose.search.searcher.Searcher as "
            "_target_, with _partial_: true"
        )
    return made.count_points(space, repeats=repeats, **searcher.keywords)
