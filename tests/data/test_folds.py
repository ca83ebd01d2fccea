from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.config import compose
from handpose.data.datamodule import HandDataModule
from handpose.data.folds import Folds, assign_folds, divide_into_folds
from handpose.data.freihand import FreiHand, number_runs
from handpose.data.mix import Mix
from handpose.data.sample import ALWAYS_TRAINED
from handpose.errors import UserError
from handpose.training import build
from handpose.training.build import build_data
from tests import builders
from tests.builders import write_freihand
from tests.data.layouts import write_ho3d

GROUPS = st.lists(st.integers(0, 30), min_size=1, max_size=200).map(np.array)


@given(groups=GROUPS, num_folds=st.integers(2, 6))
def test_no_group_is_divided_and_the_folds_are_nearly_equal(groups, num_folds):
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < num_folds:
        remedy = f"give at most {len(names)} folds" if len(names) > 1 else "give 1 fold"
        with pytest.raises(UserError, match=rf"{num_folds} folds .* the data set has {len(names)}; {remedy}"):
            assign_folds(groups, num_folds)
        return
    fold = assign_folds(groups, num_folds)
    assert all(len(set(fold[groups == name])) == 1 for name in names)
    counts = np.bincount(fold, minlength=num_folds)
    assert counts.min() > 0
    assert counts.max() - counts.min() <= sizes.max()


def test_poses_of_equal_size_are_divided_evenly_and_at_random():
    fold = assign_folds(np.repeat(np.arange(103), 4), 5)
    assert sorted(np.bincount(fold)) == [80, 80, 84, 84, 84]
    changes = np.count_nonzero(np.diff(fold[::4]))
    assert 65 < changes < 102  # 82 are expected of random folds; runs or turns would give 4 or 102


def test_the_assignment_does_not_depend_on_the_order_of_the_images():
    groups = np.random.default_rng(0).integers(0, 40, 300)
    order = np.random.default_rng(1).permutation(300)
    assert (assign_folds(groups[order], 4) == assign_folds(groups, 4)[order]).all()
    assert (assign_folds(groups, 4) == assign_folds(groups, 4)).all()


def test_images_that_are_always_trained_are_in_no_fold():
    groups = np.array([ALWAYS_TRAINED, 5, 7, ALWAYS_TRAINED, 5])
    fold = assign_folds(groups, 2)
    assert (fold == ALWAYS_TRAINED).tolist() == [True, False, False, True, False]
    assert set(fold[[1, 2]]) == {0, 1}


@pytest.mark.parametrize(
    ("num", "index", "message"),
    [
        (0, 0, r"folds\.num=0 must be at least 1"),
        (5, 5, r"folds\.index=5 is not a fold of folds\.num=5; give folds\.index=0 to 4"),
        (1, 2, r"folds\.index=2 is not a fold of folds\.num=1; give folds\.index=0, or folds\.num above 1"),
        (5, -1, r"folds\.index=-1 is not a fold"),
    ],
)
def test_a_fold_that_does_not_exist_is_refused(num, index, message):
    with pytest.raises(UserError, match=message):
        Folds(num, index)


@pytest.fixture
def root(tmp_path) -> Path:
    return write_freihand(tmp_path / "set", num_poses=20, variants=4, num_test=5)


def make_data(root: Path, *, folds: Folds, split_seed: int = 0, **options: object) -> HandDataModule:
    source = FreiHand(str(root), val_fraction=0.2, split="blocks", num_blocks=2, split_seed=split_seed)
    defaults = {"image_size": None, "batch_size": 6, "pack_folder": str(root.parent / "packed"), "seed": 3}
    return HandDataModule(source, progress=False, folds=folds, **{**defaults, **options})


def test_consecutive_poses_are_in_the_same_fold_as_long_as_a_block(root):
    assert number_runs(20, val_fraction=0.2, num_blocks=2).tolist() == np.repeat(np.arange(10), 2).tolist()
    assert number_runs(3, val_fraction=0.1, num_blocks=10).tolist() == [0, 1, 2]
    poses = set(make_data(root, folds=Folds(5, 2)).splits.val.pose.tolist())
    assert len(poses) == 4
    assert all(pose ^ 1 in poses for pose in poses)  # 0 and 1, 2 and 3, ...


def test_the_groups_of_a_file_are_not_divided(root):
    (root / "people.txt").write_text("\n".join(["ann"] * 3 + ["bob"] * 7 + ["cy"] * 10))
    source = FreiHand(
        str(root), val_fraction=0.2, split="group", num_blocks=2, split_seed=0, groups="people.txt"
    ).splits()
    held_out = [set(divide_into_folds(source, Folds(2, index)).val.pose.tolist()) for index in range(2)]
    assert sorted(held_out, key=min) == [set(range(10)), set(range(10, 20))]
    with pytest.raises(UserError, match=r"4 folds .* but the data set has 3; give at most 3 folds"):
        divide_into_folds(source, Folds(4, 0))


def test_random_poses_of_which_each_is_a_group_are_divided_alone(root):
    source = FreiHand(str(root), val_fraction=0.2, split="random", num_blocks=2, split_seed=0)
    assert source.splits().train.group is None
    val = divide_into_folds(source.splits(), Folds(4, 0)).val
    assert (len(val), len(set(val.pose))) == (20, 5)


def test_every_fold_reads_the_same_store_and_its_images(root):
    whole = make_data(root, folds=Folds())
    whole.setup("fit")
    for index in range(3):
        data = make_data(root, folds=Folds(3, index))
        data.setup("fit")
        assert data._stores["training"].contents == whole._stores["training"].contents
        for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
            annotations = getattr(data.splits, split)
            rows = loader.dataset.rows
            assert (data._stores["training"].intrinsics[rows] == annotations.intrinsics.astype(np.float32)).all()
    assert len(list((root.parent / "packed").glob("*/manifest.json"))) == 1


def test_changing_the_fold_gives_what_that_fold_gives_alone(root):
    first = make_data(root, folds=Folds(4, 1))
    first.setup("fit")
    changed, alone = first.change_fold(3), make_data(root, folds=Folds(4, 3))
    alone.setup("fit")
    for loader in ("train_dataloader", "val_dataloader"):
        for ours, theirs in zip(getattr(changed, loader)(), getattr(alone, loader)(), strict=True):
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(ours, theirs, strict=True))
    assert first.folds.index == 1
    assert set(first.splits.val.files).isdisjoint(changed.splits.val.files)


def test_the_fingerprint_does_not_depend_on_the_folds(root):
    found = {make_data(root, folds=folds).fingerprint for folds in (Folds(), Folds(3, 0), Folds(3, 2))}
    assert len(found) == 1
    assert make_data(root, folds=Folds(3, 0), split_seed=1).fingerprint not in found


def test_masks_belong_to_the_images_of_every_fold(tmp_path):
    root = write_freihand(tmp_path / "set", num_poses=20, variants=1, masks=True)
    masks = {}
    for folds in (Folds(), Folds(2, 0), Folds(2, 1)):
        data = make_data(root, folds=folds, masks=True, batch_size=1)
        for batch in data.train_dataloader():
            for position, mask in zip(batch.position, batch.mask, strict=True):
                file = data.splits.train.files[int(position)]
                assert np.array_equal(masks.setdefault(file, mask), mask)
    assert len(masks) == 20


def test_folds_and_training_on_all_images_are_refused_together(root):
    with pytest.raises(UserError, match=r"train_on_val=true trains on all images, so that no fold of folds\.num=5"):
        make_data(root, folds=Folds(5, 0), train_on_val=True)


def test_trials_that_share_their_data_get_the_fold_that_they_ask_for(root, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_cached_data", {})
    given = [*builders.SMALL, f"data.root={root}", f"paths.packed={tmp_path / 'packed'}", "folds.num=3"]
    found = [
        build_data(compose("train", [*given, f"folds.index={index}"]), quiet=True, cache_data=True).splits.val
        for index in (0, 2, 0)
    ]
    alone = build_data(compose("train", [*given, "folds.index=2"]), quiet=True).splits.val
    assert list(found[1].files) == list(alone.files) != list(found[0].files)
    assert list(found[2].files) == list(found[0].files)
    assert len(build._cached_data) == 1


@pytest.fixture
def mix_folder(tmp_path) -> Path:
    write_freihand(tmp_path / "data/FreiHAND_pub_v2")
    write_ho3d(tmp_path / "data/HO3D_v3")
    return tmp_path / "data"


def make_mix(folder: Path, weight: float) -> Mix:
    freihand = {"weight": weight, "num_blocks": 2, "val_fraction": 0.2}
    parts = {"freihand": freihand, "ho3d": {"weight": 3, "val_fraction": 0.25}}
    return Mix(str(folder), parts=parts, eval_part="freihand", image_size=32)


def test_of_a_mix_only_the_part_that_is_validated_is_divided_and_keeps_its_weight(mix_folder):
    own = make_mix(mix_folder, 1.0).splits()
    validated = []
    for index in range(4):
        splits = divide_into_folds(own, Folds(4, index))
        is_ho3d = np.array(["HO3D_v3" in str(file) for file in splits.train.files])
        assert splits.train.weight[is_ho3d].sum() == pytest.approx(3)
        assert splits.train.weight[~is_ho3d].sum() == pytest.approx(1)
        validated += splits.val.files
    assert len(validated) == len(set(validated)) == 40
    assert all("FreiHAND" in str(file) for file in validated)


def test_a_part_of_a_mix_that_is_only_validated_is_not_divided(mix_folder):
    with pytest.raises(UserError, match=r"weight 0 in training.*data\.source\.eval_part a weight above 0"):
        divide_into_folds(make_mix(mix_folder, 0.0).splits(), Folds(2, 0))
