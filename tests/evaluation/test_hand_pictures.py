"""Which hands are shown, and what is left of them."""

import json

import numpy as np
import pytest
from PIL import Image

from handpose.config import compose
from handpose.evaluation.hand_pictures import NUM_PER_KIND, choose_hands, write_hand_pictures
from handpose.evaluation.predict import SplitPredictions
from handpose.training.build import build_data
from tests.builders import SMALL


def test_the_worst_and_the_best_are_shown_in_order_and_none_twice():
    chosen = choose_hands(5, np.array([3.0, 9.0, 1.0, 5.0, 4.0]))
    assert chosen == [("worst", 1), ("worst", 3), ("worst", 4), ("best", 2), ("best", 0)]
    many = choose_hands(100, np.arange(100.0))
    assert many[0] == ("worst", 99)
    assert many[NUM_PER_KIND] == ("best", 0)
    assert len(many) == 2 * NUM_PER_KIND


@pytest.mark.parametrize("num", [1, 3, 50])
def test_without_truth_some_are_shown_that_are_spread_over_the_split(num):
    chosen = choose_hands(num, None)
    assert len({index for _, index in chosen}) == len(chosen) == min(num, NUM_PER_KIND)
    assert chosen[0] == ("other", 0)
    assert chosen[-1] == ("other", num - 1)


def test_a_hand_is_a_square_picture_with_its_error(freihand, tmp_path):
    data = build_data(compose("train", [*SMALL, f"data.root={freihand}", f"paths.packed={tmp_path / 'packed'}"]))
    data.setup("test")
    dataset = data.test_dataloader().dataset
    predicted_m = dataset.annotations.xyz_m.copy()
    predicted_m[2, 8] += 0.05  # one joint of one hand is 87 mm off
    write_hand_pictures(tmp_path, dataset, SplitPredictions(predicted_m, np.full(predicted_m.shape[:2], 0.005)))
    listed = json.loads((tmp_path / "hands" / "hands.json").read_text())
    assert listed[0]["name"] == dataset.annotations.files[2].stem
    assert listed[0]["pa_mpjpe_mm"] > 1.0
    assert listed[-1]["pa_mpjpe_mm"] == pytest.approx(0.0, abs=1e-6)
    with Image.open(tmp_path / "hands" / listed[0]["file"]) as picture:
        assert picture.width == picture.height >= 200
