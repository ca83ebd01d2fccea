"""Several networks that predict together: their mean, their files, and which of them cannot."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from handpose.errors import UserError
from handpose.evaluation.__main__ import main as evaluate
from handpose.evaluation.ensemble import combine_split_predictions
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.submission import read_course
from handpose.evaluation.trained_network import list_checkpoints, read_network, read_networks
from handpose.geometry import to_root_relative
from handpose.predict import main as predict
from handpose.skeleton import ROOT
from tests.builders import make_hands

WITHOUT_PROGRESS = ["trainer.enable_progress_bar=false", "paths.packed=packed", "trainer.accelerator=cpu"]


@pytest.fixture
def checkpoints(write_checkpoint):
    return [write_checkpoint(f"seed={seed}") for seed in (0, 1, 2)]


@pytest.fixture
def photograph(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def name_all(paths):
    return [word for path in paths for word in ("--checkpoint", str(path))]


def combine(*joints_m, errors_m=(0.003, 0.004)):
    given = [
        SplitPredictions(each, np.full(each.shape[:2], error_m))
        for each, error_m in zip(joints_m, [*errors_m, 0.0], strict=False)
    ]
    return combine_split_predictions(given)


def test_the_pose_is_the_mean_and_the_root_has_the_mean_inverse_depth():
    near, far = make_hands(3, seed=0), make_hands(3, seed=1)
    near[:, :, 2] += 0.4 - near[:, ROOT, None, 2]
    far[:, :, 2] += 0.6 - far[:, ROOT, None, 2]
    mean = combine(near, far).xyz_m
    poses = [to_root_relative(torch.from_numpy(each)).numpy() for each in (near, far)]
    assert to_root_relative(torch.from_numpy(mean)).numpy() == pytest.approx(np.mean(poses, axis=0))
    assert mean[:, ROOT, 2] == pytest.approx(0.48)  # the harmonic mean of 0.4 and 0.6


def test_networks_that_agree_expect_the_mean_of_their_squared_errors():
    hands = make_hands(2)
    assert combine(hands, hands).error_m == pytest.approx(np.sqrt((0.003**2 + 0.004**2) / 2))


def test_where_networks_disagree_the_expected_error_is_larger():
    hands, moved = make_hands(2), make_hands(2)
    moved[:, 4, 0] += 0.01
    error_m = combine(hands, moved).error_m
    assert error_m[:, 4] ** 2 - error_m[:, 3] ** 2 == pytest.approx(0.01**2 / 2)  # the variance of two values
    assert error_m[:, 3] == pytest.approx(error_m[:, 20])


def test_photographs_are_predicted_by_all_networks(checkpoints, photograph, tmp_path):
    def run(paths):
        out = tmp_path / f"out_{len(paths)}_{paths[0].parent.name}"
        assert predict([str(photograph), *name_all(paths), "--output", str(out), "--device", "cpu"]) == 0
        content = json.loads((out / "hands.json").read_text())
        return np.array(content["hands"][0]["xyz_mm"]), content["checkpoint"]

    each = [run([path])[0] for path in checkpoints]
    together, named = run(checkpoints)
    expected = 1000 * combine(*(xyz_mm[None] / 1000 for xyz_mm in each)).xyz_m[0]
    assert together == pytest.approx(expected, abs=0.01)
    assert named == ", ".join(map(str, checkpoints))


@pytest.mark.slow
def test_a_split_is_evaluated_with_all_networks(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(paths):
        out = tmp_path / "out"
        assert evaluate([*name_all(paths), "--output", str(out), *WITHOUT_PROGRESS]) == 0
        return read_course(out / "test_preds.json.gz")

    expected = combine(*(run([path]) for path in checkpoints)).xyz_m
    assert run(checkpoints) == pytest.approx(expected, abs=2e-7)


def test_the_folder_of_combined_networks_stands_for_them(checkpoints, tmp_path):
    combined = tmp_path / "retrain" / "combined"
    combined.mkdir(parents=True)
    names = ["../checkpoints/best.ckpt", "../seed_1/checkpoints/best.ckpt"]
    (combined / "metrics.json").write_text(json.dumps({"checkpoints": names}))
    assert list_checkpoints([combined, checkpoints[0]]) == [*(combined / name for name in names), checkpoints[0]]


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"retrain/combined .* give a checkpoint"):
        list_checkpoints([tmp_path])


@pytest.mark.parametrize("change", ["data.image_size=32", "heatmap=camera_axes"])
def test_networks_of_another_kind_of_input_or_output_are_refused(write_checkpoint, change):
    paths = [write_checkpoint(), write_checkpoint(change)]
    with pytest.raises(UserError, match=r"they cannot predict together"):
        read_networks(paths)


def test_one_network_is_no_ensemble(checkpoints):
    assert type(read_networks(checkpoints[:1]).module) is type(read_network(checkpoints[0]).module)


@pytest.mark.parametrize("content", ["[1]", '{"checkpoints": [1]}', '{"checkpoints": []}'])
def test_a_folder_with_damaged_metrics_is_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"a folder without combined networks"):
        list_checkpoints([tmp_path])


def test_several_networks_need_a_folder_for_their_scores(checkpoints, capsys):
    with pytest.raises(SystemExit):
        evaluate([*name_all(checkpoints), *WITHOUT_PROGRESS])
    assert "give --output FOLDER" in capsys.readouterr().err


def test_networks_with_other_axes_are_not_evaluated_together(write_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [write_checkpoint(), write_checkpoint("heatmap=camera_axes")]
    with pytest.raises(SystemExit):
        evaluate([*name_all(paths), "--output", str(tmp_path / "out"), *WITHOUT_PROGRESS])
    assert "cannot predict together" in capsys.readouterr().err
