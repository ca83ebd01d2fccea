"""Limits the GPU memory of trials that share a GPU."""

import math

import torch

from handpose.sweep.trainable.cost_callback import CONTEXT_BYTES


def compute_gpus_per_trial(num_trials: int) -> float:
    """Return the fraction of a GPU for each of `num_trials` trials that share it; Ray counts in steps of 1/10,000."""
    return math.floor(10_000 / num_trials) / 10_000


def cap_gpu_memory(gpus: float) -> None:
    """Limit the GPU memory that torch may hold in this process to the trial's fraction of its GPU.

    What the process needs in addition to tensors counts as part of the fraction. Beyond the limit, torch raises its
    out-of-memory error in this process, and the other trials on the GPU continue.

    Args:
        gpus: the trial's fraction of a GPU. 1 or more, or 0 for no GPU, removes the limit.
    """
    if not torch.cuda.is_available():
        return
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(compute_memory_fraction(gpus, total_bytes=whole))


def compute_memory_fraction(gpus: float, *, total_bytes: int) -> float:
    """Return the fraction of a GPU's memory that the tensors of a trial may use.

    Args:
        gpus: the trial's fraction of a GPU.
        total_bytes: memory of the GPU.
    """
    if not 0 < gpus < 1:
        return 1.0
    return max(gpus - CONTEXT_BYTES / total_bytes, gpus / 2)
