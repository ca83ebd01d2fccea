"""The scheduler of population-based training (Jaderberg et al. 2017, arXiv:1711.09846)."""

import math
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.errors import UserError
from handpose.schedulers.reason import Reason
from handpose.schedulers.scheduler import Fifo, SchedulerDecision, SegmentStart
from handpose.search.distributions import fit_value, parse_label, round_to_distribution
from handpose.search.space import Params, Space, YamlSpace


class PopulationBased(Fifo):
    """Scheduler of population-based training: at intervals the worst trials copy the weights of the best ones.

    A copy also takes all parameters of its source and then changes some of them.

    If the population is larger than the number of slots, trials take turns: a trial pauses at an interval if a less
    trained trial waits, or if not all of the population has started. Whether a trial is among the worst is decided when
    it resumes, from the losses at that time. It then resumes from a random one of the best trials with a checkpoint of
    its own epoch or a later one. If there is none, it resumes from its own checkpoint. A copy is ranked with the
    loss of its source until it reports a loss itself. Trials that are complete or have ended leave the population.

    Args:
        mutate: the keys of the space that a copy changes. It takes the other parameters from its source unchanged, so
            that they fit the weights.
        perturbation_interval: the number of epochs between two comparisons.
        quantile_fraction: the fraction of the population that counts as the worst, and as the best.
        resample_probability: the probability that a changed value is drawn at random instead of moved by one step.
        population_size: the number of trials that the sweep starts with. If it is resumed with more trials, these
            join as slots become free.
        max_epochs: the number of epochs of a complete trial.
        seed: the seed of the changes.
        space: the search space, which must be a YAML file.

    Raises:
        UserError: an argument is out of range, or `mutate` does not fit the space.
    """

    needs_checkpoints = True
    perturbs_params = True
    supports_two_objectives = False  # which weights are better to copy is ambiguous with two objectives
    selects_only_at_rungs = False  # a trial goes on with the weights of another one
    contract_variants = ({"quantile_fraction": 0.5, "perturbation_interval": 1},)

    def __init__(
        self,
        *,
        mutate: Sequence[str],
        perturbation_interval: int,
        quantile_fraction: float,
        resample_probability: float,
        population_size: int,
        max_epochs: int,
        seed: int,
        space: Space,
    ) -> None:
        _check_pbt_options(perturbation_interval, quantile_fraction, resample_probability, max_epochs)
        self._explore = _Explorer(_find_mutable_params(space, mutate), resample_probability)
        self._interval = perturbation_interval
        self._quantile_fraction = quantile_fraction
        self._population_size = population_size
        self._set_max_epochs(max_epochs)
        self._seed = seed
        self._num_started = 0
        self._individuals: dict[int, _Individual] = {}
        self._ranking: list[tuple[float, bool, int]] = []  # `_Individual.rank` of those with a loss, best first
        self._waiting: list[tuple[int, int]] = []  # (epoch, trial) of paused trials, least trained first

    def _set_max_epochs(self, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self.rungs = tuple(range(self._interval, max_epochs, self._interval))

    def on_trial_start(self, trial: int, params: Params) -> None:
        """Add the trial to the population."""
        self._num_started += 1
        self._individuals[trial] = _Individual(trial, params)

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """At an interval, pause if it is another trial's turn, or to copy the weights of another trial."""
        individual = self._individuals[trial]
        individual.epoch = epoch
        if epoch >= self._max_epochs:
            self.on_trial_end(trial)
            return "continue"
        if epoch % self._interval:
            return "continue"
        self._update_rank(individual, loss, checkpoint=epoch)
        must_wait = self._has_less_trained_waiting(epoch)
        self.reason = Reason("turn") if must_wait else self._explain_rank(individual)
        if not must_wait and self._find_sources(individual) == []:
            return "continue"
        insort(self._waiting, (epoch, trial))
        return "pause"

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """Return the least trained waiting trial, once the whole population has started."""
        if can_start_trial or not self._waiting:
            return None
        individual = self._individuals[self._waiting[0][1]]
        sources = self._find_sources(individual)
        if not sources:
            return SegmentStart(individual.trial)
        # Text is hashed the same way in every process.
        rng = random.Random(f"population {self._seed} {individual.trial} {individual.epoch}")
        source = rng.choice(sources)
        return SegmentStart(individual.trial, source.trial, self._explore(source.params, rng))

    def explain_resume(self, start: SegmentStart) -> Reason:
        """Return the trial's place in the population if it copies another trial; otherwise it is its turn."""
        return Reason("turn") if start.source is None else self._explain_rank(self._individuals[start.trial])

    def on_trial_resume(self, start: SegmentStart) -> None:
        """Resume the trial from its own checkpoint or as a copy of its source."""
        individual = self._individuals[start.trial]
        self._stop_waiting(individual)
        if start.source is None:
            return
        assert start.params is not None
        source = self._individuals[start.source]
        assert source.loss is not None
        individual.params = start.params
        self._update_rank(individual, source.loss, checkpoint=0)

    def on_trial_end(self, trial: int) -> None:
        """Remove the trial from the population."""
        individual = self._individuals[trial]
        self._stop_waiting(individual)
        self._remove_rank(individual)
        individual.checkpoint = 0

    def on_max_epochs(self, max_epochs: int) -> None:
        """Compare trials up to the new number of epochs."""
        self._set_max_epochs(max_epochs)

    def on_complete_trial(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """Take the trial back into the population, and decide as at a report of this epoch."""
        return self.on_trial_result(trial, epoch, loss)

    def _has_less_trained_waiting(self, epoch: int) -> bool:
        return self._num_started < self._population_size or bool(self._waiting and self._waiting[0][0] < epoch)

    def _find_sources(self, individual: "_Individual") -> list["_Individual"]:
        """Return the individuals whose weights this one may copy; none unless it is among the worst."""
        size = self._num_worst
        if bisect_left(self._ranking, individual.rank) < len(self._ranking) - size:
            return []
        best = (self._individuals[trial] for *_, trial in self._ranking[:size])
        return [other for other in best if other.checkpoint >= individual.epoch]

    @property
    def _num_worst(self) -> int:
        """Number of individuals that count as the worst, which is also the number of those that count as the best."""
        num_ranked = len(self._ranking)
        return min(math.ceil(num_ranked * self._quantile_fraction), num_ranked // 2)

    def _explain_rank(self, individual: "_Individual") -> Reason:
        rank, num_ranked = bisect_left(self._ranking, individual.rank) + 1, len(self._ranking)
        num_passing = num_ranked - self._num_worst
        return Reason("population", individual.loss, rank=rank, num_compared=num_ranked, num_passing=num_passing)

    def _update_rank(self, individual: "_Individual", loss: float, *, checkpoint: int) -> None:
        self._remove_rank(individual)
        individual.loss = loss
        individual.checkpoint = checkpoint
        insort(self._ranking, individual.rank)

    def _remove_rank(self, individual: "_Individual") -> None:
        if individual.loss is not None:
            del self._ranking[bisect_left(self._ranking, individual.rank)]
            individual.loss = None

    def _stop_waiting(self, individual: "_Individual") -> None:
        place = bisect_left(self._waiting, (individual.epoch, individual.trial))
        if self._waiting[place : place + 1] == [(individual.epoch, individual.trial)]:
            del self._waiting[place]


@dataclass
class _Individual:
    """A trial of the population.

    Attributes:
        trial: the number of the trial.
        params: the parameters that it is currently trained with.
        epoch: the last reported epoch.
        loss: the loss at its last interval, or that of its source; None before the first.
        checkpoint: the epoch of the newest checkpoint saved with these parameters; 0 if there is none.
    """

    trial: int
    params: Params
    epoch: int = 0
    loss: float | None = None
    checkpoint: int = 0

    @property
    def rank(self) -> tuple[float, bool, int]:
        """Key that sorts the population, the best first. A copy comes after its source when their losses are equal."""
        assert self.loss is not None
        return (self.loss, not self.checkpoint, self.trial)


class _Explorer:
    """Changes the mutable parameters. Unlike in Ray's scheduler, the new values are always in the space.

    A number is multiplied by 0.8 or 1.25 and rounded to its distribution. An option is replaced by the one before or
    after it. With the probability `resample_probability` a value is drawn at random instead.
    """

    def __init__(self, mutable: dict[str, BaseDistribution], resample_probability: float) -> None:
        self._mutable = mutable
        self._resample_probability = resample_probability

    def __call__(self, params: Params, rng: random.Random) -> Params:
        changed = {
            key: parse_label(self._change_value(params[key], distribution, rng))
            for key, distribution in self._mutable.items()
        }
        return {**params, **changed}

    def _change_value(self, value: Any, distribution: BaseDistribution, rng: random.Random) -> Any:
        anew = rng.random() < self._resample_probability
        if isinstance(distribution, CategoricalDistribution):
            options = list(distribution.choices)
            try:
                place = options.index(fit_value(value, distribution))
            except ValueError:
                anew = True
            if anew:
                return rng.choice(options)
            place += rng.choice((-1, 1))
            return options[min(max(place, 0), len(options) - 1)]
        assert isinstance(distribution, (FloatDistribution, IntDistribution))
        return round_to_distribution(
            _sample_uniform(distribution, rng) if anew else value * rng.choice((0.8, 1.25)), distribution
        )


def _find_mutable_params(space: Space, mutate: Sequence[str]) -> dict[str, BaseDistribution]:
    if not isinstance(space, YamlSpace):
        raise UserError(f"scheduler=pbt needs a search space in YAML, but search_space={space.name} is {space.file}")
    unknown = [key for key in mutate if key not in space.parameters]
    if unknown or not mutate:
        raise UserError(
            f"scheduler.mutate names {', '.join(unknown) or 'nothing'}, but search_space={space.name} searches "
            f"{', '.join(space.parameters)}; list in scheduler.mutate=[...] the keys that may change during a training"
        )
    return {key: space.parameters[key] for key in mutate}


def _sample_uniform(distribution: FloatDistribution | IntDistribution, rng: random.Random) -> float:
    if distribution.log:
        return math.exp(rng.uniform(math.log(distribution.low), math.log(distribution.high)))
    return rng.uniform(distribution.low, distribution.high)


def _check_pbt_options(interval: int, quantile_fraction: float, resample_probability: float, max_epochs: int) -> None:
    if not 1 <= interval < max_epochs:
        raise UserError(
            f"scheduler.perturbation_interval={interval} must be at least 1 and below "
            f"sweep.max_epochs={max_epochs}, or no trial would ever change (configs/scheduler/pbt.yaml)"
        )
    if not 0 < quantile_fraction <= 0.5:
        raise UserError(
            f"scheduler.quantile_fraction={quantile_fraction:g} must be above 0 and at most 0.5, so that no trial "
            "is among both the best and the worst (configs/scheduler/pbt.yaml)"
        )
    if not 0 <= resample_probability <= 1:
        raise UserError(
            f"scheduler.resample_probability={resample_probability:g} must be from 0 to 1 (configs/scheduler/pbt.yaml)"
        )
