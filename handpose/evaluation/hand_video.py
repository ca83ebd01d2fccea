"""Follow the hand through the frames of a video: predict it in each, and smooth its joints over time."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from handpose import drawing
from handpose.errors import UserError
from handpose.evaluation.find_hands import find_hands
from handpose.evaluation.one_euro import OneEuroFilter
from handpose.evaluation.photographs import Camera, Photograph
from handpose.evaluation.trained_network import TrainedNetwork
from handpose.evaluation.video import FrameSource, write_video
from handpose.geometry import project, project_lengths, to_root_relative
from handpose.skeleton import ROOT

LOOK_AGAIN_FRAMES = 30
"""After so many frames the hand is found in the whole frame again: a crop that has lost it would never see it."""

_MIN_INSIDE = 0.5
"""Smallest fraction of the joints inside the frame for which the next crop is around them."""


class FrameHand(NamedTuple):
    """The hand in a frame.

    Attributes:
        xyz_m: (K, 3) predicted joints in metres, in the camera frame.
        smooth_xyz_m: (K, 3) the same after the filter.
        error_m: (K,) expected error of each predicted joint in metres.
    """

    xyz_m: NDArray[np.float64]
    smooth_xyz_m: NDArray[np.float64]
    error_m: NDArray[np.float64]


class JointFilter:
    """Filters the joints of a hand with one-euro filters: the root, and the other joints relative to it.

    The distance to the camera is the least certain of all. Relative joints do not jump with it.

    Args:
        min_cutoff_hz: as for `OneEuroFilter`.
        beta: Hz for each mm/s of a coordinate.
    """

    def __init__(self, *, min_cutoff_hz: float, beta: float) -> None:
        self._root = OneEuroFilter(min_cutoff_hz=min_cutoff_hz, beta=beta)
        self._relative = OneEuroFilter(min_cutoff_hz=min_cutoff_hz, beta=beta)

    def __call__(self, xyz_m: NDArray[np.float64], *, time_s: float) -> NDArray[np.float64]:
        """Filter the joints (K, 3) of the next frame, in metres."""
        xyz_mm = 1000.0 * xyz_m
        root = xyz_mm[ROOT]
        relative = self._relative(xyz_mm - root, time_s=time_s)
        return (relative + self._root(root, time_s=time_s)) / 1000.0


class HandTracker:
    """Predicts the hand in the frames of a video, one after another.

    Args:
        network: the network.
        side: side of the square views that the network gets, in pixels.
        scale_m: length of the reference bone in metres; NaN if it is not known.
        fill: the hand fills this fraction of a crop, which is around the joints of the frame before; None: no crop.
        mirror: show the network mirror images.
        smooth: filters the joints.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        *,
        side: int,
        scale_m: float,
        fill: float | None,
        mirror: bool,
        smooth: JointFilter,
    ) -> None:
        self._network = network
        self._side, self._scale_m, self._fill, self._mirror = side, scale_m, fill, mirror
        self._smooth = smooth
        self._near: NDArray[np.float64] | None = None  # (K, 2) joints of the frame before, in pixels
        self._num_frames = 0

    def __call__(self, frame: Photograph, *, time_s: float) -> FrameHand:
        """Predict the hand in the next frame, which is shown at a time in seconds."""
        near = None if self._num_frames % LOOK_AGAIN_FRAMES == 0 or self._near is None else self._near[None]
        (xyz_m,), (error_m,) = find_hands(
            self._network,
            [frame],
            side=self._side,
            scale_m=self._scale_m,
            fill=self._fill,
            mirror=self._mirror,
            near=near,
        )
        self._num_frames += 1
        self._near = None if self._fill is None else _choose_crop(xyz_m, frame)
        return FrameHand(xyz_m, self._smooth(xyz_m, time_s=time_s), error_m)


def _choose_crop(xyz_m: NDArray[np.float64], frame: Photograph) -> NDArray[np.float64] | None:
    """Return the pixels (K, 2) around which to crop the next frame; None if the hand seems to be lost."""
    uv = project(torch.from_numpy(xyz_m), torch.from_numpy(frame.camera.intrinsics)).numpy()
    is_inside = ((uv >= 0) & (uv < frame.picture.size)).all(axis=-1)
    is_usable = np.isfinite(uv).all() and (xyz_m[:, 2] > 0).all() and is_inside.mean() >= _MIN_INSIDE
    return uv if is_usable else None


class PredictedVideo(NamedTuple):
    """What has been predicted of a video.

    Attributes:
        records: for each frame what hands.json says of it.
        predicting_s: seconds that the predictions took.
        whole_s: seconds that everything took.
        problem: why the frames after these could not be read; empty if all were.
    """

    records: list[dict[str, Any]]
    predicting_s: float
    whole_s: float
    problem: str


def predict_frames(
    source: FrameSource, cameras: Sequence[Camera], tracker: HandTracker, video: Path, *, until_s: float
) -> PredictedVideo:
    """Predict the frames of a video, and write them with the filtered skeleton.

    Args:
        source: the frames.
        cameras: the camera of each frame, or one for all.
        tracker: predicts the hand.
        video: the MP4 file to write.
        until_s: stop at this time of the video.
    """
    records: list[dict[str, Any]] = []
    predicting_s, began, problem = 0.0, time.perf_counter(), ""
    with write_video(video, size=source.size, frames_per_s=source.frames_per_s) as writer:
        try:
            for number, frame in enumerate(source.frames):
                if frame.time_s >= until_s:
                    break
                photograph = Photograph(source.path, frame.picture, cameras[number % len(cameras)])
                started = time.perf_counter()
                hand = tracker(photograph, time_s=frame.time_s)
                predicting_s += time.perf_counter() - started
                writer.write(_draw(photograph, hand), time_s=frame.time_s)
                records.append({"frame": number, "time_s": round(frame.time_s, 4)} | _describe(photograph, hand))
        except UserError as error:
            problem = str(error)
        except KeyboardInterrupt:
            if not source.is_live or not records:  # the user ends a recording in this way
                raise
    return PredictedVideo(records, predicting_s, time.perf_counter() - began, problem)


def _draw(photograph: Photograph, hand: FrameHand) -> NDArray[np.uint8]:
    xyz, intrinsics = torch.from_numpy(hand.smooth_xyz_m), torch.from_numpy(photograph.camera.intrinsics)
    radii_px = project_lengths(torch.from_numpy(hand.error_m), xyz, intrinsics).numpy()
    return drawing.draw_over_frame(photograph.picture, project(xyz, intrinsics).numpy(), radii_px)


def _describe(photograph: Photograph, hand: FrameHand) -> dict[str, Any]:
    """Return what hands.json says of a frame: the joints as predicted, and filtered."""
    intrinsics = torch.from_numpy(photograph.camera.intrinsics)
    record: dict[str, Any] = {"intrinsics": photograph.camera.intrinsics.tolist()}
    for prefix, xyz_m in (("", hand.xyz_m), ("filtered_", hand.smooth_xyz_m)):
        xyz = torch.from_numpy(xyz_m)
        record |= {
            f"{prefix}uv_px": project(xyz, intrinsics).numpy().round(3).tolist(),
            f"{prefix}xyz_mm": (1000 * xyz_m).round(3).tolist(),
            f"{prefix}xyz_root_relative_mm": (1000 * to_root_relative(xyz)).numpy().round(3).tolist(),
        }
    return record | {"expected_error_mm": (1000 * hand.error_m).round(2).tolist()}
