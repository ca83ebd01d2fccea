"""Checkpoints that are written beside the training."""

import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from handpose.sweep.storage.checkpoint_files import FolderFiles
from handpose.sweep.storage.retention import is_intact
from handpose.sweep.trainable.checkpoint_writer import BackgroundCheckpointIO, SaveResult, copy_to_cpu
from handpose.training.checkpoints import AtomicCheckpointIO


@pytest.fixture
def files(tmp_path):
    made = BackgroundCheckpointIO(FolderFiles(tmp_path))
    yield made
    made.close()


def save_checkpoint(files, folder, epoch, **more):
    path = folder / f"epoch_{epoch}.ckpt"
    files.save_checkpoint({"epoch": epoch - 1, **more}, path)
    return path


def test_what_is_saved_is_what_the_weights_were_whatever_becomes_of_them(files, tmp_path):
    net = nn.Linear(3, 2)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    path = save_checkpoint(files, tmp_path, 1, state_dict=net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    assert files.wait_for_result().checkpoint.epoch == 1
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_a_checkpoint_is_told_once_and_is_whole(files, tmp_path):
    save_checkpoint(files, tmp_path, 3, values=torch.arange(1000))
    checkpoint, note = files.wait_for_result()
    assert (checkpoint.file, checkpoint.epoch, note) == ("epoch_3.ckpt", 3, "")
    assert is_intact(checkpoint, tmp_path)
    assert files.wait_for_result() == SaveResult(None, "")


def test_of_two_that_nobody_asked_for_the_older_one_goes(files, tmp_path):
    older, newer = save_checkpoint(files, tmp_path, 1), save_checkpoint(files, tmp_path, 2)
    assert files.wait_for_result().checkpoint.epoch == 2
    assert newer.is_file()
    assert not older.exists()


def test_the_training_goes_on_while_it_is_written_and_the_next_one_waits(files, tmp_path, monkeypatch):
    may_write, written = threading.Event(), []

    def slow(self, checkpoint, path, storage_options=None):
        may_write.wait(10.0)
        write(self, checkpoint, path)
        written.append(checkpoint["epoch"] + 1)

    write = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    save_checkpoint(files, tmp_path, 1)
    assert written == []
    may_write.set()
    save_checkpoint(files, tmp_path, 2)
    assert written[:1] == [1]
    assert files.wait_for_result().checkpoint.epoch == 2


def test_what_cannot_be_written_is_a_note(files, tmp_path):
    (tmp_path / "file").write_text("in the way of a folder")
    files.save_checkpoint({"epoch": 0}, tmp_path / "file" / "epoch_1.ckpt")
    checkpoint, note = files.wait_for_result()
    assert checkpoint is None
    assert "epoch_1.ckpt cannot be written" in note
    assert files.wait_for_result() == SaveResult(None, "")


def test_a_bug_in_the_thread_is_not_taken_for_a_full_disk(files, tmp_path):
    files.save_checkpoint({}, tmp_path / "no_epoch.ckpt")
    with pytest.raises(KeyError):
        files.wait_for_result()


def test_a_copy_has_the_same_values_types_and_attributes_and_memory_of_its_own():
    state = nn.BatchNorm2d(2).state_dict()
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    original = {"state_dict": state, "list": [image, (1, "a")], "none": None}
    twin = copy_to_cpu(original)
    assert type(twin["state_dict"]) is OrderedDict
    assert twin["state_dict"]._metadata == state._metadata
    assert twin["list"][0].stride() == image.stride()
    assert torch.equal(twin["list"][0], image)
    assert twin["list"][0].data_ptr() != image.data_ptr()
    assert twin["list"][1] == (1, "a")
