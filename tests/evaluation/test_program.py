"""`python -m handpose.evaluation` in the process of the tests: what it prints and leaves, and mistakes."""

import json

import pytest
from PIL import Image

from handpose.config import compose
from handpose.evaluation.__main__ import main
from handpose.evaluation.submission import read_course, write_official
from tests.builders import make_hands

SPLIT = ["data.source.val_fraction=0.25", "data.source.num_blocks=2"]
DATA = ["data=freihand", "data.image_size=64", "data.batch_size=4", *SPLIT]


@pytest.fixture
def evaluate(freihand, tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder; returns what evaluation.json and the terminal say."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        silent = ["trainer.enable_progress_bar=false", "paths.packed=packed", "trainer.accelerator=cpu"]
        assert main([*arguments, "--output", str(tmp_path / "out"), *silent]) == 0
        return json.loads((tmp_path / "out/evaluation.json").read_text()), capsys.readouterr().out

    return run


def test_a_checkpoint_is_evaluated_on_the_data_it_was_trained_on(evaluate, checkpoint, tmp_path):
    result, told = evaluate("--checkpoint", str(checkpoint))
    assert (result["num_hands"], result["split"], result["data"]) == (6, "test", "freihand")
    assert f"{result['without_reflection']['pa_mpjpe_mm']:.2f}" in told
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"confidence.png", "evaluation.json", "hands.png", "pck.png", "test_preds.json.gz"}
    confidence = result["confidence"]
    assert not confidence["is_calibrated"]
    assert "The expected errors are not calibrated" in told
    assert f"relative to the root: {confidence['mean_expected_mm']:.2f} mm on average" in told
    assert f"the mean error is {confidence['gain_without_least_confident']:.0%} lower" in told
    with Image.open(tmp_path / "out/hands.png") as picture:
        assert picture.width > 300


def test_its_predictions_score_the_same_when_they_are_read_from_the_file(evaluate, checkpoint, freihand, tmp_path):
    of_checkpoint, _ = evaluate("--checkpoint", str(checkpoint))
    predictions = (tmp_path / "out/test_preds.json.gz").rename(tmp_path / "preds.json.gz")
    of_file, _ = evaluate("--predictions", str(predictions), *DATA, f"data.root={freihand}")
    assert of_file["without_reflection"]["pa_mpjpe_mm"] == pytest.approx(
        of_checkpoint["without_reflection"]["pa_mpjpe_mm"], abs=1e-3
    )
    assert of_file["official"] == pytest.approx(of_checkpoint["official"], abs=1e-3)


@pytest.mark.parametrize(("split", "num"), [("val", 6), pytest.param("train", 18, marks=pytest.mark.slow)])
def test_other_splits_are_in_the_order_of_their_truth(evaluate, checkpoint, split, num, tmp_path):
    result, _ = evaluate("--checkpoint", str(checkpoint), "--split", split)
    assert result["num_hands"] == num
    assert len(read_course(tmp_path / f"out/{split}_preds.json.gz")) == num


def test_the_truth_itself_is_perfect(evaluate, freihand, tmp_path):
    write_official(tmp_path / "pred.zip", make_hands(6, seed=1))
    result, _ = evaluate("--predictions", str(tmp_path / "pred.zip"), *DATA, f"data.root={freihand}")
    assert result["without_reflection"]["pa_mpjpe_mm"] < 1e-3
    assert result["keypoint_error_px"] < 1e-3


@pytest.mark.parametrize("zeros", [slice(2, 3), slice(None)])
def test_hands_of_zeros_leave_valid_json(evaluate, freihand, tmp_path, zeros):
    predicted = make_hands(6, seed=1)
    predicted[zeros] = 0.0
    write_official(tmp_path / "pred.zip", predicted)
    result, told = evaluate("--predictions", str(tmp_path / "pred.zip"), *DATA, f"data.root={freihand}")
    text = (tmp_path / "out/evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == result
    assert result["without_reflection"]["pa_mpjpe_mm"] > 1.0
    assert "with a joint at depth 0 left out" in told


@pytest.mark.slow
def test_views_and_another_data_set_can_be_asked_for(evaluate, checkpoint, freihand):
    plainly, _ = evaluate("--checkpoint", str(checkpoint))
    views = ["test_time=rotations", "test_time.num_rotations=3"]
    turned, _ = evaluate("--checkpoint", str(checkpoint), *DATA[:1], f"data.root={freihand}", *views)
    assert turned["without_reflection"]["pa_mpjpe_mm"] != plainly["without_reflection"]["pa_mpjpe_mm"]


@pytest.fixture
def evaluate_refused(freihand, tmp_path, monkeypatch, capsys):
    """The one sentence that the program leaves with."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments, "trainer.accelerator=cpu", "paths.packed=packed", f"data.root={freihand}"])
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert told.splitlines()[-1].startswith("error: ")
        return told

    return run


def test_mistakes_are_one_sentence(evaluate_refused, checkpoint, tmp_path):
    write_official(tmp_path / "pred.zip", make_hands(5))
    assert "has 5 hands but the test split of freihand has 6" in evaluate_refused("--predictions", "pred.zip", *DATA)
    assert "there is no file nowhere.ckpt" in evaluate_refused("--checkpoint", "nowhere.ckpt")
    assert "nowhere.json.gz does not exist" in evaluate_refused("--predictions", "nowhere.json.gz", *DATA)
    assert "was trained with another network" in evaluate_refused(
        "--checkpoint", str(checkpoint), "model.decoder.depth=3"
    )
    assert "did you mean test_time.crop" in evaluate_refused("--checkpoint", str(checkpoint), "test_time.crp=0.5")


def test_a_split_without_joints_is_told(evaluate_refused, checkpoint, freihand, tmp_path):
    (freihand / "evaluation_xyz.json").rename(tmp_path / "away.json")
    try:
        assert "the test split of freihand has no joints" in evaluate_refused("--checkpoint", str(checkpoint))
    finally:
        (tmp_path / "away.json").rename(freihand / "evaluation_xyz.json")


def test_a_checkpoint_brings_its_views_and_its_data(checkpoint, freihand):
    from handpose.evaluation.trained_network import list_data_overrides, list_network_overrides
    from handpose.training.checkpoints import read_checkpoint

    config = read_checkpoint(checkpoint)["config"]
    again = compose("train", [*list_network_overrides(config), *list_data_overrides(config)])
    assert again.data.root == str(freihand)
    assert (again.data.image_size, again.data.source.val_fraction) == (64, 0.25)
    assert (again.model.encoder.name, again.model.decoder.depth) == ("test_efficientnet", 2)
    divided = compose("train", list_data_overrides({**config, "folds": {"num": 5, "index": 2}}))
    assert (divided.folds.num, divided.folds.index) == (5, 2)
    before = {key: value for key, value in config.items() if key != "folds"}  # as earlier versions wrote it
    assert compose("train", list_data_overrides(before)).folds.num == 1
