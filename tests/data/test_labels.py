"""Labels in files are the labels, and one file serves all."""

from dataclasses import fields

import numpy as np
import pytest

from handpose.data import labels
from handpose.data.freihand import FreiHand
from tests.builders import write_freihand


@pytest.fixture
def splits(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_MIN_BYTES", 1)
    root = write_freihand(tmp_path / "set")
    return FreiHand(str(root), val_fraction=0.2, split="random", num_blocks=1, split_seed=0).splits()


def assert_same(one, other):
    for split in ("train", "val", "test"):
        mine, theirs = getattr(one, split), getattr(other, split)
        assert list(mine.files) == list(theirs.files)
        for field in fields(mine):
            if field.name != "files":
                np.testing.assert_array_equal(getattr(mine, field.name), getattr(theirs, field.name))


def test_shared_labels_are_the_labels(splits, tmp_path):
    assert_same(labels.share_labels(splits, tmp_path / "packed"), splits)


def test_a_second_process_finds_the_same_files(splits, tmp_path):
    labels.share_labels(splits, tmp_path / "packed")
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "packed").iterdir()}
    labels.share_labels(splits, tmp_path / "packed")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "packed").iterdir()} == first


def test_what_is_written_to_a_shared_label_stays_in_the_process(splits, tmp_path):
    mine, other = (labels.share_labels(splits, tmp_path / "packed") for _ in range(2))
    mine.train.xyz_m[:] = 0
    assert_same(other, splits)


def test_small_labels_make_no_files(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_MIN_BYTES", 2**20)
    labels.share_labels(splits, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_labels_stay_in_memory_where_the_folder_cannot_be_made(splits, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert labels.share_labels(splits, tmp_path / "file" / "packed") is splits
