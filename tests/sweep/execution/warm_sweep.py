"""Starts workers ahead as a sweep does, and prints which of them Tune then uses.

python -m tests.sweep.execution.warm_sweep
"""

import json
import os
import sys

import ray
from ray.tune.execution.class_cache import _ActorClassCache

from handpose.sweep.controller.slots import Slots
from handpose.sweep.execution.ray_internals import make_worker_runtime_env
from handpose.sweep.execution.runtime import set_ray_environment, start_ray
from handpose.sweep.execution.warm_up import prepare_warm_up
from handpose.sweep.record.settings import RaySettings
from tests.sweep.objectives import curve


class Worker:
    """Says which process it is in, and what had been imported when it came there."""

    def __init__(self):
        self.imported = "tests.sweep.objectives" in sys.modules

    def who(self):
        return os.getpid(), self.imported, os.environ["OMP_NUM_THREADS"]


def main():
    with (
        set_ray_environment(),
        prepare_warm_up(curve, num_threads=1) as warm,
        start_ray(RaySettings(address=None, num_cpus=2), hook=warm.hook),
    ):
        warm.start_workers(Slots(2, 1, 0.0))
        warm.start_workers(Slots(2, 1, 0.0))  # which have theirs already
        warm.wait(num_more=1)
        ready = warm.pids
        probe_worker = ray.remote(num_cpus=1, runtime_env=make_worker_runtime_env())(Worker).remote()
        tried = ray.get(probe_worker.who.remote())
        ray.kill(probe_worker)
        tunes = _ActorClassCache().get(Worker).options(num_cpus=1)
        trials = ray.get([worker.who.remote() for worker in [tunes.remote() for _ in range(2)]])
    print(json.dumps({"ready": sorted(ready), "preflight": tried, "trials": trials}))


if __name__ == "__main__":
    main()
