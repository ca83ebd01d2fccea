"""A sweep whose trials cost only time, and that otherwise runs as in tune.py. The cluster drills use it.

    python -m benchmarks.cheap_sweep FOLDER sweep.num_trials=30 ray.address=HOST:PORT
    python -m benchmarks.cheap_sweep FOLDER                     # resumes it

A trial trains one weight, which grows by its learning rate each epoch and is saved in the checkpoints. The final weight
shows whether every epoch was trained exactly once, on any nodes and processes. With several workers
(sweep.workers_per_trial) each adds its part, as gradients are added. The exit status is as in tune.py.
"""

import contextlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from ray import cloudpickle

from handpose.config import compose, list_location_overrides, quote_override
from handpose.files import write_atomically
from handpose.program import exit_on_user_error
from handpose.search.space import load_space
from handpose.sweep.audit.audit import compose_choices
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.driver.resume import SweepTask, load_recorded_task, make_sweep_record
from handpose.sweep.driver.run import SweepRun, run_sweep
from handpose.sweep.driver.shutdown import INTERRUPTED_STATUS, SweepInterruptedError
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.provenance import collect_provenance
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.storage.checkpoint_files import explain_unshared_folder
from handpose.sweep.storage.retention import describe_checkpoint, find_newest_intact
from handpose.sweep.trainable.reporting import get_worker_context, report_epoch
from handpose.sweep.trainable.trial import TrialRecipe, add_checkpoint_metric, select_training_overrides

EPOCHS = 8
BROKEN_NODE = "HANDPOSE_DRILL_BROKEN_NODE"
EPOCH_S = "HANDPOSE_DRILL_EPOCH_S"
"""Environment variables of a node: every trial on it fails, and the seconds that an epoch takes there."""

_METRIC = "val/pa_mpjpe_mm"
_DEFAULTS = (
    f"sweep.max_epochs={EPOCHS}",
    "sweep.gpus_per_trial=0",
    "sweep.retry_delay_s=0.5",
    "scheduler=asha",
    "scheduler.grace_period=2",
    "searcher=random",
)


def train_growing_weight(segment: TrialSegment) -> None:
    """Train a weight that grows by the learning rate each epoch. A larger weight is better."""
    if os.environ.get(BROKEN_NODE):
        raise RuntimeError("CUDA error: an uncorrectable ECC error was encountered")
    folder = Path(segment.folder)
    if problem := explain_unshared_folder(folder / EVENTS_FILE, timeout_s=1.0):
        raise FileNotFoundError(problem)
    newest = find_newest_intact(segment.checkpoints, folder)
    weight, epoch = json.loads((folder / newest.file).read_text(encoding="utf-8")) if newest else (0.0, 0)
    resumed_from = epoch
    while epoch < EPOCHS:
        time.sleep(float(os.environ.get(EPOCH_S, "1")))
        epoch += 1
        weight += _sum_over_workers(segment.params["optimizer.lr"] / get_worker_context().num_workers)
        checkpoint = None
        if get_worker_context().rank == 0:
            file = segment.make_checkpoint_path(epoch)
            with write_atomically(file) as part:
                part.write_text(json.dumps([weight, epoch]), encoding="utf-8")
            checkpoint = describe_checkpoint(file, folder=folder, epoch=epoch)
        report_epoch(epoch, {_METRIC: 10.0 - weight}, resumed_from=resumed_from, checkpoint=checkpoint)


def _sum_over_workers(part: float) -> float:
    """Sum the parts of all workers of the trial."""
    if get_worker_context().num_workers == 1:
        return part
    import torch

    parts = torch.tensor(part, dtype=torch.float64)
    torch.distributed.all_reduce(parts)
    return float(parts)


def main() -> None:
    """Start or resume the sweep."""
    if len(sys.argv) < 2 or {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        return
    folder, given = Path(sys.argv[1]).resolve(), sys.argv[2:]
    # Otherwise a worker would import everything that this file imports.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with exit_on_user_error():
        task = load_recorded_task(folder, given) if (folder / "sweep.yaml").is_file() else _make_new_task(folder, given)
        config, space = task.config, task.space
        sweep = instantiate(config.sweep)
        try:
            run = SweepRun(
                sweep=sweep,
                cluster=instantiate(config.ray),
                space=space,
                searcher=partial(instantiate(config.searcher), defaults=task.defaults, fingerprint=""),
                make_scheduler=bind_scheduler(instantiate(config.scheduler), sweep, space),
                trial_function=train_growing_weight,
                command=_make_recipe(task, sweep).format_command,
                description=None if task.origin else make_sweep_record(task, collect_provenance(data="")),
            )
            with run_sweep(run):
                pass
        except SweepInterruptedError as error:
            print(error, file=sys.stderr)
            sys.exit(INTERRUPTED_STATUS)


def _make_recipe(task: SweepTask, sweep: SweepSettings) -> TrialRecipe:
    """Make the recipe of a trial with a real network, for the commands in trials.csv."""
    overrides = add_checkpoint_metric(select_training_overrides(task.overrides), task.config, sweep.target)
    return TrialRecipe(overrides, task.locations, sweep.max_epochs, sweep.cpus_per_trial, sweep.workers_per_trial)


def _make_new_task(folder: Path, given: list[str]) -> SweepTask:
    overrides = [*_DEFAULTS, *given]
    folder_overrides = [quote_override("sweep.folder", str(folder)), f"sweep.name={folder.name}"]
    config = compose("tune", [*overrides, *folder_overrides])
    return SweepTask(
        config, overrides, list_location_overrides(config), compose_choices(overrides), load_space("default")
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
