"""`python -m handpose.predict`: predict the hands in photographs, as overlays and as JSON."""

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
from handpose.evaluation.photographs import (
    ASSUMED_FOCAL,
    Photograph,
    find_photographs,
    make_camera,
    read_intrinsics,
    read_photograph,
)
from handpose.evaluation.trained_network import TrainedNetwork, list_checkpoints, read_networks
from handpose.files import check_writable, write_atomically, write_json
from handpose.geometry import project, project_lengths, to_root_relative
from handpose.heatmaps import CameraAxes
from handpose.program import exit_on_user_error, make_parser
from handpose.skeleton import JOINT_NAMES
from handpose.utf8 import use_utf8

_FILL = 0.6

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
        paths = find_photographs(options.photographs)
        checkpoints = list_checkpoints(options.checkpoint)
        network = read_networks(checkpoints, overrides=[f"test_time={options.test_time}"])
        _check_options(options, network)
        side = network.choose_input_size(options.image_size)
        names = [path.name for path in paths]
        cameras = read_intrinsics(options.intrinsics, names) if options.intrinsics else [None] * len(paths)
        files = list(zip(paths, cameras, name_overlays(paths), strict=True))
        network.module.to(device)
        hands: list[dict[str, Any]] = []
        for start in range(0, len(files), options.batch_size):
            hands += _predict_batch(files[start : start + options.batch_size], network, side, options)
        _write_json_file(hands, network, side, options)
        _print_summary(hands, options.output)
    return 1 if any("error" in hand for hand in hands) else 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("handpose.predict", _DESCRIPTION)
    add = parser.add_argument
    add("photographs", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="photographs, or folders of photographs")
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
    add("--batch-size", type=int, default=8, metavar="N", help="number of photographs per batch; default: 8")
    add("--device", default="auto", help="device to run on: auto, cpu, cuda, cuda:1; default: auto")
    add("--output", type=Path, default=Path("hands"), metavar="FOLDER", help="folder for the results; default: hands")
    return parser.parse_args(arguments)


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


def name_overlays(photographs: Sequence[Path]) -> list[str]:
    """Name the overlay of each photograph: a JPEG for a JPEG, else a PNG. All names are different."""
    names: list[str] = []
    for path in photographs:
        suffix = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        numbers = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
        names.append(next(name for n in numbers if (name := f"{path.stem}_hand{n}{suffix}") not in names))
    return names


def _write_json_file(
    hands: list[dict[str, Any]], network: TrainedNetwork, side: int, options: argparse.Namespace
) -> None:
    about = {
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
    write_json(options.output / "hands.json", about | {"hands": hands}, indent=1)


def _print_summary(hands: list[dict[str, Any]], folder: Path) -> None:
    found = [hand for hand in hands if "error" not in hand]
    print(f"{len(found)} of {len(hands)} photographs were predicted: overlays and hands.json are in {folder}")
    assumed = sum(hand["intrinsics_assumed"] for hand in found)
    if assumed:
        print(
            f"The camera of {assumed} photographs is unknown: the focal length is assumed to be {ASSUMED_FOCAL} "
            f"times the longer side, so distances are a guess; give --intrinsics or --focal"
        )


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
