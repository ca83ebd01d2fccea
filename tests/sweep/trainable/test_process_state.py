"""What a trial may do to its process, and that the next one does not notice."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handpose.sweep.trainable import process_state as worker
from handpose.sweep.trainable.process_state import preserve_process_state
from handpose.sweep.trainable.reporting import UnfitWorkerError
from tests.builders import write_freihand
from tests.sweep.trainable.side_effects import SIDE_EFFECTS

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("dirt", SIDE_EFFECTS)
def test_whatever_a_trial_sets_is_put_back(dirt):
    make_dirty, look = SIDE_EFFECTS[dirt]
    with preserve_process_state():
        before = look()
    with preserve_process_state():
        make_dirty()
        assert look() != before, "the dirt cannot be seen"
    with preserve_process_state():
        assert look() == before


def test_what_a_trial_set_is_put_back_when_it_fails_too():
    def fail():
        torch.set_default_dtype(torch.float64)
        raise FloatingPointError

    with pytest.raises(FloatingPointError), preserve_process_state():
        fail()
    assert torch.get_default_dtype() == torch.float32


def test_what_nobody_has_set_is_not_set_afterwards(monkeypatch):
    """So that what follows another setting goes on following it."""
    for name in ("set_num_threads", "set_default_device", "set_float32_matmul_precision", "set_default_dtype"):
        monkeypatch.setattr(torch, name, pytest.fail)
    with preserve_process_state():
        pass


def test_what_cannot_be_read_at_the_beginning_is_left_alone():
    with preserve_process_state():
        SIDE_EFFECTS["contradicting precisions"][0]()
        with preserve_process_state():
            torch.set_default_dtype(torch.float64)
        assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_a_training_in_a_used_process_is_that_of_a_fresh_one_bit_for_bit(tmp_path):
    data = write_freihand(tmp_path / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    command = [sys.executable, "-m", "tests.sweep.trainable.side_effects", str(data), str(tmp_path)]
    trained = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    fresh, used = trained.stdout.split()
    assert len(fresh) == 64
    assert used == fresh


class FullGpu:
    """Stands in for torch.cuda of a process whose last trial has left bytes behind."""

    def __init__(self, left_bytes):
        self.left_bytes = left_bytes
        self.freed = []

    def __getattr__(self, name):
        return lambda *_: self.freed.append(name)

    def is_initialized(self):
        return True

    def device_count(self):
        return 1

    def memory_allocated(self, device):
        return self.left_bytes


@pytest.mark.parametrize(("left_bytes", "is_worn"), [(0, False), (10 * 2**20, False), (10**9, True)])
def test_a_process_whose_gpu_memory_does_not_come_back_takes_no_other_trial(monkeypatch, left_bytes, is_worn):
    gpu = FullGpu(left_bytes)
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    if is_worn:
        with pytest.raises(UnfitWorkerError, match="has left 1000 MB of GPU 0 in use"):
            worker._free_memory()
    else:
        worker._free_memory()
    assert {"empty_cache", "ipc_collect", "reset_peak_memory_stats"} <= set(gpu.freed)
