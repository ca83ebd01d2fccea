"""Workers that measure what a trial costs before the sweep starts."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from handpose.errors import UserError
from handpose.search.space import Params
from handpose.sweep.execution.worker_death import diagnose_worker_death
from handpose.sweep.execution.worker_start import PATIENCE_S, PROBE_AFTER_S, StartProbe, never_started
from handpose.sweep.record.settings import LatencyOf
from handpose.sweep.trainable.gpu_memory import compute_gpus_per_trial
from handpose.sweep.trainable.trial import TrialRecipe
from handpose.sweep.trainable.trial_cost import (
    MIN_STEPS,
    DataSize,
    ProbeFailure,
    TrialCost,
    TrialCostProbe,
    summarise_error,
)

_TIMEOUT_S = 600.0


class ProbeWorker:
    """Measures configurations in one worker with the resources of a slot, which imports everything only once.

    A context manager that ends the worker on exit. A worker that a configuration has killed is replaced.

    Args:
        cpus: cores of the worker.
        gpus: GPUs of the worker.
        recipe: how to compose trials.
        data: the size of the data.
        latency_of: what latency_ms is the time of; see `SweepSettings`.

    Attributes:
        start_s: seconds until a worker has started and imported everything, once one has.

    Raises:
        UserError: no worker can be started.
    """

    def __init__(
        self, *, cpus: int, gpus: float, recipe: TrialRecipe, data: DataSize, latency_of: LatencyOf = None
    ) -> None:
        self.gpus = gpus
        self._cpus = cpus
        self._recipe = recipe
        self._data = data
        self._latency_of: LatencyOf = latency_of
        self._worker: Any = None
        self._is_ready = False
        self._started_at = 0.0
        self.start_s = 0.0

    def __enter__(self) -> "ProbeWorker":
        self._start_worker()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_worker()

    def measure_params(
        self, params: Params, *, num_steps: int = MIN_STEPS, weights: bool = False
    ) -> TrialCost | ProbeFailure:
        """Measure the costs of the trial with these parameters.

        Args:
            params: the parameters.
            num_steps: as in `measure_trial_cost`.
            weights: as in `measure_trial_cost`.
        """
        self._ensure_ready()
        overrides = self._recipe.make_worker_overrides(params)
        how = {
            "num_steps": num_steps,
            "weights": weights,
            "num_workers": self._recipe.num_workers,
            "gpus": self.gpus,
            "latency_of": self._latency_of,
        }
        call = self._worker.measure_cost.remote(overrides, params, self._data, **how)
        try:
            return ray.get(call, timeout=_TIMEOUT_S)
        except GetTimeoutError:
            refusal = ProbeFailure("time", f"a few steps of it take more than {_TIMEOUT_S / 60:.0f} minutes")
        except OutOfMemoryError:
            refusal = ProbeFailure("memory", "the memory of the machine was full")
        except RayActorError as error:
            death = diagnose_worker_death(str(error))
            refusal = ProbeFailure("crashed" if death.is_crash else "killed", death.sentence)
        self._stop_worker()
        return refusal

    def _ensure_ready(self) -> None:
        if self._worker is None:
            self._start_worker()
        if self._is_ready:
            return
        ready = self._worker.wait_until_ready.remote()
        try:
            if not ray.wait([ready], timeout=PROBE_AFTER_S)[0]:
                self._check_start(ready)
            ray.get(ready)
        except RayError as error:
            raise UserError(f"no worker can be started: {summarise_error(error)}") from error
        self._is_ready = True
        self.start_s = time.monotonic() - self._started_at

    def _check_start(self, ready: Any) -> None:
        """Wait longer for the worker.

        Raises:
            UserError: it still has not started; the message says whether all slots are taken or workers cannot start.
        """
        probe = StartProbe()
        if ray.wait([ready], timeout=PATIENCE_S - PROBE_AFTER_S)[0]:
            return
        if not probe.has_run():
            raise never_started()
        raise UserError(
            f"no slot (sweep.cpus_per_trial={self._cpus}, sweep.gpus_per_trial={self.gpus:g}) was free for "
            f"{PATIENCE_S / 60:.0f} minutes: other programs use the resources of the Ray cluster; try again later"
        )

    def _start_worker(self) -> None:
        self._started_at = time.monotonic()
        self._worker = ray.remote(num_cpus=self._cpus, num_gpus=self.gpus)(TrialCostProbe).remote()
        self._is_ready = False

    def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(RayError):
                ray.kill(worker)


_NUM_STEPS = 30


class GpuThroughputBenchmark:
    """Measures how fast the same trial trains in several workers that share one GPU.

    Args:
        cpus: cores of each worker.
        recipe: how to compose the trial.
        data: the size of the data.
        params: the parameters of the trial.
    """

    def __init__(self, *, cpus: int, recipe: "TrialRecipe", data: DataSize, params: Mapping[str, Any]) -> None:
        self._cpus = cpus
        self._recipe = recipe
        self._data = data
        self._params = params

    def measure_steps_per_s(self, number: int) -> float:
        """Return the steps per second of all trials together; 0 if one of them cannot train.

        Args:
            number: how many trials train at the same time.

        Raises:
            UserError: no GPU is free.
        """
        group = placement_group([{"CPU": self._cpus * number, "GPU": 1}])  # otherwise Ray may use several GPUs
        try:
            if not group.wait(_TIMEOUT_S):
                raise UserError("sweep.gpus_per_trial=auto: no GPU was free for 10 minutes; give a number instead")
            costs = ray.get(self._start_measurements(group, number), timeout=_TIMEOUT_S)
        except RayError:  # a worker was killed, or did not finish in time
            return 0.0
        finally:
            remove_placement_group(group)  # this ends its workers too
        return 0.0 if any(isinstance(cost, ProbeFailure) for cost in costs) else sum(1 / cost.step_s for cost in costs)

    def _start_measurements(self, group: PlacementGroup, number: int) -> list[Any]:
        worker = ray.remote(num_cpus=self._cpus, num_gpus=compute_gpus_per_trial(number))(TrialCostProbe)
        placed = worker.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        workers: list[Any] = [placed.remote() for _ in range(number)]
        ray.get(
            [each.wait_until_ready.remote() for each in workers], timeout=_TIMEOUT_S
        )  # so that all start at the same time
        overrides = self._recipe.make_worker_overrides(self._params)
        arguments = (overrides, self._params, self._data)
        return [each.measure_cost.remote(*arguments, num_steps=_NUM_STEPS, weights=False) for each in workers]
