"""What a configuration makes of the process that it is built in."""

import pytest
import torch

from handpose.config import compose
from handpose.training import build as module
from handpose.training.build import build_training


@pytest.fixture
def threads():
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "cores", "num_threads"),
    [("null", 1, 1), ("null", 3, 3), ("null", 16, 4), ("2", 1, 2), ("6", 16, 6)],
)
def test_torch_has_a_thread_for_each_core_of_the_container(threads, freihand, monkeypatch, given, cores, num_threads):
    """At most as many as it would take by itself, which OMP_NUM_THREADS limits; what the user gives holds."""
    monkeypatch.setattr(module, "count_cores", lambda: cores)
    small = ["model.encoder.name=test_efficientnet", "model.decoder.depth=1", "data=freihand", f"data.root={freihand}"]
    build_training(compose("train", [*small, f"num_threads={given}"]), pretrained=False, quiet=True)
    assert torch.get_num_threads() == num_threads
