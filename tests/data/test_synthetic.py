"""The synthetic set is what FreiHAND's layout says, comes out the same however it is made, and is never half made."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handpose.data import synthetic
from handpose.data.synthetic import Synthetic
from handpose.errors import UserError

# Wrist and tip of the middle finger of the first picture of PARAMETERS, metres.
PINNED = (-0.04884633, 0.04499741, 0.49146038, 0.01348475, -0.06405106, 0.46651577)

PARAMETERS = {
    "num_train": 10,
    "num_eval": 4,
    "image_size": 48,
    "seed": 0,
    "roll_deg": 45,
    "tilt_deg": 35,
    "back_probability": 0.3,
    "pose_variety": 1.0,
    "focal": [1.5, 4.0],
    "fill": [0.5, 0.75],
    "cutoff_probability": 0.0,
    "occluder_probability": 0.1,
    "blur_probability": 0.1,
    "noise": 6,
    "clutter": 1.0,
    "val_fraction": 0.2,
    "split": "blocks",
    "num_blocks": 1,
    "split_seed": 0,
    "num_workers": 2,
}


def make(root, **changes):
    return Synthetic(str(root), **{**PARAMETERS, **changes})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("synthetic")).generate()


def test_layout_is_freihands(folder):
    for split, count in (("training", 10), ("evaluation", 4)):
        names = sorted(path.name for path in (folder / split / "rgb").iterdir())
        assert names == [f"{i:08d}.jpg" for i in range(count)]
        shapes = {"K": (count, 3, 3), "xyz": (count, 21, 3), "scale": (count,)}
        for key, shape in shapes.items():
            assert np.array(json.loads((folder / f"{split}_{key}.json").read_text())).shape == shape
        with Image.open(folder / split / "rgb" / names[0]) as image:
            assert image.format == "JPEG"
            assert image.size == (48, 48)


def test_every_training_picture_has_the_mask_of_its_hand(folder):
    """Joints that nothing covers lie on it; it is black and white, and a part of the picture."""
    camera, xyz = (np.array(json.loads((folder / f"training_{key}.json").read_text())) for key in ("K", "xyz"))
    uvw = np.einsum("nij,nkj->nki", camera, xyz)
    uv = np.clip(np.round(uvw[..., :2] / uvw[..., 2:]).astype(int), 0, 47)
    names = sorted(path.name for path in (folder / "training/mask").iterdir())
    assert names == [f"{i:08d}.jpg" for i in range(10)]
    assert not (folder / "evaluation/mask").exists()
    for name, (u, v) in zip(names, uv.swapaxes(1, 2), strict=True):
        with Image.open(folder / "training/mask" / name) as image:
            assert image.mode == "L"
            mask = np.asarray(image)
        assert mask.shape == (48, 48)
        assert ((mask < 40) | (mask > 215)).mean() > 0.98
        assert 0.05 < (mask > 127).mean() < 0.8
        assert (mask[v, u] > 127).mean() > 0.8


def test_scale_is_the_reference_bone_and_joints_project_onto_the_picture(folder):
    xyz = np.array(json.loads((folder / "training_xyz.json").read_text()))
    scale = np.array(json.loads((folder / "training_scale.json").read_text()))
    camera = np.array(json.loads((folder / "training_K.json").read_text()))
    np.testing.assert_allclose(scale, np.linalg.norm(xyz[:, 10] - xyz[:, 9], axis=1), atol=1e-7)
    uvw = np.einsum("nij,nkj->nki", camera, xyz)
    uv = uvw[..., :2] / uvw[..., 2:]
    assert uv.min() >= 0
    assert uv.max() <= 47


def test_splits_come_through_freihands_reader(folder):
    splits = make(folder.parent).splits()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 2, 4)
    assert splits.test.xyz_m is not None
    assert splits.train.files[0].is_file()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path, num_workers):
    other = make(tmp_path, num_workers=num_workers).generate()
    assert other.name == folder.name
    assert contents(other) == contents(folder)


def test_as_many_processes_draw_as_the_container_has_cores(tmp_path, monkeypatch):
    started = []

    def draw_in_process(order, worker, num_workers):
        started.append((worker, num_workers))
        return iter(())

    monkeypatch.setattr(synthetic.hand_drawing, "draw_in_process", draw_in_process)
    monkeypatch.setattr(synthetic, "count_cores", lambda: 3)
    with pytest.raises(KeyError):  # nothing was drawn
        make(tmp_path, num_workers=None).generate()
    assert sorted(started) == [(0, 3), (1, 3), (2, 3)]


def test_a_longer_set_begins_with_the_shorter_one(folder, tmp_path):
    longer = make(tmp_path, num_train=12).generate()
    assert longer.name != folder.name
    for i in range(10):
        name = f"training/rgb/{i:08d}.jpg"
        assert (longer / name).read_bytes() == (folder / name).read_bytes()


def test_seeds_and_splits_differ(folder, tmp_path):
    other = make(tmp_path, seed=1).generate()
    first, second = (json.loads((f / "training_xyz.json").read_text()) for f in (folder, other))
    assert not np.allclose(first, second, atol=1e-3)
    evaluation = json.loads((folder / "evaluation_xyz.json").read_text())
    assert not np.allclose(first[:4], evaluation, atol=1e-3)


def test_a_set_is_made_once(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make(folder.parent).generate() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_every_parameter_of_the_pictures_names_another_folder(tmp_path):
    changes = {
        "num_train": 11,
        "num_eval": 5,
        "image_size": 64,
        "seed": 3,
        "roll_deg": 10,
        "tilt_deg": 10,
        "back_probability": 0.5,
        "pose_variety": 0.5,
        "focal": [2, 3],
        "fill": [0.6, 0.7],
        "cutoff_probability": 0.5,
        "occluder_probability": 0.5,
        "blur_probability": 0.5,
        "noise": 1,
        "clutter": 0.5,
    }
    folders = {make(tmp_path, **{name: value}).folder for name, value in changes.items()} | {make(tmp_path).folder}
    assert len(folders) == len(changes) + 1
    same = make(tmp_path, val_fraction=0.5, split="random", num_blocks=2, split_seed=9, num_workers=1, noise=6.0)
    assert same.folder == make(tmp_path).folder


def test_a_generator_of_another_version_does_not_reuse_the_folder(tmp_path, monkeypatch):
    before = make(tmp_path).folder
    monkeypatch.setattr(synthetic, "GENERATOR_VERSION", synthetic.GENERATOR_VERSION + 1)
    assert make(tmp_path).folder != before


def test_the_pictures_of_this_version_are_pinned(folder):
    """Joints of the first picture: when they change, GENERATOR_VERSION must change too, and then this."""
    assert synthetic.GENERATOR_VERSION == 5
    wrist, tip = (json.loads((folder / "training_xyz.json").read_text())[0][joint] for joint in (0, 12))
    assert [*wrist, *tip] == pytest.approx(PINNED, abs=1e-6)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(tmp_path):
    parameters = {**PARAMETERS, "num_train": 4000, "num_workers": 1}
    script = f"from handpose.data.synthetic import Synthetic\nSynthetic({str(tmp_path)!r}, **{parameters!r}).generate()"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, cwd=Path.cwd())
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.jpg"))) < 5:
        assert time.monotonic() < deadline, "no picture in a minute"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    target = make(tmp_path, num_train=4000)
    assert not target.folder.exists()
    partial = list(tmp_path.glob(".*.partial"))
    assert len(partial) == 1
    _wait_until_still(partial[0])  # the process that draws ends when nobody listens


def _wait_until_still(folder):
    def count():
        return len(list(folder.rglob("*.jpg")))

    deadline = time.monotonic() + 30
    last = -1
    while count() != last:
        assert time.monotonic() < deadline, "the drawing process outlives its parent"
        last = count()
        time.sleep(0.5)


def test_the_remains_of_a_killed_run_are_cleaned_away(folder, tmp_path):
    target = make(tmp_path)
    partial = tmp_path / f".{target.folder.name}.partial"
    (partial / "training" / "rgb").mkdir(parents=True)
    (partial / "training" / "rgb" / "00000099.jpg").write_bytes(b"half a picture")
    assert contents(target.generate()) == contents(folder)
    assert not partial.exists()


@pytest.mark.parametrize("lost", ["training/rgb/00000003.jpg", "training/mask/00000003.jpg"])
def test_a_set_that_has_lost_a_file_is_drawn_again(folder, tmp_path, lost):
    damaged = shutil.copytree(folder, tmp_path / folder.name)
    (damaged / lost).unlink()
    assert contents(make(tmp_path).generate()) == contents(folder)


@pytest.mark.slow
def test_two_processes_at_once_make_one_set(folder, tmp_path):
    script = (
        "import os, sys\nfrom handpose.data.synthetic import Synthetic\n"
        "other = os.fork()\n"
        f"Synthetic({str(tmp_path)!r}, **{PARAMETERS!r}).generate()\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if other else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=Path.cwd(), timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Drew 14 hands") == 1
    assert contents(tmp_path / folder.name) == contents(folder)


@pytest.mark.parametrize(
    ("complaint", "error", "message"),
    [
        ("ValueError: something broke", RuntimeError, "something broke"),
        ('OSError [28, "No space left on device", "/set/0.jpg"]', UserError, "/set/0.jpg cannot be written"),
    ],
)
def test_a_failing_drawing_process_ends_the_run_with_its_message(tmp_path, monkeypatch, complaint, error, message):
    failing = tmp_path / "python"
    failing.write_text(f"#!/bin/sh\necho '{complaint}' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(error, match=message):
        make(tmp_path / "root").generate()
    assert [path.suffix for path in (tmp_path / "root").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": 1}, "data.num_train must be a whole number of at least 2, but got 1"),
        ({"num_eval": 0}, "data.num_eval"),
        ({"image_size": 8}, "data.image_size"),
        ({"image_size": 48.5}, "data.image_size"),
        ({"seed": -1}, "data.seed"),
        ({"num_workers": 0}, "data.num_workers"),
        ({"roll_deg": 200}, "data.roll_deg must be a number from 0 to 180, but got 200"),
        ({"tilt_deg": "much"}, "data.tilt_deg must be a number from 0 to 90, but got 'much'"),
        ({"noise": float("nan")}, "data.noise"),
        ({"back_probability": 1.5}, "data.back_probability"),
        ({"focal": [3, 2]}, "data.focal must be a pair [low, high] with low <= high, but got [3, 2]"),
        ({"focal": 3}, "data.focal must be a pair"),
        ({"fill": [0.5]}, "data.fill must be a pair"),
        ({"clutter": None}, "data.clutter"),
    ],
)
def test_a_value_out_of_range_is_the_users_mistake(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(tmp_path, **change)


def test_a_root_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to data\.root=") as caught:
        make(tmp_path / "file").generate()
    assert str(tmp_path / "file") in str(caught.value)


def test_too_small_a_disk_is_the_users_mistake(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(UserError, match=r"needs up to .* free; choose another folder"):
        make(tmp_path, num_train=free // 48**2 + 10**6).generate()


def test_mean_pose_is_as_wrong_as_on_a_real_data_set():
    """Generalised Procrustes mean against the poses; FreiHAND's constant prediction is of this size."""
    from handpose.data import hand_kinematics

    poses = []
    for seed in range(250):
        rng = np.random.default_rng(seed)
        shape = hand_kinematics.draw_shape(rng)
        poses.append(hand_kinematics.pose_hand(shape, hand_kinematics.draw_pose(rng, shape)).joints)
    mean = poses[0]
    for _ in range(5):
        mean = np.mean([_align(pose, mean) for pose in poses], axis=0)
    errors = [np.linalg.norm(_align(mean, pose) - pose, axis=1).mean() for pose in poses]
    assert 14 < np.mean(errors) < 20


def _align(source, target):
    """Similarity transform of source to target (Kabsch, no reflection)."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, values, vt = np.linalg.svd(a.T @ b)
    values[-1] *= np.sign(np.linalg.det(u @ vt))
    u[:, -1] *= np.sign(np.linalg.det(u @ vt))
    return a @ u @ vt * values.sum() / (a**2).sum() + target.mean(0)


def test_the_contact_sheet_shows_every_hand_plain_and_with_its_bones(tmp_path):
    difficulty = make(tmp_path).difficulty
    synthetic.draw_contact_sheet(tmp_path / "sheet.png", num=7, seed=0, image_size=64, difficulty=difficulty)
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    tile = 256
    assert sheet.shape == (4 * tile, 6 * tile, 3)
    plain, marked = sheet[:tile, :tile], sheet[tile : 2 * tile, :tile]
    changed = (plain != marked).any(axis=2).mean()
    assert 0.002 < changed < 0.2


def test_the_command_line_writes_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "read_default_difficulty", lambda: make(tmp_path).difficulty)
    target = tmp_path / "sheet.png"
    assert synthetic.main(["--sheet", str(target), "--num", "2", "--image-size", "48"]) == 0
    assert target.is_file()
    assert "Wrote 2 hands" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--sheet", "sheet.png", "--num", "0"], ["--sheet", "nowhere/sheet.png"], ["--sheet", "sheet.txtx", "--num", "1"]],
)
def test_the_command_line_explains_a_mistake_in_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "read_default_difficulty", lambda: make(tmp_path).difficulty)
    assert synthetic.main([*arguments, "--image-size", "32"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_sheets_difficulty_is_the_configurations():
    difficulty = synthetic.read_default_difficulty()
    assert 0 < difficulty.tilt_deg <= 90
    assert difficulty.fill[0] < difficulty.fill[1]
