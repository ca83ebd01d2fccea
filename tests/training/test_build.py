"""What a configuration makes of the process that it is built in."""

import os

import pytest
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed

from handpose.config import compose
from handpose.training import build as module
from handpose.training.build import build_training


@pytest.fixture
def count_threads(freihand, monkeypatch):
    """Builds a training in a process that has started with four torch threads; returns how many it has then."""
    before = torch.get_num_threads()
    watches = []
    monkeypatch.setattr(module, "watch_contention", lambda: watches.append(True))

    def build(*overrides, cores, omp_num_threads=None):
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads or "")  # restored after the test, whoever sets it
        if omp_num_threads is None:
            del os.environ["OMP_NUM_THREADS"]
        monkeypatch.setattr(module, "count_cores", lambda: cores)
        small = ["model.encoder.name=lcnet_035", "model.decoder.depth=1", "data=freihand", f"data.root={freihand}"]
        watches.clear()
        build_training(compose("train", [*small, *overrides]), pretrained=False, quiet=True)
        num_threads = torch.get_num_threads()
        assert bool(watches) == (num_threads > 1)  # a single thread waits for no other
        return num_threads

    yield build
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "cores", "num_threads"),
    [("null", 1, 1), ("null", 3, 3), ("null", 16, 4), ("2", 1, 2), ("6", 16, 6)],
)
def test_torch_has_a_thread_for_each_core_of_the_container(count_threads, given, cores, num_threads):
    """At most as many as it would take by itself; what the user gives holds."""
    assert count_threads(f"num_threads={given}", cores=cores) == num_threads


def test_omp_num_threads_holds_unless_num_threads_is_given(count_threads):
    assert count_threads(cores=2, omp_num_threads="4") == 4
    assert count_threads("num_threads=3", cores=2, omp_num_threads="4") == 3
    assert count_threads(cores=2, omp_num_threads="") == 2  # counts as not set


@pytest.mark.parametrize(
    ("overrides", "num_threads"),
    [
        (["trainer.devices=2"], 2),  # four cores for two processes
        (["trainer.devices=8"], 1),
        (["trainer.devices=2", "num_threads=3"], 3),
        (["+trainer.num_nodes=2"], 4),
    ],
)
def test_processes_share_the_cores_and_lightning_leaves_the_number_as_it_is(count_threads, overrides, num_threads):
    assert count_threads("trainer.accelerator=cpu", *overrides, cores=4) == num_threads
    _set_num_threads_if_needed(num_processes=1)  # what Lightning does when it starts the processes
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == num_threads
