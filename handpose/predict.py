"""`python -m handpose.predict`: predict the hands in photographs or in a video, as overlays and as JSON."""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from handpose import drawing
from handpose.config import quote_override, use_given_extensions
from handpose.errors import UserError, explain_file_error
from handpose.evaluation.find_hands import find_hands
from handpose.evaluation.hand_video import HandTracker, JointFilter, predict_frames
from handpose.evaluation.photographs import (
    ASSUMED_FOCAL,
    Photograph,
    find_photographs,
    make_camera,
    read_intrinsics,
    read_photograph,
)
from handpose.evaluation.trained_network import TrainedNetwork, list_checkpoints, read_networks
from handpose.evaluation.video import VIDEO_SUFFIXES, FrameSource, open_frames, open_video, open_webcam
from handpose.files import check_writable, write_atomically, write_json
from handpose.geometry import project, project_lengths, to_root_relative
from handpose.heatmaps import CameraAxes
from handpose.program import exit_on_user_error, make_parser
from handpose.skeleton import JOINT_NAMES
from handpose.utf8 import use_utf8

_FILL = 0.6

_FRAME_RATE = 30.0
_MIN_CUTOFF_HZ = 1.0
_BETA = 0.05
"""Chosen on simulated joints at 30 frames/s with noise of 3 mm. It leaves an error of 1.4 mm at rest, of 2.3 mm in a
swing of 40 mm at 0.3 Hz, and of 5.5 mm in one of 80 mm at 1 Hz. With beta=0 the last two are 8 mm and 38 mm, since the
joints lag behind."""

_ASSUMED_CAMERA = (
    f"the focal length is assumed to be {ASSUMED_FOCAL} times the longer side, so distances are a guess; give "
    "--intrinsics or --focal"
)
_UNCALIBRATED = "not calibrated: right proportions, but maybe too large or too small"

_DESCRIPTION = """\
Find the 21 joints of the hand in photographs. Each photograph must show one hand, which fills a good part of the
picture. It must be a right hand if the network was trained on right hands, as in FreiHAND and the synthetic data set;
use --mirror for left hands. For each photograph the program writes an overlay. It writes the joints to hands.json: in
pixels, in millimetres in the camera frame, and in millimetres relative to the base of the middle finger, together with
the camera that was used.

  python -m handpose.predict hand.jpg --checkpoint FILE
  python -m handpose.predict FOLDER --checkpoint FILE --intrinsics K.json --crop --output FOLDER

Without --intrinsics and --focal, the focal length is read from the file's EXIF data. If they do not contain it, it is
assumed; then the distance to the camera is only a guess, and the pose is a little less accurate. Without --scale, the
hand is assumed to have the mean size of the hands in the training set.

  python -m handpose.predict VIDEO --checkpoint FILE --crop
  python -m handpose.predict FOLDER --frames --frame-rate 25 --checkpoint FILE --crop
  python -m handpose.predict --webcam --checkpoint FILE --crop --seconds 10

Of a video file, a folder of frames or a camera, the joints of all frames are predicted in order and filtered over time.
The program writes a video with the filtered skeleton, and a record for each frame to hands.json. Ctrl-C ends a
recording. With --crop, each frame is cropped around the hand of the frame before.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        1 if a file could not be read, else 0. A mistake of the user exits with status 2.
    """
    with exit_on_user_error():
        options = _parse_arguments(arguments)
        if options.extensions is not None:
            use_given_extensions([quote_override("paths.extensions", str(options.extensions))])
        device = _choose_device(options.device)
        _check_output(options.output)
        opened = _open_frames(options)
        paths = [] if opened else find_photographs(options.inputs)
        checkpoints = list_checkpoints(options.checkpoint)
        network = read_networks(checkpoints, overrides=[f"test_time={options.test_time}"])
        _check_options(options, network)
        side = network.choose_input_size(options.image_size)
        network.module.to(device)
        if opened:
            return _predict_video(opened, network, side, options)
        names = [path.name for path in paths]
        cameras = read_intrinsics(options.intrinsics, names) if options.intrinsics else [None] * len(paths)
        files = list(zip(paths, cameras, name_overlays(paths), strict=True))
        hands: list[dict[str, Any]] = []
        for start in range(0, len(files), options.batch_size):
            hands += _predict_batch(files[start : start + options.batch_size], network, side, options)
        write_json(options.output / "hands.json", _describe(network, side, options) | {"hands": hands}, indent=1)
        _print_summary(hands, options.output)
    return 1 if any("error" in hand for hand in hands) else 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("handpose.predict", _DESCRIPTION)
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        type=Path,
        metavar="IMAGE|FOLDER|VIDEO",
        help="photographs and folders of photographs; or a video; or a folder of frames with --frames",
    )
    add(
        "--checkpoint",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="checkpoint of a training; several (--checkpoint A --checkpoint B), or the folder retrain/combined of a "
        "sweep: the predictions of their networks are averaged",
    )
    camera = parser.add_mutually_exclusive_group()
    camera.add_argument(
        "--intrinsics",
        metavar="FILE|fx,fy,cx,cy",
        help="camera in pixels: four numbers, or a JSON file with one K, a list of them, or a K for each file name",
    )
    camera.add_argument("--focal", type=float, metavar="PX", help="focal length in pixels of the photograph")
    add("--scale", type=float, metavar="MM", help="length of the proximal bone of the middle finger in mm")
    add(
        "--crop",
        nargs="?",
        type=float,
        const=_FILL,
        metavar="FILL",
        help=f"predict a second time, on a crop in which the hand fills this fraction of the picture ({_FILL} "
        f"unless given)",
    )
    add(
        "--mirror",
        action="store_true",
        help="mirror the photographs: for left hands if the network was trained on right hands",
    )
    add(
        "--test-time",
        default="none",
        metavar="CHOICE",
        help="test-time augmentation, a file in configs/test_time; default: none, a single pass",
    )
    add(
        "--extensions",
        type=Path,
        metavar="FOLDER",
        help="your own folder of extensions, as paths.extensions in the training (docs/extending.md)",
    )
    add("--image-size", type=int, metavar="PX", help="side of the network's input in pixels; default: as trained")
    _add_video_options(parser)
    add("--batch-size", type=int, default=8, metavar="N", help="number of photographs per batch; default: 8")
    add("--device", default="auto", help="device to run on: auto, cpu, cuda, cuda:1; default: auto")
    add("--output", type=Path, default=Path("hands"), metavar="FOLDER", help="folder for the results; default: hands")
    return parser.parse_args(arguments)


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("videos").add_argument
    suffixes = ", ".join(VIDEO_SUFFIXES)
    add("--video", action="store_true", help=f"the file is a video, though its name does not end in {suffixes}")
    add("--frames", action="store_true", help="the folder holds the frames of a video, in the order of their names")
    add("--frame-rate", type=float, metavar="HZ", help=f"frames per second of --frames; default: {_FRAME_RATE:g}")
    add(
        "--webcam",
        type=int,
        nargs="?",
        const=0,
        metavar="NUMBER",
        help="record from a camera of this computer until Ctrl-C; default: number 0",
    )
    add("--seconds", type=float, metavar="S", help="stop after so many seconds of the video or camera")
    add(
        "--min-cutoff",
        type=float,
        metavar="HZ",
        help="one-euro filter: cut-off frequency of a hand at rest; a lower one removes more jitter; default: "
        f"{_MIN_CUTOFF_HZ:g}",
    )
    add(
        "--beta",
        type=float,
        metavar="HZ",
        help="one-euro filter: by how much each mm/s of speed raises the cut-off frequency; a larger value removes "
        f"lag; default: {_BETA:g}",
    )


def _open_frames(options: argparse.Namespace) -> FrameSource | None:
    """Open the video, the folder of frames or the camera that the user names; None for photographs.

    Raises:
        UserError: it cannot be opened, or the options do not fit together.
    """
    videos = [path for path in options.inputs if options.video or path.suffix.lower() in VIDEO_SUFFIXES]
    kinds = [name for name, given in (("--webcam", options.webcam is not None), ("--frames", options.frames)) if given]
    for name in ("frame_rate", "seconds", "min_cutoff", "beta"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not (videos or kinds):
            raise UserError(f"{option} {value} is for videos; give a video, --frames or --webcam")
        if not (0 < value < math.inf or (name == "beta" and value == 0)):
            raise UserError(f"{option} must be {'0 or more' if name == 'beta' else 'above 0'}, but it is {value}")
    if options.frame_rate is not None and not options.frames:
        raise UserError(f"--frame-rate {options.frame_rate} is for --frames; a video has its own")
    if options.webcam is not None:
        if options.inputs or options.frames:
            raise UserError(f"--webcam {options.webcam} takes neither files nor --frames; leave them out")
        return open_webcam(options.webcam)
    if not options.inputs:
        raise UserError("nothing to predict; give photographs, a video, or --webcam")
    if not (videos or options.frames):
        return None
    if len(options.inputs) > 1:
        raise UserError(f"give one video or folder of frames at a time, not {len(options.inputs)}")
    (path,) = options.inputs
    if options.frames:
        return open_frames(path, frames_per_s=options.frame_rate or _FRAME_RATE)
    return open_video(path)


def _check_options(options: argparse.Namespace, network: TrainedNetwork) -> None:
    for name in ("focal", "scale", "batch_size"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, but it is {value}")
    if options.crop is not None and not 0.0 < options.crop <= 1.0:
        raise UserError(f"--crop must be above 0 and at most 1, but it is {options.crop}")
    if isinstance(network.module.axes, CameraAxes) and (options.crop or not (options.intrinsics or options.focal)):
        raise UserError(
            "a network with heatmap=camera_axes works for one camera only: give --intrinsics or --focal of "
            "pictures like those it was trained on, and no --crop"
        )


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not available ({str(error).splitlines()[0]}); give cpu or auto") from error


def _check_output(folder: Path) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        reason = explain_file_error(error, remedy="give another --output")
        raise UserError(f"the folder {folder} cannot be made or written to because {reason}") from error


def _predict_batch(
    files: Sequence[tuple[Path, NDArray[np.float64] | None, str]],
    network: TrainedNetwork,
    side: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Read, predict and draw some photographs.

    A photograph that cannot be read is reported on stderr, and gets a record with the error.

    Args:
        files: for each photograph its path, its intrinsics if they were given, and the file name of its overlay.
        network: the network.
        side: side of the network's input in pixels.
        options: the options of the command line.
    """
    records: dict[Path, dict[str, Any]] = {}
    readable: list[tuple[Photograph, str]] = []
    for path, given, overlay in files:
        try:
            picture, exif_px = read_photograph(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            records[path] = {"file": str(path), "error": str(error)}
            continue
        camera = make_camera(picture.size, given=given, focal_px=options.focal, exif_px=exif_px)
        readable.append((Photograph(path, picture, camera), overlay))
    if readable:
        scale_m = math.nan if options.scale is None else options.scale / 1000.0
        found = find_hands(
            network,
            [photograph for photograph, _ in readable],
            side=side,
            scale_m=scale_m,
            fill=options.crop,
            mirror=options.mirror,
        )
        for (photograph, overlay), xyz_m, error_m in zip(readable, *found, strict=True):
            records[photograph.path] = _make_record(photograph, xyz_m, error_m, options.output / overlay)
    return [records[path] for path, _, _ in files]


def _make_record(
    photograph: Photograph, xyz_m: NDArray[np.float64], error_m: NDArray[np.float64], overlay: Path
) -> dict[str, Any]:
    """Draw the overlay of a photograph, and return its record for hands.json."""
    camera, xyz = photograph.camera, torch.from_numpy(xyz_m)
    intrinsics = torch.from_numpy(camera.intrinsics)
    uv = project(xyz, intrinsics).numpy()
    radii_px = project_lengths(torch.from_numpy(error_m), xyz, intrinsics).numpy()
    kind = "JPEG" if overlay.suffix == ".jpg" else "PNG"
    with write_atomically(overlay) as part:
        Image.fromarray(drawing.draw_over_photograph(np.asarray(photograph.picture), uv, radii_px)).save(
            part, kind, quality=92
        )
    return {
        "file": str(photograph.path),
        "overlay": overlay.name,
        "size": list(photograph.picture.size),
        "intrinsics": camera.intrinsics.tolist(),
        "intrinsics_from": camera.source,
        "intrinsics_assumed": camera.is_assumed,
        "uv_px": uv.round(3).tolist(),
        "xyz_mm": (1000 * xyz_m).round(3).tolist(),
        "xyz_root_relative_mm": (1000 * to_root_relative(xyz)).numpy().round(3).tolist(),
        "expected_error_mm": (1000 * error_m).round(2).tolist(),
    }


def _predict_video(source: FrameSource, network: TrainedNetwork, side: int, options: argparse.Namespace) -> int:
    """Predict all frames, and write the video and hands.json. Return the exit status: 1 if a frame cannot be read."""
    names = source.names or [source.path.name]
    given = read_intrinsics(options.intrinsics, names) if options.intrinsics else [None] * len(names)
    cameras = [make_camera(source.size, given=each, focal_px=options.focal, exif_px=None) for each in given]
    cutoff_hz = _MIN_CUTOFF_HZ if options.min_cutoff is None else options.min_cutoff
    beta = _BETA if options.beta is None else options.beta
    tracker = HandTracker(
        network,
        side=side,
        scale_m=math.nan if options.scale is None else options.scale / 1000.0,
        fill=options.crop,
        mirror=options.mirror,
        smooth=JointFilter(min_cutoff_hz=cutoff_hz, beta=beta),
    )
    video = options.output / f"{source.path.stem}_hand.mp4"
    done = predict_frames(source, cameras, tracker, video, until_s=options.seconds or math.inf)
    about = _describe(network, side, options) | {
        "video": str(source.path),
        "overlay": video.name,
        "size": list(source.size),
        "frames_per_s": source.frames_per_s,
        "min_cutoff_hz": cutoff_hz,
        "beta_hz_per_mm_s": beta,
        "intrinsics_from": cameras[0].source,
        "intrinsics_assumed": cameras[0].is_assumed,
    }
    write_json(options.output / "hands.json", about | {"frames": done.records})
    num = len(done.records)
    print(f"{num} frames were predicted: {video.name} and hands.json are in {options.output}")
    print(
        f"{num / done.predicting_s:.1f} frames per second for the prediction, {num / done.whole_s:.1f} with reading, "
        "drawing and writing"
    )
    if cameras[0].is_assumed:
        print(f"The camera is unknown: {_ASSUMED_CAMERA}")
    if done.problem:
        print(f"error: {done.problem}; the frames before it were kept", file=sys.stderr)
    return 1 if done.problem else 0


def name_overlays(photographs: Sequence[Path]) -> list[str]:
    """Name the overlay of each photograph: a JPEG for a JPEG, else a PNG. All names are different."""
    names: list[str] = []
    for path in photographs:
        suffix = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        numbers = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
        names.append(next(name for n in numbers if (name := f"{path.stem}_hand{n}{suffix}") not in names))
    return names


def _describe(network: TrainedNetwork, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return how the hands were predicted, for hands.json."""
    return {
        "checkpoint": ", ".join(map(str, options.checkpoint)),
        "image_size": side,
        "test_time": options.test_time,
        "crop": options.crop,
        "mirror": options.mirror,
        "reference_bone_mm": options.scale,
        "reference_bone_from": "assumed: the mean of the training set" if options.scale is None else "given",
        "joints": list(JOINT_NAMES),
        "expected_errors": "calibrated on validation images" if network.is_calibrated else _UNCALIBRATED,
    }


def _print_summary(hands: list[dict[str, Any]], folder: Path) -> None:
    found = [hand for hand in hands if "error" not in hand]
    print(f"{len(found)} of {len(hands)} photographs were predicted: overlays and hands.json are in {folder}")
    assumed = sum(hand["intrinsics_assumed"] for hand in found)
    if assumed:
        print(f"The camera of {assumed} photographs is unknown: {_ASSUMED_CAMERA}")


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
