"""Run and measure a sweep of real trials: ours as in tune.py, or Ray Tune's documented recipe for Lightning.

Each sweep has its own process with a new Ray. On both sides a callback clocks the training steps and validations of
each trial, and the same configuration defines the network, the data and the training. The plain side follows Tune's
documentation for Lightning: a function that builds module and Trainer, with TuneReportCheckpointCallback among its
callbacks, under Tuner, ASHAScheduler and OptunaSearch. It keeps the defaults of Tune and Lightning, except for the
progress bar, which the documentation also turns off. With TuneConfig(reuse_actors=True), which is another side, Tune
starts the next trial in the process of one that has ended, as we do; Ray's own wrapper of the function resets it.
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

Side = Literal["ours", "plain", "plain + reuse_actors"]
REUSING: Side = "plain + reuse_actors"

ON_CPU = ("trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "sweep.cpus_per_trial=1", "sweep.retrain=false")
"""One core and one thread per trial, on both sides."""

_LIMIT_S = 3600.0


@dataclass(frozen=True)
class MeasuredSweep:
    """A measured sweep.

    Attributes:
        started: when the sweep was requested, in seconds since 1970.
        ended: when its last trial ended, in seconds since 1970.
        num_slots: number of slots.
        trials: its trials, or their segments.
    """

    started: float
    ended: float
    num_slots: int
    trials: Sequence[ClockedSegment]

    @property
    def slot_s(self) -> float:
        return self.num_slots * (self.ended - self.started)


# --- in the driver of the benchmark -----------------------------------------------------------------------------------


def measure_sweep(side: Side, overrides: Sequence[str], proposals: Sequence[Params] | None = None) -> MeasuredSweep:
    """Run a sweep in its own process.

    Args:
        side: the side.
        overrides: overrides of tune.py.
        proposals: what a plain side trains, in order; None: its OptunaSearch proposes, with the seed of the sweep.
            Our side always proposes itself, as configured.
    """
    record = run_in_fresh_process(run_measured, side=side, overrides=list(overrides), proposals=proposals)
    trials = [
        ClockedSegment(**trial | {"values": [tuple(each) for each in trial["values"]]}) for trial in record["trials"]
    ]
    return MeasuredSweep(**record | {"trials": trials})


def run_in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """Run a function of one of our modules in its own process, and return its result.

    Arguments and result are passed as JSON. The output is shown only if the function fails, and then this process
    exits.
    """
    module, name = function.__module__, function.__name__
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log.txt"
        # The module is imported, not run: objects sent to workers must not come from a __main__ that the workers do not
        # have.
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
            log_text = log.read_text(encoding="utf-8", errors="replace")
            sys.exit(f"{name}({arguments}) ended with {done.returncode}:\n{log_text[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _make_script() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def make_data(overrides: Sequence[str]) -> None:
    """Draw and pack the data of a sweep, so that no side has to do it. A mistake in the overrides exits the process."""
    try:
        summarise_data(compose("tune", overrides))
    except UserError as error:
        sys.exit(f"error: {error}")


# --- in the process of a sweep ----------------------------------------------------------------------------------------


def run_measured(side: Side, overrides: Sequence[str], proposals: Sequence[Params] | None) -> dict[str, Any]:
    """Run a sweep in this process. Return the values of a `MeasuredSweep`, with trials sorted by their first steps."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "clocks").mkdir()
        started = time.time()
        place_overrides = (quote_override("sweep.folder", str(folder / "sweep")), "sweep.name=measured")
        config = compose("tune", [*overrides, *place_overrides])
        if side == "ours":
            ended = _run_ours(config, overrides, folder)
        else:
            ended = _run_plain(config, overrides, folder, proposals, reuse_actors=side == REUSING)
        trials = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "clocks").glob("*.json")]
    return {
        "started": started,
        "ended": ended,
        "num_slots": config.ray.num_cpus or count_cores(),
        "trials": sorted(trials, key=lambda trial: trial["first_step"]),
    }


def _run_ours(config: Any, given: Sequence[str], folder: Path) -> float:
    """Run our sweep as in tune.py, up to the winner. Return when the last trial ended."""
    plan = build_plan(SweepTask(config, given, list_location_overrides(config), {}, load_space(config.search_space)))
    with plan.run_sweep(trial_function=ClockedObjective(**vars(plan.trial_function), clocks=str(folder / "clocks"))):
        pass
    # Time of the last event: all trials had ended, and Ray was still running.
    return (plan.sweep.path / EVENTS_FILE).stat().st_mtime


def _run_plain(
    config: Any, given: Sequence[str], folder: Path, points: Sequence[Params] | None, *, reuse_actors: bool
) -> float:
    """Run the sweep as in Tune's documentation. Return when the last trial ended."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    sweep, rule, space = instantiate(config.sweep), config.scheduler, load_space(config.search_space)
    recipe = TrialRecipe(
        select_training_overrides(given), list_location_overrides(config), sweep.max_epochs, sweep.cpus_per_trial
    )
    name = sweep.metric.partition("/")[2]  # OptunaSearch does not accept slashes
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
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder / "sweep")),
    ).fit()
    ended = time.time()
    ray.shutdown()
    return ended


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the distributions of a space without conditions, for OptunaSearch.

    OptunaSearch pickles the space, so that it cannot be a function.
    """
    trial = optuna.create_study().ask()
    space.sample(trial)
    return trial.distributions
