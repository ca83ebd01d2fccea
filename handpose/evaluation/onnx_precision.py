"""The same network as ONNX files of several precisions: writing them, and measuring what each loses and gains.

fp16 stores weights and activations in half precision. int8 is the static quantisation of ONNX Runtime: weights and
activations are 8-bit integers, whose ranges are taken from the activations of calibration pictures. In both, the
read-out stays in single precision.
"""

import ast
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from handpose.data.sample import HandBatch
from handpose.evaluation.onnx_graph import decode_outputs, export_onnx, open_session
from handpose.evaluation.predict import compute_errors
from handpose.files import write_atomically
from handpose.heatmaps import Axes
from handpose.training.module import HandPose

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

BATCH_SIZE = 64

_WARM_UP = 5
_TIMED_RUNS = (20, 1000)
_TIMED_S = 3.0
"""How long the files are timed together, within the limits on the runs of each."""
_LATENCY_S = 0.5

_SCOPES = "pkg.torch.onnx.name_scopes"
_READ_OUT_STARTS = ("Softmax", "ReduceLogSumExp")


class PrecisionResult(NamedTuple):
    """What one precision costs and gives.

    Attributes:
        precision: the precision.
        megabytes: size of the file in 1e6 bytes.
        images_per_s: single images per second on this machine's CPU, from the median time.
        max_difference: largest difference of each output from fp32; its names are those of the outputs.
        pa_mpjpe_mm: error on the labelled pictures in mm; NaN without labels.
        is_finite: whether all outputs are finite numbers.
    """

    precision: Precision
    megabytes: float
    images_per_s: float
    max_difference: dict[str, float]
    pa_mpjpe_mm: float
    is_finite: bool


def write_precision(fp32: Path, path: Path, precision: Precision, *, calibration: NDArray[np.uint8]) -> None:
    """Write an exported network in another precision. Inputs, outputs and metadata stay the same.

    Args:
        fp32: the file that `export_onnx` wrote.
        path: the file to write.
        precision: fp16 or int8.
        calibration: (N, 3, H, W) pictures like those that the network will see; only int8 uses them.
    """
    if precision == "fp16":
        _write_fp16(fp32, path)
    else:
        assert precision == "int8", precision
        _write_int8(fp32, path, calibration)


def find_read_out_nodes(model: onnx.ModelProto) -> list[str]:
    """Find the nodes that must stay in fp32: the read-out, except its layers with weights.

    The read-out is the first softmax or log-sum-exp behind the encoder, and everything that depends on it. Its outputs
    are coordinates, and 8 bits of a coordinate are a quarter of a pixel at 64 pixels; half precision has steps of an
    eighth of a pixel beyond pixel 128. Measured with int8 (EfficientNet-Lite0 on photographs at 64 px, 2026-11-30):
    fp32 6.803 mm; everything quantised 6.881 mm; without the read-out 6.791 mm; without the read-out, but with its
    fully connected layers, 6.793 mm and a file that is a quarter smaller.

    Args:
        model: an exported network.

    Returns:
        The names of the nodes.
    """
    computed: set[str] = set()  # tensors of the read-out
    found = []
    for node in model.graph.node:  # in topological order
        starts = node.op_type in _READ_OUT_STARTS and "net.encoder" not in _list_scopes(node)
        if starts or any(name in computed for name in node.input):
            computed.update(node.output)
            if node.op_type != "Gemm":
                found.append(node.name)
    return found


def _list_scopes(node: onnx.NodeProto) -> list[str]:
    """List the modules of the network to which a node belongs."""
    return next((ast.literal_eval(item.value) for item in node.metadata_props if item.key == _SCOPES), [])


def _write_fp16(fp32: Path, path: Path) -> None:
    model = onnx.load(fp32)
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=find_read_out_nodes(model))
    OnnxModel(half).topological_sort()  # the casts are appended at the end
    with write_atomically(path) as part:
        onnx.save(half, part)
        onnx.checker.check_model(part)


def _write_int8(fp32: Path, path: Path, calibration: NDArray[np.uint8]) -> None:
    model = onnx.load(fp32)
    with write_atomically(path) as part, _suppress_hints():
        quantize_static(
            model,
            part,
            _CalibrationPictures(calibration),
            quant_format=QuantFormat.QDQ,
            # Unsigned activations are what x86 CPUs multiply fastest: 997 images/s, against 573 with signed ones. One
            # scale for each channel of the weights: with one for each layer, the network above lost 0.13 mm.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=find_read_out_nodes(model),
        )
        quantised = onnx.load(part)
        kept = [item for item in quantised.metadata_props if item.key != "onnx.infer"]  # a note of the quantiser
        del quantised.metadata_props[:]
        quantised.metadata_props.extend(kept)
        onnx.save(quantised, part)
        onnx.checker.check_model(part)


class _CalibrationPictures(CalibrationDataReader):
    """Passes calibration pictures to the quantiser, one at a time."""

    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        self._remaining = iter(pictures)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        picture = next(self._remaining, None)
        return None if picture is None else {"image": picture[None]}


@contextmanager
def _suppress_hints() -> Iterator[None]:
    """Suppress the quantiser's advice to fold normalisations first: the exporter has done that."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def measure_precisions(
    files: Mapping[Precision, Path], axes: Axes, images: NDArray[np.uint8], *, hands: HandBatch | None
) -> list[PrecisionResult]:
    """Measure files of one network side by side.

    Args:
        files: precision -> file; fp32 is the reference.
        axes: the axes of the network.
        images: (N, 3, H, W) pictures.
        hands: the labels of the pictures, if they are known.
    """
    outputs = {precision: _run(path, images) for precision, path in files.items()}
    rates = measure_images_per_s(list(files.values()), images)
    results = []
    for (precision, path), rate in zip(files.items(), rates, strict=True):
        pairs = zip(outputs[precision].items(), outputs["fp32"].values(), strict=True)
        difference = {name: float(np.abs(mine - reference).max()) for (name, mine), reference in pairs}
        values = list(outputs[precision].values())
        results.append(
            PrecisionResult(
                precision=precision,
                megabytes=path.stat().st_size / 1e6,
                images_per_s=rate,
                max_difference=difference,
                pa_mpjpe_mm=float("nan") if hands is None else _compute_pa_mpjpe_mm(values, axes, hands),
                is_finite=all(np.isfinite(each).all() for each in values),
            )
        )
    return results


def measure_exported_latency_ms(module: HandPose, images: NDArray[np.uint8], precision: Precision) -> float:
    """Export a network, and measure the time of one image with ONNX Runtime on the CPU, in milliseconds.

    Other work on the machine only adds to a time, so the minimum counts.

    Args:
        module: the network, on the CPU. A copy of it is exported.
        images: (N, 3, H, W) pictures; they also calibrate int8. They need not be photographs, because the time does not
            depend on what they show.
        precision: precision of the exported file.
    """
    with tempfile.TemporaryDirectory() as name:
        fp32 = file = Path(name) / "fp32.onnx"
        export_onnx(copy.deepcopy(module), fp32, side=images.shape[-1])
        if precision != "fp32":
            file = Path(name) / f"{precision}.onnx"
            write_precision(fp32, file, precision, calibration=images)
        (seconds,) = _time_single_images([file], images, limit_s=_LATENCY_S)
    return 1000.0 * min(seconds)


def compute_split_error_mm(path: Path, axes: Axes, hands: HandBatch) -> float:
    """Compute the PA-MPJPE in mm of a file on labelled hands.

    Args:
        path: the ONNX file.
        axes: the axes of the network.
        hands: images with their joints.
    """
    return _compute_pa_mpjpe_mm(list(_run(path, hands.image.numpy()).values()), axes, hands)


def measure_images_per_s(files: Sequence[Path], images: NDArray[np.uint8]) -> list[float]:
    """Measure how many single images per second each file predicts on the CPU. The files take turns.

    Args:
        files: ONNX files.
        images: (N, 3, H, W) pictures.
    """
    return [1.0 / statistics.median(seconds) for seconds in _time_single_images(files, images, limit_s=_TIMED_S)]


def _time_single_images(files: Sequence[Path], images: NDArray[np.uint8], *, limit_s: float) -> list[list[float]]:
    """Return the seconds of each run of single pictures after a warm-up, for each file. The files take turns."""
    sessions = [open_session(path) for path in files]
    seconds: list[list[float]] = [[] for _ in sessions]
    (least, most), began = _TIMED_RUNS, time.perf_counter()
    for run in range(_WARM_UP + most):
        if run >= _WARM_UP + least and time.perf_counter() - began >= limit_s:
            break
        picture = images[run % len(images), None]
        for session, times in zip(sessions, seconds, strict=True):
            started = time.perf_counter()
            session.run(None, {"image": picture})
            times.append(time.perf_counter() - started)
    return [times[_WARM_UP:] for times in seconds]


def _run(path: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Run all pictures through a file. Return name of the output -> values."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    batches = [
        session.run(None, {"image": images[start : start + BATCH_SIZE]}) for start in range(0, len(images), BATCH_SIZE)
    ]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*batches, strict=True), strict=True)}


def _compute_pa_mpjpe_mm(outputs: Sequence[NDArray[np.float32]], axes: Axes, hands: HandBatch) -> float:
    camera, side = hands.intrinsics, hands.image.shape[-1]
    xyz_m = decode_outputs(outputs, axes, intrinsics=camera, scale_m=hands.scale_m, side=side)
    return compute_errors(xyz_m.numpy(), hands.xyz_m.numpy(), camera.numpy())["pa_mpjpe_mm"]
