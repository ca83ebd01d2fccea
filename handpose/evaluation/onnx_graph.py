"""A network as an ONNX file. Its inputs are decoded images; its outputs need only the camera to become mm."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handpose.evaluation.ensemble import Ensemble
from handpose.files import to_json, write_atomically
from handpose.heatmaps import Axes, ImageAxes
from handpose.skeleton import BONES, JOINT_NAMES, REFERENCE_BONE, ROOT
from handpose.training.module import HandPose
from handpose.training.trainer import suppress_library_output

OPSET = 20
"""The ONNX opset: the newest that torch 2.15 exports by default, and that runtimes since 2024 can read."""

_STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Metadata of a node that the exporter adds: paths of the machine where the file was written."""


class OnnxGraph(nn.Module):
    """The exported graph: uint8 images (B, 3, H, W) -> the outputs in `names`."""

    def __init__(self, module: HandPose | Ensemble) -> None:
        super().__init__()
        assert isinstance(module, HandPose), "an ensemble has no single graph"
        self.net = module.net
        self.axes = module.axes
        self.names = ("uv_px", "relative_depth") if isinstance(self.axes, ImageAxes) else ("xyz_mm",)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        coordinates = self.axes.read_out(self.net(image.float() / 255.0))  # (B, K, 3)
        if not isinstance(self.axes, ImageAxes):
            return (1000.0 * self.axes.low_m + coordinates * self.axes.extent,)
        height, width = image.shape[-2:]
        uv = torch.stack((coordinates[..., 0] * width - 0.5, coordinates[..., 1] * height - 0.5), dim=-1)
        depth = (coordinates[..., 2] - 0.5) * 2.0 * self.axes.depth_range
        return uv, depth - depth[:, ROOT, None]


def export_onnx(module: HandPose | Ensemble, path: Path, *, side: int) -> OnnxGraph:
    """Write the network as ONNX.

    Args:
        module: the trained network, on the CPU. Its parameters will need no gradient any more.
        path: the file to write.
        side: side of the input images in pixels. The batch size is free.

    Returns:
        The exported graph.
    """
    graph = OnnxGraph(module).eval().requires_grad_(False)
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
    exported.model.metadata_props.update(build_metadata(module.axes, side))
    for node in exported.model.graph:
        node.metadata_props.pop(_STACK_TRACE, None)
    with write_atomically(path) as part:
        exported.save(part)
        onnx.checker.check_model(part)
    return graph


def build_metadata(axes: Axes, side: int) -> dict[str, str]:
    """Build the metadata that a program needs to use the file: text, with numbers as JSON."""
    metadata = {
        "input": f"image: uint8, (batch, 3, {side}, {side}), RGB, as decoded",
        "joints": json.dumps(JOINT_NAMES),
        "root": JOINT_NAMES[ROOT],
    }
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


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU, with as many threads as PyTorch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def decode_outputs(
    outputs: Sequence[NDArray[np.float32]], axes: Axes, *, intrinsics: Tensor, scale_m: Tensor, side: int
) -> Tensor:
    """Convert the outputs of an exported network to joints in the camera frame.

    Args:
        outputs: the outputs for B images, in the order of the file.
        axes: the axes of the network.
        intrinsics: (B, 3, 3) of the images, in pixels.
        scale_m: (B,) length of each hand's reference bone in metres; NaN if it is not known.
        side: side of the images in pixels.

    Returns:
        (B, K, 3) joints in metres.
    """
    first, *others = (torch.from_numpy(output) for output in outputs)
    if not isinstance(axes, ImageAxes):
        return first / 1000.0
    depth = 0.5 + 0.5 * others[0] / axes.depth_range
    coordinates = torch.cat(((first + 0.5) / side, depth[..., None]), dim=-1)  # (B, K, 3)
    return axes.decode(coordinates, intrinsics, (side, side), scale_m)
