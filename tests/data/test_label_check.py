import json
from pathlib import Path

import numpy as np
import pytest

from handpose.config import compose
from handpose.data import hand_kinematics, label_check
from handpose.data.hand_scene import Difficulty, draw_view
from handpose.data.label_check import find_suspicious_labels
from handpose.data.sample import Annotations, ImageFiles
from handpose.training.build import build_data
from tests.builders import SMALL, write_freihand, write_json

SIZE = 96
NUM = 300


def make_synthetic_hands(difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """Joints and cameras of the synthetic set, without the pictures."""
    joints, cameras = [], []
    for index in range(NUM):
        rng = np.random.default_rng([0, 0, index])
        shape = hand_kinematics.draw_shape(rng)
        hand = hand_kinematics.pose_hand(shape, hand_kinematics.draw_pose(rng, shape, difficulty.pose_variety))
        view = draw_view(rng, hand.joints, SIZE, difficulty)
        joints.append((hand.joints @ view.rotation.T + view.translation) / 1000)
        cameras.append(view.intrinsics)
    return np.stack(joints), np.stack(cameras)


def make_difficulty(**changed) -> Difficulty:
    source = compose("train", []).data.source
    values = {name: source[name] for name in Difficulty.__dataclass_fields__} | changed
    return Difficulty(**{name: tuple(value) if name in ("focal", "fill") else value for name, value in values.items()})


@pytest.fixture(scope="module")
def clean() -> tuple[np.ndarray, np.ndarray]:
    return make_synthetic_hands(make_difficulty())


def find_labels(xyz_m, intrinsics, *, scale_m=None, pose=None) -> dict[int, str]:
    pose = np.arange(len(xyz_m)) if pose is None else pose
    files = ImageFiles.from_paths(Path(f"/rgb/{i:08d}.jpg") for i in range(len(pose)))
    annotations = Annotations(
        files=files,
        intrinsics=intrinsics[pose],
        xyz_m=xyz_m[pose],
        scale_m=None if scale_m is None else scale_m[pose],
        pose=pose,
    )
    suspicions = find_suspicious_labels(annotations, intrinsics[pose], SIZE)
    return {suspicion.image: "; ".join(suspicion.reasons) for suspicion in suspicions}


def change_hand(xyz_m, hand, new) -> np.ndarray:
    copy = xyz_m.copy()
    copy[hand] = new
    return copy


def test_clean_synthetic_hands_raise_no_suspicion(clean):
    assert find_labels(*clean) == {}


def test_the_hardest_synthetic_hands_raise_no_suspicion():
    hardest = {"roll_deg": 180, "tilt_deg": 90, "back_probability": 0.5, "pose_variety": 2.0, "cutoff_probability": 1.0}
    assert find_labels(*make_synthetic_hands(make_difficulty(**hardest, focal=(0.8, 10), fill=(0.1, 1)))) == {}


def test_a_joint_that_is_moved_is_found_with_its_bone(clean):
    xyz_m, intrinsics = clean
    wrong = xyz_m.copy()
    wrong[7, 10] = wrong[7, 9] + np.array([1e-4, 0.0, 0.0])
    wrong[20, 8] += np.array([0.0, 0.0, 0.06])
    suspicions = find_labels(wrong, intrinsics)
    assert suspicions.keys() == {7, 20}
    assert "middle_mcp to middle_pip" in suspicions[7]
    assert "index_dip to index_tip" in suspicions[20]


def test_a_hand_in_millimetres_among_metres_is_found(clean):
    suspicions = find_labels(change_hand(clean[0], 3, 1000 * clean[0][3]), clean[1])
    assert suspicions.keys() == {3}
    assert "times as large" in suspicions[3]
    assert "from the camera" in suspicions[3]


def test_a_hand_far_behind_the_others_is_found(clean):
    suspicions = find_labels(change_hand(clean[0], 3, clean[0][3] + np.array([0, 0, 30.0])), clean[1])
    assert suspicions.keys() == {3}
    assert "from the camera" in suspicions[3]


def test_hands_outside_their_pictures_are_found(clean):
    suspicions = find_labels(change_hand(clean[0], 3, clean[0][3] + np.array([0.5, 0, 0])), clean[1])
    assert suspicions.keys() == {3}
    assert "21 of its joints lie outside the picture of 96 px" in suspicions[3]


def test_left_hands_among_right_ones_are_found_and_the_other_way_round(clean):
    xyz_m, intrinsics = clean
    folder_sync = np.array([-1.0, 1.0, 1.0])
    suspicions = find_labels(change_hand(xyz_m, slice(0, 20), xyz_m[:20] * folder_sync), intrinsics)
    assert len(suspicions) >= 19
    assert set(suspicions) <= set(range(20))
    assert all("it is a left hand, but nearly all others are right hands" in reason for reason in suspicions.values())
    suspicions = find_labels(change_hand(xyz_m * folder_sync, slice(0, 20), xyz_m[:20]), intrinsics)
    assert all("it is a right hand, but nearly all others are left hands" in reason for reason in suspicions.values())
    assert len(suspicions) >= 19


def test_a_data_set_of_both_sides_raises_no_suspicion(clean):
    xyz_m, intrinsics = clean
    assert find_labels(change_hand(xyz_m, slice(0, 100), xyz_m[:100] * np.array([-1.0, 1.0, 1.0])), intrinsics) == {}


def test_a_scale_that_is_not_the_reference_bone_is_found(clean):
    xyz_m, intrinsics = clean
    scale_m = np.linalg.norm(xyz_m[:, 9] - xyz_m[:, 10], axis=-1)
    scale_m[4] *= 2
    reason = "its scale is 2 times the length of the bone middle_mcp to middle_pip"
    assert find_labels(xyz_m, intrinsics, scale_m=scale_m) == {4: reason}


def test_one_pose_of_several_images_is_named_once(clean):
    wrong = change_hand(clean[0][:20], 3, 1000 * clean[0][3])
    assert find_labels(wrong, clean[1][:20], pose=np.arange(80) % 20).keys() == {3}


def test_a_tenth_of_wrong_hands_does_not_hide_each_other(clean):
    xyz_m, intrinsics = clean
    wrong = xyz_m.copy()
    wrong[:30, 10] = wrong[:30, 9] + np.random.default_rng(0).normal(0, 0.3, (30, 3))
    assert set(range(30)) == find_labels(wrong, intrinsics).keys()


def test_the_data_module_names_entry_and_file_once_and_is_quiet_where_it_is_told_to(tmp_path, capsys):
    root = write_freihand(tmp_path / "set", num_poses=24, variants=4, num_test=12)
    xyz_m = np.array(json.loads((root / "training_xyz.json").read_text()))
    xyz_m[5, 10] = xyz_m[5, 9] + 1e-4
    write_json(root / "training_xyz.json", xyz_m)
    config = compose("train", [*SMALL, f"data.root={root}", f"paths.output={tmp_path}"])
    data = build_data(config)
    data.setup("fit")
    data.setup()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert "entry 5 (" in said
    assert "00000005.jpg): the bone middle_mcp to middle_pip" in said
    build_data(config, quiet=True).setup()
    assert "warning" not in capsys.readouterr().err


def test_a_long_list_is_cut_short():
    suspicions = [label_check.SuspiciousLabel(i, ("it is odd",)) for i in range(25)]
    text = label_check.format_warning("train", [Path(f"/{i:08d}.jpg") for i in range(25)], suspicions, num_poses=300)
    assert text.startswith("warning: 25 of 300 hands of the train split")
    assert text.endswith("and 15 more")


def test_joints_that_are_no_numbers_or_lie_on_one_point_are_said_in_words(clean):
    xyz_m, intrinsics = clean
    for broken in (np.full((21, 3), np.nan), np.tile(xyz_m[3, :1], (21, 1))):
        reasons = find_labels(change_hand(xyz_m, 3, broken), intrinsics)
        assert "has no length, or its joints are not finite" in reasons[3]
        assert "nan" not in reasons[3]
        assert "inf" not in reasons[3].replace("finite", "")
