import shutil
from pathlib import Path

import numpy as np
import pytest

from handpose.data import dexycb
from handpose.data.dexycb import SERIALS, SUBJECTS, DexYcb, find_split
from handpose.data.pack import pack
from handpose.data.sample import Annotations, Splits
from handpose.errors import UserError
from handpose.skeleton import JOINT_NAMES
from tests.data.layouts import (
    DEXYCB_SERIALS,
    DEXYCB_SUBJECTS,
    INDEX_TIP,
    is_left_in_dexycb,
    make_dexycb_camera,
    make_dexycb_hand,
    make_frame_hands,
    project,
    write_dexycb,
    write_dexycb_frame,
)
from tests.data.test_crops import find_disk


def read(root: Path, **options: object) -> Splits:
    return DexYcb(str(root), **{"setup": "s0", "crop_margin": 0.3, "frame_step": 1, **options}).splits()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_dexycb(tmp_path_factory.mktemp("data") / "dex-ycb")


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A set that a test may break, with one frame in each split of s0, and 5 instead of 100 sequences of a subject."""
    monkeypatch.setattr(dexycb, "NUM_SEQUENCES", 5)
    return write_dexycb(tmp_path / "dex-ycb", {0: (0, 4), 2: (4,)}, num_sequences=5)


def locate(file: Path) -> tuple[int, int, int]:
    """(subject, sequence, camera) of a picture."""
    subject, sequence, serial = file.parts[-4:-1]
    return DEXYCB_SUBJECTS.index(subject), int(sequence[-2:]), DEXYCB_SERIALS.index(serial)


def test_the_joints_project_to_the_published_keypoints_and_left_hands_are_mirrored(root):
    splits = read(root)
    sides = set()
    for split in (splits.train, splits.val, splits.test):
        for file, xyz_m, camera, crop in zip(split.files, split.xyz_m, split.intrinsics, split.crops, strict=True):
            subject, sequence, number = locate(file)
            published = make_dexycb_hand(subject, sequence, number)
            joint_2d = project(published, make_dexycb_camera(number))
            left, top, side, is_mirrored = crop
            assert is_mirrored == is_left_in_dexycb(sequence)
            sides.add(is_mirrored)
            ours = project(xyz_m, camera)
            u = side - 1 - ours[:, 0] if is_mirrored else ours[:, 0]
            np.testing.assert_allclose(np.stack([u + left, ours[:, 1] + top], axis=-1), joint_2d, atol=1e-3)
            right = published * [-1, 1, 1] if is_mirrored else published
            np.testing.assert_allclose(xyz_m, right, atol=1e-6)  # the files are float32
    assert sides == {0, 1}


def test_the_packed_picture_shows_the_joint(root, tmp_path):
    split = read(root).val
    packed = pack(split, image_size=128, folder=tmp_path / "packed", progress=False)
    for image, uv in zip(packed.images, project(split.xyz_m, packed.intrinsics)[:, INDEX_TIP], strict=True):
        np.testing.assert_allclose(find_disk(image), uv, atol=0.4)


def test_the_published_order_of_joints_is_that_of_this_project():
    """dex_ycb_toolkit/dex_ycb.py names its joints so."""
    fingers = ("thumb", "index", "middle", "ring", "little")
    assert (
        "wrist",
        *(f"{finger}_{part}" for finger in fingers for part in ("mcp", "pip", "dip", "tip")),
    ) == JOINT_NAMES


@pytest.mark.parametrize(
    ("setup", "train", "val", "test"),
    [
        ("s0", 10 * 80 * 8, 2 * 20 * 8, 8 * 20 * 8),
        ("s1", 7 * 100 * 8, 100 * 8, 2 * 100 * 8),
        ("s2", 10 * 100 * 6, 10 * 100, 10 * 100),
        ("s3", 10 * 75 * 8, 10 * 10 * 8, 10 * 15 * 8),
    ],
)
def test_a_setup_divides_everything_as_published(setup, train, val, test):
    places = [(s, c, q) for s in range(len(SUBJECTS)) for c in range(len(SERIALS)) for q in range(100)]
    found = [find_split(setup, subject=s, camera=c, sequence=q) for s, c, q in places]
    assert [found.count(split) for split in ("train", "val", "test")] == [train, val, test]


def list_places(split: Annotations) -> set[tuple[int, int, int]]:
    return {locate(file) for file in split.files}


def test_each_setup_holds_out_what_its_name_says(root):
    splits = read(root, setup="s0")
    assert {sequence % 5 for _, sequence, _ in list_places(splits.train)} == {0}
    assert {place[:2] for place in list_places(splits.val)} == {(0, 4)}
    assert {place[:2] for place in list_places(splits.test)} == {(2, 4), (6, 4), (7, 4)}
    splits = read(root, setup="s1")
    assert [{subject for subject, _, _ in list_places(part)} for part in (splits.train, splits.val, splits.test)] == [
        {0, 2},
        {6},
        {7},
    ]
    splits = read(root, setup="s2")
    assert {camera for _, _, camera in list_places(splits.val)} == {6}
    assert {camera for _, _, camera in list_places(splits.test)} == {7}
    splits = read(root, setup="s3")
    assert {sequence for _, sequence, _ in list_places(splits.val)} == {15}
    assert {sequence for _, sequence, _ in list_places(splits.test)} == {35}


def test_invisible_and_cut_off_hands_are_left_out_and_counted(small):
    hand = make_frame_hands(1)[0]
    for name, sequence in (("20200709-subject-01", 100000), ("20200820-subject-03", 100004)):
        folder = small / name / f"{name[:8]}_{sequence}"
        write_dexycb_frame(folder / SERIALS[0], 0, hand, make_dexycb_camera(0), visible=False)
        uv = project(hand, make_dexycb_camera(1))
        shift_m = hand[:, 2].mean() * (640 - uv[:, 0].mean()) / 611
        across = hand + np.array([shift_m, 0, 0])  # half of it is outside
        write_dexycb_frame(folder / SERIALS[1], 0, across, make_dexycb_camera(1))
    splits = read(small)
    assert len(splits.train) == 6
    assert len(splits.test) == 7  # the test split keeps the hand at the border
    assert splits.notes == (
        "dexycb: 2 of 8 hands of the training split are left out: 1 without a visible hand, 1 cut off by the border "
        "of the picture",
        "dexycb: 1 of 8 hands of the test split are left out: 1 without a visible hand",
    )


def test_every_second_frame_of_each_video(small):
    folder = small / "20200709-subject-01/20200709_100000"
    meta = folder / "meta.yml"
    meta.write_text(meta.read_text(encoding="utf-8").replace("num_frames: 1", "num_frames: 3"), encoding="utf-8")
    for camera, serial in enumerate(SERIALS):
        for frame in (1, 2):
            write_dexycb_frame(folder / serial, frame, make_frame_hands(1, frame)[0], make_dexycb_camera(camera))
    assert len(read(small).train) == 24
    train = read(small, frame_step=2).train
    assert [file.stem for file in train.files] == ["color_000000", "color_000002"] * 8


def replace_text(path: Path, before: str, after: str) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")


FIRST = "20200709-subject-01/20200709_100000"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (shutil.rmtree, ["data.root=", "does not exist", "dex-ycb.github.io", "CC BY-NC"]),
        (lambda root: shutil.rmtree(root / "calibration"), ["no calibration/intrinsics", "dex-ycb.github.io"]),
        (lambda root: shutil.rmtree(root / SUBJECTS[5]), [SUBJECTS[5], "does not exist", "all subjects"]),
        (lambda root: shutil.rmtree(root / FIRST), ["has 4 sequences, but each subject has 5"]),
        (lambda root: (root / FIRST / "meta.yml").unlink(), ["meta.yml does not exist"]),
        (lambda root: replace_text(root / FIRST / "meta.yml", "num_frames: 1", "a: 1"), ["num_frames=None"]),
        (lambda root: replace_text(root / FIRST / "meta.yml", "num_frames:", "[num_frames"), ["meta.yml is damaged"]),
        (
            lambda root: (root / f"calibration/intrinsics/{SERIALS[2]}_640x480.yml").unlink(),
            [f"{SERIALS[2]}_640x480.yml does not exist"],
        ),
        (
            lambda root: replace_text(root / f"calibration/intrinsics/{SERIALS[2]}_640x480.yml", "fx", "f"),
            [f"{SERIALS[2]}_640x480.yml", "fx, fy, ppx, ppy under color is not 4 finite numbers"],
        ),
        (lambda root: (root / FIRST / SERIALS[0] / "labels_000000.npz").unlink(), ["labels_000000.npz does not exist"]),
        (
            lambda root: (root / FIRST / SERIALS[0] / "labels_000000.npz").write_bytes(b"PK"),
            ["labels_000000.npz cannot be read"],
        ),
    ],
)
def test_a_broken_data_set_is_told_in_one_sentence(small, break_it, words):
    break_it(small)
    with pytest.raises(UserError) as error:
        read(small)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_a_calibration_of_another_release_is_told(small):
    for serial in SERIALS:
        replace_text(small / f"calibration/intrinsics/{serial}_640x480.yml", "  ppx: 3", "  ppx: 4")
    with pytest.raises(UserError, match=r"joint_3d projects 100 px from joint_2d in the median.*\.jpg"):
        read(small)
