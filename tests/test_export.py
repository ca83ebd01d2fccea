"""A network as ONNX gives what it gives in PyTorch; the program says so."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from handpose import geometry
from handpose.data.augment import View
from handpose.evaluation.onnx_graph import OPSET, decode_outputs, export_onnx
from handpose.evaluation.onnx_precision import PrecisionResult
from handpose.evaluation.trained_network import read_network
from handpose.export import compare_with_pytorch, main, name_files
from tests.builders import make_cameras

SIDE = 64
UNUSABLE = PrecisionResult("fp16", 1.0, 1.0, {"uv_px": float("nan")}, float("nan"), is_finite=False)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The network, its file, and what was written."""
    network, path = read_network(checkpoint), tmp_path_factory.mktemp("onnx") / "hand.onnx"
    return network, path, export_onnx(network.module, path, side=SIDE)


def pictures(num):
    return np.random.default_rng(num).integers(0, 256, (num, 3, SIDE, SIDE), dtype=np.uint8)


def test_batches_of_any_size_agree_with_pytorch(exported):
    _, path, graph = exported
    for num in (1, 3):
        assert max(compare_with_pytorch(graph, path, pictures(num)).max_difference.values()) < 1e-3


def test_with_the_metadata_alone_the_outputs_become_the_joints_that_the_network_predicts(exported):
    network, path, _ = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    image, intrinsics = pictures(4), torch.from_numpy(make_cameras(4, SIDE)).float()
    uv, relative = (torch.from_numpy(output) for output in session.run(None, {"image": image}))
    rays = geometry.normalize_image_points(uv, intrinsics)
    depth = (
        geometry.solve_root_depth(rays, relative, torch.tensor(json.loads(told["bone_lengths"])))[:, None] + relative
    )
    xyz_mm = geometry.back_project(uv, depth * json.loads(told["scale_mm"]), intrinsics)
    view = View(torch.from_numpy(image).float() / 255.0, intrinsics, torch.empty(4, 21, 3))
    with torch.no_grad():
        expected_m = network.module.predict_xyz_m(view, torch.full((4,), torch.nan))
    assert torch.allclose(xyz_mm, 1000 * expected_m, atol=0.05)
    outputs, unknown = (uv.numpy(), relative.numpy()), torch.full((4,), torch.nan)
    decoded_m = decode_outputs(outputs, network.module.axes, intrinsics=intrinsics, scale_m=unknown, side=SIDE)
    assert torch.allclose(decoded_m, expected_m, atol=5e-5)
    assert len(json.loads(told["joints"])) == 21


def test_the_file_stands_alone_and_says_what_goes_in(exported):
    _, path, _ = exported
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    model = onnx.load(path)
    assert {item.domain: item.version for item in model.opset_import}[""] == OPSET
    (image,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(uint8)", [3, SIDE, SIDE])
    assert isinstance(image.shape[0], str)  # any number


@pytest.fixture
def in_a_folder(exported, tmp_path, monkeypatch):
    """An empty folder; the program gets the file that has been written, since writing takes seconds."""
    _, written, graph = exported

    def copied(module, path, *, side):
        path.write_bytes(written.read_bytes())
        return graph

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("handpose.export.export_onnx", copied)
    monkeypatch.setattr("handpose.evaluation.onnx_precision._TIMED_S", 0.0)
    return tmp_path


def test_the_program_compares_on_the_test_split_and_prints_what_it_found(checkpoint, in_a_folder, capsys):
    assert main(["--checkpoint", str(checkpoint), "--output", "hand.onnx", "paths.packed=packed"]) == 0
    told = capsys.readouterr().out
    for words in ("M parameters", "largest difference from PyTorch on 6 pictures: uv_px", "ONNX Runtime", " MB, "):
        assert words in told


def test_a_file_that_differs_is_not_left(checkpoint, in_a_folder, monkeypatch, capsys):
    monkeypatch.setattr("handpose.export.TOLERANCE", -1.0)
    assert main(["--checkpoint", str(checkpoint), "--output", "hand.onnx", "paths.packed=packed"]) == 1
    assert "differs from PyTorch" in capsys.readouterr().err
    assert not (in_a_folder / "hand.onnx").exists()


def test_several_precisions_are_compared_with_fp32_on_the_validation_split(checkpoint, in_a_folder, capsys):
    given = ["--checkpoint", str(checkpoint), "--output", "hand.onnx", "--precision", "int8", "fp16"]
    assert main([*given, "paths.packed=packed"]) == 0
    told = capsys.readouterr().out
    assert {path.name for path in in_a_folder.glob("*.onnx")} == {"hand_fp16.onnx", "hand_int8.onnx"}
    rows = [line.split() for line in told.splitlines() if re.match(r"(fp32|fp16|int8) +\d", line)]
    assert [row[0] for row in rows] == ["fp32", "fp16", "int8"]
    fp32, fp16, int8 = ([float(value) for value in row[1:]] for row in rows)
    assert int8[0] < 0.5 * fp32[0]
    assert fp16[0] < 0.7 * fp32[0]
    assert fp32[2:] == [1.0, fp32[3], 0.0]
    assert int8[4] == pytest.approx(int8[3] - fp32[3], abs=2e-3)
    assert "int8 was calibrated on 6 of these pictures" in told


def test_without_labels_the_largest_difference_is_printed(checkpoint, in_a_folder, capsys):
    (in_a_folder / "pictures").mkdir()
    for number, picture in enumerate(pictures(3)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(in_a_folder / f"pictures/{number}.png")
    given = ["--checkpoint", str(checkpoint), "--output", "hand.onnx", "--precision", "int8", "--images", "pictures"]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "largest difference from fp32" in told
    assert "PA-MPJPE" not in told
    assert "3 pictures of pictures" in told
    assert [path.name for path in in_a_folder.glob("*.onnx")] == ["hand.onnx"]  # int8, since it is the only one


def test_outputs_that_are_not_finite_are_not_left(checkpoint, in_a_folder, monkeypatch, capsys):
    results = [UNUSABLE._replace(precision="fp32", is_finite=True), UNUSABLE]
    monkeypatch.setattr("handpose.export.measure_precisions", lambda *_, **__: results)
    given = ["--checkpoint", str(checkpoint), "--output", "hand.onnx", "--precision", "fp32", "fp16"]
    assert main([*given, "paths.packed=packed"]) == 1
    assert "outputs of fp16 are not finite, so hand_fp16.onnx was removed" in capsys.readouterr().err
    assert [path.name for path in in_a_folder.glob("*.onnx")] == ["hand.onnx"]


@pytest.mark.parametrize(
    ("precisions", "names"),
    [
        (["fp32"], {"fp32": "a/hand.onnx"}),
        (["int8"], {"int8": "a/hand.onnx"}),
        (["int8", "fp32"], {"fp32": "a/hand.onnx", "int8": "a/hand_int8.onnx"}),
    ],
)
def test_a_single_precision_has_the_name_that_was_given(precisions, names):
    assert {key: str(path) for key, path in name_files(Path("a/hand.onnx"), precisions).items()} == names


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "hand.onnx", "--precision", "fp8"], "--precision fp8 is not known; give one or several of fp32"),
        (["--output", "hand.pt"], "must end in .onnx"),
        (["--output", "hand.onnx", "--images", "nowhere"], "nowhere does not exist"),
        (["--output", "hand.onnx", "--image-size", "8"], "--image-size must be at least 32"),
    ],
)
def test_mistakes_are_one_sentence(checkpoint, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["--checkpoint", str(checkpoint), *arguments])
    told = capsys.readouterr().err
    assert (left.value.code, told.count("\n")) == (2, 1)
    assert sentence in told
