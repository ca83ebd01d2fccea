"""`python -m handpose.predict` in the tests' process: what it leaves for all kinds of photographs, and mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from handpose.predict import main, name_overlays


@pytest.fixture
def photographs(tmp_path):
    """Three photographs of three shapes and kinds, in a folder of their own."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shape in (("a.jpg", (60, 90, 3)), ("b.png", (80, 50)), ("c.png", (64, 64, 4))):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def predict(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder; returns its status, hands.json and what the terminal says."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main([*map(str, arguments), "--checkpoint", str(checkpoint), "--device", "cpu"])
        return status, json.loads((tmp_path / "hands/hands.json").read_text()), capsys.readouterr()

    return run


def test_every_photograph_gets_an_overlay_of_its_size_and_joints(predict, photographs, tmp_path):
    status, result, told = predict(photographs, "--batch-size", 2)
    assert status == 0
    assert [hand["overlay"] for hand in result["hands"]] == ["a_hand.jpg", "b_hand.png", "c_hand.png"]
    for hand in result["hands"]:
        with Image.open(tmp_path / "hands" / hand["overlay"]) as overlay:
            assert overlay.size == tuple(hand["size"])
        xyz, camera = np.array(hand["xyz_mm"]), np.array(hand["intrinsics"])
        assert np.array(hand["uv_px"]) == pytest.approx((xyz / xyz[:, 2:] @ camera.T)[:, :2], abs=0.05)
        assert np.array(hand["xyz_root_relative_mm"]) == pytest.approx(xyz - xyz[9], abs=0.01)
    assert "3 of 3 photographs" in told.out


def test_an_assumed_camera_is_said_plainly(predict, photographs):
    _, result, told = predict(photographs)
    assert all(hand["intrinsics_assumed"] and "assumed" in hand["intrinsics_from"] for hand in result["hands"])
    assert "The camera of 3 photographs is unknown: the focal length is assumed" in told.out
    assert "assumed" in result["reference_bone_from"]
    _, result, told = predict(photographs, "--focal", 500, "--scale", 28)
    assert not any(hand["intrinsics_assumed"] for hand in result["hands"])
    assert "assumed" not in told.out
    assert result["reference_bone_mm"] == 28


def test_a_hand_twice_as_large_is_twice_as_far(predict, photographs):
    depths = [predict(photographs, "--scale", scale)[1]["hands"][0]["xyz_mm"][9][2] for scale in (20, 40)]
    assert depths[1] == pytest.approx(2 * depths[0], rel=1e-3)


def test_batches_change_nothing(predict, photographs):
    one, all_at_once = (predict(photographs, "--batch-size", size)[1]["hands"] for size in (1, 3))
    for single, other in zip(one, all_at_once, strict=True):
        assert np.array(single["uv_px"]) == pytest.approx(np.array(other["uv_px"]), abs=0.05)


def test_closer_looks_and_more_views_change_the_prediction(predict, photographs):
    plainly, cropped, turned = (
        predict(photographs, *options)[1]["hands"][0]["uv_px"]
        for options in ((), ("--crop", 0.5), ("--test-time", "full"))
    )
    assert plainly != cropped
    assert plainly != turned


def test_a_hand_in_the_mirror_is_the_mirror_image(predict, photographs):
    path = photographs / "c.png"
    straight = np.array(predict(path)[1]["hands"][0]["uv_px"])
    with Image.open(path) as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        width = picture.width
    flipped = np.array(predict(path, "--mirror")[1]["hands"][0]["uv_px"])
    flipped[:, 0] = width - 1 - flipped[:, 0]
    assert flipped == pytest.approx(straight, abs=0.05)


def test_a_file_that_cannot_be_read_is_told_and_the_others_are_predicted(predict, photographs):
    (photographs / "b.png").write_text("no picture")
    status, result, told = predict(photographs)
    assert status == 1
    assert "b.png cannot be read as a picture" in told.err
    assert ["error" in hand for hand in result["hands"]] == [False, True, False]
    assert "2 of 3 photographs" in told.out


def test_no_overlay_takes_the_place_of_another(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "a.bmp", "b/a.png", "a.jpeg")]
    assert name_overlays(paths) == ["a_hand.png", "a_hand_2.png", "a_hand_3.png", "a_hand.jpg"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
        (["PHOTOGRAPHS", "--focal", "-3"], "--focal must be above 0, but it is -3"),
        (["PHOTOGRAPHS", "--crop", "2"], "--crop must be above 0 and at most 1"),
        (["PHOTOGRAPHS", "--intrinsics", "1,2,3"], "neither a file nor four numbers"),
        (["PHOTOGRAPHS", "--test-time", "mirror"], "test_time=mirror: no such choice"),
        (["PHOTOGRAPHS", "--image-size", "8"], "--image-size must be at least 32"),
        (["PHOTOGRAPHS", "--batch-size", "0"], "--batch-size must be above 0"),
        (["PHOTOGRAPHS", "--output", "PHOTOGRAPHS/a.jpg"], "cannot be made"),
    ],
)
def test_mistakes_are_one_sentence(predict, photographs, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as left:
        predict(*(argument.replace("PHOTOGRAPHS", str(photographs)) for argument in arguments))
    told = capsys.readouterr().err
    assert (left.value.code, told.count("\n")) == (2, 1)
    assert sentence in told


def test_a_network_of_one_camera_asks_for_it(write_checkpoint, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ranges = [f"heatmap.{axis}_mm=[-900,1600]" for axis in "xyz"]
    given = [str(photographs), "--checkpoint", str(write_checkpoint("heatmap=camera_axes", *ranges)), "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(given)
    assert "works for one camera only: give --intrinsics or --focal" in capsys.readouterr().err
    assert main([*given, "--focal", "100"]) == 0


def test_a_size_that_is_not_known_is_asked_for(write_checkpoint, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [str(photographs), "--checkpoint", str(write_checkpoint("data.image_size=null")), "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(given)
    assert "give this size, for example --image-size 224" in capsys.readouterr().err
    assert main([*given, "--image-size", "64"]) == 0
