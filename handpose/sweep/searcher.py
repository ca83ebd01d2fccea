"""What proposes the next configuration: an Optuna study behind Tune's Searcher.

Tune brings an OptunaSearch of its own, which tells the study half-truths (seen on Ray 2.60 with Optuna 5.0): a trial
that the scheduler stopped at epoch 1 is COMPLETE with its value there, so that a sampler mixes fidelities; a trial
that reports NaN stays RUNNING for ever, since `tell` raises and is swallowed; keys with slashes are refused. Here
every report reaches the study with its epoch, and every trial ends in the state it deserves:

    COMPLETE  trained to sweep.max_epochs
    PRUNED    stopped before; Optuna ranks it by (epoch, value)
    FAIL      diverged, crashed or never ran; no sampler learns from it
"""

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.search import Searcher

from handpose.sweep.space import Params, Space, grid_points

PARAMS = "params"
"""Key of Tune's configuration that holds a trial's parameters; nothing else is in it, so that no name can clash."""

_REPORTED = f"config/{PARAMS}/"


@dataclass
class _Asked:
    """A trial of the study that Tune is running: what it was begun with, and what was last told of it."""

    trial: optuna.Trial
    params: Params
    epoch: int = 0
    value: float = math.nan
    is_perturbed: bool = False
    is_over: bool = False


class OptunaSearcher(Searcher):
    """Asks an Optuna study for configurations and tells it what becomes of them.

    space: what is drawn. folder: where the study is kept, as journal.log, which optuna-dashboard can open while the
    sweep runs. name: of the study. metric, mode: what is optimised. max_epochs: full fidelity. seed: of the order of
    a grid. first: draws to try before all others, by parameter name. sampler: makes the sampler; without one every
    point of the space is tried once. Raises UserError when there is no sampler and the points cannot be listed.

    `numbers` has the number in the study of each of Tune's trials, by id.
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
        first: list[Params] | None = None,
        sampler: Callable[[], BaseSampler] | None = None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._space = space
        self._max_epochs = max_epochs
        self._is_grid = sampler is None
        self._planned = list(first or []) if sampler else _grid(space, first or [], seed)
        self.num_points = len(self._planned) if self._is_grid else None
        self.study = _create_study(folder, name, metric, mode, sampler or RandomSampler)
        self.numbers: dict[str, int] = {}
        self._asked: dict[str, _Asked] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next configuration, or FINISHED at the end of a grid."""
        if self._planned:
            self.study.enqueue_trial(self._planned.pop(0))
        elif self._is_grid:
            return Searcher.FINISHED
        trial = self.study.ask()
        try:
            params = self._space.suggest(trial)
        except Exception:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self._asked[trial_id] = _Asked(trial, params)
        self.numbers[trial_id] = trial.number
        return {PARAMS: params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the study a value and the epoch it belongs to."""
        asked = self._asked[trial_id]
        if asked.is_perturbed or result["epoch"] <= asked.epoch:
            return  # a trial that ends by itself repeats its last report
        if _params_of(result) != asked.params:
            # Population based training changes parameters on the way: from here on the values belong to other ones.
            asked.is_perturbed = True
            return
        asked.epoch, asked.value = result["epoch"], float(result[self.metric])
        asked.trial.report(asked.value, step=asked.epoch)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended; result is its last report."""
        if result and not self._asked[trial_id].is_over:
            self.on_trial_result(trial_id, result)
        self._end(self._asked[trial_id], error=error)

    def close(self) -> None:
        """Tell the study of the trials that ended without a word: of those that a budget or a signal cut off."""
        for asked in self._asked.values():
            self._end(asked, error=False)

    def _end(self, asked: _Asked, *, error: bool) -> None:
        if asked.is_over:
            return
        asked.is_over = True
        if error or not math.isfinite(asked.value):
            self.study.tell(asked.trial, state=TrialState.FAIL)
        elif asked.epoch >= self._max_epochs:
            self.study.tell(asked.trial, asked.value)
        else:
            self.study.tell(asked.trial, state=TrialState.PRUNED)


def _params_of(result: dict[str, Any]) -> Params:
    return {key.removeprefix(_REPORTED): value for key, value in result.items() if key.startswith(_REPORTED)}


def _grid(space: Space, first: list[Params], seed: int) -> list[Params]:
    """Every point once, those to be tried first at the head, the others in an order drawn from the seed.

    Optuna's GridSampler is not used: told of the last point but one outside Study.optimize it calls Study.stop, which
    raises there.
    """
    points = [point for point in grid_points(space) if point not in first]
    random.Random(seed).shuffle(points)
    return [*first, *points]


def _create_study(
    folder: Path, name: str, metric: str, mode: Literal["min", "max"], sampler: Callable[[], BaseSampler]
) -> optuna.Study:
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    direction = StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of TPE's `group` and of the name of the metric
        study = optuna.create_study(storage=storage, sampler=sampler(), study_name=name, direction=direction)
        study.set_metric_names([metric])
    return study
