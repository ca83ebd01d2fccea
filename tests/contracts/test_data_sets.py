"""What every data set in configs/data keeps to: three splits of pictures with labels that belong together."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from handpose import geometry
from handpose.config import compose, quote_override
from handpose.data.folds import Folds, divide_into_folds
from handpose.data.sample import ALWAYS_TRAINED, join_annotations
from handpose.training.build import build_data
from tests.builders import write_course, write_freihand
from tests.data.layouts import write_coco_wholebody, write_dexycb, write_ho3d, write_interhand


def write_mix(root: Path) -> None:
    write_freihand(root / "FreiHAND_pub_v2")
    write_ho3d(root / "HO3D_v3")


EXAMPLES = {
    "coco_wholebody": write_coco_wholebody,
    "dexycb": write_dexycb,
    "freihand": write_freihand,
    "freihand_course": write_course,
    "ho3d": write_ho3d,
    "interhand": write_interhand,
    "mix": write_mix,
    "synthetic": None,
}
"""Layouts of which the tests write an example; the synthetic set draws itself."""

SMALL = {
    "coco_wholebody": ["data.source.val_fraction=0.25", "data.image_size=64"],
    "dexycb": ["data.image_size=64"],
    "freihand": ["data.source.num_blocks=1"],
    "ho3d": ["data.source.val_fraction=0.25", "data.image_size=64"],
    "interhand": ["data.image_size=64"],
    "mix": ["data.source.parts={freihand: {num_blocks: 1}, ho3d: {weight: 3}}", "data.image_size=64"],
    "synthetic": [
        *("data.source.num_train=12", "data.source.num_eval=3", "data.source.num_blocks=1"),
        "data.source.num_workers=1",
    ],
}


@pytest.fixture(scope="module")
def write_example(tmp_path_factory):
    """Writes the example of a layout once: a thousand folders for DexYCB."""

    @functools.cache
    def write(name):
        root = tmp_path_factory.mktemp(name) / "data"
        if EXAMPLES[name]:
            EXAMPLES[name](root)
        return root

    return write


@pytest.fixture
def data(data_set, tmp_path, write_example):
    root = compose("train", data_set.overrides).data.root
    if data_set.name in EXAMPLES:
        root = write_example(data_set.name)
    elif not Path(root).is_dir():
        pytest.skip(f"there is no {root} to read; give MP_DATA=FOLDER")
    more = SMALL.get(data_set.name, [])
    folders = [quote_override("data.root", str(root)), quote_override("paths.packed", str(tmp_path / "packed"))]
    config = compose("train", [*data_set.overrides, *folders, *more, "data.batch_size=2"])
    return build_data(config, quiet=True)


def test_its_splits_have_pictures_and_labels_of_one_number(data):
    for split in (data.splits.train, data.splits.val, data.splits.test):
        assert len(split) > 0
        assert split.intrinsics.shape == (len(split), 3, 3)
        assert split.pose.shape == (len(split),)
        assert split.xyz_m is None or split.xyz_m.shape == (len(split), 21, 3)
        assert all(file.is_file() for file in split.files)


def test_training_and_validation_have_joints_in_metres_before_the_camera(data):
    for split in (data.splits.train, data.splits.val):
        if split.is_flat:
            assert split.rays.shape == (len(split), 21, 3)
            assert (np.nan_to_num(split.rays[..., 2], nan=1.0) == 1.0).all()
            continue
        assert np.isfinite(split.xyz_m).all()
        assert (split.xyz_m[..., 2] > 0).all()
        assert 0.005 < np.median(geometry.compute_bone_lengths(torch.from_numpy(split.xyz_m))) < 0.2


def test_no_pose_and_no_picture_is_in_two_splits(data):
    splits = (data.splits.train, data.splits.val, data.splits.test)
    poses = [set(split.pose.tolist()) for split in splits]
    files = [set(split.files) for split in splits]
    assert sum(map(len, poses)) == len(set().union(*poses))
    assert sum(map(len, files)) == len(set().union(*files))


def test_two_folds_validate_each_training_and_validation_image_once_and_divide_no_group(data):
    own = data.source.splits()
    both = join_annotations(own.train, own.val)
    groups = dict(zip(map(str, list_images(both)), both.pose if both.group is None else both.group, strict=True))
    divided = {image for image, group in groups.items() if group != ALWAYS_TRAINED}
    validated = []
    for index in range(2):
        splits = divide_into_folds(own, Folds(2, index))
        train, val = (set(map(str, list_images(split))) for split in (splits.train, splits.val))
        assert len(train) + len(val) == len(both)
        assert {groups[image] for image in train}.isdisjoint(groups[image] for image in val)
        assert set(splits.train.pose).isdisjoint(splits.val.pose)
        assert splits.test is own.test
        validated += val
    assert len(validated) == len(divided)
    assert set(validated) == divided


def list_images(split):
    """The file and the square in it of each image: a photograph may show several hands."""
    return list(zip(split.files, map(tuple, split.crops_or_whole.tolist()), strict=True))


def test_batches_have_pictures_with_the_joints_inside(data):
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch.image.dtype == torch.uint8
        assert batch.image.float().std() > 1.0
    batch = next(iter(data.train_dataloader()))
    uv = geometry.project(batch.xyz_m, batch.intrinsics)
    assert ((uv > -0.5) & (uv < data.image_size - 0.5)).float().mean() > 0.5


def test_the_fingerprint_is_the_same_when_it_is_read_again(data):
    before = data.fingerprint
    data.__dict__.pop("_own_splits")
    data._stores.clear()
    assert data.fingerprint == before
