"""Choose how many trials share a GPU: the number with the highest throughput among those that fit into its memory.

A fraction of a GPU in Ray is only a count and limits nothing, so the memory of each worker is capped as well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from handpose.sweep.trainable.gpu_memory import compute_gpus_per_trial

_USABLE_MEMORY_FRACTION = 0.95
"""Fraction of a GPU's memory that trials may use; peaks in training exceed what a few steps took."""
_MIN_GAIN = 0.05
"""Smallest relative gain in throughput that justifies more trials on a GPU, since each of them becomes slower."""


class GpuThroughput(NamedTuple):
    """Measured throughput of several trials on one GPU.

    Attributes:
        num_trials: trials that share the GPU.
        steps_per_s: training steps per second of all these trials together.
    """

    num_trials: int
    steps_per_s: float


class TrialsPerGpuChoice(NamedTuple):
    """How many trials share a GPU, with the measurements behind the choice.

    Attributes:
        num_trials: the chosen number of trials.
        throughputs: measured throughputs.
        gpu_memory_fraction: fraction of a GPU's memory that the most demanding trial takes.
    """

    num_trials: int
    throughputs: Sequence[GpuThroughput]
    gpu_memory_fraction: float

    @property
    def gpus_per_trial(self) -> float:
        return compute_gpus_per_trial(self.num_trials)

    def format_line(self) -> str:
        """Describe the choice in one line for the terminal."""
        measured = ", ".join(f"{each.num_trials}: {each.steps_per_s:.3g}" for each in self.throughputs)
        return (
            f"a GPU       the largest trial takes {self.gpu_memory_fraction:.0%} of its memory; steps per second by "
            f"the number of trials on it: {measured}; chosen: sweep.gpus_per_trial={self.gpus_per_trial:g}"
        )


def choose_trials_per_gpu(
    gpu_memory_fraction: float, *, max_trials: int, measure_steps_per_s: Callable[[int], float]
) -> TrialsPerGpuChoice:
    """Return the smallest number of trials per GPU whose throughput is within 5 % of the highest measured one.

    The number is doubled until the throughput no longer grows by at least 5 %.

    Args:
        gpu_memory_fraction: fraction of a GPU's memory that the most demanding trial takes.
        max_trials: largest number for which there are cores.
        measure_steps_per_s: returns the steps per second of that many trials side by side; 0 if they do not fit.
    """
    fitting = (
        min(max_trials, math.floor(_USABLE_MEMORY_FRACTION / gpu_memory_fraction))
        if gpu_memory_fraction
        else max_trials
    )
    packings: list[GpuThroughput] = []
    for number in _list_candidate_counts(max(1, fitting)):
        packings.append(GpuThroughput(number, measure_steps_per_s(number)))
        if len(packings) > 1 and packings[-1].steps_per_s < (1 + _MIN_GAIN) * packings[-2].steps_per_s:
            break
    best = max(each.steps_per_s for each in packings)
    chosen = next(each for each in packings if each.steps_per_s * (1 + _MIN_GAIN) >= best)
    return TrialsPerGpuChoice(chosen.num_trials, tuple(packings), gpu_memory_fraction)


def _list_candidate_counts(max_trials: int) -> list[int]:
    doubled = [2**i for i in range(max_trials.bit_length())]
    return doubled if doubled[-1] == max_trials else [*doubled, max_trials]


def count_trials_per_gpu(resources: Mapping[str, float], *, cpus_per_trial: int) -> int:
    """Count the trials per GPU for which Ray has enough cores; at least 1."""
    return max(1, int(resources["CPU"] // resources["GPU"] // cpus_per_trial))
