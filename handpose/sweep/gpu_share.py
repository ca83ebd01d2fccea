"""How many trials share a GPU: as many as its memory holds, as long as they train more together than fewer would.

A part of a GPU in Ray is a count and limits nothing, so the memory of a worker is capped here too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from handpose.errors import UserError
from handpose.sweep.cost_watch import CONTEXT_BYTES
from handpose.sweep.trial_cost import DataSize, Gauge, Refusal

if TYPE_CHECKING:
    from handpose.sweep.trial import TrialRecipe

_USABLE = 0.95
"""Of a GPU's memory; what trials take at their peaks is never quite what a few steps took."""
_GAIN = 0.05
"""Less than this in throughput is not worth another neighbour, which slows each trial down."""
_NUM_STEPS = 30
_PATIENCE_S = 600.0


class Packing(NamedTuple):
    """So many trials on one GPU, and the training steps a second of all of them."""

    num_trials: int
    steps_per_s: float


class Choice(NamedTuple):
    """What was found. packings: that were measured. memory_share: of a GPU, taken by the most demanding trial."""

    num_trials: int
    packings: Sequence[Packing]
    memory_share: float

    @property
    def gpus_per_trial(self) -> float:
        return share_of(self.num_trials)

    def line(self) -> str:
        """For a person."""
        measured = ", ".join(f"{each.num_trials}: {each.steps_per_s:.3g}" for each in self.packings)
        return (
            f"a GPU       the largest trial takes {self.memory_share:.0%} of its memory; steps a second with so many "
            f"trials on it: {measured}; so sweep.gpus_per_trial={self.gpus_per_trial:g}"
        )


def share_of(num_trials: int) -> float:
    """The part of a GPU that lets so many trials share it; Ray counts in steps of 1/10,000."""
    return math.floor(10_000 / num_trials) / 10_000


def choose(memory_share: float, *, most: int, steps_per_s: Callable[[int], float]) -> Choice:
    """The fewest trials on a GPU that come within 5 % of the most steps a second that any number reaches.

    memory_share: of the most demanding trial. most: that there are cores for. steps_per_s: measures that many trials
    side by side, 0 where they do not fit. Doubles the number until it no longer pays.
    """
    fitting = min(most, math.floor(_USABLE / memory_share)) if memory_share else most
    packings: list[Packing] = []
    for number in _numbers(max(1, fitting)):
        packings.append(Packing(number, steps_per_s(number)))
        if len(packings) > 1 and packings[-1].steps_per_s < (1 + _GAIN) * packings[-2].steps_per_s:
            break
    best = max(each.steps_per_s for each in packings)
    chosen = next(each for each in packings if each.steps_per_s * (1 + _GAIN) >= best)
    return Choice(chosen.num_trials, tuple(packings), memory_share)


def _numbers(most: int) -> list[int]:
    doubled = [2**i for i in range(most.bit_length())]
    return doubled if doubled[-1] == most else [*doubled, most]


def cores_a_gpu(resources: Mapping[str, float], *, cpus_per_trial: int) -> int:
    """Trials for which each of Ray's GPUs has cores."""
    return max(1, int(resources["CPU"] // resources["GPU"] // cpus_per_trial))


class Neighbours:
    """Trains the same trial in several workers that share one GPU, and tells how fast they are together.

    params: of the trial. Raises UserError where there is no free GPU.
    """

    def __init__(self, *, cpus: int, recipe: "TrialRecipe", data: DataSize, params: Mapping[str, Any]) -> None:
        self._cpus = cpus
        self._recipe = recipe
        self._data = data
        self._params = params

    def steps_per_s(self, number: int) -> float:
        """Of that many trials, training side by side; 0 where one of them cannot."""
        group = placement_group([{"CPU": self._cpus * number, "GPU": 1}])  # else Ray may take several GPUs for them
        try:
            if not group.wait(_PATIENCE_S):
                raise UserError("sweep.gpus_per_trial=auto: no GPU was free for 10 minutes; give a number instead")
            costs = ray.get(self._measured(group, number), timeout=_PATIENCE_S)
        except RayError:  # a worker was killed, or does not come to an end
            return 0.0
        finally:
            remove_placement_group(group)  # with the workers in it
        return 0.0 if any(isinstance(cost, Refusal) for cost in costs) else sum(1 / cost.step_s for cost in costs)

    def _measured(self, group: PlacementGroup, number: int) -> list[Any]:
        worker = ray.remote(num_cpus=self._cpus, num_gpus=share_of(number))(Gauge)
        placed = worker.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        workers: list[Any] = [placed.remote() for _ in range(number)]
        ray.get([each.ready.remote() for each in workers], timeout=_PATIENCE_S)  # then all begin at one moment
        overrides = self._recipe.in_worker(self._params)
        arguments = (overrides, self._params, self._data)
        return [each.measure.remote(*arguments, num_steps=_NUM_STEPS, weights=False) for each in workers]


def cap_gpu_memory(share: float) -> None:
    """Let torch in this process hold no more of its GPU than the share, less what the process takes beside tensors.

    share: 1 or more, or 0 for none, lifts the cap. Beyond it torch raises its out-of-memory error in this process, and
    the neighbours go on.
    """
    if not torch.cuda.is_available():
        return
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(share, whole_bytes=whole))


def memory_fraction(share: float, *, whole_bytes: int) -> float:
    """Of a GPU's memory, for the tensors of a trial with this share of it."""
    if not 0 < share < 1:
        return 1.0
    return max(share - CONTEXT_BYTES / whole_bytes, share / 2)
