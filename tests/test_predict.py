"""`python -m handpose.predict` in the tests' process: what it leaves for all kinds of photographs, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handpose.errors import UserError
from handpose.evaluation.video import open_video, write_video
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


@pytest.fixture
def video(tmp_path):
    """A film of nine frames, in which a patch moves."""
    path = tmp_path / "film.mp4"
    with write_video(path, size=(96, 64), frames_per_s=30.0) as writer:
        for number in range(9):
            picture = np.full((64, 96, 3), 90, np.uint8)
            picture[20:40, 5 * number : 5 * number + 20] = 230
            writer.write(picture, time_s=number / 30.0)
    return path


def test_every_frame_of_a_video_gets_raw_and_filtered_joints_and_an_overlay(predict, video, tmp_path):
    status, result, told = predict(video, "--crop")
    assert status == 0
    assert [frame["frame"] for frame in result["frames"]] == list(range(9))
    overlay = open_video(tmp_path / "hands" / result["overlay"])
    assert (overlay.size, len(list(overlay.frames))) == ((96, 64), 9)
    for frame in result["frames"]:
        for prefix in ("", "filtered_"):
            xyz, camera = np.array(frame[f"{prefix}xyz_mm"]), np.array(frame["intrinsics"])
            uv = (xyz / xyz[:, 2:] @ camera.T)[:, :2]
            assert np.array(frame[f"{prefix}uv_px"]) == pytest.approx(uv, rel=1e-3, abs=0.05)
            assert np.array(frame[f"{prefix}xyz_root_relative_mm"]) == pytest.approx(xyz - xyz[9], abs=0.01)
        assert len(frame["expected_error_mm"]) == 21
    first, *_, last = result["frames"]
    assert first["filtered_xyz_mm"] == pytest.approx(np.array(first["xyz_mm"]), abs=0.01)
    assert last["filtered_xyz_mm"] != last["xyz_mm"]
    assert (result["min_cutoff_hz"], result["beta_hz_per_mm_s"]) == (1.0, 0.05)
    assert "9 frames were predicted" in told.out
    assert "frames per second" in told.out


def test_with_a_very_high_cutoff_the_filter_changes_nothing(predict, video):
    for frame in predict(video, "--min-cutoff", 1e9)[1]["frames"]:
        assert np.array(frame["filtered_xyz_mm"]) == pytest.approx(np.array(frame["xyz_mm"]), abs=0.01)


def test_a_folder_of_frames_is_a_video(predict, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in (10, 9, 1):
        picture = np.full((64, 64, 3), 20 * number, np.uint8)
        Image.fromarray(picture).save(tmp_path / f"frames/{number}.png")
    result = predict(tmp_path / "frames", "--frames", "--frame-rate", 10)[1]
    assert [frame["time_s"] for frame in result["frames"]] == [0.0, 0.1, 0.2]
    assert len(predict(tmp_path / "frames", "--frames", "--frame-rate", 10, "--seconds", 0.15)[1]["frames"]) == 2


def test_the_frames_before_a_damaged_one_are_kept(predict, video, monkeypatch):
    def open_damaged(path):
        source = open_video(path)

        def read():
            for _ in range(4):
                yield next(source.frames)
            raise UserError(f"{path} cannot be decoded")

        return source._replace(frames=read())

    monkeypatch.setattr("handpose.predict.open_video", open_damaged)
    status, result, told = predict(video)
    assert (status, len(result["frames"])) == (1, 4)
    assert "cannot be decoded; the frames before it were kept" in told.err


def test_ctrl_c_ends_a_recording_and_keeps_it(predict, video, monkeypatch):
    def open_camera(number):
        source = open_video(video)

        def read():
            for _ in range(3):
                yield next(source.frames)
            raise KeyboardInterrupt

        return source._replace(path=Path(f"webcam{number}"), frames=read(), is_live=True)

    monkeypatch.setattr("handpose.predict.open_webcam", open_camera)
    status, result, _ = predict("--webcam", 2)
    assert (status, len(result["frames"]), result["overlay"]) == (0, 3, "webcam2_hand.mp4")


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
        ([], "nothing to predict; give photographs, a video, or --webcam"),
        (["nowhere.mp4"], "nowhere.mp4 cannot be read as a video"),
        (["PHOTOGRAPHS/a.jpg", "--frames"], "--frames PHOTOGRAPHS/a.jpg is not a folder"),
        (["PHOTOGRAPHS", "--frames"], "all frames must have the same size"),
        (["PHOTOGRAPHS", "--beta", "0.1"], "--beta 0.1 is for videos"),
        (["a.mp4", "--min-cutoff", "0"], "--min-cutoff must be above 0, but it is 0"),
        (["a.mp4", "--frame-rate", "9"], "--frame-rate 9.0 is for --frames"),
        (["a.mp4", "b.mp4"], "give one video or folder of frames at a time, not 2"),
        (["--webcam", "97"], "--webcam 97"),
        (["PHOTOGRAPHS", "--webcam"], "--webcam 0 takes neither files nor --frames"),
        (["PHOTOGRAPHS", "--batch-size", "0"], "--batch-size must be above 0"),
        (["PHOTOGRAPHS", "--output", "PHOTOGRAPHS/a.jpg"], "cannot be made"),
    ],
)
def test_mistakes_are_one_sentence(predict, photographs, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as left:
        predict(*(argument.replace("PHOTOGRAPHS", str(photographs)) for argument in arguments))
    told = capsys.readouterr().err
    assert (left.value.code, told.count("\n")) == (2, 1)
    assert sentence.replace("PHOTOGRAPHS", str(photographs)) in told


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
