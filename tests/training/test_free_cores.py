"""How many threads a training has beside other programs."""

from types import SimpleNamespace

import pytest
import torch

from handpose.config import compose
from handpose.training import trainer as module
from handpose.training.free_cores import FreeCores
from handpose.training.results import RunFolders


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_there_is_a_thread_for_each_core_that_others_leave(four_threads):
    watch = SimpleNamespace(lost_cores=0.0)
    cores = FreeCores(watch)
    for lost_cores, num_threads in ((0.0, 4), (0.7, 3), (1.6, 2), (3.9, 1), (0.0, 4), (2.0, 2)):
        watch.lost_cores = lost_cores
        cores.on_train_batch_start(None, None, None, 0)
        assert torch.get_num_threads() == num_threads
    cores.on_validation_batch_start(None, None, None, 0, dataloader_idx=0)
    assert torch.get_num_threads() == 2
    cores.teardown(None, None, "fit")
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("overrides", "omp_num_threads", "is_free"),
    [([], "", True), (["num_threads=4"], "", False), ([], "4", False)],
)
def test_only_a_number_that_the_user_has_not_given_changes(
    four_threads, tmp_path, monkeypatch, overrides, omp_num_threads, is_free
):
    monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    watch = SimpleNamespace(lost_cores=0.0)
    monkeypatch.setattr(module, "watch_contention", lambda: watch)
    config = compose("train", ["logger=none", "trainer.accelerator=cpu", *overrides])
    trainer = module.make_training_trainer(config, RunFolders(tmp_path, tmp_path, tmp_path), quiet=True)
    assert any(isinstance(callback, FreeCores) for callback in trainer.callbacks) == is_free
