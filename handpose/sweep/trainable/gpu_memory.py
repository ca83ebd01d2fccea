"""The share of a GPU that a trial may use."""

import math
from typing import TYPE_CHECKING

import torch

from handpose.sweep.trainable.cost_callback import CONTEXT_BYTES

if TYPE_CHECKING:
    pass


def compute_gpus_per_trial(num_trials: int) -> float:
    """The part of a GPU that lets so many trials share it; Ray counts in steps of 1/10,000."""
    return math.floor(10_000 / num_trials) / 10_000


def cap_gpu_memory(gpus: float) -> None:
    """Let torch in this process hold no more of its GPU than the share, less what the process takes beside tensors.

    share: 1 or more, or 0 for none, lifts the cap. Beyond it torch raises its out-of-memory error in this process, and
    the neighbours go on.
    """
    if not torch.cuda.is_available():
        return
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(compute_memory_fraction(gpus, total_bytes=whole))


def compute_memory_fraction(gpus: float, *, total_bytes: int) -> float:
    """Of a GPU's memory, for the tensors of a trial with this share of it."""
    if not 0 < gpus < 1:
        return 1.0
    return max(gpus - CONTEXT_BYTES / total_bytes, gpus / 2)
