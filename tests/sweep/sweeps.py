"""Small sweeps over cheap curves instead of networks."""

from functools import partial

from optuna.samplers import RandomSampler, TPESampler

from handpose.config import compose, list_location_overrides
from handpose.schedulers.asha import Asha
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.space import load_space
from handpose.sweep.controller.slots import MIN_PROCESS_MB
from handpose.sweep.driver.resume import SweepTask, copy_space, make_sweep_record
from handpose.sweep.driver.run import SweepRun, run_sweep
from handpose.sweep.record.settings import ConfirmSettings, RaySettings, SweepSettings
from handpose.yaml_files import write_yaml
from tests.sweep.objectives import METRIC


def make_settings(folder, **changes):
    """Settings of a small sweep in that folder."""
    values = {
        "name": "test",
        "folder": str(folder),
        "resume": None,
        "status": None,
        "num_trials": 6,
        "max_epochs": 4,
        "folds": 1,
        "workers_per_trial": 1,
        "cpus_per_trial": 1,
        "gpus_per_trial": None,
        "max_concurrent": None,
        "time_budget_s": None,
        "gpu_hours": None,
        "stop_when": None,
        "seed": 0,
        "metric": METRIC,
        "mode": "min",
        "second_objective": None,
        "latency_of": None,
        "divergence_factor": 10.0,
        "checkpoint_every_epochs": None,
        "checkpoint_budget_gb": 1.0,
        "max_retries": 2,
        "retry_delay_s": 0.0,
        "hang_timeout_s": None,
        "quarantine_after_failures": 3,
        "stop_after_failures": 3,
        "preflight": "off",
        "confirm": ConfirmSettings(top_k=0, seeds=0),
        "retrain": True,
        "retrain_devices": None,
        "wandb_project": None,
        "storage": None,
    }
    return SweepSettings(**values | changes)


def write_begun_sweep(folder, overrides):
    """Write what a sweep with these overrides has left in its folder before its first trial. Returns the folder."""
    config = compose("tune", overrides)
    task = SweepTask(config, overrides, list_location_overrides(config), {}, load_space("default"))
    copy_space(task.space, folder)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, {"data_fingerprint": "abc"}))
    return folder


def make_asha(max_epochs, **changes):
    values = {"mode": "stop", "grace_period": 1, "reduction_factor": 2, "brackets": 1, "seed": 0}
    return lambda: Asha(max_epochs=max_epochs, **values | changes)


def make_tpe():
    return partial(TPESampler, n_startup_trials=4)


def run_small_sweep(
    settings,
    space,
    trial_function,
    *,
    sampler=RandomSampler,
    scheduler=None,
    defaults=None,
    resume=False,
    command=lambda params: f"python train.py {params}",
    folder_sync=None,
    preflight=lambda slots: slots,
    process_mb=MIN_PROCESS_MB,
    load_space=None,
    **searcher,
):
    """Run a sweep; returns its table. sampler: None for a grid."""
    run = SweepRun(
        sweep=settings,
        cluster=RaySettings(address=None, num_cpus=2),
        space=space,
        searcher=partial(OptunaSearcher, sampler=sampler, defaults=defaults or {}, **searcher),
        make_scheduler=scheduler or make_asha(settings.max_epochs),
        trial_function=trial_function,
        command=command,
        description=None if resume else {"name": "test"},
        folder_sync=folder_sync,
        preflight=preflight,
        process_mb=process_mb,
        load_space=load_space,
    )
    with run_sweep(run) as table:
        return table
