"""Check that the shared memory suffices for data loaders with several processes.

The processes of a DataLoader pass their batches through /dev/shm, which a container often limits to 64 MB. If a batch
does not fit, torch waits for it for ever.
"""

import mmap
import shutil
from pathlib import Path

from handpose.errors import UserError, join_lines
from handpose.skeleton import NUM_JOINTS

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2
"""Batches that each process of a data loader prepares in advance."""


def compute_batch_bytes(*, batch_size: int, image_size: int, masks: bool) -> int:
    """Return the shared memory that a batch needs: images, masks and labels. Each tensor uses whole pages.

    Args:
        batch_size: images in the batch.
        image_size: side of the images in pixels.
        masks: whether the batch contains masks.
    """
    per_image = [
        (4 if masks else 3) * image_size**2,
        4 * 9,  # intrinsics
        4 * 3 * NUM_JOINTS,
        4,  # scale
        8,  # position
    ]
    return sum(-(-batch_size * size // mmap.PAGESIZE) * mmap.PAGESIZE for size in per_image)


def check_shared_memory(
    *, num_workers: int, bytes_per_batch: int, num_processes: int = 1, processes: str = "processes"
) -> None:
    """Check that the batches of the data loaders' processes fit into the free shared memory.

    Args:
        num_workers: processes of each loader, data.num_workers.
        bytes_per_batch: result of `compute_batch_bytes`.
        num_processes: training processes on this machine, each with a loader.
        processes: name of these processes, for the message.

    Raises:
        UserError: they do not fit.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():  # there is no such folder on macOS
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    for_each_worker = num_processes * PREFETCH * bytes_per_batch
    if num_workers * for_each_worker <= free:
        return
    times = f"{num_processes} {processes} x " if num_processes > 1 else ""
    raise UserError(
        f"data.num_workers={num_workers} needs {_format_mb(num_workers * for_each_worker)} of shared memory ({times}"
        f"{num_workers} workers x {PREFETCH} batches of {_format_mb(bytes_per_batch)}), but {SHARED_MEMORY} has "
        f"{_format_mb(free)} "
        f"free; give data.num_workers={free // for_each_worker}, a smaller data.batch_size, or more shared memory "
        "(docker run --shm-size=8g)"
    )


def make_loader_error(num_workers: int, error: Exception) -> UserError:
    """Return the error to raise when the processes of a data loader return no batch."""
    usage = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    memory = f"; {SHARED_MEMORY} has {_format_mb(usage.free)} of {_format_mb(usage.total)} free" if usage else ""
    return UserError(
        f"data.num_workers={num_workers}: the worker processes of the data loader delivered no batch "
        f"({join_lines(error)[:200]}){memory}; give data.num_workers=0, or more shared memory"
    )


def _format_mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB"
