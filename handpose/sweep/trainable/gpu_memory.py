"""Checks that a trial sees the GPU that it holds, and limits the memory of trials that share a GPU."""

import math
import socket

import torch

from handpose.sweep.trainable.cost_callback import CONTEXT_BYTES


class GpuNotVisibleError(RuntimeError):
    """A trial holds a GPU, but its node shows none. The trial is retried, because another node may show one."""


def check_gpu_is_visible(accelerator: str, gpus: float) -> None:
    """Check that torch finds a GPU if the trial holds one. Lightning would train on cores without a word.

    Args:
        accelerator: `trainer.accelerator`.
        gpus: GPUs that the trial holds.

    Raises:
        GpuNotVisibleError: torch finds no GPU.
    """
    if gpus and accelerator != "cpu" and not torch.cuda.is_available():
        raise GpuNotVisibleError(
            f"the trial holds {gpus:g} GPUs (sweep.gpus_per_trial), but torch finds none on {socket.gethostname()}: "
            "check nvidia-smi, CUDA_VISIBLE_DEVICES and the GPUs of the job there, or give trainer.accelerator=cpu"
        )


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
