"""Ray, started once for all tests of sweeps, and sweeps over cheap curves instead of networks."""

import warnings
from functools import partial

import pytest
from optuna.samplers import RandomSampler, TPESampler
from ray.tune.schedulers import AsyncHyperBandScheduler

from handpose.sweep.run import ray_runtime, run_sweep
from handpose.sweep.searcher import OptunaSearcher
from handpose.sweep.settings import RaySettings, SweepSettings
from handpose.sweep.space import load_space
from tests.sweep.objectives import METRIC


@pytest.fixture(scope="session")
def ray_started():
    """Two slots of one core."""
    with warnings.catch_warnings(), ray_runtime(RaySettings(address=None, num_cpus=2)):
        yield


@pytest.fixture
def write_space(tmp_path):
    """Makes a search space of the given text."""

    def write(text, suffix=".yaml"):
        file = tmp_path / f"space{suffix}"
        file.write_text(text)
        return load_space(str(file))

    return write


def make_settings(folder, **changes):
    """Settings of a small sweep in that folder."""
    values = {
        "name": "test",
        "folder": str(folder),
        "num_trials": 6,
        "max_epochs": 4,
        "cpus_per_trial": 1,
        "gpus_per_trial": None,
        "max_concurrent": None,
        "time_budget_s": None,
        "seed": 0,
        "metric": METRIC,
        "mode": "min",
        "checkpoint_every_epochs": None,
        "retrain": True,
    }
    return SweepSettings(**values | changes)


def asha(max_epochs):
    return AsyncHyperBandScheduler(time_attr="epoch", max_t=max_epochs, grace_period=1, reduction_factor=2)


def tpe(seed=0):
    return partial(OptunaSearcher, sampler=partial(TPESampler, seed=seed, n_startup_trials=4))


def random(seed=0):
    return partial(OptunaSearcher, sampler=partial(RandomSampler, seed=seed))


def grid():
    return partial(OptunaSearcher, sampler=None)


def start(settings, space, objective, *, searcher=None, scheduler=None, defaults=None):
    """Run a sweep; returns its table."""
    return run_sweep(
        sweep=settings,
        cluster=RaySettings(address=None, num_cpus=2),
        space=space,
        searcher=searcher or random(),
        scheduler=scheduler or asha(settings.max_epochs),
        objective=objective,
        command=lambda params: f"python train.py {params}",
        defaults=defaults or {},
        description={"name": "test"},
    )


@pytest.fixture
def sweep(ray_started, tmp_path):
    """Runs a sweep over a cheap objective; returns its table and its folder."""

    def run(space, objective, *, searcher=None, scheduler=None, defaults=None, name="sweep", **changes):
        folder = tmp_path / name
        settings = make_settings(folder, **changes)
        return start(settings, space, objective, searcher=searcher, scheduler=scheduler, defaults=defaults), folder

    return run
