"""A sweep of real trials, measured: ours as tune.py runs it, or Ray Tune's documented recipe for Lightning.

Each sweep has a process of its own with a fresh Ray. On both sides a callback clocks the training steps and validations
of each trial, and the same configuration makes the network, the data and the training of a trial. The plain side is
what Tune's documentation shows for Lightning: a function that builds module and Trainer, with
TuneReportCheckpointCallback among its callbacks, under Tuner, ASHAScheduler and OptunaSearch. What it leaves to the
defaults of Tune and Lightning is left to them, except for the progress bar, which it turns off too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.utils import instantiate
from optuna.distributions import BaseDistribution

from benchmarks.clock import ClockedObjective, ClockedSegment, make_plain_trainable
from handpose.config import compose, list_location_overrides, quote_override
from handpose.config_files import REPOSITORY
from handpose.errors import UserError
from handpose.resources import count_cores
from handpose.search.space import Params, Space, load_space
from handpose.sweep.driver.resume import SweepTask
from handpose.sweep.plan import build_plan
from handpose.sweep.preflight.checks import summarise_data
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.trainable.trial import TrialRecipe, select_training_overrides

Side = Literal["ours", "plain"]

ON_CPU = ("trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "sweep.cpus_per_trial=1", "sweep.retrain=false")
"""One core and one thread a trial, on both sides."""

_LIMIT_S = 3600.0


@dataclass(frozen=True)
class MeasuredSweep:
    """A sweep as it was clocked: asked for at `started`, its last trial ended at `ended`."""

    started: float
    ended: float
    num_slots: int
    trials: Sequence[ClockedSegment]

    @property
    def slot_s(self) -> float:
        return self.num_slots * (self.ended - self.started)


# --- from the outside -------------------------------------------------------------------------------------------------


def measure_sweep(side: Side, overrides: Sequence[str], proposals: Sequence[Params] | None = None) -> MeasuredSweep:
    """Run a sweep in a process of its own. overrides: of tune.py. proposals: what the plain side is to train, in order;
    without any its OptunaSearch proposes, with the seed of the sweep. Ours proposes itself, as configured.
    """
    record = run_in_fresh_process(run_measured, side=side, overrides=list(overrides), proposals=proposals)
    trials = [
        ClockedSegment(**trial | {"values": [tuple(each) for each in trial["values"]]}) for trial in record["trials"]
    ]
    return MeasuredSweep(**record | {"trials": trials})


def run_in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """What a function of a module of ours answers in a process of its own; arguments and answer travel as JSON.

    Its output is shown only when it fails, which ends this process too.
    """
    module, name = function.__module__, function.__name__
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        # The module is imported, not run: what workers are sent must not come from a __main__ that they lack.
        code = (
            f"import json, pathlib, sys; from {module.replace('__main__', _make_script())} import {name}; "
            f"pathlib.Path({str(answer)!r}).write_text("
            f"json.dumps({name}(**json.load(sys.stdin))), encoding='utf-8')"
        )
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [sys.executable, "-c", code],
                input=json.dumps(arguments),
                encoding="utf-8",
                stdout=output,
                stderr=output,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
                timeout=_LIMIT_S,
            )
        if done.returncode:
            said = log.read_text(encoding="utf-8", errors="replace")
            sys.exit(f"{name}({arguments}) ended with {done.returncode}:\n{said[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _make_script() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def make_data(overrides: Sequence[str]) -> None:
    """Draw and pack the data of a sweep, so that no side has to; a mistake in the overrides ends the process."""
    try:
        summarise_data(compose("tune", overrides))
    except UserError as error:
        sys.exit(f"error: {error}")


# --- in the process of a sweep ----------------------------------------------------------------------------------------


def run_measured(side: Side, overrides: Sequence[str], proposals: Sequence[Params] | None) -> dict[str, Any]:
    """Run a sweep here; returns the fields of `MeasuredSweep`, trials in the order of their first steps."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "clocks").mkdir()
        began = time.time()
        place_overrides = (quote_override("sweep.folder", str(folder / "sweep")), "sweep.name=measured")
        config = compose("tune", [*overrides, *place_overrides])
        if side == "ours":
            ended = _run_ours(config, overrides, folder)
        else:
            ended = _run_plain(config, overrides, folder, proposals)
        trials = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "clocks").glob("*.json")]
    return {
        "began": began,
        "ended": ended,
        "num_slots": config.ray.num_cpus or count_cores(),
        "trials": sorted(trials, key=lambda trial: trial["first_step"]),
    }


def _run_ours(config: Any, given: Sequence[str], folder: Path) -> float:
    """As tune.py has it, up to the winner; returns when the last trial had ended."""
    plan = build_plan(SweepTask(config, given, list_location_overrides(config), {}, load_space(config.search_space)))
    with plan.run_sweep(trial_function=ClockedObjective(**vars(plan.trial_function), clocks=str(folder / "clocks"))):
        pass
    return (plan.sweep.path / EVENTS_FILE).stat().st_mtime  # of its last event: all trials had ended, and Ray still ran


def _run_plain(config: Any, given: Sequence[str], folder: Path, points: Sequence[Params] | None) -> float:
    """As Tune's documentation has it; returns when the last trial had ended."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    sweep, rule, space = instantiate(config.sweep), config.scheduler, load_space(config.search_space)
    recipe = TrialRecipe(
        select_training_overrides(given), list_location_overrides(config), sweep.max_epochs, sweep.cpus_per_trial
    )
    name = sweep.metric.partition("/")[2]  # OptunaSearch takes no slashes
    train = make_plain_trainable(recipe, metric=sweep.metric, reported_as=name, clocks=str(folder / "clocks"))
    scheduler = (
        ASHAScheduler(max_t=sweep.max_epochs, grace_period=rule.grace_period, reduction_factor=rule.reduction_factor)
        if "reduction_factor" in rule
        else None
    )
    searcher = (
        OptunaSearch(make_distributions(space), metric=name, mode=sweep.target.mode, seed=sweep.seed)
        if points is None
        else None
    )
    ray.init(num_cpus=config.ray.num_cpus or count_cores())
    tune.Tuner(
        tune.with_resources(train, {"cpu": sweep.cpus_per_trial}),
        param_space=None if points is None else {"params": tune.grid_search(list(points))},
        tune_config=tune.TuneConfig(
            metric=name,
            mode=sweep.target.mode,
            scheduler=scheduler,
            search_alg=searcher,
            num_samples=sweep.num_trials if points is None else 1,
        ),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder / "sweep")),
    ).fit()
    ended = time.time()
    ray.shutdown()
    return ended


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """What OptunaSearch takes for a space without conditions; it pickles it, so that a function would not do."""
    trial = optuna.create_study().ask()
    space.sample(trial)
    return trial.distributions
