import numpy as np
import pytest

from handpose.data.freihand_course import FreiHandCourse
from handpose.errors import UserError
from tests.builders import make_cameras, make_hands, write_course, write_json


@pytest.mark.parametrize("images_per_entry", [1, 4])
def test_image_i_has_the_labels_of_entry_i_modulo_n(tmp_path, images_per_entry):
    splits = FreiHandCourse(
        str(write_course(tmp_path / "set", num_poses=4, images_per_entry=images_per_entry))
    ).splits()
    for seed, split in enumerate((splits.train, splits.val, splits.test)):
        numbers = np.array([int(file.stem) for file in split.files])
        np.testing.assert_array_equal(numbers, np.arange(4 * images_per_entry))
        np.testing.assert_array_equal(split.intrinsics, make_cameras(4, seed=seed)[numbers % 4])
    np.testing.assert_array_equal(splits.train.xyz_m[-1], make_hands(4)[3])
    assert [split.files[0].parent.name for split in (splits.train, splits.val, splits.test)] == ["train", "val", "test"]


def test_the_scale_is_the_reference_bone_where_joints_are_known(tmp_path):
    splits = FreiHandCourse(str(write_course(tmp_path / "set"))).splits()
    bone = np.linalg.norm(make_hands(4, seed=1)[:, 9] - make_hands(4, seed=1)[:, 10], axis=-1)
    np.testing.assert_allclose(splits.val.scale_m[:4], bone, rtol=1e-12)
    assert splits.test.xyz_m is None
    assert splits.test.scale_m is None


def test_test_joints_are_used_where_they_are_given(tmp_path):
    root = write_course(tmp_path / "set")
    write_json(root / "test_xyz.json", make_hands(4, seed=2))
    np.testing.assert_array_equal(FreiHandCourse(str(root)).splits().test.xyz_m[:4], make_hands(4, seed=2))


def test_no_pose_is_in_two_splits(tmp_path):
    splits = FreiHandCourse(str(write_course(tmp_path / "set", num_poses=4))).splits()
    poses = np.concatenate([np.unique(split.pose) for split in (splits.train, splits.val, splits.test)])
    assert len(poses) == len(set(poses)) == 12


def test_a_missing_root_is_told_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*nowhere does not exist; .*MP_DATA.*data=freihand"):
        FreiHandCourse(str(tmp_path / "nowhere")).splits()


def test_what_is_missing_is_named(tmp_path):
    root = write_course(tmp_path / "set")
    (root / "val_xyz.json").unlink()
    with pytest.raises(UserError, match=r"val_xyz.json does not exist; .*freihand_dataset_MP"):
        FreiHandCourse(str(root)).splits()


def test_counts_that_do_not_agree_are_told(tmp_path):
    root = write_course(tmp_path / "set")
    (root / "test/00000015.jpg").unlink()
    with pytest.raises(UserError, match=r"test_K.json has 4 poses but .*test has 15 images"):
        FreiHandCourse(str(root)).splits()


def test_millimetres_are_refused(tmp_path):
    root = write_course(tmp_path / "set")
    write_json(root / "train_xyz.json", 1000 * make_hands(4))
    with pytest.raises(UserError, match=r"train_xyz.json.*metres"):
        FreiHandCourse(str(root)).splits()
