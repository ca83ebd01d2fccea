"""The hand is looked for around its place in the frame before, and in the whole frame when it seems to be lost."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handpose.evaluation.hand_video import LOOK_AGAIN_FRAMES, HandTracker, JointFilter
from handpose.evaluation.photographs import Camera, Photograph
from handpose.evaluation.predict import SplitPredictions
from tests.builders import make_hands

CAMERA = Camera(np.array([[200.0, 0, 100], [0, 200.0, 100], [0, 0, 1]]), "given")
FRAME = Photograph(Path("film.mp4"), Image.new("RGB", (200, 200)), CAMERA)


@pytest.fixture
def track(monkeypatch):
    """Tracks hands that are given, and returns for each frame whether the whole frame was looked at."""

    def run(hands_m, *, fill):
        looked_at_whole = []

        def find(network, photographs, *, near, **_):
            looked_at_whole.append(near is None)
            return SplitPredictions(hands_m[len(looked_at_whole) - 1][None], np.full((1, 21), 0.004))

        monkeypatch.setattr("handpose.evaluation.hand_video.find_hands", find)
        smooth = JointFilter(min_cutoff_hz=1.0, beta=0.0)
        tracker = HandTracker(None, side=64, scale_m=0.03, fill=fill, mirror=False, smooth=smooth)
        for number in range(len(hands_m)):
            tracker(FRAME, time_s=number / 30)
        return looked_at_whole

    return run


def repeat_hand(num):
    """A hand in the middle of the frame."""
    hand = make_hands(1)
    return np.repeat(hand - hand.mean(axis=1, keepdims=True) + [0.0, 0.0, 0.6], num, axis=0)


def test_the_next_crop_is_around_the_hand_until_the_whole_frame_is_due_again(track):
    looked = track(repeat_hand(LOOK_AGAIN_FRAMES + 3), fill=0.6)
    assert [number for number, whole in enumerate(looked) if whole] == [0, LOOK_AGAIN_FRAMES]


def test_without_a_crop_every_frame_is_seen_whole(track):
    assert all(track(repeat_hand(5), fill=None))


@pytest.mark.parametrize("moved_m", [[5.0, 0.0, 0.0], [0.0, 0.0, -9.0]])
def test_a_hand_outside_the_frame_is_looked_for_in_the_whole_frame(track, moved_m):
    hands_m = repeat_hand(5)
    hands_m[2] += moved_m
    assert track(hands_m, fill=0.6) == [True, False, False, True, False]


def test_relative_joints_do_not_jump_with_the_distance_of_the_root():
    smooth = JointFilter(min_cutoff_hz=1.0, beta=0.05)
    hands_m = repeat_hand(20)
    jumps = hands_m + 0.2 * np.random.default_rng(0).normal(size=(20, 1, 1)) * [0, 0, 1]
    for number, xyz_m in enumerate(jumps):
        found = smooth(xyz_m, time_s=number / 30)
        assert found - found[9] == pytest.approx(hands_m[0] - hands_m[0][9], abs=1e-9)
