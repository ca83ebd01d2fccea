"""How many trials share a GPU: as many as its memory holds, as long as they train more together than fewer would.

A part of a GPU in Ray is a count and limits nothing, so the memory of a worker is capped here too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from handpose.sweep.trainable.gpu_memory import compute_gpus_per_trial

if TYPE_CHECKING:
    pass

_USABLE_MEMORY_FRACTION = 0.95
"""Of a GPU's memory; what trials take at their peaks is never quite what a few steps took."""
_MIN_GAIN = 0.05
"""Less than this in throughput is not worth another neighbour, which slows each trial down."""


class GpuThroughput(NamedTuple):
    """So many trials on one GPU, and the training steps a second of all of them."""

    num_trials: int
    steps_per_s: float


class TrialsPerGpuChoice(NamedTuple):
    """What was found. packings: that were measured. memory_share: of a GPU, taken by the most demanding trial."""

    num_trials: int
    throughputs: Sequence[GpuThroughput]
    gpu_memory_fraction: float

    @property
    def gpus_per_trial(self) -> float:
        return compute_gpus_per_trial(self.num_trials)

    def format_line(self) -> str:
        """For a person."""
        measured = ", ".join(f"{each.num_trials}: {each.steps_per_s:.3g}" for each in self.throughputs)
        return (
            f"a GPU       the largest trial takes {self.gpu_memory_fraction:.0%} of its memory; "
            f"steps a second with so many "
            f"trials on it: {measured}; so sweep.gpus_per_trial={self.gpus_per_trial:g}"
        )


def choose_trials_per_gpu(
    gpu_memory_fraction: float, *, max_trials: int, measure_steps_per_s: Callable[[int], float]
) -> TrialsPerGpuChoice:
    """The fewest trials on a GPU that come within 5 % of the most steps a second that any number reaches.

    memory_share: of the most demanding trial. most: that there are cores for. steps_per_s: measures that many trials
    side by side, 0 where they do not fit. Doubles the number until it no longer pays.
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
    """Trials for which each of Ray's GPUs has cores."""
    return max(1, int(resources["CPU"] // resources["GPU"] // cpus_per_trial))
