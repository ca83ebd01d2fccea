import gzip
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from handpose.errors import UserError
from handpose.evaluation import submission
from handpose.evaluation.submission import read_course, read_official, write_course, write_official

AIT_ORDER = [
    "wrist",
    "thumb_mcp", "index_mcp", "middle_mcp", "ring_mcp", "little_mcp",
    "thumb_pip", "index_pip", "middle_pip", "ring_pip", "little_pip",
    "thumb_dip", "index_dip", "middle_dip", "ring_dip", "little_dip",
    "thumb_tip", "index_tip", "middle_tip", "ring_tip", "little_tip",
]  # fmt: skip
FREIHAND_ORDER = [
    "wrist",
    "thumb_mcp", "thumb_pip", "thumb_dip", "thumb_tip",
    "index_mcp", "index_pip", "index_dip", "index_tip",
    "middle_mcp", "middle_pip", "middle_dip", "middle_tip",
    "ring_mcp", "ring_pip", "ring_dip", "ring_tip",
    "little_mcp", "little_pip", "little_dip", "little_tip",
]  # fmt: skip


def make_poses(num: int = 5) -> np.ndarray:
    return 0.05 * np.random.default_rng(0).normal(size=(num, 21, 3)) + (0.0, 0.0, 0.7)


def test_course_file_is_plain_gzipped_json_in_ait_order_and_mm(tmp_path: Path) -> None:
    xyz = np.zeros((1, 21, 3))
    xyz[0, :, 2] = np.arange(21) / 1000  # joint j of FreiHAND order lies j mm away
    write_course(tmp_path / "test_preds.json.gz", xyz)
    with gzip.open(tmp_path / "test_preds.json.gz", "rt") as file:
        content = json.load(file)
    assert [FREIHAND_ORDER[round(z)] for _, _, z in content[0]] == AIT_ORDER
    assert content[0][0] == [0, 0, 0]


def test_course_file_comes_back_to_a_ten_thousandth_of_a_millimetre(tmp_path: Path) -> None:
    write_course(tmp_path / "test_preds.json.gz", make_poses())
    np.testing.assert_allclose(read_course(tmp_path / "test_preds.json.gz"), make_poses(), rtol=0, atol=0.51e-7)


def test_official_file_is_a_zip_with_keypoints_and_empty_meshes(tmp_path: Path) -> None:
    write_official(tmp_path / "pred.zip", make_poses())
    with zipfile.ZipFile(tmp_path / "pred.zip") as archive:
        assert archive.namelist() == ["pred.json"]
        xyz, vertices = json.loads(archive.read("pred.json"))
    np.testing.assert_allclose(xyz, make_poses(), rtol=0, atol=0.51e-7)
    assert np.shape(vertices) == (5, 778, 3)
    assert not np.any(vertices)


@pytest.mark.parametrize(("name", "read"), [("test_preds.json.gz", read_course), ("pred.zip", read_official)])
def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(tmp_path, monkeypatch, name, read):
    monkeypatch.setattr(submission, "_MAX_JSON_BYTES", 10_000)
    text = b"[" + b" " * 20_000 + b"]"
    if read is read_course:
        (tmp_path / name).write_bytes(gzip.compress(text))
    else:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pred.json", text)
    assert (tmp_path / name).stat().st_size < 1000
    with pytest.raises(UserError, match=rf"{name} unpacks to more than 10 kB; it is no file of predictions"):
        read(tmp_path / name)


def test_official_file_comes_back(tmp_path: Path) -> None:
    write_official(tmp_path / "pred.zip", make_poses())
    np.testing.assert_allclose(read_official(tmp_path / "pred.zip"), make_poses(), rtol=0, atol=0.51e-7)


@pytest.mark.parametrize("write", [write_course, write_official])
def test_same_predictions_give_the_same_bytes_and_the_folder_is_made(write, tmp_path: Path, monkeypatch) -> None:
    for second, folder in enumerate(("a", "b")):
        monkeypatch.setattr(time, "time", lambda now=1e9 + 10 * second: now)
        write(tmp_path / "preds" / folder / "file", make_poses())
    first, second = ((tmp_path / "preds" / folder / "file").read_bytes() for folder in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("write", [write_course, write_official])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(write, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    write(path, make_poses())
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path, 2 * make_poses())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [write_course, write_official])
def test_predictions_that_are_not_finite_are_refused(write, tmp_path: Path) -> None:
    xyz = make_poses()
    xyz[3, 2, 1] = np.nan
    with pytest.raises(UserError, match="1 of 5 hands are not finite, the first is number 3"):
        write(tmp_path / "file", xyz)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [write_course, write_official])
def test_predictions_of_another_shape_are_refused(write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(5, 20, 3\)"):
        write(tmp_path / "file", make_poses()[:, :20])


def write_course_file(path: Path, content: object) -> None:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def write_official_file(path: Path, content: object, name: str = "pred.json") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, json.dumps(content))


HAND = [[0.0] * 3] * 21
BAD_COURSE_FILES = {
    "does not exist": lambda path: None,
    "not a complete gzip": lambda path: path.write_text("[]"),
    "truncated": lambda path: path.write_bytes(gzip.compress(bytes(range(256)) * 50)[:60]),
    "does not hold JSON": lambda path: path.write_bytes(gzip.compress(b"[[")),
    "not finite": lambda path: write_course_file(path, [[*HAND[:-1], [0.0, 0.0, float("nan")]]]),
    r"\(1, 20, 3\)": lambda path: write_course_file(path, [HAND[:-1]]),
    "unequal": lambda path: write_course_file(path, [HAND, HAND[:-1]]),
    r"N x 21 x 3": lambda path: write_course_file(path, {"xyz": HAND}),
}
BAD_OFFICIAL_FILES = {
    "does not exist": lambda path: None,
    "not a zip": lambda path: path.write_text("[]"),
    "pred.json in it": lambda path: write_official_file(path, [], name="other.json"),
    "two lists": lambda path: write_official_file(path, [HAND]),
    "1 hands but 2 meshes": lambda path: write_official_file(path, [[HAND], [[], []]]),
    "not finite": lambda path: write_official_file(path, [[[*HAND[:-1], [0.0, 0.0, float("inf")]]], [[]]]),
    r"\(1, 20, 3\)": lambda path: write_official_file(path, [[HAND[:-1]], [[]]]),
}


@pytest.mark.parametrize("complaint", BAD_COURSE_FILES)
def test_a_bad_course_file_is_named_with_its_fault(complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "test_preds.json.gz"
    BAD_COURSE_FILES[complaint](path)
    with pytest.raises(UserError, match=complaint) as error:
        read_course(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("complaint", BAD_OFFICIAL_FILES)
def test_a_bad_official_file_is_named_with_its_fault(complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "pred.zip"
    BAD_OFFICIAL_FILES[complaint](path)
    with pytest.raises(UserError, match=complaint) as error:
        read_official(path)
    assert str(path) in str(error.value)
