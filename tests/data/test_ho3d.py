import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from handpose.data.ho3d import Ho3d
from handpose.data.pack import pack
from handpose.data.sample import Annotations, Splits
from handpose.errors import UserError
from handpose.skeleton import JOINT_NAMES
from tests.builders import write_json
from tests.data.layouts import (
    FRAME_CAMERA,
    HO3D_NAMES,
    INDEX_TIP,
    make_frame_hands,
    project,
    to_ho3d,
    write_frame,
    write_ho3d,
    write_ho3d_frame,
)
from tests.data.test_crops import find_disk

SEQUENCES = ("ABF10", "ABF11", "MC1", "SM2")


def read(root: Path, **options: object) -> Splits:
    defaults = {"crop_margin": 0.3, "val_fraction": 0.25, "split_seed": 0, "frame_step": 1}
    return Ho3d(str(root), **{**defaults, **options}).splits()


@pytest.fixture
def root(tmp_path) -> Path:
    return write_ho3d(tmp_path / "HO3D_v3")


def list_sequences(split: Annotations) -> list[str]:
    return [file.parent.parent.name for file in split.files]


def test_every_image_has_its_joints_in_this_projects_order_and_frame(root):
    splits = read(root)
    assert len(splits.train) + len(splits.val) == 12
    for split in (splits.train, splits.val):
        for file, xyz_m, camera, crop in zip(split.files, split.xyz_m, split.intrinsics, split.crops, strict=True):
            truth = make_frame_hands(3, SEQUENCES.index(file.parent.parent.name))[int(file.stem)]
            np.testing.assert_allclose(xyz_m, truth, atol=1e-12)
            published = project(to_ho3d(truth) * [1, -1, -1], FRAME_CAMERA)  # as vis_HO3D.py draws it
            for name, uv in zip(HO3D_NAMES, published, strict=True):
                ours = project(xyz_m, camera)[JOINT_NAMES.index(name)] + crop[:2]
                np.testing.assert_allclose(ours, uv, atol=1e-9)


def test_the_packed_picture_shows_the_joint(root, tmp_path):
    for split in (read(root).train, read(root).test):
        packed = pack(split, image_size=128, folder=tmp_path / "packed", progress=False)
        for image, uv in zip(packed.images, project(split.xyz_m, packed.intrinsics)[:, INDEX_TIP], strict=True):
            np.testing.assert_allclose(find_disk(image), uv, atol=0.4)


def test_all_cameras_of_a_recording_are_in_the_same_split(root):
    for seed in range(5):
        splits = read(root, split_seed=seed)
        train, val = set(list_sequences(splits.train)), set(list_sequences(splits.val))
        assert not train & val
        assert train | val == set(SEQUENCES)
        assert len({"ABF10", "ABF11"} & val) != 1
        assert len(splits.val) == 3 or val == {"ABF10", "ABF11"}


def test_the_test_split_is_the_evaluation_in_its_order_with_the_published_boxes(root):
    test = read(root, crop_margin=0.0).test
    assert [file.stem for file in test.files] == ["0000", "0001", "0002", "0003"]
    np.testing.assert_allclose(test.xyz_m, make_frame_hands(4, 50), atol=1e-9)
    uv = project(test.xyz_m, test.intrinsics)
    side = test.crops[:, 2]
    assert np.abs(uv.min(axis=1).min(axis=1)).max() <= 1.5  # the box touches the joints on its longer side
    assert np.abs(uv.max(axis=1).max(axis=1) - side).max() <= 2.5
    assert not test.is_scale_given


def test_the_joints_of_the_evaluation_may_be_missing(root):
    (root / "evaluation_xyz.json").unlink()
    with_joints, test = read(write_ho3d(root.parent / "other")).test, read(root).test
    assert test.xyz_m is None
    assert test.scale_m is None
    np.testing.assert_array_equal(test.crops, with_joints.crops)


def test_frames_without_joints_and_hands_at_the_border_are_left_out_and_counted(root):
    write_ho3d_frame(root / "train/MC1", 1, make_frame_hands(1)[0], {"handJoints3D": None})
    cut_off = make_frame_hands(1)[0] + [0.4, 0, 0]
    write_ho3d_frame(root / "train/MC1", 2, cut_off, {"handJoints3D": to_ho3d(cut_off)})
    splits = read(root)
    assert len(splits.train) + len(splits.val) == 10
    assert len(splits.notes) == 1
    assert re.search(
        r"ho3d: 2 of \d+ hands of the \w+ split are left out: 1 without joints, 1 cut off", splits.notes[0]
    )


def test_every_second_frame(root):
    splits = read(root, frame_step=2)
    assert {file.stem for split in (splits.train, splits.val) for file in split.files} == {"0000", "0002"}
    assert len(splits.test) == 4


def test_labels_come_from_the_cache_until_a_file_changes(root, tmp_path, monkeypatch):
    before = read(root, cache_folder=str(tmp_path / "packed"))
    monkeypatch.setattr("handpose.data.ho3d.read_pickle", lambda *arguments: pytest.fail("read again"))
    again = read(root, cache_folder=str(tmp_path / "packed"))
    np.testing.assert_array_equal(again.train.xyz_m, before.train.xyz_m)
    np.testing.assert_array_equal(again.test.intrinsics, before.test.intrinsics)
    monkeypatch.undo()
    for sequence in SEQUENCES:
        moved = make_frame_hands(1, 9)[0]
        write_ho3d_frame(root / "train" / sequence, 0, moved, {"handJoints3D": to_ho3d(moved)})
    changed = read(root, cache_folder=str(tmp_path / "packed"))
    assert not np.array_equal(changed.train.xyz_m, before.train.xyz_m)


class Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (pytest.fail, ("the file was executed",))


def write_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"handJoints3D": Code()}))


def edit_json(path: Path, factor: float) -> None:
    write_json(path, factor * np.array(json.loads(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (shutil.rmtree, ["data.root=", "does not exist", "HO-3D_v3", "TU Graz", "shreyashampali/ho3d"]),
        (lambda root: (root / "train.txt").unlink(), ["has no train.txt", "HO-3D_v3"]),
        (lambda root: (root / "train.txt").write_text(""), ["train.txt", "SEQUENCE/FRAME", "none"]),
        (lambda root: (root / "train.txt").write_text("ABF10 x"), ["train.txt", "SEQUENCE/FRAME", "ABF10"]),
        (lambda root: (root / "train/MC1/meta/0001.pkl").unlink(), ["MC1/meta/0001.pkl", "does not exist"]),
        (lambda root: (root / "train/MC1/meta/0001.pkl").write_bytes(b"x"), ["0001.pkl", "cannot be read", "unpack"]),
        (lambda root: write_code(root / "train/MC1/meta/0001.pkl"), ["0001.pkl", "it contains _pytest.outcomes"]),
        (
            lambda root: write_ho3d_frame(root / "train/MC1", 1, make_frame_hands(1)[0], {"handJoints3D": [1, 2]}),
            ["0001.pkl", "handJoints3D is not 21 x 3 finite numbers"],
        ),
        (lambda root: (root / "evaluation.txt").unlink(), ["evaluation.txt", "does not exist"]),
        (
            lambda root: edit_json(root / "evaluation_xyz.json", -1.0),
            ["evaluation_xyz.json", "from the wrist", "OpenGL"],
        ),
        (lambda root: (root / "evaluation_xyz.json").write_text("[1]"), ["evaluation_xyz.json", "4 x 21 x 3"]),
    ],
)
def test_a_broken_data_set_is_told_in_one_sentence(root, break_it, words):
    break_it(root)
    with pytest.raises(UserError) as error:
        read(root)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_version_2_is_refused(root):
    for file in root.glob("train/*/rgb/*.jpg"):
        file.rename(file.with_suffix(".png"))
    with pytest.raises(UserError, match="HO-3D version 2"):
        read(root)


def test_pictures_of_another_size_are_refused(root):
    for file in root.glob("train/*/rgb/*.jpg"):
        write_frame(file, [], (320, 240))
    with pytest.raises(UserError, match=r"320 x 240 pixels, but the labels .* 640 x 480"):
        read(root)


def test_one_recording_cannot_be_divided(tmp_path):
    root = write_ho3d(tmp_path / "set", sequences=("ABF10", "ABF11"))
    with pytest.raises(UserError, match="cannot be held out of 1 sequences"):
        read(root)
