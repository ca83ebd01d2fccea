"""Which checkpoints are whole, and which go first when the budget is full."""

import os

import pytest

from handpose.sweep.storage.checkpoint_files import FolderFiles
from handpose.sweep.storage.retention import CheckpointRetention, describe_checkpoint, find_newest_intact, is_intact


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint of 100 bytes of a trial after an epoch."""

    def written(trial, epoch, size=100):
        file = tmp_path / "checkpoints" / f"trial_{trial:04d}" / f"epoch_{epoch}.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(size))
        return describe_checkpoint(file, folder=tmp_path, epoch=epoch)

    return written


@pytest.fixture
def retention(tmp_path):
    """Trials 0-9 need nothing, 10-19 are finalists, 20-29 wait at a rung, 30-39 run; a smaller number is better."""

    def need(trial):
        return "none" if trial < 10 else "finalist" if trial < 20 else "resumable"

    return CheckpointRetention(
        FolderFiles(tmp_path), 500, get_need=need, get_loss=float, is_running=lambda trial: trial >= 30
    )


def list_files(folder):
    return {f"{file.parent.name[-2:]}/{file.stem}" for file in (folder / "checkpoints").glob("*/*")}


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: os.truncate(file, 99),
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        lambda file: file.write_bytes(b"\0" * 100),
        lambda file: file.unlink(),
    ],
)
def test_whatever_happened_to_the_newest_the_one_before_it_is_used(save, tmp_path, damage):
    checkpoints = [save(0, 1), save(0, 2)]
    assert find_newest_intact(checkpoints, tmp_path) == checkpoints[1]
    damage(tmp_path / checkpoints[1].file)
    assert not is_intact(checkpoints[1], tmp_path)
    assert find_newest_intact(checkpoints, tmp_path) == checkpoints[0]


def test_nothing_whole_is_none(save, tmp_path):
    checkpoint = save(0, 1)
    (tmp_path / checkpoint.file).unlink()
    assert find_newest_intact([checkpoint], tmp_path) is None


def test_a_trial_keeps_its_newest_two(retention, save, tmp_path):
    for epoch in (1, 2, 3, 4):
        retention.add(30, save(30, epoch))
        retention.enforce_budget(30)
    assert list_files(tmp_path) == {"30/epoch_3", "30/epoch_4"}
    assert retention.total_bytes == 200


def test_what_is_needed_least_goes_first_and_of_that_the_worst(retention, save, tmp_path):
    order = []
    for trial, epoch in [(5, 1), (6, 1), (11, 1), (12, 1), (20, 1), (21, 1), (30, 1), (30, 2), (20, 2)]:
        retention.add(trial, save(trial, epoch))
    while True:
        before = list_files(tmp_path)
        retention.budget_bytes = retention.total_bytes - 1
        retention.enforce_budget(30)
        gone = before - list_files(tmp_path)
        if not gone:
            break
        order += sorted(gone)
    assert order == [
        "06/epoch_1",  # stopped
        "05/epoch_1",
        "30/epoch_1",  # older ones, only there in case the newest is damaged
        "20/epoch_1",
        "12/epoch_1",  # finalists
        "11/epoch_1",
        "21/epoch_1",  # waits at a rung, and would begin anew
        "20/epoch_2",
    ]
    assert list_files(tmp_path) == {"30/epoch_2"}  # runs


def test_after_a_crash_only_what_is_known_and_there_is_left(retention, save, tmp_path):
    known, gone = save(30, 2), save(30, 1)
    save(30, 3)  # written, but never reported
    (tmp_path / "checkpoints" / "trial_0030" / ".epoch_4.ckpt.part").write_bytes(b"half")
    (tmp_path / gone.file).unlink()
    retention.add(30, gone)
    retention.add(30, known)
    retention.reconcile()
    assert list_files(tmp_path) == {"30/epoch_2"}
    assert retention.list_checkpoints(30) == [known]
    assert retention.total_bytes == 100
