import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handpose.data.interhand import FREIHAND_FROM_INTERHAND, InterHand
from handpose.data.pack import pack
from handpose.data.sample import Splits
from handpose.errors import UserError
from handpose.skeleton import JOINT_NAMES
from tests.builders import write_json
from tests.data.layouts import (
    INDEX_TIP,
    INTERHAND_CAMERAS,
    INTERHAND_NAMES,
    make_interhand_camera,
    make_interhand_world,
    project,
    project_interhand,
    write_interhand,
)
from tests.data.test_crops import find_disk


def read(root: Path, **options: object) -> Splits:
    return InterHand(str(root), **{"crop_margin": 0.3, "frame_step": 1, **options}).splits()


@pytest.fixture
def root(tmp_path) -> Path:
    return write_interhand(tmp_path / "InterHand2.6M")


def edit(root: Path, split: str, kind: str, change: Callable[[Any], object]) -> None:
    path = root / "annotations" / split / f"InterHand2.6M_{split}_{kind}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def test_the_joints_project_to_the_published_pixels_and_left_hands_are_mirrored(root):
    for seed, split in enumerate((part := read(root)).__dict__[name] for name in ("train", "val", "test")):
        assert len(split) == 8  # four frames with a single hand, two cameras
        for file, xyz_m, camera, crop in zip(split.files, split.xyz_m, split.intrinsics, split.crops, strict=True):
            frame, name = int(file.stem.removeprefix("image")), file.parent.name.removeprefix("cam")
            hand = make_interhand_world(frame, seed)[21 * (frame % 2) :][:21]
            published = project_interhand(hand, make_interhand_camera(10 * seed + INTERHAND_CAMERAS.index(name)))
            left, top, side, is_mirrored = crop
            assert is_mirrored == frame % 2
            ours = project(xyz_m, camera)
            u = side - 1 - ours[:, 0] if is_mirrored else ours[:, 0]
            for joint, uv in zip(INTERHAND_NAMES, published, strict=True):
                place = JOINT_NAMES.index(joint)
                np.testing.assert_allclose([u[place] + left, ours[place, 1] + top], uv, atol=1e-6)
            lengths = np.linalg.norm(np.diff(hand, axis=0), axis=-1)[:3]
            np.testing.assert_allclose(np.linalg.norm(np.diff(xyz_m[1:5], axis=0), axis=-1), lengths[::-1] / 1000)
    assert part.notes[0] == "interhand: 2 of 10 hands of the training split are left out: 2 of interacting hands"


def test_known_joints_are_at_known_positions():
    """The wrist is joint 20 and the tips are joints 0, 4, 8, 12 and 16 (skeleton.txt)."""
    assert FREIHAND_FROM_INTERHAND[0] == 20
    assert [FREIHAND_FROM_INTERHAND[4 * finger] for finger in range(1, 6)] == [0, 4, 8, 12, 16]
    assert sorted(FREIHAND_FROM_INTERHAND) == list(range(21))


def test_the_packed_picture_shows_the_joint(root, tmp_path):
    split = read(root).train
    packed = pack(split, image_size=128, folder=tmp_path / "packed", progress=False)
    for image, uv in zip(packed.images, project(split.xyz_m, packed.intrinsics)[:, INDEX_TIP], strict=True):
        np.testing.assert_allclose(find_disk(image), uv, atol=0.4)


def test_version_0_0_has_its_annotations_in_one_folder(root, tmp_path):
    other = read(write_interhand(tmp_path / "v0.0", folder="all"))
    np.testing.assert_array_equal(other.test.xyz_m, read(root).test.xyz_m)


def test_hands_without_all_labels_or_a_sure_side_or_at_the_border_are_left_out_and_counted(root):
    def spoil(content: Any) -> None:
        content["annotations"][0]["joint_valid"][3] = [0]
        content["annotations"][1]["hand_type_valid"] = 0

    edit(root, "train", "data", spoil)
    cut_off = {"focal": {name: [6000.0, 6000.0] for name in INTERHAND_CAMERAS}}
    edit(root, "val", "camera", lambda content: content["0"]["focal"].update({INTERHAND_CAMERAS[0]: [2000.0, 2000.0]}))
    splits = read(root)
    assert len(splits.train) == 6
    assert splits.notes[0].endswith(
        "4 of 10 hands of the training split are left out: 2 of interacting hands, "
        "1 of a hand whose side is uncertain, 1 with a joint that has no label"
    )
    assert len(splits.val) == 4
    assert "4 cut off by the border of the picture" in splits.notes[1]
    edit(root, "val", "camera", lambda content: content["0"].update(cut_off))
    with pytest.raises(UserError, match="the validation split has no single hand that can be used"):
        read(root)


def test_every_second_frame_of_each_camera(root):
    splits = read(root, frame_step=2)
    assert [file.stem for file in splits.train.files] == ["image0", "image2"] * 2
    assert len(splits.test) == 8


def test_labels_come_from_the_cache(root, tmp_path, monkeypatch):
    before = read(root, cache_folder=str(tmp_path / "packed"))
    monkeypatch.setattr("handpose.data.interhand.read_json", lambda *arguments: pytest.fail("read again"))
    again = read(root, cache_folder=str(tmp_path / "packed"))
    assert list(again.train.files) == list(before.train.files)
    np.testing.assert_array_equal(again.train.xyz_m, before.train.xyz_m)
    assert again.notes == before.notes


def find_train_file(root: Path, kind: str) -> Path:
    return root / f"annotations/train/InterHand2.6M_train_{kind}.json"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (shutil.rmtree, ["data.root=", "does not exist", "mks0601.github.io/InterHand2.6M", "CC BY-NC"]),
        (lambda root: shutil.rmtree(root / "annotations"), ["has no annotations", "mks0601.github.io"]),
        (lambda root: find_train_file(root, "data").unlink(), ["neither", "train_data.json", "annotations/all"]),
        (lambda root: find_train_file(root, "camera").write_bytes(b"{"), ["train_camera.json", "not valid JSON"]),
        (lambda root: edit(root, "train", "joint_3d", lambda c: c["0"].pop("2")), ["train_data.json", "KeyError: '2'"]),
        (lambda root: edit(root, "train", "data", lambda c: c.pop("images")), ["published fields", "'images'"]),
        (
            lambda root: edit(root, "train", "camera", lambda c: c["0"]["camrot"].update({"400002": [1]})),
            ["train_camera.json", "camrot of capture 0, 400002 is not 3 x 3"],
        ),
    ],
)
def test_a_broken_data_set_is_told_in_one_sentence(root, break_it, words):
    break_it(root)
    with pytest.raises(UserError) as error:
        read(root)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message
