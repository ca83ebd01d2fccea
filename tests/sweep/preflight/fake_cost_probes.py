"""Stands in for the measuring of networks. In a module of its own, so that a worker that runs it imports no torch."""

import os
import time
from types import SimpleNamespace


class FragileCostProbe:
    """Answers with the parameters; those that ask for it kill the worker, or keep it for good."""

    def wait_until_ready(self):
        pass

    def measure_cost(self, overrides, params, data, *, num_steps, weights, num_workers=1, gpus=0.0, latency_of=None):
        if params.get("kills"):
            os._exit(1)
        if params.get("hangs"):
            time.sleep(600)
        return os.getpid(), overrides, params


class SteadyCostProbe:
    """Trains two steps a second, whatever it is asked for; those that ask for it kill the worker."""

    def wait_until_ready(self):
        pass

    def measure_cost(self, overrides, params, data, *, num_steps, weights, num_workers=1, gpus=0.0, latency_of=None):
        if params.get("kills"):
            os._exit(1)
        return SimpleNamespace(step_s=0.5)
