"""Search methods behind one interface, for benchmarks/search.py: ours, and those of the packages that we require.

A method chooses the trial that a free slot runs next, and gets the loss of each epoch. What the packages decide
themselves (which trial starts, pauses, resumes or stops) is left to them. Methods of further packages are in
benchmarks/search_peers.py.

No method starts with the default configuration. Ours does in a sweep, which is a head start of a few trials if the
default is a good one.
"""

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from benchmarks.curve_surrogate import LOSS
from handpose.config import compose
from handpose.schedulers.scheduler import Scheduler
from handpose.search.epoch_timer import EpochTimer
from handpose.search.prior import Prior
from handpose.search.searcher import Searcher, TrialSnapshot
from handpose.search.space import Params, Space

Decision = Literal["continue", "pause", "stop"]

_ENDLESS = "sweep.num_trials=100000"
MEMORY = Path("/dev/shm")
"""A folder in memory: the study is a file that is synchronised after every report."""


class Task(NamedTuple):
    """What a method searches.

    Attributes:
        space: the search space.
        defaults: the overrides of every training, which give the default configuration.
        max_epochs: epochs of a complete trial.
        num_slots: number of trials at a time.
        seed: the seed of the method.
    """

    space: Space
    overrides: tuple[str, ...]
    max_epochs: int
    num_slots: int
    seed: int


class Method(Protocol):
    """A search method. Trials have any hashable name."""

    def next_trial(self) -> tuple[Any, Params | None] | None:
        """Return the trial that a free slot runs: its name, and its parameters if it is new; None to wait."""

    def report(self, trial: Any, epoch: int, loss: float) -> Decision:
        """Decide after an epoch. The loss is infinite if the training diverged; then the trial ends in any case."""

    def close(self) -> None:
        """Release resources."""


class OurMethod:
    """A scheduler and a searcher of this project, as configs/scheduler and configs/searcher make them.

    The searcher gets no default configuration, which it would propose first.

    Args:
        task: what is searched.
        choices: overrides that select them.

    Attributes:
        now: seconds on the simulated clock, to be set before each call.
    """

    def __init__(self, task: Task, *choices: str) -> None:
        from hydra.utils import instantiate

        from handpose.schema import bind_arguments

        config = compose("tune", [*task.overrides, *choices, f"sweep.max_epochs={task.max_epochs}", _ENDLESS])
        self.now = 0.0
        self._max_epochs = task.max_epochs
        self._folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        common = {"space": task.space, "max_epochs": task.max_epochs, "seed": task.seed}
        self._scheduler: Scheduler = bind_arguments(instantiate(config.scheduler), num_objectives=1, **common)()
        self._searcher: Searcher = bind_arguments(
            instantiate(config.searcher),
            folder=Path(self._folder.name),
            name="search",
            metric=LOSS,
            mode="min",
            repeats=False,
            defaults={},  # so that the default configuration is not the first one
            **common,
        )()
        self._snapshots: dict[int, TrialSnapshot] = {}
        self._timers: defaultdict[int, EpochTimer] = defaultdict(EpochTimer)

    def next_trial(self) -> tuple[int, Params | None] | None:
        self._scheduler.now = self.now
        start = self._scheduler.choose_trial_to_resume(can_start_trial=True)
        if start is not None:
            self._scheduler.on_trial_resume(start)
            self._timers[start.trial].start_segment(self.now)
            self._update(start.trial, state="running")
            return start.trial, None
        number = len(self._snapshots)
        params = self._searcher.suggest(number)
        if params is None:
            return None
        self._snapshots[number] = TrialSnapshot(number, "running", params, {})
        self._timers[number].start_segment(self.now)
        self._scheduler.on_trial_start(number, params)
        self._searcher.on_trial_update(self._snapshots[number])
        return number, params

    def report(self, trial: int, epoch: int, loss: float) -> Decision:
        values = {**self._snapshots[trial].values, epoch: loss}
        self._timers[trial].report(epoch, self.now)
        if not math.isfinite(loss):
            self._scheduler.on_trial_end(trial)
            self._update(trial, values=values, state="diverged")
            return "stop"
        self._scheduler.now = self.now
        decision = self._scheduler.on_trial_result(trial, epoch, loss)
        if epoch >= self._max_epochs:
            self._update(trial, values=values, state="complete")
            return "stop"
        states = {"continue": "running", "pause": "paused", "stop": "stopped"}
        self._update(trial, values=values, state=states[decision])
        return decision

    def close(self) -> None:
        self._searcher.close()
        self._folder.cleanup()

    def _update(self, number: int, **changes: Any) -> None:
        seconds = self._timers[number].typical_epoch_s
        self._snapshots[number] = self._snapshots[number]._replace(**changes, epoch_seconds=seconds)
        self._searcher.on_trial_update(self._snapshots[number])


class RayTrial:
    """What Ray's schedulers read of a trial."""

    def __init__(self, trial_id: str, config: Params, scheduler: Any) -> None:
        self.trial_id, self.config = trial_id, config
        self.status, self.is_saving = "RUNNING", False
        self.last_result: dict[str, Any] = {}
        self.stopping_criterion = {"training_iteration": math.inf}


class RayMethod:
    """Ray's ASHAScheduler and OptunaSearch with their defaults, but a reduction factor of 3; informed as by Tune."""

    def __init__(self, task: Task) -> None:
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        self._searcher = OptunaSearch(task.space.sample, metric=LOSS, mode="min", seed=task.seed)
        self._scheduler: Any = ASHAScheduler(  # without a Tune controller, and with trials that do nothing
            metric=LOSS, mode="min", max_t=task.max_epochs, grace_period=1, reduction_factor=3
        )
        self._max_epochs = task.max_epochs
        self._trials: dict[str, RayTrial] = {}

    def next_trial(self) -> tuple[str, Params | None] | None:
        name = str(len(self._trials))
        params = self._searcher.suggest(name)
        if params is None:
            return None
        self._trials[name] = RayTrial(name, params, self._scheduler)
        self._scheduler.on_trial_add(None, self._trials[name])
        return name, params

    def report(self, trial: str, epoch: int, loss: float) -> Decision:
        result = {LOSS: loss, "training_iteration": epoch}
        decision = self._scheduler.on_trial_result(None, self._trials[trial], result)
        self._searcher.on_trial_result(trial, result)
        if decision == "CONTINUE" and epoch < self._max_epochs and math.isfinite(loss):
            return "continue"
        self._scheduler.on_trial_complete(None, self._trials[trial], result)
        self._searcher.on_trial_complete(trial, result)
        return "stop"

    def close(self) -> None:
        """Do nothing: there are no resources."""


class OptunaMethod:
    """Optuna's TPE with its HyperbandPruner, as its documentation combines them; constant_liar for parallel trials."""

    def __init__(self, task: Task) -> None:
        import optuna

        self._space, self._max_epochs = task.space, task.max_epochs
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=task.max_epochs, reduction_factor=3)
        sampler = optuna.samplers.TPESampler(seed=task.seed, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler, pruner=pruner)
        self._trials: dict[int, Any] = {}

    def next_trial(self) -> tuple[int, Params | None] | None:
        trial = self._study.ask()
        self._trials[trial.number] = trial
        return trial.number, self._space.sample(trial)

    def report(self, trial: int, epoch: int, loss: float) -> Decision:
        import optuna

        asked = self._trials[trial]
        if not math.isfinite(loss):
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            return "stop"
        asked.report(loss, epoch)
        if epoch >= self._max_epochs:
            self._study.tell(asked, loss)
            return "stop"
        if asked.should_prune():
            self._study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            return "stop"
        return "continue"

    def close(self) -> None:
        """Do nothing: the study is in memory."""


class OracleMethod:
    """Trains one given configuration to its end, and nothing else."""

    def __init__(self, params: Params) -> None:
        self._left = [params]

    def next_trial(self) -> tuple[str, Params | None] | None:
        return ("best", self._left.pop()) if self._left else None

    def report(self, trial: str, epoch: int, loss: float) -> Decision:
        return "continue"

    def close(self) -> None:
        """Do nothing: there are no resources."""


def _make_ours(*choices: str) -> Callable[[Task, Any], Method]:
    return lambda task, world: OurMethod(task, *choices)


def _add_prior(task: Task, params: Params) -> Task:
    """Return the task with the belief that these parameters are the best ones, without a spread."""
    return task._replace(space=replace(task.space, priors={key: Prior(value) for key, value in params.items()}))


def _make_right_prior(task: Task, world: Any) -> Method:
    return OurMethod(_add_prior(task, world.best_params), *_ASHA_CURVES)


def _make_wrong_prior(task: Task, world: Any) -> Method:
    return OurMethod(_add_prior(task, world.worst_params), *_ASHA_CURVES)


_ASHA_CURVES = ("scheduler=asha", "searcher=curves")
_ASHA_TPE = ("scheduler=asha", "searcher=tpe")
WITHOUT_PRIOR = "ASHA + curves"
WITH_PRIOR = {f"{WITHOUT_PRIOR}, right prior": _make_right_prior, f"{WITHOUT_PRIOR}, wrong prior": _make_wrong_prior}
"""Name -> makes the method whose prior is centred at the best or at the worst reference configuration."""


METHODS: Mapping[str, Callable[[Task, Any], Method]] = {
    "oracle": lambda task, world: OracleMethod(world.best_params),
    "random": _make_ours("scheduler=fifo", "searcher=random"),
    "ASHA + random": _make_ours("scheduler=asha", "searcher=random"),
    WITHOUT_PRIOR: _make_ours(*_ASHA_CURVES),
    **WITH_PRIOR,
    "ASHA + TPE": _make_ours(*_ASHA_TPE),
    "ASHA + multivariate TPE": _make_ours(
        *_ASHA_TPE, *(f"searcher.sampler.{key}=true" for key in ("multivariate", "group"))
    ),
    "ASHA promote + curves": _make_ours("scheduler=asha", "scheduler.mode=promote", "searcher=curves"),
    "freeze-thaw + curves": _make_ours("scheduler=freeze_thaw", "searcher=curves"),
    "ASHA promote + TPE": _make_ours("scheduler=asha", "scheduler.mode=promote", "searcher=tpe"),
    "Ray: ASHA + OptunaSearch": lambda task, world: RayMethod(task),
    "Optuna: Hyperband + TPE": lambda task, world: OptunaMethod(task),
}
"""Name -> makes the method."""
