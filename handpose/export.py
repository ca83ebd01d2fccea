"""`python -m handpose.export`: write a checkpoint as ONNX in one or several precisions, and compare them.

The graph takes decoded images (uint8, RGB, channels first), so that scaling and normalisation cannot be forgotten. It
returns pixels and relative depth. Converting these to metres needs the camera: `handpose.geometry` has the closed form,
and the file's metadata contain its parameters.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from handpose.config import compose, use_given_extensions
from handpose.data.datamodule import HandDataModule
from handpose.data.sample import HandBatch
from handpose.errors import UserError
from handpose.evaluation.onnx_graph import OPSET, OnnxGraph, export_onnx, open_session
from handpose.evaluation.onnx_precision import (
    PRECISIONS,
    Precision,
    PrecisionResult,
    measure_precisions,
    write_precision,
)
from handpose.evaluation.photographs import (
    find_photographs,
    make_whole_view_intrinsics,
    read_photograph,
    warp_photograph,
)
from handpose.evaluation.trained_network import list_data_overrides, read_network
from handpose.files import check_output_file
from handpose.heatmaps import Axes
from handpose.program import exit_on_user_error, make_parser
from handpose.training.build import build_data
from handpose.training.checkpoints import read_checkpoint
from handpose.utf8 import use_utf8

TOLERANCE = 1e-3
"""Largest difference of fp32 from PyTorch, in pixels, reference bones or millimetres."""

_NUM_IMAGES = 64  # for the comparison with PyTorch
_NUM_CALIBRATION = 256
_NUM_LABELLED = 1000
_NUM_TIMED_RUNS = 50
_SAME_SPEED = 1.05  # runs of the same file differ by a few per cent

_DESCRIPTION = """\
Write the network of a checkpoint as an ONNX file. Then compare the outputs of ONNX and PyTorch on the pictures of a
folder, or on the test split of the checkpoint's data set.

  python -m handpose.export --checkpoint FILE --output hand.onnx --images FOLDER
  python -m handpose.export --checkpoint FILE --output hand.onnx --precision fp32 fp16 int8

  input   image: uint8 (batch, 3, side, side), RGB
  output  uv_px (batch, 21, 2): pixels of the input; the centres of pixels have integer coordinates.
          relative_depth (batch, 21): depth relative to the base of the middle finger, in lengths of its proximal bone.
          A network trained with heatmap=camera_axes has xyz_mm (batch, 21, 3) instead of both.
          The metadata of the file describe how a camera converts the outputs to metres.

A single precision is written to the file of --output. Several are written to hand.onnx (fp32), hand_fp16.onnx and
hand_int8.onnx. Then a table compares their size, speed and error on the validation split with those of fp32. With
--images it has the largest difference from fp32 instead of the error. int8 is calibrated on pictures of the validation
split or of the folder.
"""


class OnnxComparison(NamedTuple):
    """A comparison of the fp32 file with PyTorch.

    Attributes:
        max_difference: name of the output -> largest difference.
        torch_ms: median latency of one image with PyTorch on this machine's CPU.
        onnx_ms: median latency of one image with ONNX Runtime on this machine's CPU.
    """

    max_difference: dict[str, float]
    torch_ms: float
    onnx_ms: float


def compare_with_pytorch(graph: OnnxGraph, path: Path, images: NDArray[np.uint8]) -> OnnxComparison:
    """Compare the ONNX file with PyTorch.

    Args:
        graph: the graph.
        path: the ONNX file.
        images: (N, 3, H, W) images. They are run in one batch and one by one.
    """
    session = open_session(path)
    max_difference = dict.fromkeys(graph.names, 0.0)
    with torch.no_grad():
        for batch in (images, *images[:, None]):
            torch_outputs, onnx_outputs = graph(torch.from_numpy(batch)), session.run(None, {"image": batch})
            for name, one, other in zip(graph.names, torch_outputs, onnx_outputs, strict=True):
                max_difference[name] = max(max_difference[name], float(np.abs(one.numpy() - other).max()))
        first = images[:1]
        torch_ms = _measure_median_ms(lambda: graph(torch.from_numpy(first)))
    return OnnxComparison(max_difference, torch_ms, _measure_median_ms(lambda: session.run(None, {"image": first})))


def _measure_median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_NUM_TIMED_RUNS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000.0 * statistics.median(times)


class Pictures(NamedTuple):
    """Pictures on which the precisions are calibrated and compared.

    Attributes:
        images: (N, 3, H, W) pictures.
        hands: their labels, if they are known in three dimensions.
        source: where they come from, in words.
    """

    images: NDArray[np.uint8]
    hands: HandBatch | None
    source: str

    def choose_calibration(self) -> NDArray[np.uint8]:
        """Choose the pictures that calibrate int8: all of them, or 256 that are spread evenly over more."""
        return self.images[_spread(len(self.images), _NUM_CALIBRATION)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        1 if the fp32 file differs from PyTorch, or an output of another precision is not finite; else 0. A mistake of
        the user exits with status 2.
    """
    with exit_on_user_error(), tempfile.TemporaryDirectory() as scratch:
        options = _parse_arguments(arguments)
        files = name_files(options.output, options.precision)
        for file in files.values():
            check_output_file(file)
        use_given_extensions(options.overrides)
        network = read_network(options.checkpoint)
        side = network.choose_input_size(options.image_size)
        others = [precision for precision in files if precision != "fp32"]
        if options.images:
            pictures = _read_folder(options.images, side)
            compared = pictures.images[:_NUM_IMAGES]
        else:
            data = read_data(options.checkpoint, side, options.overrides)
            compared = _read_test_images(data)
            pictures = read_pictures(data, "val") if others else Pictures(compared, None, "")
        reference = files.get("fp32", Path(scratch) / "hand.onnx")
        graph = export_onnx(network.module, reference, side=side)
        comparison = compare_with_pytorch(graph, reference, compared)
        print(_format_summary(graph, reference, comparison, len(compared)))
        if not max(comparison.max_difference.values()) <= TOLERANCE:  # also true for NaN
            reference.unlink()
            print(
                f"error: ONNX differs from PyTorch by more than {TOLERANCE}, so {reference} was removed",
                file=sys.stderr,
            )
            return 1
        return _write_others(files, reference, network.module.axes, pictures) if others else 0


def name_files(output: Path, precisions: Sequence[str]) -> dict[Precision, Path]:
    """Name the file of each precision: `output` itself for fp32 and for a single precision, else hand_int8.onnx.

    Raises:
        UserError: a precision is unknown, or `output` does not end in .onnx.
    """
    if output.suffix != ".onnx":
        raise UserError(f"--output {output} must end in .onnx")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision} is not known; give one or several of {', '.join(PRECISIONS)}")
    chosen = [precision for precision in PRECISIONS if precision in precisions]
    if len(chosen) == 1:
        return {chosen[0]: output}
    return {each: output if each == "fp32" else output.with_stem(f"{output.stem}_{each}") for each in chosen}


def _write_others(files: Mapping[Precision, Path], reference: Path, axes: Axes, pictures: Pictures) -> int:
    """Write all precisions but fp32, and print the table. Return the exit status."""
    calibration = pictures.choose_calibration()
    for precision, file in files.items():
        if precision != "fp32":
            write_precision(reference, file, precision, calibration=calibration)
    compared: dict[Precision, Path] = {"fp32": reference, **files}
    results = measure_precisions(compared, axes, pictures.images, hands=pictures.hands)
    print(f"\n{format_table(results)}\n\n{_format_notes(results, pictures, len(calibration))}")
    status = 0
    for result in results:
        if not result.is_finite:
            files[result.precision].unlink()
            print(
                f"error: outputs of {result.precision} are not finite, so {files[result.precision]} was removed",
                file=sys.stderr,
            )
            status = 1
    return status


def format_table(results: Sequence[PrecisionResult]) -> str:
    """Format a row for each precision. fp32 comes first; gains and losses are relative to it."""
    reference = results[0]
    is_labelled = not math.isnan(reference.pa_mpjpe_mm)
    head = f"{'precision':<10}{'MB':>8}{'images/s':>10}{'gain':>7}"
    lines = [head + (f"{'PA-MPJPE mm':>13}{'lost mm':>9}" if is_labelled else "   largest difference from fp32")]
    for each in results:
        line = f"{each.precision:<10}{each.megabytes:8.2f}{each.images_per_s:10.1f}"
        line += f"{each.images_per_s / reference.images_per_s:7.2f}"
        if is_labelled:
            line += f"{each.pa_mpjpe_mm:13.3f}{each.pa_mpjpe_mm - reference.pa_mpjpe_mm:9.3f}"
        else:
            line += "   " + ", ".join(f"{name} {value:.3g}" for name, value in each.max_difference.items())
        lines.append(line)
    return "\n".join(lines)


def _format_notes(results: Sequence[PrecisionResult], pictures: Pictures, num_calibration: int) -> str:
    rates = {result.precision: result.images_per_s for result in results}
    notes = [
        f"single pictures on {torch.get_num_threads()} CPU thread(s), medians of runs in turns; compared on "
        f"{len(pictures.images)} pictures of {pictures.source}"
    ]
    if "int8" in rates:
        notes.append(f"int8 was calibrated on {num_calibration} of these pictures")
    for precision, rate in rates.items():
        if precision != "fp32" and rate <= _SAME_SPEED * rates["fp32"]:
            notes.append(f"{precision} is not faster than fp32 on this CPU")
    return "\n".join(notes)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("handpose.export", _DESCRIPTION)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint of a training")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.onnx", help="file to write")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32"],
        metavar="PRECISION",
        help="fp32, fp16 or int8, or several of them; default: fp32",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="pictures for the comparison and for calibrating int8; default: those of the checkpoint's data set",
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the input in pixels; default: as trained")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="override of the data set as for train.py, such as data.root=DIR",
    )
    options = parser.parse_intermixed_args(arguments)
    options.overrides += [item for item in options.precision if "=" in item]  # they may follow --precision
    options.precision = [item for item in options.precision if "=" not in item]
    return options


def _spread(num: int, limit: int) -> NDArray[np.int64]:
    """Return the positions of at most `limit` of `num` items, evenly over all of them."""
    return np.unique(np.linspace(0, num - 1, min(num, limit)).round().astype(np.int64))


def _read_folder(folder: Path, side: int) -> Pictures:
    views = []
    for path in find_photographs([folder])[:_NUM_CALIBRATION]:
        photograph, _ = read_photograph(path)
        views.append(
            warp_photograph(photograph, make_whole_view_intrinsics(photograph.size, np.eye(3), side=side), side=side)
        )
    return Pictures(np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2)), None, str(folder))


def read_data(checkpoint: Path, side: int, overrides: Sequence[str]) -> HandDataModule:
    """Read the data set that a checkpoint names, with images of `side` pixels; `overrides` are those of train.py."""
    trained_with = read_checkpoint(checkpoint, key="--checkpoint")["config"]
    size = f"data.image_size={side}"
    return build_data(compose("train", [*list_data_overrides(trained_with), size, *overrides]))


def _read_test_images(data: HandDataModule) -> NDArray[np.uint8]:
    data.setup("test")
    dataset = data.test_dataloader().dataset
    batch: HandBatch = dataset[np.arange(min(_NUM_IMAGES, len(dataset)))]  # type: ignore[arg-type]
    return np.ascontiguousarray(batch.image.numpy())


def read_pictures(data: HandDataModule, split: Literal["val", "test"]) -> Pictures:
    """Read the pictures of a split: all of them, or 1,000 that are spread evenly over a larger one."""
    data.setup("test" if split == "test" else "fit")
    dataset = (data.test_dataloader() if split == "test" else data.val_dataloader()).dataset
    hands: HandBatch = dataset[_spread(len(dataset), _NUM_LABELLED)]  # type: ignore[arg-type]
    is_labelled = bool(hands.has_depth.all()) and bool(hands.xyz_m.isfinite().all())
    name = {"val": "validation", "test": "test"}[split]
    images = np.ascontiguousarray(hands.image.numpy())
    return Pictures(images, hands if is_labelled else None, f"the {name} split of {data.source.name}")


def _format_summary(graph: OnnxGraph, path: Path, comparison: OnnxComparison, num_pictures: int) -> str:
    differences = ", ".join(f"{name} {value:.1e}" for name, value in comparison.max_difference.items())
    parameters = sum(parameter.numel() for parameter in graph.parameters()) / 1e6
    return "\n".join(
        (
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, {parameters:.2f} M parameters, opset {OPSET}",
            f"largest difference from PyTorch on {num_pictures} pictures: {differences}",
            f"one picture on {torch.get_num_threads()} CPU thread(s): PyTorch {comparison.torch_ms:.1f} ms, ONNX "
            f"Runtime {comparison.onnx_ms:.1f} ms (medians of {_NUM_TIMED_RUNS})",
        )
    )


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
