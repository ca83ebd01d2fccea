"""What decides which trial goes on: Ray's schedulers, as configs/scheduler names them, and what they lack."""

import inspect
import math
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune import TuneError, schedulers
from ray.tune.experiment import Trial
from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

from handpose.errors import UserError
from handpose.sweep.searcher import PARAMS
from handpose.sweep.space import ListedSpace, Params, Space, from_label, label


def build_scheduler(scheduler: partial[TrialScheduler], space: Space) -> TrialScheduler:
    """Make the configured scheduler; one that takes a `space` is given it.

    Raises UserError with the scheduler's own words when its values do not go together.
    """
    extra = {"space": space} if "space" in inspect.signature(scheduler.func).parameters else {}
    try:
        return scheduler(**extra)
    except UserError:
        raise
    except (AssertionError, ValueError, TypeError, TuneError) as error:
        raise UserError(f"scheduler: {error} (its values stand in configs/scheduler/)") from error


def median_stopping(*, grace_period: int, min_samples_required: int) -> MedianStoppingRule:
    """Ray's median stopping rule; it never pauses a trial, which without a checkpoint would begin from scratch."""
    return MedianStoppingRule(
        time_attr="epoch",
        grace_period=grace_period,
        min_samples_required=min_samples_required,
        min_time_slice=math.inf,  # type: ignore[arg-type]
    )


class PopulationBasedTraining(schedulers.PopulationBasedTraining):
    """Ray's population based training, started from the searcher's suggestions.

    space: what the parameters range over. mutate: keys of it that change when a trial goes on from another's weights;
    the others come with the weights, so that the network still fits them. Changed values stay in their range, unlike
    Ray's own. perturbation_interval: epochs. seed: of the changes. Raises UserError when `mutate` does not fit the
    space.
    """

    def __init__(
        self,
        *,
        space: Space,
        mutate: list[str],
        perturbation_interval: int,
        quantile_fraction: float,
        resample_probability: float,
        seed: int,
    ) -> None:
        super().__init__(
            time_attr="epoch",
            perturbation_interval=perturbation_interval,
            quantile_fraction=quantile_fraction,
            custom_explore_fn=_Explore(_mutable(space, mutate), resample_probability, random.Random(seed)),
            log_config=False,
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Add a trial that a searcher suggested.

        Ray refuses searchers, because they would be told values that their parameters did not earn. Ours is not: it
        hears of no value after the first change (`OptunaSearcher.on_trial_result`).
        """
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)  # type: ignore[arg-type]


class _Explore:
    """Changes some parameters of a trial's configuration."""

    def __init__(self, mutable: dict[str, BaseDistribution], resample_probability: float, rng: random.Random) -> None:
        self._mutable = mutable
        self._resample_probability = resample_probability
        self._rng = rng

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        params: Params = dict(config[PARAMS])
        for key, distribution in self._mutable.items():
            params[key] = from_label(self._change(label(params[key]), distribution))
        return {**config, PARAMS: params}

    def _change(self, value: Any, distribution: BaseDistribution) -> Any:
        anew = self._rng.random() < self._resample_probability
        if isinstance(distribution, CategoricalDistribution):
            options = list(distribution.choices)
            if anew:
                return self._rng.choice(options)
            place = options.index(value) + self._rng.choice((-1, 1))
            return options[min(max(place, 0), len(options) - 1)]
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        if anew:
            return _fitted(_draw(distribution, self._rng), distribution)
        return _fitted(value * self._rng.choice((0.8, 1.25)), distribution)


def _mutable(space: Space, mutate: list[str]) -> dict[str, BaseDistribution]:
    if not isinstance(space, ListedSpace):
        raise UserError(f"scheduler=pbt needs a search space in YAML, but search_space={space.name} is {space.file}")
    unknown = [key for key in mutate if key not in space.parameters]
    if unknown or not mutate:
        raise UserError(
            f"scheduler.mutate names {', '.join(unknown) or 'nothing'}, but search_space={space.name} searches "
            f"{', '.join(space.parameters)}; give scheduler.mutate=[...] those that may change under trained weights"
        )
    return {key: space.parameters[key] for key in mutate}


def _draw(distribution: FloatDistribution | IntDistribution, rng: random.Random) -> float:
    if distribution.log:
        return math.exp(rng.uniform(math.log(distribution.low), math.log(distribution.high)))
    return rng.uniform(distribution.low, distribution.high)


def _fitted(value: float, distribution: FloatDistribution | IntDistribution) -> float:
    """The nearest value that the distribution can give."""
    value = min(max(value, distribution.low), distribution.high)
    if distribution.step is not None:
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
    return int(value) if isinstance(distribution, IntDistribution) else float(value)
