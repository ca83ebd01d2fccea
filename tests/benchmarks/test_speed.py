"""The measurements of speed measure what they say, and run to their end; how fast anything is, is not tested."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from handpose import geometry
from handpose.config_files import REPOSITORY
from handpose.data.freihand import FreiHand
from tests.builders import write_freihand, write_jpeg

data, gpu = (importlib.import_module(f"benchmarks.{name}") for name in ("data", "gpu"))


def read(root):
    return FreiHand(str(root), val_fraction=0.2, split="random", num_blocks=1, split_seed=0).splits()


def test_the_originals_joints_turn_with_its_picture(tmp_path):
    """A bright patch painted at a joint is found where the turned joint projects; the camera is centred."""
    images = read(write_freihand(tmp_path / "set", size=64)).train
    camera = torch.tensor([[120.0, 0, 31.5], [0, 120.0, 31.5], [0, 0, 1]])
    xyz_m = torch.from_numpy(images.xyz_m[0]).float()
    u, v = geometry.project(xyz_m, camera)[12].round().int().tolist()
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[v - 1 : v + 2, u - 1 : u + 2] = 255
    write_jpeg(images.files[0], picture)
    image, turned_m = data.PerImageDataset(images, data.decode_pil, data.rotate_pil)[0]
    assert not torch.allclose(turned_m, xyz_m, atol=1e-3)
    bright = (image[0] > 0.6).nonzero().float().mean(0).flip(0)
    assert torch.allclose(bright, geometry.project(turned_m, camera)[12], atol=1.5)


def test_a_repeated_data_set_is_read_like_the_one_it_repeats(tmp_path):
    root = write_freihand(tmp_path / "set", variants=1)
    many = read(data.repeat_dataset(root, tmp_path / "many", 3))
    assert len(many.train) + len(many.val) == 30
    assert len(many.test) == 15


def run(name, *arguments):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_measurement_ends_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"^.* needs a GPU .*$"):  # a sentence: Python prints it and returns 1
        gpu.main()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_measurement_on_a_gpu_can_be_rehearsed(tmp_path):
    tiny = ["--encoder", "lcnet_035", "--batch-size", 4, "--steps", 2, "--repeats", 1, "--processes", 1, 2]
    done = run("gpu.py", "--rehearse", *tiny, "--output", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert set(row["images_per_s"]) == {"encoder", "bare", "trainer"}
    assert all(rate > 0 for rate in row["processes_images_per_s"].values())


@pytest.mark.slow
def test_throughput_is_measured_on_all_sides(tmp_path):
    tiny = ["--encoder", "lcnet_035", "--image-size", 64, "--batch-size", 4, "--steps", 2, "--repeats", 1]
    done = run("throughput.py", *tiny, "--output", tmp_path / "throughput.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert set(row["images_per_s"]) == {"bare", "augmented", "trainer", "original"}


@pytest.mark.slow
def test_loaders_and_memory_are_measured(tmp_path):
    tiny = ["--image-size", 64, "--images", 40, "--batch-size", 8, "--batches", 2, "--repeats", 1]
    done = run("data.py", *tiny, "--copies", 2, "--processes", 2, "--output", tmp_path / "data.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "data.json").read_text())
    assert {"packed", "packed, turned", "PIL", "simplejpeg"} <= set(results["loaders"][0]["images_per_s"])
    assert len(results["memory"][0]["processes"]) == 2
