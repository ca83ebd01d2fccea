"""Sweeps with a known truth: the searcher, scheduler, events and files are real, and the values come from a formula.

Nothing is trained and Ray is not started, so that hundreds of sweeps take minutes. The folder of such a sweep can be
read and reported like any other. It cannot be resumed or audited, because its sweep.yaml has no overrides.
"""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig

from handpose.config import compose, to_plain_values
from handpose.report.trial_table import TrialTable
from handpose.search.space import flatten_config, load_space
from handpose.sweep.controller.controller import SweepController
from handpose.sweep.controller.history import History
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler, make_searcher
from handpose.sweep.record.events import EVENTS_FILE, EventLog

LossFunction = Callable[[Mapping[str, Any], int, random.Random], float]
"""(parameters, epoch, generator of the trial) -> value of the metric; smaller is better."""

REPOSITORY = Path(__file__).resolve().parents[1]
SPACE_NAMES = tuple(
    sorted(file.stem for file in (REPOSITORY / "search_spaces").iterdir() if file.suffix in (".yaml", ".py"))
)
"""The names of the search spaces that the project contains."""


@dataclass(frozen=True)
class SweepSetup:
    """How a fabricated sweep is run. Each of the `num_slots` slots takes one second for an epoch."""

    space: str
    searcher: str
    scheduler: str
    mode: str = "stop"
    num_trials: int = 40
    max_epochs: int = 9
    num_slots: int = 4


def fabricate_sweep(setup: SweepSetup, loss: LossFunction, folder: Path, *, seed: int) -> None:
    """Run a sweep whose trials report `loss`, and write its folder as tune.py would before the confirmation."""
    config = _make_config(setup)
    sweep = instantiate(config.sweep)
    sweep = replace(sweep, folder=str(folder), seed=seed, num_trials=setup.num_trials, max_epochs=setup.max_epochs)
    space = load_space(setup.space)
    scheduler = bind_scheduler(instantiate(config.scheduler), sweep, space)
    _write_description(config, folder, setup, seed)
    searcher = make_searcher(
        instantiate(config.searcher),
        sweep,
        space,
        repeats=scheduler().perturbs_params,
        folder=folder / "study",
        defaults=flatten_config(to_plain_values(config)),
        fingerprint=None,
    )
    log = EventLog(folder / EVENTS_FILE)
    table = TrialTable(sweep.metric, sweep.target.mode, sweep.num_trials, sweep.max_epochs)
    clock = _Clock()
    state = SweepController(
        sweep, log=log, history=History(sweep, scheduler=scheduler(), table=table), searcher=searcher, clock=clock
    )
    state.open(num_slots=setup.num_slots)
    _run_slots(state, loss, sweep.metric, clock, seed)
    state.close("finished")
    searcher.close()
    log.close()


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _run_slots(state: SweepController, loss: LossFunction, metric: str, clock: _Clock, seed: int) -> None:
    """Let all slots train one epoch in turn until the sweep is over."""
    running: dict[int, int] = {}  # trial -> its last epoch
    generators: dict[int, random.Random] = {}
    while True:
        while (segment := state.next_segment()) is not None:
            running[segment.trial] = state.history.trials[segment.trial].row.epochs
        if state.is_over:
            return
        clock.now += 1.0
        for trial in list(running):
            running[trial] += 1
            generator = generators.setdefault(trial, random.Random(f"{seed} {trial}"))
            params = state.history.trials[trial].row.params
            value = loss(params, running[trial], generator)
            if not state.process_report(trial, running[trial], {metric: value}):
                del running[trial]


@cache
def _make_config(setup: SweepSetup) -> DictConfig:
    mode = [f"scheduler.mode={setup.mode}"] if setup.scheduler == "asha" else []
    given = [f"search_space={setup.space}", f"searcher={setup.searcher}", f"scheduler={setup.scheduler}"]
    return compose("tune", [*given, *mode, "sweep.name=fabricated"])


def _write_description(config: DictConfig, folder: Path, setup: SweepSetup, seed: int) -> None:
    folder.mkdir(parents=True)
    values = to_plain_values(config)
    values["sweep"] |= {
        "folder": str(folder),
        "seed": seed,
        "num_trials": setup.num_trials,
        "max_epochs": setup.max_epochs,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"config": values}), encoding="utf-8")
    (folder / "search_space").mkdir()
    (file,) = (REPOSITORY / "search_spaces").glob(f"{setup.space}.*")
    shutil.copy(file, folder / "search_space")
