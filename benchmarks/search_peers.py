"""The search methods of other packages, through their own interfaces and with their documented settings.

    pip install -r requirements.txt -r requirements-benchmarks.txt
    python benchmarks/search.py --methods "SMAC: MultiFidelityFacade" "Syne Tune: BOHB"

Packages are imported when a method starts. Which versions ran together, and which need an environment of their own,
is in requirements-benchmarks.txt.

- Syne Tune (Salinas et al. 2022): `suggest` and `on_trial_result` of its schedulers, called as its Tuner does. ASHA,
  ASHA with the searchers BORE and CQR, and BOHB are in the current version. PASHA, MOBSTER, Hyper-Tune and DyHPO
  were removed after version 0.14.
- SMAC3 (Lindauer et al. 2022): `ask` and `tell` of MultiFidelityFacade, which is Hyperband with a random forest. The
  initial design has 10 configurations per parameter, but at most a quarter of Scenario.n_trials, whose default is 100.
- NePS: AskAndTell with `asha` and `priorband` (Mallik et al. 2023), the latter also with its Gaussian process, from 10
  full trainings on; the package has no default for that. PriorBand has no prior here: it draws evenly and near the best
  configuration. Its freeze-thaw method `ifbo` is not included, because it downloads the weights of its network when it
  starts; its former MF-EI is no longer in the package.
- Ray Tune: TuneBOHB with HyperBandForBOHB (Falkner et al. 2018), called as the Tune controller does, which keeps one
  proposal in the queue.

All methods are treated alike:

- Epochs are the fidelity, from 1 to those of a complete trial, and the reduction factor is 3, which is the default of
  each package. A trial that a method evaluates again with a larger budget resumes from its checkpoint and pays for the
  additional epochs and a start. Syne Tune and Ray model this themselves. SMAC and NePS return the same configuration
  with a larger budget, and would otherwise pay for all its epochs again.
- No method starts with the default configuration or with one in the middle of the ranges.
- Every slot asks as soon as it is free. Which trials are still running is passed on through each package's interface;
  what it makes of that is its own matter. SMAC and NePS begin the next bracket while one waits for results.
- A training that diverges is reported as a failed one: `on_trial_error` in Syne Tune and Ray, StatusType.CRASHED in
  SMAC, an exception in NePS.
- A start costs the same in all. What packages save on real starts, such as Ray's `reuse_actors`, is not simulated;
  benchmarks/slots.py measures it.

A search of 40 full trainings on 16 slots in the space `default` takes about as many processor seconds: 2 at most with
the two ASHAs and PASHA, 2 to 6 with the two BOHBs and PriorBand, 14 to 19 with SMAC, 20 to 35 with BORE and MOBSTER,
60 with CQR, more than 180 with Hyper-Tune. PriorBand's Gaussian process takes 7 to 16 for each proposal, so that one
search takes about an hour.

SMAC and TuneBOHB know the conditions of a space. For Syne Tune and NePS it is flat: they propose values for
all parameters, and those that a configuration does not have are ignored.
"""

import importlib.util
import logging
import math
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from benchmarks.curve_surrogate import LOSS
from benchmarks.search_methods import MEMORY, Decision, Method, RayTrial, Task
from handpose.plain_values import is_same
from handpose.search.distributions import count_values, get_value_at, round_to_distribution
from handpose.search.points import draw_trial, place_values
from handpose.search.space import Params, Space

_EPOCH = "epoch"
_ETA = 3


# --- spaces -----------------------------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """The values of a parameter as the peers see them, both ends included. Choices are numbered from 0."""

    kind: Literal["float", "integer", "choice"]
    low: float
    high: float
    log: bool


class Condition(NamedTuple):
    """A parameter exists if its parent has one of these values, which are those of the parent's domain."""

    parent: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class FlatParameter:
    """A parameter of a flat space.

    Attributes:
        distribution: what the space draws from.
        condition: when the parameter exists; None: always.
    """

    distribution: BaseDistribution
    condition: Condition | None = None

    @property
    def domain(self) -> Domain:
        each = self.distribution
        if isinstance(each, CategoricalDistribution):
            return Domain("choice", 0, len(each.choices) - 1, False)
        assert isinstance(each, (FloatDistribution, IntDistribution))
        if self._is_stepped:
            return Domain("integer", 0, (count_values(each) or 1) - 1, False)
        return Domain("integer" if isinstance(each, IntDistribution) else "float", each.low, each.high, each.log)

    def decode(self, value: Any) -> Any:
        """Return the value that the space draws for a value of the domain."""
        each = self.distribution
        if isinstance(each, CategoricalDistribution) or self._is_stepped:
            return get_value_at(each, int(value))
        assert isinstance(each, (FloatDistribution, IntDistribution))
        return round_to_distribution(int(value) if isinstance(each, IntDistribution) else float(value), each)

    def encode(self, value: Any) -> Any:
        """Return the value of the domain for a value that the space draws."""
        each = self.distribution
        if isinstance(each, CategoricalDistribution):
            return next(index for index, choice in enumerate(each.choices) if is_same(choice, value))
        if self._is_stepped:
            assert isinstance(each, (FloatDistribution, IntDistribution))
            assert each.step is not None
            return round((value - each.low) / each.step)
        return value

    @property
    def _is_stepped(self) -> bool:
        each = self.distribution
        return isinstance(each, (FloatDistribution, IntDistribution)) and each.step not in (None, 1)


class FlatSpace:
    """The parameters of a search space, with the conditions under which they exist, found by drawing from it.

    Parameters with a single value are left out.

    Args:
        space: the search space.
        num_draws: the number of draws.

    Attributes:
        parameters: name -> parameter, each one after its parent.

    Raises:
        ValueError: a range depends on other draws, or no value of one other parameter decides whether one exists.
    """

    def __init__(self, space: Space, *, num_draws: int = 200) -> None:
        self._space = space
        sampler = RandomSampler(seed=0)
        trials = [draw_trial(space, sampler)[0] for _ in range(num_draws)]
        found: dict[str, BaseDistribution] = {}
        for trial in trials:
            for name, distribution in trial.distributions.items():
                if found.setdefault(name, distribution) != distribution:
                    raise ValueError(
                        f"{space.file}: the peers need fixed ranges, but {name} is drawn from {found[name]} and from "
                        f"{distribution}"
                    )
        draws = [trial.params for trial in trials]
        names = sorted(found, key=lambda name: -sum(name in each for each in draws))
        self.parameters: dict[str, FlatParameter] = {}
        for name in names:
            if not found[name].single():
                condition = self._find_condition(name, draws)
                self.parameters[name] = FlatParameter(found[name], condition)

    def is_active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Return whether a configuration with these values, of the domains, has the parameter."""
        condition = self.parameters[name].condition
        if condition is None:
            return True
        return self.is_active(condition.parent, values) and values[condition.parent] in condition.values

    def build_params(self, values: Mapping[str, Any]) -> Params:
        """Return the configuration that the space makes of these values, as if it had drawn them.

        Values of parameters that the configuration does not have are ignored. Parameters without a value have their
        first choice or lower end.

        Args:
            values: name -> value of its domain.
        """
        given = {name: self.parameters[name].decode(value) for name, value in values.items()}
        return place_values(self._space, given).params

    def _find_condition(self, name: str, draws: list[dict[str, Any]]) -> Condition | None:
        if all(name in each for each in draws):
            return None
        for parent, parameter in self.parameters.items():
            if parameter.domain.kind == "float":
                continue
            present = {parameter.encode(each[parent]) if parent in each else None for each in draws if name in each}
            absent = {parameter.encode(each[parent]) if parent in each else None for each in draws if name not in each}
            is_every_value_seen = len((present | absent) - {None}) == count_values(parameter.distribution)
            if is_every_value_seen and None not in present and not present & absent:
                return Condition(parent, tuple(sorted(value for value in present if value is not None)))
        raise ValueError(
            f"{self._space.file}: {name} does not exist in every configuration, and no value of one other parameter "
            f"decides it in {len(draws)} draws; the peers need that"
        )


# --- Syne Tune --------------------------------------------------------------------------------------------------------


class SyneTuneMethod:
    """A scheduler of Syne Tune.

    Args:
        task: what is searched.
        scheduler: name of its class in `syne_tune.optimizer.baselines`, or in `legacy_baselines` of version 0.14.
        is_legacy: it is one of `legacy_baselines`, whose interface differs a little.
    """

    def __init__(self, task: Task, scheduler: str, *, is_legacy: bool = False) -> None:
        np.random.seed(task.seed)  # some draws are from NumPy's global generator
        logging.getLogger("syne_tune").setLevel(logging.ERROR)
        baselines = importlib.import_module(_SYNE_TUNE_LEGACY if is_legacy else _SYNE_TUNE)
        self._flat = FlatSpace(task.space)
        self._is_legacy = is_legacy
        space = make_syne_tune_space(self._flat)
        common = {"metric": LOSS, "random_seed": task.seed, "points_to_evaluate": []}
        if is_legacy:
            resources = {"resource_attr": _EPOCH, "max_resource_attr": "max_epochs", "mode": "min"}
            make = getattr(baselines, scheduler)
            self._scheduler = make(space | {"max_epochs": task.max_epochs}, **resources, **common)
        else:
            self._scheduler = getattr(baselines, scheduler)(
                space, time_attr=_EPOCH, max_t=task.max_epochs, do_minimize=True, **common
            )
        self._trials: dict[int, Any] = {}

    def next_trial(self) -> tuple[int, Params | None] | None:
        from syne_tune.backend.trial_status import Trial

        number = len(self._trials)
        suggestion = self._scheduler.suggest(number) if self._is_legacy else self._scheduler.suggest()
        if suggestion is None:
            return None
        if not suggestion.spawn_new_trial_id:
            paused = int(suggestion.checkpoint_trial_id)
            if suggestion.config is not None:
                self._trials[paused].config = suggestion.config
            return paused, None
        self._trials[number] = Trial(number, suggestion.config, datetime.now())
        self._scheduler.on_trial_add(self._trials[number])
        values = {name: value for name, value in suggestion.config.items() if name in self._flat.parameters}
        return number, self._flat.build_params(values)

    def report(self, trial: int, epoch: int, loss: float) -> Decision:
        if not math.isfinite(loss):
            self._scheduler.on_trial_error(self._trials[trial])
            return "stop"
        decision = self._scheduler.on_trial_result(self._trials[trial], {LOSS: loss, _EPOCH: epoch})
        if decision == "CONTINUE":
            return "continue"
        self._scheduler.on_trial_remove(self._trials[trial])
        return "pause" if decision == "PAUSE" else "stop"

    def close(self) -> None:
        """Do nothing: there are no resources."""


def make_syne_tune_space(flat: FlatSpace) -> dict[str, Any]:
    """Return Syne Tune's configuration space, without conditions."""
    from syne_tune import config_space

    def make(domain: Domain) -> Any:
        if domain.kind == "choice":
            return config_space.choice(list(range(int(domain.high) + 1)))
        if domain.kind == "integer":
            draw = config_space.lograndint if domain.log else config_space.randint
            return draw(int(domain.low), int(domain.high))
        return (config_space.loguniform if domain.log else config_space.uniform)(domain.low, domain.high)

    return {name: make(parameter.domain) for name, parameter in flat.parameters.items()}


# --- ConfigSpace: SMAC, and BOHB of Ray -------------------------------------------------------------------------------


def make_config_space(flat: FlatSpace, seed: int) -> Any:
    """Return a ConfigurationSpace of ConfigSpace, with the conditions."""
    import ConfigSpace as cs  # noqa: N813

    def make(name: str, domain: Domain) -> Any:
        if domain.kind == "choice":
            return cs.Categorical(name, list(range(int(domain.high) + 1)))
        if domain.kind == "integer":
            return cs.Integer(name, (int(domain.low), int(domain.high)), log=domain.log)
        return cs.Float(name, (domain.low, domain.high), log=domain.log)

    space = cs.ConfigurationSpace(seed=seed)
    space.add([make(name, parameter.domain) for name, parameter in flat.parameters.items()])
    conditions = {name: each.condition for name, each in flat.parameters.items() if each.condition is not None}
    space.add([cs.InCondition(space[name], space[each.parent], list(each.values)) for name, each in conditions.items()])
    return space


class SmacMethod:
    """SMAC's MultiFidelityFacade.

    SMAC does not say when a trial ends for good; one whose budget is used up pauses. A failed trial costs as much as
    the worst loss so far: with the default of Scenario.crash_cost, which is infinite, SMAC's random forest gets NaN.
    """

    def __init__(self, task: Task) -> None:
        from smac import MultiFidelityFacade, Scenario

        self._flat = FlatSpace(task.space)
        self._folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        scenario = Scenario(
            make_config_space(self._flat, task.seed),
            deterministic=True,
            min_budget=1,
            max_budget=task.max_epochs,
            seed=task.seed,
            output_directory=Path(self._folder.name),
        )
        self._smac = MultiFidelityFacade(scenario, _never_train, logging_level=False, overwrite=True)
        self._numbers: dict[Any, int] = {}
        self._pending: dict[int, Any] = {}
        self._worst = 0.0

    def next_trial(self) -> tuple[int, Params | None] | None:
        info = self._smac.ask()
        is_new = info.config not in self._numbers
        number = self._numbers.setdefault(info.config, len(self._numbers))
        self._pending[number] = info
        return number, self._flat.build_params(dict(info.config)) if is_new else None

    def report(self, trial: int, epoch: int, loss: float) -> Decision:
        from smac.runhistory import StatusType, TrialValue

        info = self._pending[trial]
        if not math.isfinite(loss):
            self._smac.tell(info, TrialValue(self._worst, status=StatusType.CRASHED), save=False)
            return "stop"
        self._worst = max(self._worst, loss)
        if epoch < round(info.budget):
            return "continue"
        self._smac.tell(info, TrialValue(loss), save=False)
        return "pause"

    def close(self) -> None:
        self._folder.cleanup()


def _never_train(config: Any, seed: int, budget: float) -> float:
    """Stand in for the target function, which `ask` and `tell` do not call."""
    raise NotImplementedError


class RayBohbMethod:
    """Ray's TuneBOHB and HyperBandForBOHB, in a loop that does what Ray's TuneController does with them."""

    def __init__(self, task: Task) -> None:
        from ray.tune.schedulers import HyperBandForBOHB
        from ray.tune.search.bohb import TuneBOHB

        np.random.seed(task.seed)  # HpBandSter draws from NumPy's global generator
        logging.getLogger("hpbandster").setLevel(logging.ERROR)
        self._flat = FlatSpace(task.space)
        self._searcher = TuneBOHB(make_config_space(self._flat, task.seed), metric=LOSS, mode="min", seed=task.seed)
        self._scheduler: Any = HyperBandForBOHB(metric=LOSS, mode="min", max_t=task.max_epochs, reduction_factor=_ETA)
        self._trials: dict[str, RayTrial] = {}
        self.search_alg = self  # the scheduler asks the controller for `search_alg.searcher`
        self.searcher = self._searcher

    def get_trials(self) -> list[RayTrial]:
        """Return all trials, for the scheduler."""
        return list(self._trials.values())

    def stop_trial(self, trial: RayTrial) -> None:
        """End a paused trial, for the scheduler."""
        if trial.status in ("PENDING", "PAUSED"):
            self._scheduler.on_trial_remove(self, trial)
            self._searcher.on_trial_complete(trial.trial_id)
            trial.status = "TERMINATED"

    def next_trial(self) -> tuple[str, Params | None] | None:
        if not any(trial.status == "PENDING" for trial in self._trials.values()):
            self._enqueue()
        trial = self._scheduler.choose_trial_to_run(self)
        if trial is None:
            return None
        is_new = trial.status == "PENDING"
        trial.status = "RUNNING"
        return trial.trial_id, self._flat.build_params(trial.config) if is_new else None

    def report(self, trial: str, epoch: int, loss: float) -> Decision:
        each = self._trials[trial]
        if not math.isfinite(loss):
            each.status = "ERROR"
            self._scheduler.on_trial_error(self, each)
            self._searcher.on_trial_complete(trial, error=True)
            return "stop"
        result = {LOSS: loss, "training_iteration": epoch}
        decision = self._scheduler.on_trial_result(self, each, result)
        if decision == "STOP":
            self._scheduler.on_trial_complete(self, each, result)
            self._searcher.on_trial_complete(trial, result)
            each.status = "TERMINATED"
            return "stop"
        self._searcher.on_trial_result(trial, result)
        each.status = "PAUSED" if decision == "PAUSE" else "RUNNING"
        return "pause" if decision == "PAUSE" else "continue"

    def close(self) -> None:
        """Do nothing: there are no resources."""

    def _enqueue(self) -> None:
        name = str(len(self._trials))
        values = self._searcher.suggest(name)
        assert values is not None, "the number of running trials has no limit"
        trial = RayTrial(name, values, self._scheduler)
        trial.status = "PENDING"
        self._trials[name] = trial
        self._scheduler.on_trial_add(self, trial)


# --- NePS -------------------------------------------------------------------------------------------------------------


class NepsMethod:
    """An optimizer of NePS, asked and told through its AskAndTell.

    Its ASHA also promotes a trial whose result is still pending if a rung has no better one. There is no checkpoint
    then, so the promoted configuration is trained from the start.

    Args:
        task: what is searched.
        algorithm: name of the function in `neps.algorithms`.
        options: its options.
    """

    def __init__(self, task: Task, algorithm: str, **options: Any) -> None:
        import neps
        import torch

        for seed in (random.seed, np.random.seed, torch.manual_seed):  # NePS draws from the global generators
            seed(task.seed)
        self._flat = FlatSpace(task.space)
        self._names = {f"parameter_{number}": name for number, name in enumerate(self._flat.parameters)}
        space = make_neps_space({each: self._flat.parameters[name] for each, name in self._names.items()}, task)
        self._neps = neps.AskAndTell(getattr(neps.algorithms, algorithm)(space, eta=_ETA, **options))
        self._running: dict[str, Any] = {}
        self._paused: dict[str, dict[str, int]] = {}  # number of a configuration -> trial -> epochs

    def next_trial(self) -> tuple[str, Params | None] | None:
        asked = self._neps.ask()
        paused = self._paused.setdefault(_get_number(asked), {})
        resumable = [name for name, epochs in paused.items() if epochs < asked.config[_EPOCH]]
        trial = max(resumable, key=lambda name: paused[name], default=asked.metadata.id)
        self._running[trial] = asked
        if resumable:
            del paused[trial]
            return trial, None
        return trial, self._flat.build_params({name: asked.config[each] for each, name in self._names.items()})

    def report(self, trial: str, epoch: int, loss: float) -> Decision:
        asked = self._running[trial]
        if math.isfinite(loss) and epoch < asked.config[_EPOCH]:
            return "continue"
        del self._running[trial]
        if not math.isfinite(loss):
            self._neps.tell(asked, FloatingPointError("the training diverged"))
            return "stop"
        self._neps.tell(asked, loss)
        self._paused[_get_number(asked)][trial] = epoch
        return "pause"

    def close(self) -> None:
        """Do nothing: the trials are in memory."""


def _get_number(asked: Any) -> str:
    """Return the number of the configuration, which an evaluation with a larger budget shares."""
    return asked.metadata.id.partition("_rung_")[0]


def make_neps_space(parameters: Mapping[str, FlatParameter], task: Task) -> Any:
    """Return a PipelineSpace of NePS, without conditions. Names are those of Python attributes."""
    import neps

    def make(domain: Domain) -> Any:
        if domain.kind == "choice":  # numbers, because NePS orders them by their hash, which for text is a random one
            return neps.Categorical(choices=list(range(int(domain.high) + 1)))
        if domain.kind == "integer":
            return neps.Integer(int(domain.low), int(domain.high), log=domain.log)
        return neps.Float(domain.low, domain.high, log=domain.log)

    members = {name: make(parameter.domain) for name, parameter in parameters.items()}
    return type("Space", (neps.PipelineSpace,), members | {_EPOCH: neps.IntegerFidelity(1, task.max_epochs)})()


# --- all --------------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """A method of another package.

    Attributes:
        make: makes the method.
        modules: the modules that it needs.
    """

    make: Callable[[Task], Method]
    modules: tuple[str, ...]

    def is_installed(self) -> bool:
        """Return whether its package can be imported, without importing all of it."""
        try:
            return all(importlib.util.find_spec(module) is not None for module in self.modules)
        except ModuleNotFoundError:  # of a parent of the module
            return False


_SYNE_TUNE = "syne_tune.optimizer.baselines"
_SYNE_TUNE_LEGACY = "syne_tune.optimizer.legacy_baselines"


def _make_syne_tune(scheduler: str) -> Peer:
    return Peer(lambda task: SyneTuneMethod(task, scheduler), (_SYNE_TUNE,))


def _make_legacy_syne_tune(scheduler: str) -> Peer:
    return Peer(lambda task: SyneTuneMethod(task, scheduler, is_legacy=True), (_SYNE_TUNE_LEGACY, "autograd"))


def _make_neps(algorithm: str, **options: Any) -> Peer:
    return Peer(lambda task: NepsMethod(task, algorithm, **options), ("neps",))


PEERS: Mapping[str, Peer] = {
    "Syne Tune: ASHA": _make_syne_tune("ASHA"),
    "Syne Tune: ASHA + BORE": _make_syne_tune("ASHABORE"),
    "Syne Tune: ASHA + CQR": _make_syne_tune("ASHACQR"),
    "Syne Tune: BOHB": _make_syne_tune("BOHB"),
    "Syne Tune 0.14: PASHA": _make_legacy_syne_tune("PASHA"),
    "Syne Tune 0.14: MOBSTER": _make_legacy_syne_tune("MOBSTER"),
    "Syne Tune 0.14: Hyper-Tune": _make_legacy_syne_tune("HyperTune"),
    "Syne Tune 0.14: DyHPO": _make_legacy_syne_tune("DyHPO"),
    "SMAC: MultiFidelityFacade": Peer(SmacMethod, ("smac",)),
    "NePS: ASHA": _make_neps("asha"),
    "NePS: PriorBand": _make_neps("priorband"),
    "NePS: PriorBand + GP": _make_neps("priorband", bayesian_optimization_kick_in_point=10),
    "Ray: BOHB": Peer(RayBohbMethod, ("hpbandster", "ConfigSpace")),
}
"""Name -> the method."""
