"""Half precision and 8-bit integers give nearly what single precision gives, and the read-out stays as it is."""

import numpy as np
import onnx
import pytest
import torch

from handpose.evaluation.onnx_graph import export_onnx, open_session
from handpose.evaluation.onnx_precision import find_read_out_nodes, measure_precisions, write_precision
from handpose.evaluation.trained_network import read_network

SIDE = 64
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images():
    """Smooth pictures, as photographs are: noise would have no features that are worth a range."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    return coarse.repeat(8, axis=2).repeat(8, axis=3)


@pytest.fixture(scope="module", params=["image_axes", "camera_axes"])
def written(request, write_checkpoint, images, tmp_path_factory):
    """A network and its files."""
    ranges = [f"heatmap.{axis}_mm=[-900,1600]" for axis in "xyz"] if request.param == "camera_axes" else []
    network = read_network(write_checkpoint(f"heatmap={request.param}", *ranges))
    with torch.no_grad():  # the heatmaps of the checkpoint are so sharp that any rounding moves their peaks
        for weights in (parameter for parameter in network.module.net.decoder.parameters() if parameter.ndim > 1):
            weights.mul_(0.2)
    folder = tmp_path_factory.mktemp("onnx")
    files = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    export_onnx(network.module, files["fp32"], side=SIDE)
    for precision in ("fp16", "int8"):
        write_precision(files["fp32"], files[precision], precision, calibration=images)
    return network, files


def test_outputs_are_near_those_of_fp32(written, images, monkeypatch):
    monkeypatch.setattr("handpose.evaluation.onnx_precision._TIMED_S", 0.0)
    network, files = written
    fp32, fp16, int8 = measure_precisions(files, network.module.axes, images, hands=None)
    assert set(fp32.max_difference.values()) == {0.0}
    spread = {name: np.ptp(values) for name, values in run(files["fp32"], images).items()}
    for name, extent in spread.items():
        assert 0.0 < fp16.max_difference[name] < 0.02 * extent
        assert 0.0 < int8.max_difference[name] < 0.06 * extent
    assert all(each.is_finite and each.images_per_s > 0 for each in (fp32, fp16, int8))
    assert int8.megabytes < fp16.megabytes < fp32.megabytes


def run(path, images):
    session = open_session(path)
    return dict(zip((item.name for item in session.get_outputs()), session.run(None, {"image": images}), strict=True))


def test_inputs_outputs_and_metadata_stay_the_same(written):
    _, files = written
    described = [
        (
            [(item.name, item.type, item.shape) for item in (*session.get_inputs(), *session.get_outputs())],
            session.get_modelmeta().custom_metadata_map,
        )
        for session in map(open_session, files.values())
    ]
    assert described[0] == described[1] == described[2]
    assert "joints" in described[0][1]


def test_the_read_out_is_neither_quantised_nor_halved(written):
    _, files = written
    models = {precision: onnx.load(path) for precision, path in files.items()}
    kept = set(find_read_out_nodes(models["fp32"]))
    assert {node.op_type for node in models["fp32"].graph.node if node.name in kept} >= {"Softmax", "ReduceSum"}
    assert not {node.op_type for node in models["fp32"].graph.node if node.name in kept} & {"Conv", "Gemm"}
    made = {output: node for node in models["int8"].graph.node for output in node.output}
    for node in models["int8"].graph.node:
        if node.name in kept and node.op_type in ("Softmax", "ReduceSum", "Mul"):
            assert all(tensor not in made or made[tensor].op_type != "QuantizeLinear" for tensor in node.input)
        if node.op_type == "Conv":
            assert made[node.input[1]].op_type == "DequantizeLinear"


def test_a_file_names_no_folder_of_the_machine_that_wrote_it(written):
    _, files = written
    for path in files.values():
        assert b'File "' not in path.read_bytes()
