"""Two processes that train together, forked from one that has imported everything once."""

import multiprocessing
from pathlib import Path

import torch
from torch import distributed

multiprocessing.set_forkserver_preload([__name__, "handpose.training.build", "handpose.training.batch_norm"])


def run_in_two_processes(function, folder: Path) -> list:
    """Call function(rank) in each of two processes that can talk to each other; return what each returns."""
    torch.multiprocessing.start_processes(_run, args=(function, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _run(rank: int, function, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(function(rank), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
