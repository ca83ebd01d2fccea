"""The articulated hand keeps to its bones and limits and moves as a right hand does."""

import numpy as np
import pytest

from handpose import skeleton
from handpose.data import hand_kinematics
from handpose.data.hand_kinematics import LIMITS_DEG, SIZE_LIMITS, HandPose

FLAT = HandPose(np.zeros(4), np.zeros(4), np.zeros(4), np.zeros(4), np.array([40.0, 20, 0, 0]), 0.0)


def draw_hand(seed):
    rng = np.random.default_rng(seed)
    shape = hand_kinematics.draw_shape(rng)
    pose = hand_kinematics.draw_pose(rng, shape)
    return shape, pose, hand_kinematics.pose_hand(shape, pose)


def compute_bones(joints):
    parents, children = np.array(skeleton.BONES).T
    return joints[children] - joints[parents]


def compute_angle_deg(first, second):
    cosine = np.sum(first * second, -1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@pytest.fixture(scope="module")
def hands():
    return [draw_hand(seed) for seed in range(300)]


def test_posing_keeps_every_bone_length(hands):
    for shape, _, hand in hands[:50]:
        flat = hand_kinematics.pose_hand(shape, FLAT)
        np.testing.assert_allclose(
            np.linalg.norm(compute_bones(hand.joints), axis=1),
            np.linalg.norm(compute_bones(flat.joints), axis=1),
            rtol=1e-9,
        )


def test_bones_are_an_adults(hands):
    lengths = np.stack([np.linalg.norm(compute_bones(hand.joints), axis=1) for *_, hand in hands])
    # Buryanov and Kotiuk 2010: mean proximal phalanges of index to little finger 39.8, 44.6, 41.4, 32.7 mm and middle
    # ones 22.4, 26.3, 25.7, 18.1 mm, between bone ends; joint centres lie a little further apart.
    np.testing.assert_allclose(lengths[:, [5, 9, 13, 17]].mean(0), [39.8, 44.6, 41.4, 32.7], rtol=0.10)
    np.testing.assert_allclose(lengths[:, [6, 10, 14, 18]].mean(0), [22.4, 26.3, 25.7, 18.1], rtol=0.15)


def test_bones_of_one_hand_vary_little_and_hands_vary_within_the_limits(hands):
    lengths = np.stack([np.linalg.norm(compute_bones(hand.joints), axis=1) for *_, hand in hands])
    relative = lengths / np.median(lengths, axis=0)
    size = np.median(relative, axis=1)
    assert SIZE_LIMITS[0] - 0.05 < size.min() < 0.92
    assert 1.08 < size.max() < SIZE_LIMITS[1] + 0.05
    assert 0.01 < (relative / size[:, None]).std() < 0.04


def test_joint_angles_seen_on_the_skeleton_keep_the_limits(hands):
    for *_, hand in hands:
        chain = compute_bones(hand.joints).reshape(5, 4, 3)[
            1:
        ]  # metacarpal, proximal, middle, distal of the four fingers
        pip, dip = compute_angle_deg(chain[:, 1], chain[:, 2]), compute_angle_deg(chain[:, 2], chain[:, 3])
        assert pip.max() <= LIMITS_DEG["pip"][1] + 1e-6
        assert dip.max() <= LIMITS_DEG["dip"][1] + 1e-6
        thumb = compute_bones(hand.joints)[1:4]
        assert compute_angle_deg(thumb[0], thumb[1]) <= LIMITS_DEG["thumb_mcp"][1] + 1e-6
        assert compute_angle_deg(thumb[1], thumb[2]) <= LIMITS_DEG["thumb_ip"][1] + 1e-6


def test_every_angle_drawn_is_within_its_limits(hands):
    for _, pose, _ in hands:
        for name in ("mcp", "pip", "dip", "spread", "cupping"):
            low, high = LIMITS_DEG[name]
            assert np.all(np.asarray(getattr(pose, name)) >= low)
            assert np.all(np.asarray(getattr(pose, name)) <= high)
        for angle, name in zip(pose.thumb, ("radial", "palmar", "mcp", "ip"), strict=True):
            assert LIMITS_DEG[f"thumb_{name}"][0] <= angle <= LIMITS_DEG[f"thumb_{name}"][1]


def test_dip_follows_pip_by_two_thirds(hands):
    pip = np.concatenate([pose.pip for _, pose, _ in hands])
    dip = np.concatenate([pose.dip for _, pose, _ in hands])
    free = (dip > 1) & (dip < 79)
    slope = np.polyfit(pip[free], dip[free], 1)[0]
    assert slope == pytest.approx(2 / 3, abs=0.06)


def test_few_components_explain_the_postures(hands):
    angles = np.array([np.concatenate([pose.mcp, pose.pip, pose.dip, pose.spread, pose.thumb]) for _, pose, _ in hands])
    variance = np.sort(np.linalg.eigvalsh(np.cov(angles.T)))[::-1]
    share = np.cumsum(variance) / variance.sum()
    # Santello et al. 1998: two components explain more than 80 % of grasping; gestures are more varied.
    assert 0.55 < share[1] < 0.9
    assert share[5] > 0.9


def test_flat_right_hand_has_its_thumb_to_the_left_of_its_back():
    joints = hand_kinematics.pose_hand(hand_kinematics.draw_shape(np.random.default_rng(0)), FLAT).joints
    up = joints[9] - joints[0]  # wrist to middle knuckle
    to_thumb = joints[5] - joints[17]  # little to index knuckle
    # Right hand, fingers up, palm towards the reader: the thumb is on the reader's right. So up x to_thumb points away
    # from the reader, that is out of the back of the hand.
    assert np.cross(up, to_thumb)[2] < 0
    assert joints[4] @ to_thumb > joints[9] @ to_thumb


def test_bending_moves_fingertips_to_the_palm_and_opening_moves_them_away():
    shape = hand_kinematics.draw_shape(np.random.default_rng(0))
    fist = FLAT._replace(mcp=np.full(4, 75.0), pip=np.full(4, 95.0), dip=np.full(4, 60.0))
    open_tips = hand_kinematics.pose_hand(shape, FLAT).joints[8::4]
    joints = hand_kinematics.pose_hand(shape, fist).joints
    tips, knuckles = joints[8::4], joints[5::4]
    assert np.all(tips[:, 2] > knuckles[:, 2] + 8)  # on the side of the palm
    assert np.linalg.norm(tips - knuckles, axis=1).max() < 60
    assert np.linalg.norm(open_tips - knuckles, axis=1).min() > 65


def test_spreading_opens_the_hand_without_bending_it():
    shape = hand_kinematics.draw_shape(np.random.default_rng(0))
    spread = FLAT._replace(spread=np.array([10.0, 0, -8, -15]))
    near = hand_kinematics.pose_hand(shape, FLAT).joints[[8, 20]]
    wide = hand_kinematics.pose_hand(shape, spread).joints[[8, 20]]
    assert np.ptp(wide[:, 0]) > np.ptp(near[:, 0]) + 20
    np.testing.assert_allclose(wide[:, 2], near[:, 2], atol=3)


def test_thumb_does_not_go_through_the_fingers(hands):
    worst = []
    for *_, hand in hands:
        share = np.linspace(0, 1, 40)[:, None]
        thumb = hand.joints[3] + share * (hand.joints[4] - hand.joints[3])
        gaps = []
        for joint in range(5, skeleton.NUM_JOINTS):
            if joint % 4 != 1:
                start = hand.joints[skeleton.PARENTS[joint]]
                other = start + share * (hand.joints[joint] - start)
                gaps.append(np.linalg.norm(thumb[:, None] - other[None], axis=-1).min())
        worst.append(min(gaps))
    # Bones closer than 8 mm would mean that the flesh of one is inside the other by half.
    assert np.mean(np.array(worst) < 8) < 0.02


def test_no_variety_leaves_poses_close_together():
    rng = np.random.default_rng(0)
    shape = hand_kinematics.draw_shape(rng)
    poses = [hand_kinematics.draw_pose(rng, shape, variety=0.0) for _ in range(30)]
    assert np.std([pose.pip for pose in poses], axis=0).max() < 8
