"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846) as a rule of a sweep."""

import math
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.errors import UserError
from handpose.schedulers.scheduler import Fifo, SchedulerDecision, SegmentStart
from handpose.search.distributions import fit_value, parse_label, round_to_distribution
from handpose.search.space import Params, Space, YamlSpace


class PopulationBased(Fifo):
    """At every interval the worst trials go on from the best ones' weights, with some parameters changed.

    mutate: keys of the space that change then; the others come with the weights, so that the network still fits them.
    perturbation_interval: epochs. quantile_fraction: of the population, the share that counts as the worst, and as the
    best. resample_probability: that a changed value is drawn anew instead of moved to a neighbour. population_size:
    trials of the sweep when it begins; if it goes on with more, these join as slots become free. seed: of the changes.

    The population takes turns where it is larger than the slots: a trial pauses at an interval when another one has
    been trained less far and waits. Who is among the worst is decided when a trial goes on, by what is known then. It
    goes on from a random one of the best that has a checkpoint at least as old as itself; where there is none, from its
    own. A trial that took over weights counts with their loss until it reports one of its own. Those that are complete
    or ended are no longer part of the population. Raises UserError when the values do not go together.
    """

    needs_checkpoints = True
    perturbs_params = True
    supports_two_objectives = False  # weights are taken over from what is better, and there are two answers to that

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
        self._max_epochs = max_epochs
        self._seed = seed
        self.rungs = tuple(range(perturbation_interval, max_epochs, perturbation_interval))
        self._num_started = 0
        self._individuals: dict[int, _Individual] = {}
        self._ranking: list[tuple[float, bool, int]] = []  # `_Member.rank` of those with a loss, best first
        self._waiting: list[tuple[int, int]] = []  # (epoch, trial) of those that pause, least trained first

    def on_trial_start(self, trial: int, params: Params) -> None:
        """One more member."""
        self._num_started += 1
        self._individuals[trial] = _Individual(trial, params)

    def on_trial_result(self, trial: int, epoch: int, loss: float) -> SchedulerDecision:
        """At an interval: pause when it is another's turn, or to go on from another's weights."""
        worker = self._individuals[trial]
        worker.epoch = epoch
        if epoch >= self._max_epochs:
            self.on_trial_end(trial)
            return "continue"
        if epoch % self._interval:
            return "continue"
        self._update_rank(worker, loss, checkpoint=epoch)
        if not self._has_less_trained_waiting(epoch) and self._find_sources(worker) == []:
            return "continue"
        insort(self._waiting, (epoch, trial))
        return "pause"

    def choose_trial_to_resume(self, *, can_start_trial: bool) -> SegmentStart | None:
        """The one that is trained least of those that wait, after the whole population has begun."""
        if can_start_trial or not self._waiting:
            return None
        worker = self._individuals[self._waiting[0][1]]
        sources = self._find_sources(worker)
        if not sources:
            return SegmentStart(worker.trial)
        rng = random.Random(f"population {self._seed} {worker.trial} {worker.epoch}")  # text: the same in every process
        source = rng.choice(sources)
        return SegmentStart(worker.trial, source.trial, self._explore(source.params, rng))

    def on_trial_resume(self, start: SegmentStart) -> None:
        """It goes on from its own checkpoint, or as a copy of its source."""
        worker = self._individuals[start.trial]
        self._stop_waiting(worker)
        if start.source is None:
            return
        assert start.params is not None
        source = self._individuals[start.source]
        assert source.loss is not None
        worker.params = start.params
        self._update_rank(worker, source.loss, checkpoint=0)

    def on_trial_end(self, trial: int) -> None:
        """It leaves the population."""
        worker = self._individuals[trial]
        self._stop_waiting(worker)
        self._remove_rank(worker)
        worker.checkpoint = 0

    def _has_less_trained_waiting(self, epoch: int) -> bool:
        return self._num_started < self._population_size or bool(self._waiting and self._waiting[0][0] < epoch)

    def _find_sources(self, individual: "_Individual") -> list["_Individual"]:
        """Whose weights the member may take over: none unless it is among the worst."""
        num_ranked = len(self._ranking)
        size = min(math.ceil(num_ranked * self._quantile_fraction), num_ranked // 2)
        if bisect_left(self._ranking, individual.rank) < num_ranked - size:
            return []
        best = (self._individuals[trial] for *_, trial in self._ranking[:size])
        return [other for other in best if other.checkpoint >= individual.epoch]

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
    """A trial of the population, and the parameters that its weights are trained with now.

    epoch: that it reported last. loss: at its last interval. checkpoint: epoch of the newest one that it has saved with
    these parameters; 0 where it has none.
    """

    trial: int
    params: Params
    epoch: int = 0
    loss: float | None = None
    checkpoint: int = 0

    @property
    def rank(self) -> tuple[float, bool, int]:
        """Sorts the population, the best first; of equals a copy comes after its source."""
        assert self.loss is not None
        return (self.loss, not self.checkpoint, self.trial)


class _Explorer:
    """Changes some parameters; what comes out lies in the space, unlike with Ray's own."""

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
            f"{', '.join(space.parameters)}; give scheduler.mutate=[...] those that may change under trained weights"
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
            f"sweep.max_epochs={max_epochs}, or nobody of the population changes (configs/scheduler/pbt.yaml)"
        )
    if not 0 < quantile_fraction <= 0.5:
        raise UserError(
            f"scheduler.quantile_fraction={quantile_fraction:g} must be above 0 and at most 0.5: the best and the "
            "worst of a population are not the same (configs/scheduler/pbt.yaml)"
        )
    if not 0 <= resample_probability <= 1:
        raise UserError(
            f"scheduler.resample_probability={resample_probability:g} must be from 0 to 1 (configs/scheduler/pbt.yaml)"
        )
