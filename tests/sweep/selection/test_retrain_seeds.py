"""The winner retrained over several seeds: which seeds, how long, and whose predictions are written."""

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from handpose.errors import UserError
from handpose.evaluation.submission import (
    EXPECTED_ERRORS_FILE,
    read_course,
    write_course,
    write_expected_errors,
)
from handpose.files import read_json
from handpose.skeleton import ROOT
from handpose.sweep.analysis.read_sweep import read_combined_seeds
from handpose.sweep.record.settings import RetrainSettings
from handpose.sweep.selection import retrain_seeds as module
from handpose.sweep.selection.retrain_seeds import list_seeds, retrain_over_seeds, summarise_metrics
from handpose.training.checkpoints import BestAndLastCheckpoint
from handpose.yaml_files import write_yaml

HANDS_M = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 21, 3)) + np.array([0.0, 0.0, 0.6])
SHIFTS_M = (0.0, 0.003, 0.009)
"""By how much the predictions of each seed are shifted in depth, except the root."""
OTHERS = [joint for joint in range(21) if joint != ROOT]
ROUNDING_M = 1e-7
"""Precision of a file of predictions."""
VIEWS = {"mirror": True, "rotations": 1}
VALIDATION_MM = (12.0, 10.0, 11.0)


def shift(number):
    shifted_m = HANDS_M.copy()
    shifted_m[:, OTHERS, 2] += SHIFTS_M[number]
    return shifted_m


@pytest.fixture
def folder(tmp_path):
    write_yaml(tmp_path / "best.yaml", {"overrides": ["seed=5"]})
    return tmp_path


@pytest.fixture(params=[True])
def retrained(monkeypatch, request):
    """Stands in for the retraining and for the test; keeps the calls."""
    calls, has_errors = SimpleNamespace(seeds=[], ends=[], written=[]), request.param

    def retrain(folder, *, seed, find_end):
        number = 0 if seed is None else seed - 5
        place = folder / "retrain" if seed is None else folder / "retrain" / f"seed_{seed}"
        checkpoint = place / "checkpoints" / "best-epoch003-pa_mpjpe_mm.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"best": str(checkpoint), "best_value": VALIDATION_MM[number]}
        parts = {"config": {}, "state_dict": {}, "epoch": 2, "callbacks": {BestAndLastCheckpoint.__qualname__: state}}
        torch.save(parts, checkpoint)
        metrics = {"test/pa_mpjpe_mm": 10.0 + number**2, "test/nan": math.nan, "baseline/pa_mpjpe_mm": 20.0}
        write_course(place / "test_preds.json.gz", shift(number))
        if has_errors:
            write_expected_errors(place / EXPECTED_ERRORS_FILE, np.full((2, 21), 0.001 * number))
        (place / "metrics.json").write_text(
            json.dumps({"checkpoint": str(checkpoint), "test_time": VIEWS, "metrics": {**metrics, "test/nan": None}})
        )
        calls.seeds.append(seed)
        calls.ends.append(None if find_end is None else find_end(0))
        return metrics

    def write_test_results(config, checkpoint, place, predicted, about):
        assert config.seed == 5
        calls.written.append((checkpoint, *predicted))
        content = {**about, "metrics": {"test/pa_mpjpe_mm": 9.0}}
        (place / "metrics.json").write_text(json.dumps(content))

    monkeypatch.setattr(module, "write_test_results", write_test_results)
    monkeypatch.setattr("handpose.training.checkpoints.list_architecture_overrides", lambda config: {})
    calls.run = retrain
    return calls


def run(folder, retrained, **settings):
    given = RetrainSettings(**{"use_val": False, "seeds": 3, "predict": "ensemble", **settings})
    return retrain_over_seeds(folder, given, lambda **options: retrained.run(folder, **options))


def test_the_seeds_follow_that_of_the_winner(folder, retrained):
    metrics = run(folder, retrained)
    assert retrained.seeds == [None, 6, 7]
    assert metrics["test/pa_mpjpe_mm"] == 10.0
    write_yaml(folder / "best.yaml", {"overrides": [f"seed={2**32 - 1}"]})
    assert list_seeds(folder, 2) == [2**32 - 1, 0]


def test_the_ensemble_is_the_mean_of_the_root_relative_joints(folder, retrained):
    run(folder, retrained)
    ((_, predicted_m, error_m),) = retrained.written
    assert error_m[:, ROOT] == pytest.approx(np.sqrt((0.001**2 + 0.002**2) / 3))
    expected = HANDS_M.copy()
    expected[:, OTHERS, 2] += np.mean(SHIFTS_M)
    assert predicted_m == pytest.approx(expected, abs=ROUNDING_M)


@pytest.mark.parametrize("retrained", [False], indirect=True)
def test_retrainings_of_earlier_versions_have_no_expected_errors(folder, retrained):
    run(folder, retrained)
    assert np.isnan(retrained.written[0][2]).all()


@pytest.mark.parametrize(("predict", "number"), [("first", 0), ("best", 1)])
def test_or_the_predictions_of_one_network_are_written(folder, retrained, predict, number):
    run(folder, retrained, predict=predict)
    ((checkpoint, predicted_m, _),) = retrained.written
    assert predicted_m == pytest.approx(shift(number), abs=ROUNDING_M)
    assert checkpoint.parent.parent.name == ("retrain" if number == 0 else f"seed_{5 + number}")
    combined = read_combined_seeds(folder / "retrain")
    assert combined.predicted_by == [5 + number]
    assert read_json(folder / "retrain/combined/metrics.json")["test_time"] == VIEWS


def test_the_metrics_are_means_with_their_standard_deviation(folder, retrained):
    run(folder, retrained)
    combined = read_combined_seeds(folder / "retrain")
    values = [10.0, 11.0, 14.0]
    assert combined.mean["test/pa_mpjpe_mm"] == pytest.approx(np.mean(values))
    assert combined.deviation["test/pa_mpjpe_mm"] == pytest.approx(np.std(values, ddof=1))
    assert math.isnan(combined.mean["test/nan"])
    assert combined.metrics == {"test/pa_mpjpe_mm": 9.0}
    assert "baseline/pa_mpjpe_mm" not in combined.mean


def test_what_is_combined_is_not_combined_again_unless_it_changes(folder, retrained):
    run(folder, retrained)
    keep = lambda **options: {}  # noqa: E731
    retrain_over_seeds(folder, RetrainSettings(use_val=False, seeds=3, predict="ensemble"), keep)
    assert len(retrained.written) == 1
    run(folder, retrained, predict="first")
    run(folder, retrained, seeds=2, predict="first")
    assert len(retrained.written) == 3


def test_with_one_seed_again_nothing_is_combined(folder, retrained):
    run(folder, retrained)
    run(folder, retrained, seeds=1)
    assert read_combined_seeds(folder / "retrain") is None
    assert read_course(folder / "retrain" / "test_preds.json.gz") == pytest.approx(HANDS_M, abs=ROUNDING_M)


def test_each_seed_has_an_even_part_of_the_time_that_is_left(folder, retrained):
    began = time.time()
    given = RetrainSettings(use_val=False, seeds=3, predict="first")
    retrain_over_seeds(
        folder, given, lambda **options: retrained.run(folder, **options), find_end=lambda num_gpus: began + 300.0
    )
    assert np.array(retrained.ends) - began == pytest.approx([100.0, 150.0, 300.0], abs=3.0)


def test_without_a_limit_no_seed_has_one(folder, retrained):
    given = RetrainSettings(use_val=False, seeds=2, predict="first")
    retrain_over_seeds(
        folder, given, lambda **options: retrained.run(folder, **options), find_end=lambda num_gpus: math.inf
    )
    assert retrained.ends == [math.inf, math.inf]


def test_a_metric_that_one_seed_lacks_has_no_mean():
    found = summarise_metrics([{"test/a": 1.0, "test/b": 2.0}, {"test/a": 3.0}])
    assert found["mean"] == {"test/a": 2.0, "test/b": None}


@pytest.mark.parametrize(
    ("changes", "saves", "message"),
    [
        ({"predict": "best", "use_val": True}, True, r"retrain\.predict=best .* retrain\.predict=ensemble"),
        ({}, False, r"retrain\.seeds=3 needs checkpoints"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes, saves, message):
    settings = RetrainSettings(**{"use_val": False, "seeds": 3, "predict": "ensemble", **changes})
    with pytest.raises(UserError, match=message):
        settings.check(saves_checkpoints=saves)
    RetrainSettings(**{**vars(settings), "seeds": 1}).check(saves_checkpoints=saves)


def test_files_that_are_damaged_are_named(folder, retrained):
    run(folder, retrained)
    file = folder / "retrain" / "combined" / "metrics.json"
    content = read_json(file)
    del content["mean"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"combined/metrics\.json"):
        read_combined_seeds(folder / "retrain")


def test_of_2_d_keypoints_only_the_metrics_are_combined(folder, retrained):
    def retrain(**options):
        metrics = retrained.run(folder, **options)
        place = "retrain" if options["seed"] is None else f"retrain/seed_{options['seed']}"
        (folder / place / "test_preds.json.gz").unlink()
        return metrics

    retrain_over_seeds(folder, RetrainSettings(use_val=False, seeds=2, predict="ensemble"), retrain)
    assert retrained.written == []
    combined = read_combined_seeds(folder / "retrain")
    assert combined.mean["test/pa_mpjpe_mm"] == pytest.approx(10.5)
    assert combined.metrics == {}
