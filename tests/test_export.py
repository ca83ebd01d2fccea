"""A network as ONNX gives what it gives in PyTorch; the program says so."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from handpose import geometry
from handpose.data.augment import View
from handpose.evaluation.trained_network import read_network
from handpose.export import OPSET, compare_with_pytorch, export_onnx, main
from tests.builders import make_cameras

SIDE = 64


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The network, its file, and what was written."""
    network, path = read_network(checkpoint), tmp_path_factory.mktemp("onnx") / "hand.onnx"
    return network, path, export_onnx(network, path, side=SIDE)


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

    def copied(network, path, *, side):
        path.write_bytes(written.read_bytes())
        return graph

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("handpose.export.export_onnx", copied)
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
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
