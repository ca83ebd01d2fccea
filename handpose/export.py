"""`python -m handpose.export`: write a checkpoint as ONNX, and compare it with PyTorch on images.

The graph takes decoded images (uint8, RGB, channels first), so that scaling and normalisation cannot be forgotten. It
returns pixels and relative depth. Converting these to metres needs the camera: `handpose.geometry` has the closed form,
and the file's metadata contain its parameters.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handpose.config import compose, use_given_extensions
from handpose.data.sample import HandBatch
from handpose.errors import UserError
from handpose.evaluation.photographs import (
    find_photographs,
    make_whole_view_intrinsics,
    read_photograph,
    warp_photograph,
)
from handpose.evaluation.trained_network import TrainedNetwork, list_data_overrides, read_network
from handpose.files import check_output_file, to_json, write_atomically
from handpose.heatmaps import ImageAxes
from handpose.program import exit_on_user_error, make_parser
from handpose.skeleton import BONES, JOINT_NAMES, REFERENCE_BONE, ROOT
from handpose.training.build import build_data
from handpose.training.checkpoints import read_checkpoint
from handpose.training.module import HandPose
from handpose.training.trainer import suppress_library_output
from handpose.utf8 import use_utf8

OPSET = 20
"""The ONNX opset: the newest that torch 2.15 exports by default, and that runtimes since 2024 can read."""

TOLERANCE = 1e-3
"""Largest difference from PyTorch, in pixels, reference bones or millimetres."""

_NUM_IMAGES = 64
_NUM_TIMED_RUNS = 50

_DESCRIPTION = """\
Write the network of a checkpoint as an ONNX file. Then compare the outputs of ONNX and PyTorch on the pictures of a
folder, or on the test split of the checkpoint's data set.

  python -m handpose.export --checkpoint FILE --output hand.onnx --images FOLDER

  input   image: uint8 (batch, 3, side, side), RGB
  output  uv_px (batch, 21, 2): pixels of the input; the centres of pixels have integer coordinates.
          relative_depth (batch, 21): depth relative to the base of the middle finger, in lengths of its proximal bone.
          A network trained with heatmap=camera_axes has xyz_mm (batch, 21, 3) instead of both.
          The metadata of the file describe how a camera converts the outputs to metres.
"""


class OnnxGraph(nn.Module):
    """The exported graph: uint8 images (B, 3, H, W) -> the outputs in `names`."""

    def __init__(self, network: TrainedNetwork) -> None:
        super().__init__()
        assert isinstance(network.module, HandPose), "an ensemble has no single graph"
        self.net = network.module.net
        self.axes = network.module.axes
        self.names = ("uv_px", "relative_depth") if isinstance(self.axes, ImageAxes) else ("xyz_mm",)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        coordinates = self.axes.read_out(self.net(image.float() / 255.0))  # (B, K, 3)
        if not isinstance(self.axes, ImageAxes):
            return (1000.0 * self.axes.low_m + coordinates * self.axes.extent,)
        height, width = image.shape[-2:]
        uv = torch.stack((coordinates[..., 0] * width - 0.5, coordinates[..., 1] * height - 0.5), dim=-1)
        depth = (coordinates[..., 2] - 0.5) * 2.0 * self.axes.depth_range
        return uv, depth - depth[:, ROOT, None]


class OnnxComparison(NamedTuple):
    """A comparison of the ONNX file with PyTorch.

    Attributes:
        max_difference: name of the output -> largest difference.
        torch_ms: median latency of one image with PyTorch on this machine's CPU.
        onnx_ms: median latency of one image with ONNX Runtime on this machine's CPU.
    """

    max_difference: dict[str, float]
    torch_ms: float
    onnx_ms: float


def export_onnx(network: TrainedNetwork, path: Path, *, side: int) -> OnnxGraph:
    """Write the network as ONNX.

    Args:
        network: the network.
        path: the file to write.
        side: side of the input images in pixels. The batch size is free.

    Returns:
        The exported graph.
    """
    graph = OnnxGraph(network).eval().requires_grad_(False)
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with suppress_library_output():
        program = torch.export.export(graph, (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
        exported = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=list(graph.names),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None, "torch returns a program where it is not told to write a file"
    exported.model.metadata_props.update(build_metadata(network, side))
    with write_atomically(path) as part:
        exported.save(part)
        onnx.checker.check_model(part)
    return graph


def build_metadata(network: TrainedNetwork, side: int) -> dict[str, str]:
    """Build the metadata that a program needs to use the file: text, with numbers as JSON."""
    metadata = {
        "input": f"image: uint8, (batch, 3, {side}, {side}), RGB, as decoded",
        "joints": json.dumps(JOINT_NAMES),
        "root": JOINT_NAMES[ROOT],
    }
    axes = network.module.axes
    if not isinstance(axes, ImageAxes):
        return metadata | {"output": "xyz_mm: joints in the frame of the camera that the network was trained with, mm"}
    return metadata | {
        "output": "uv_px: pixels of the input, centres at integers; relative_depth: depth minus the root's, in lengths "
        f"of the reference bone, {JOINT_NAMES[REFERENCE_BONE[0]]} to {JOINT_NAMES[REFERENCE_BONE[1]]}",
        "geometry": "with K of the input, rays (x, y, 1) = K^-1 (u, v, 1); Z = root_depth(rays, relative_depth, "
        "bone_lengths), in closed form (handpose.geometry.solve_root_depth); joints = rays * (Z + relative_depth) * "
        "scale, in the unit of scale, the length of the reference bone: scale_mm is its mean in the training set",
        "bones": json.dumps(BONES),
        "bone_lengths": to_json(axes.bone_lengths.tolist()),
        "scale_mm": to_json(1000.0 * float(axes.scale_m)),
    }


def compare_with_pytorch(graph: OnnxGraph, path: Path, images: NDArray[np.uint8]) -> OnnxComparison:
    """Compare the ONNX file with PyTorch.

    Args:
        graph: the graph.
        path: the ONNX file.
        images: (N, 3, H, W) images. They are run in one batch and one by one.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        1 if the file differs from PyTorch, else 0. A mistake of the user exits with status 2.
    """
    with exit_on_user_error():
        options = _parse_arguments(arguments)
        if options.output.suffix != ".onnx":
            raise UserError(f"--output {options.output} must end in .onnx")
        check_output_file(options.output)
        use_given_extensions(options.overrides)
        network = read_network(options.checkpoint)
        side = network.choose_input_size(options.image_size)
        if options.images:
            pictures = _read_folder_images(options.images, side)
        else:
            pictures = _read_test_images(options.checkpoint, side, options.overrides)
        graph = export_onnx(network, options.output, side=side)
        comparison = compare_with_pytorch(graph, options.output, pictures)
        print(_format_summary(graph, options.output, comparison, len(pictures)))
        if not max(comparison.max_difference.values()) <= TOLERANCE:  # also true for NaN
            options.output.unlink()
            print(
                f"error: ONNX differs from PyTorch by more than {TOLERANCE}, so {options.output} was removed",
                file=sys.stderr,
            )
            return 1
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("handpose.export", _DESCRIPTION)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint of a training")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.onnx", help="file to write")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures for the comparison; default: the test split"
    )
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of the input in pixels; default: as trained")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="override of the data set as for train.py, such as data.root=DIR",
    )
    return parser.parse_intermixed_args(arguments)


def _read_folder_images(folder: Path, side: int) -> NDArray[np.uint8]:
    views = []
    for path in find_photographs([folder])[:_NUM_IMAGES]:
        photograph, _ = read_photograph(path)
        views.append(
            warp_photograph(photograph, make_whole_view_intrinsics(photograph.size, np.eye(3), side=side), side=side)
        )
    return np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2))


def _read_test_images(checkpoint: Path, side: int, overrides: Sequence[str]) -> NDArray[np.uint8]:
    trained_with = read_checkpoint(checkpoint, key="--checkpoint")["config"]
    size = f"data.image_size={side}"
    data = build_data(compose("train", [*list_data_overrides(trained_with), size, *overrides]))
    data.setup("test")
    dataset = data.test_dataloader().dataset
    batch: HandBatch = dataset[np.arange(min(_NUM_IMAGES, len(dataset)))]  # type: ignore[arg-type]
    return np.ascontiguousarray(batch.image.numpy())


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
