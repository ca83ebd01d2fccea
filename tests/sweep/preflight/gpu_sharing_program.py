"""Neighbours on a GPU that Ray believes in and that is not there; apart, since Ray is started once in a process."""

import json
import sys
from pathlib import Path

import ray

from handpose.sweep.execution import probe_worker
from handpose.sweep.execution.probe_worker import GpuThroughputBenchmark
from handpose.sweep.trainable.trial import TrialRecipe
from handpose.sweep.trainable.trial_cost import DataSize
from tests.sweep.preflight.fake_cost_probes import SteadyCostProbe


def main() -> None:
    """Write into the file that is named what was measured of one, of three, and of workers that die."""
    ray.init(num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
    vars(probe_worker)["TrialCostProbe"] = SteadyCostProbe

    def steps_per_s(number: int, **params: bool) -> float:
        slot = {"cpus": 1, "recipe": TrialRecipe((), (), 4, 1), "data": DataSize(64, 8, 4)}
        return GpuThroughputBenchmark(params=params, **slot).measure_steps_per_s(number)

    told = {"alone": steps_per_s(1), "three": steps_per_s(3), "killed": steps_per_s(2, kills=True)}
    Path(sys.argv[1]).write_text(json.dumps(told), encoding="utf-8")  # Ray prints when it likes


if __name__ == "__main__":
    main()
