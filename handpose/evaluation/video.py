"""Frames of a video file, of a folder or of a camera, and writing a video.

PyAV, the Python binding of FFmpeg, reads and writes them. It is maintained, needs no other program, and gives the time
and the rotation of each frame. Its wheel (36 MB) is smaller than those of OpenCV (61 MB) and imageio-ffmpeg (68 MB).
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from handpose.errors import UserError
from handpose.evaluation.photographs import find_photographs, read_photograph, read_upright_size
from handpose.files import write_atomically

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")

_TIME_BASE = Fraction(1, 90_000)  # of MPEG; every usual frame rate is a whole number of its ticks
_CODEC = "libx264" if "libx264" in av.codecs_available else "mpeg4"  # a build of FFmpeg may lack the former
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
"""Platform -> FFmpeg's input format for cameras, and how it names the camera of a number."""


class Frame(NamedTuple):
    """A frame: its time from the first frame in seconds, and the upright RGB picture."""

    time_s: float
    picture: Image.Image


class FrameSource(NamedTuple):
    """A source of frames.

    Attributes:
        path: the video file, the folder or the camera.
        names: file names of the frames of a folder; empty for a video and a camera.
        size: (width, height) of the upright frames.
        frames_per_s: frame rate.
        frames: the frames, which can be read once.
        is_live: they come from a camera, and end only when the user ends them.
    """

    path: Path
    names: Sequence[str]
    size: tuple[int, int]
    frames_per_s: float
    frames: Iterator[Frame]
    is_live: bool = False


def open_video(path: Path) -> FrameSource:
    """Open a video file.

    Raises:
        UserError: the file cannot be read, or is not a video.
    """
    container, stream = _open(str(path), None, f"{path} cannot be read as a video")
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        container.close()
        raise UserError(f"{path} does not say its frame rate; convert it to MP4")
    frames = _decode(container, stream, float(rate), path)
    try:
        first = next(frames)
    except StopIteration:
        raise UserError(f"{path} has no frames") from None
    return FrameSource(path, (), first.picture.size, float(rate), _put_back(first, frames))


def open_frames(folder: Path, *, frames_per_s: float) -> FrameSource:
    """Open a folder of frames. Numbers in their names are compared as numbers: frame_10 comes after frame_9.

    Raises:
        UserError: there are no pictures, or they differ in size.
    """
    if not folder.is_dir():
        raise UserError(f"--frames {folder} is not a folder; give the folder of the frames of a video")
    paths = sorted(find_photographs([folder]), key=lambda path: _split_numbers(path.name))
    sizes = [read_upright_size(path) for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(
                f"{path} has {size[0]} x {size[1]} pixels, but {paths[0].name} has {sizes[0][0]} x {sizes[0][1]}: all "
                "frames must have the same size"
            )
    frames = (Frame(number / frames_per_s, read_photograph(path)[0]) for number, path in enumerate(paths))
    return FrameSource(folder, [path.name for path in paths], sizes[0], frames_per_s, frames)


def open_webcam(number: int) -> FrameSource:
    """Open a camera of this computer.

    Raises:
        UserError: there is none of this number.
    """
    if sys.platform not in _CAMERAS:
        raise UserError(f"--webcam does not work on {sys.platform}; record a video and give its file")
    kind, name = _CAMERAS[sys.platform][0], _CAMERAS[sys.platform][1].format(number)
    container, stream = _open(
        name,
        kind,
        f"--webcam {number}: the camera {name} cannot be opened; give another number, or the file of a video",
    )
    rate = float(stream.average_rate or 30)
    frames = _decode(container, stream, rate, Path(name))
    first = next(frames)
    size = first.picture.size
    return FrameSource(Path(f"webcam{number}"), (), size, rate, _put_back(first, frames), is_live=True)


class VideoWriter:
    """Writes pictures to an open MP4 file.

    Args:
        container: the open file.
        size: (width, height) of the pictures. An odd side is enlarged by a pixel, because the encoder needs even ones.
        frames_per_s: frame rate that the file states; each picture has a time of its own.
    """

    def __init__(self, container: OutputContainer, *, size: tuple[int, int], frames_per_s: float) -> None:
        self._container = container
        rate = Fraction(frames_per_s).limit_denominator(1001)
        self._stream = cast(VideoStream, container.add_stream(_CODEC, rate=rate))
        self._stream.width, self._stream.height = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "20", "preset": "veryfast"}
        self._stream.time_base = self._stream.codec_context.time_base = _TIME_BASE

    def write(self, picture: NDArray[np.uint8], *, time_s: float) -> None:
        """Write a picture (H, W, 3) that is shown at a time, in seconds."""
        height, width = picture.shape[:2]
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = VideoFrame.from_ndarray(even, format="rgb24")
        frame.pts, frame.time_base = round(time_s / _TIME_BASE), _TIME_BASE
        self._container.mux(self._stream.encode(frame))

    def flush(self) -> None:
        """Write what the encoder has held back."""
        self._container.mux(self._stream.encode())


@contextmanager
def write_video(path: Path, *, size: tuple[int, int], frames_per_s: float) -> Iterator[VideoWriter]:
    """Open an MP4 file to write. It exists under its name only when it is complete."""
    with write_atomically(path) as part, av.open(str(part), "w", format="mp4") as container:
        writer = VideoWriter(container, size=size, frames_per_s=frames_per_s)
        yield writer
        writer.flush()


def turn_upright(picture: Image.Image, rotation_deg: int) -> Image.Image:
    """Turn a picture counter-clockwise by the angle that its file states, a multiple of 90 degrees."""
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    turn = turns.get(rotation_deg % 360)
    return picture if turn is None else picture.transpose(turn)


def _open(name: str, kind: str | None, sentence: str) -> tuple[InputContainer, VideoStream]:
    try:
        container = av.open(name, format=kind)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"{sentence} ({error.strerror})") from error
    if not container.streams.video:
        container.close()
        raise UserError(f"{sentence} (it has no pictures, only sound)")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return container, stream


def _decode(container: InputContainer, stream: VideoStream, frames_per_s: float, path: Path) -> Iterator[Frame]:
    """Decode the frames. Their times are those of the file, or those of its frame rate where it has none."""
    first_s, before_s = None, -1.0 / frames_per_s
    with container:
        try:
            for frame in container.decode(stream):
                clock_s = frame.time
                first_s = clock_s if first_s is None else first_s
                time_s = before_s + 1.0 / frames_per_s
                if clock_s is not None and first_s is not None and clock_s - first_s > before_s:
                    time_s = clock_s - first_s
                before_s = time_s
                yield Frame(time_s, turn_upright(frame.to_image(), frame.rotation))
        except av.FFmpegError as error:
            raise UserError(f"{path} cannot be decoded after {before_s:.2f} s ({error.strerror})") from error


def _put_back(first: Frame, frames: Iterator[Frame]) -> Iterator[Frame]:
    yield first
    yield from frames


def _split_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
