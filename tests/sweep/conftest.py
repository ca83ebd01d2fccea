"""Ray, started once for all tests of sweeps, and sweeps over cheap curves instead of networks."""

import pytest
from optuna.samplers import RandomSampler

from tests.sweep.sweeps import make_settings, run_small_sweep


@pytest.fixture
def sweep(ray_started, tmp_path):
    """Runs a sweep over a cheap objective; returns its table and its folder."""

    def run(space, objective, *, name="sweep", sampler=RandomSampler, scheduler=None, defaults=None, **changes):
        folder = tmp_path / name
        settings = make_settings(folder, **changes)
        return run_small_sweep(
            settings, space, objective, sampler=sampler, scheduler=scheduler, defaults=defaults
        ), folder

    return run
