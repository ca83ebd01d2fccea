import pickle
from pathlib import Path

import numpy as np
import pytest

from handpose.data.label_files import check_root, map_files, read_arrays, read_pickle, to_array
from handpose.errors import UserError


def read_numbers(files: list[Path], folder: Path | None) -> np.ndarray:
    arrays = read_arrays(
        lambda: {"numbers": np.array([float(file.read_text(encoding="utf-8")) for file in files])},
        files=files,
        kind="numbers 1",
        cache_folder=folder,
    )
    return arrays["numbers"]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    written = [tmp_path / f"{i}.txt" for i in range(3)]
    for number, file in enumerate(written):
        file.write_text(str(number), encoding="utf-8")
    return written


def test_the_cache_is_used_only_for_the_same_files(files, tmp_path):
    folder = tmp_path / "packed"
    assert read_numbers(files, folder).tolist() == [0, 1, 2]
    assert len(list(folder.iterdir())) == 1
    assert read_numbers(files[::-1], folder).tolist() == [2, 1, 0]
    files[1].write_text("71", encoding="utf-8")
    assert read_numbers(files, folder).tolist() == [0, 71, 2]


def test_a_damaged_cache_is_made_again(files, tmp_path):
    folder = tmp_path / "packed"
    read_numbers(files, folder)
    for cached in folder.iterdir():
        cached.write_bytes(cached.read_bytes()[:40])
    assert read_numbers(files, folder).tolist() == [0, 1, 2]


def test_a_folder_that_cannot_be_written_is_no_error(files, tmp_path):
    (tmp_path / "file").touch()
    assert read_numbers(files, tmp_path / "file").tolist() == [0, 1, 2]


def test_many_files_are_read_in_order(files):
    assert map_files(lambda file: file.name, files * 40) == [file.name for file in files * 40]


def test_a_pickle_of_python_2_with_arrays_can_be_read(tmp_path):
    content = {"camMat": np.eye(3), "name": "mug", "none": None, "number": np.float32(2)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
    again = read_pickle(tmp_path / "a.pkl", "layout")
    np.testing.assert_array_equal(again["camMat"], np.eye(3))
    assert (again["name"], again["none"], again["number"]) == ("mug", None, 2)


def test_a_pickle_with_something_else_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"path": Path("x")}))
    with pytest.raises(UserError, match=r"a\.pkl cannot be read as .* \(it contains pathlib"):
        read_pickle(tmp_path / "a.pkl", "layout")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="must hold a dictionary but holds list"):
        read_pickle(tmp_path / "a.pkl", "layout")


@pytest.mark.parametrize("value", [[1, 2], [[1, 2, "a"]], None, [1, 2, np.nan], [1, 2, 10**400]])
def test_a_label_of_another_shape_is_refused(value):
    with pytest.raises(UserError, match=r"k\.json: the focal length is not 3 finite numbers"):
        to_array(value, (3,), Path("k.json"), "the focal length")


def test_a_root_one_folder_too_high_is_put_right(tmp_path):
    (tmp_path / "set/train").mkdir(parents=True)
    check_root(tmp_path / "set", inner="train", where="get it")
    with pytest.raises(UserError, match=r"but set in it has; use data\.root="):
        check_root(tmp_path, inner="train", where="get it")
    with pytest.raises(UserError, match="does not exist; get it"):
        check_root(tmp_path / "no", inner="train", where="get it")
