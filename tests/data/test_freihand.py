import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.data.freihand import FreiHand, choose_validation_poses
from handpose.data.sample import Splits
from handpose.errors import UserError
from tests.builders import make_cameras, make_hands, write_freihand, write_json


def read(root: Path, **options: object) -> Splits:
    defaults = {"val_fraction": 0.2, "split": "blocks", "num_blocks": 2, "split_seed": 0}
    return FreiHand(str(root), **{**defaults, **options}).splits()


@pytest.mark.parametrize("variants", [1, 4])
def test_every_image_has_the_labels_of_its_pose(tmp_path, variants):
    splits = read(write_freihand(tmp_path / "set", num_poses=10, variants=variants))
    assert len(splits.train) + len(splits.val) == 10 * variants
    for split in (splits.train, splits.val):
        numbers = np.array([int(file.stem) for file in split.files])
        np.testing.assert_array_equal(split.pose, numbers % 10)
        np.testing.assert_array_equal(split.xyz_m, make_hands(10)[numbers % 10])
        np.testing.assert_array_equal(split.intrinsics, make_cameras(10)[numbers % 10])
    np.testing.assert_array_equal(splits.test.xyz_m, make_hands(5, seed=1))
    assert [file.name for file in splits.test.files] == [f"0000000{i}.jpg" for i in range(5)]
    assert all(file.exists() for split in (splits.train, splits.val, splits.test) for file in split.files)


@pytest.mark.parametrize("split", ["blocks", "random"])
def test_no_pose_is_in_two_splits_and_no_image_is_lost(tmp_path, split):
    splits = read(write_freihand(tmp_path / "set", num_poses=10, variants=4), split=split)
    poses = np.concatenate([np.unique(part.pose) for part in (splits.train, splits.val, splits.test)])
    assert sorted(poses) == list(range(15))
    assert len({*splits.train.files, *splits.val.files}) == 40
    assert len(splits.val) == 2 * 4


@given(
    num_poses=st.integers(2, 300),
    val_fraction=st.floats(0.01, 0.5),
    num_blocks=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_blocks_are_runs_of_neighbours_one_in_each_stretch(num_poses, val_fraction, num_blocks, seed):
    num_val = round(val_fraction * num_poses)
    if not 0 < num_val < num_poses or num_blocks > num_val:
        return
    chosen = choose_validation_poses(
        num_poses, val_fraction=val_fraction, split="blocks", num_blocks=num_blocks, split_seed=seed
    )
    assert num_val - num_blocks <= chosen.sum() <= num_val
    for i in range(num_blocks):
        segment = chosen[i * num_poses // num_blocks : (i + 1) * num_poses // num_blocks]
        first, last = np.flatnonzero(segment)[[0, -1]]
        assert segment[first : last + 1].all()


@given(num_poses=st.integers(2, 300), val_fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_a_random_split_keeps_exactly_its_fraction(num_poses, val_fraction, seed):
    num_val = round(val_fraction * num_poses)
    if not 0 < num_val < num_poses:
        return
    chosen = choose_validation_poses(
        num_poses, val_fraction=val_fraction, split="random", num_blocks=0, split_seed=seed
    )
    assert chosen.sum() == num_val


def test_freihand_keeps_a_tenth_of_its_poses_in_blocks():
    chosen = choose_validation_poses(32560, val_fraction=0.1, split="blocks", num_blocks=16, split_seed=0)
    starts = np.flatnonzero(np.diff(chosen.astype(int)) == 1)
    assert chosen.sum() == 3256
    assert len(starts) == 16


@pytest.mark.parametrize("split", ["blocks", "random"])
def test_the_seed_decides_the_split(split):
    def chosen(seed: int) -> list[bool]:
        return choose_validation_poses(100, val_fraction=0.2, split=split, num_blocks=4, split_seed=seed).tolist()

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def write_groups(root, names):
    (root / "persons.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def test_whole_groups_are_held_out(tmp_path):
    root = write_freihand(tmp_path / "set", num_poses=12, variants=4)
    names = ["Anna", "Bela", "Anna", "Ciro"] * 3
    write_groups(root, names)
    splits = read(root, split="group", groups="persons.txt", val_fraction=0.25)
    held_out = {names[pose] for pose in splits.val.pose}
    assert held_out in ({"Bela"}, {"Ciro"})  # a quarter of the poses each
    assert {names[pose] for pose in splits.train.pose} == {"Anna", "Bela", "Ciro"} - held_out
    others = [read(root, split="group", groups=str(root / "persons.txt"), split_seed=seed) for seed in range(8)]
    assert len({tuple(np.unique(each.val.pose)) for each in others}) > 1


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        (
            {"split": "group"},
            ["a"] * 12,
            r"data\.source\.split=group and data\.source\.groups=None do not fit together",
        ),
        ({"groups": "persons.txt"}, ["a"] * 12, r"split=blocks and data\.source\.groups=persons\.txt do not fit"),
        ({"split": "group", "groups": "nobody.txt"}, [], r"data\.source\.groups=.*nobody\.txt cannot be read as text"),
        ({"split": "group", "groups": "persons.txt"}, ["a"] * 11, r"persons\.txt has 11 lines for 12 training poses"),
        ({"split": "group", "groups": "persons.txt"}, ["a", "", *"b" * 10], r"and line 2 is empty"),
        ({"split": "group", "groups": "persons.txt"}, ["a"] * 12, r"cannot be held out of 1 groups of persons\.txt"),
    ],
)
def test_groups_that_cannot_be_held_out_are_refused(tmp_path, options, names, message):
    root = write_freihand(tmp_path / "set", num_poses=12, variants=1)
    write_groups(root, names)
    with pytest.raises(UserError, match=message):
        read(root, **options)


def test_an_evaluation_without_joints_keeps_its_scale(tmp_path):
    root = write_freihand(tmp_path / "set")
    (root / "evaluation_xyz.json").unlink()
    test = read(root).test
    assert test.xyz_m is None
    np.testing.assert_array_equal(test.scale_m, json.loads((root / "evaluation_scale.json").read_text()))


def test_a_scale_that_is_absent_is_the_reference_bone(tmp_path):
    root = write_freihand(tmp_path / "set")
    published = read(root)
    (root / "training_scale.json").unlink()
    (root / "evaluation_scale.json").unlink()
    np.testing.assert_allclose(read(root).train.scale_m, published.train.scale_m, rtol=1e-12)
    np.testing.assert_allclose(read(root).test.scale_m, published.test.scale_m, rtol=1e-12)


def test_one_noisy_scale_is_accepted(tmp_path):
    root = write_freihand(tmp_path / "set")
    scales = json.loads((root / "training_scale.json").read_text())
    write_json(root / "training_scale.json", [2 * scales[0], *scales[1:]])
    splits = read(root)
    at_pose_0 = np.concatenate([part.scale_m[part.pose == 0] for part in (splits.train, splits.val)])
    np.testing.assert_array_equal(at_pose_0, 2 * scales[0])


def test_files_that_are_no_images_of_the_set_are_passed_over(tmp_path):
    root = write_freihand(tmp_path / "set")
    (root / "training/rgb/.DS_Store").touch()
    (root / "training/rgb/Thumbs.db").touch()
    assert len(read(root).train) == 32


def change(name: str, entry: int, index: tuple[int, ...], value: object) -> Callable[[Path], None]:
    """Put a value into one entry of a JSON file."""

    def apply(root: Path) -> None:
        entries = json.loads((root / name).read_text())
        target = entries
        for position in (entry, *index)[:-1]:
            target = target[position]
        target[(entry, *index)[-1]] = value
        write_json(root / name, entries)

    return apply


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def shorten(name: str) -> Callable[[Path], None]:
    return lambda root: write_json(root / name, json.loads((root / name).read_text())[:-1])


def scale_by(name: str, factor: float) -> Callable[[Path], None]:
    return lambda root: write_json(root / name, factor * np.array(json.loads((root / name).read_text())))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (remove("."), ["data.root=", "does not exist", "lmb.informatik.uni-freiburg.de/projects/freihand"]),
        (remove("training"), ["training/rgb", "does not exist", "lmb.informatik"]),
        (remove("evaluation/rgb"), ["evaluation/rgb", "does not exist"]),
        (remove("training_K.json"), ["training_K.json", "does not exist", "lmb.informatik"]),
        (remove("training_xyz.json"), ["training_xyz.json", "does not exist"]),
        (remove("evaluation_K.json"), ["evaluation_K.json", "does not exist"]),
        (remove("training/rgb/00000003.jpg"), ["training/rgb/00000003.jpg is missing", "00000039.jpg"]),
        (remove("training/rgb/00000039.jpg"), ["training_K.json", "10 poses", "39 images", "1 or 4"]),
        (remove("evaluation/rgb/00000004.jpg"), ["evaluation_K.json", "5 poses", "4 images"]),
        (shorten("training_xyz.json"), ["training_K.json has 10", "training_xyz.json has 9"]),
        (shorten("evaluation_scale.json"), ["evaluation_K.json has 5", "evaluation_scale.json has 4"]),
        (rewrite("training_xyz.json", "[[1, 2"), ["training_xyz.json", "not valid JSON"]),
        (rewrite("training_xyz.json", "{}"), ["training_xyz.json", "list"]),
        (rewrite("training_xyz.json", "[]"), ["training_xyz.json", "list"]),
        (change("training_K.json", 3, (), [[1, 0], [0, 1]]), ["training_K.json", "entry 3", "3 x 3"]),
        (change("training_xyz.json", 4, (), [[0, 0, 1]] * 20), ["training_xyz.json", "entry 4", "21 x 3"]),
        (change("training_xyz.json", 4, (2, 1), "wide"), ["training_xyz.json", "entry 4", "21 x 3"]),
        (change("training_xyz.json", 4, (2, 1), 10**400), ["training_xyz.json", "entry 4", "21 x 3"]),
        (
            change("training_xyz.json", 5, (7, 0), float("nan")),
            ["training_xyz.json", "entry 5", "not finite: nan at [7, 0]"],
        ),
        (change("training_xyz.json", 5, (7, 0), None), ["training_xyz.json", "entry 5", "not finite: nan at [7, 0]"]),
        (
            change("training_K.json", 5, (0, 0), float("inf")),
            ["training_K.json", "entry 5", "not finite: inf at [0, 0]"],
        ),
        (change("training_xyz.json", 6, (8, 2), 0.0), ["training_xyz.json", "entry 6", "in front of the camera"]),
        (change("training_K.json", 7, (0, 0), -50.0), ["training_K.json", "entry 7", "focal length", "-50"]),
        (change("training_K.json", 7, (1, 1), 0), ["training_K.json", "entry 7", "focal length"]),
        (change("training_K.json", 8, (2, 2), 2), ["training_K.json", "entry 8", "last row 0 0 1"]),
        (change("training_K.json", 8, (1, 0), 2), ["training_K.json", "entry 8", "upper triangular"]),
        (change("training_scale.json", 8, (), 0), ["training_scale.json", "entry 8", "not positive"]),
        (change("training_scale.json", 8, (), [1]), ["training_scale.json", "entry 8", "one number"]),
        (change("evaluation_xyz.json", 2, (0, 2), -1.0), ["evaluation_xyz.json", "entry 2", "in front"]),
        (scale_by("training_xyz.json", 1000), ["training_xyz.json", "metres"]),
        (scale_by("training_scale.json", 1000), ["training_scale.json", "1e+03 times", "remove it"]),
    ],
)
def test_a_broken_data_set_is_told_in_one_sentence(tmp_path, break_it, words):
    root = write_freihand(tmp_path / "set")
    break_it(root)
    with pytest.raises(UserError) as error:
        read(root)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_two_joints_in_one_place_are_told(tmp_path):
    root = write_freihand(tmp_path / "set")
    xyz_m = make_hands(10)
    xyz_m[3, 10] = xyz_m[3, 9]
    write_json(root / "training_xyz.json", xyz_m)
    with pytest.raises(UserError, match="entry 3 has joints 9 and 10 in one place"):
        read(root)


def test_a_root_one_folder_too_high_is_put_right(tmp_path):
    root = write_freihand(tmp_path / "archive" / "FreiHAND_pub_v2")
    with pytest.raises(UserError, match=re.escape(f"use data.root={root}")):
        read(root.parent)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_fraction": 0.0}, "val_fraction=0.0 of 10 poses leaves no pose for validation"),
        ({"val_fraction": 0.01}, "val_fraction=0.01 of 10 poses leaves no pose for validation"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 of 10 poses leaves no pose for training"),
        ({"num_blocks": 3}, "num_blocks=3 does not fit the 2 validation poses"),
        ({"num_blocks": 0}, "num_blocks=0 does not fit"),
        ({"split": "images"}, "data.source.split=images is unknown"),
    ],
)
def test_a_split_that_cannot_be_is_told(tmp_path, options, words):
    root = write_freihand(tmp_path / "set")
    with pytest.raises(UserError, match=re.escape(words)):
        read(root, **options)
