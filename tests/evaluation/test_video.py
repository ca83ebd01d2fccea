"""A video that is written is read back; frames of a folder come in order; what is no video is refused."""

import numpy as np
import pytest
from PIL import Image

from handpose.errors import UserError
from handpose.evaluation.video import open_frames, open_video, open_webcam, turn_upright, write_video


def make_picture(number, size=(64, 48)):
    width, height = size
    return np.full((height, width, 3), 20 * number, np.uint8)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "hand.mp4"
    with write_video(path, size=(64, 48), frames_per_s=25.0) as writer:
        for number in range(10):
            writer.write(make_picture(number), time_s=number / 25.0)
    return path


def test_a_video_is_read_back_with_its_frames_times_and_colours(video):
    source = open_video(video)
    frames = list(source.frames)
    assert (source.size, source.frames_per_s, len(frames)) == ((64, 48), 25.0, 10)
    assert [frame.time_s for frame in frames] == pytest.approx([number / 25 for number in range(10)])
    for number, frame in enumerate(frames):
        assert np.asarray(frame.picture).mean() == pytest.approx(20 * number, abs=4)
    assert [file.name for file in video.parent.iterdir()] == ["hand.mp4"]


def test_times_may_be_uneven_as_in_recordings_of_phones(tmp_path):
    times = [0.0, 0.03, 0.08, 0.1]
    with write_video(tmp_path / "a.mp4", size=(64, 48), frames_per_s=30.0) as writer:
        for number, time_s in enumerate(times):
            writer.write(make_picture(number), time_s=time_s)
    assert [frame.time_s for frame in open_video(tmp_path / "a.mp4").frames] == pytest.approx(times, abs=1e-4)


def test_an_odd_size_is_enlarged_by_a_pixel(tmp_path):
    with write_video(tmp_path / "a.mp4", size=(63, 47), frames_per_s=30.0) as writer:
        writer.write(make_picture(5, (63, 47)), time_s=0.0)
    assert open_video(tmp_path / "a.mp4").size == (64, 48)


def test_a_video_that_is_not_completed_is_not_left(tmp_path):
    def write_half():
        with write_video(tmp_path / "a.mp4", size=(64, 48), frames_per_s=30.0) as writer:
            writer.write(make_picture(0), time_s=0.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert not list(tmp_path.iterdir())


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        Image.fromarray(make_picture(number)).save(tmp_path / f"frame_{number}.png")
    source = open_frames(tmp_path, frames_per_s=10.0)
    assert source.names == ["frame_1.png", "frame_9.png", "frame_10.png"]
    frames = list(source.frames)
    assert [frame.time_s for frame in frames] == [0.0, 0.1, 0.2]
    assert [np.asarray(frame.picture)[0, 0, 0] for frame in frames] == [20, 180, 200]


def test_frames_must_agree_in_size(tmp_path):
    for number, size in enumerate([(64, 48), (48, 64)]):
        Image.fromarray(make_picture(number, size)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"1.png has 48 x 64 pixels, but 0.png has 64 x 48"):
        open_frames(tmp_path, frames_per_s=10.0)


@pytest.mark.parametrize(("rotation_deg", "corner"), [(0, (0, 0)), (90, (0, 3)), (-90, (3, 0)), (180, (3, 3))])
def test_a_picture_is_turned_counter_clockwise(rotation_deg, corner):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0] = 255  # upper left; turned by 90 degrees counter-clockwise it is at the lower left
    turned = turn_upright(Image.fromarray(pixels), rotation_deg)
    assert turned.getpixel(corner) == (255, 255, 255)


def test_what_is_no_video_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    for path in (tmp_path / "a.mp4", tmp_path / "nowhere.mp4"):
        with pytest.raises(UserError, match=f"{path.name} cannot be read as a video"):
            open_video(path)
    with pytest.raises(UserError, match="is not a folder"):
        open_frames(tmp_path / "a.mp4", frames_per_s=10.0)


def test_a_camera_that_is_not_there_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="--webcam 97"):
        open_webcam(97)
