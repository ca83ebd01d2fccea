"""Which metrics a validation logs, and which direction of each is better."""

import numpy as np
import pytest

from handpose import config_files
from handpose.config import compose
from handpose.errors import UserError
from handpose.evaluation.predict import compute_errors
from handpose.metrics.target import TargetMetric
from handpose.metrics.validation import get_direction, list_validation_metrics, make_metrics, make_target_metric
from handpose.training.build import build_training


def test_errors_are_minimised_and_the_area_under_pck_is_maximised():
    assert {name: get_direction(name) for name in list_validation_metrics()} == {
        "val/pa_mpjpe_mm": "min",
        "val/rr_mpjpe_mm": "min",
        "val/keypoint_error_px": "min",
        "val/pck_auc": "max",
    }


@pytest.mark.parametrize("mode", [None, "max"])
def test_the_mode_follows_the_metric(mode):
    target = make_target_metric("val/pck_auc", mode, group="sweep")
    assert target == TargetMetric("val/pck_auc", "max")
    assert target.to_loss(0.8) < target.to_loss(0.3)


@pytest.mark.parametrize("group", ["sweep", "checkpoints"])
@pytest.mark.parametrize(("metric", "mode"), [("val/pck_auc", "min"), ("val/rr_mpjpe_mm", "max")])
def test_a_mode_that_contradicts_the_metric_is_refused_with_both(metric, mode, group):
    with pytest.raises(
        UserError,
        match=rf"^{group}\.mode={mode} contradicts {group}\.metric={metric}, whose (larger|smaller) values are better",
    ):
        make_target_metric(metric, mode, group=group)


@pytest.mark.parametrize("name", ["val/loss", "train/loss", "val/pck", "latency_ms", ""])
def test_a_metric_that_no_validation_logs_is_refused_with_those_that_there_are(name):
    with pytest.raises(UserError) as refused:
        make_target_metric(name, None, group="sweep")
    assert f"sweep.metric={name} is not measured" in str(refused.value)
    assert all(known in str(refused.value) for known in list_validation_metrics())


def test_the_table_has_what_the_module_logs():
    config = compose("train", ["model.encoder.name=test_efficientnet", "model.decoder.depth=1"])
    module, _ = build_training(config, pretrained=False, quiet=True)
    assert list(module.val_metrics) == list_validation_metrics()


@pytest.fixture
def write_metric(tmp_path, monkeypatch):
    """Adds a metric of a user."""
    (tmp_path / "configs" / "metrics").mkdir(parents=True)
    monkeypatch.setattr(config_files, "_extensions", tmp_path)

    def write(text):
        (tmp_path / "configs" / "metrics" / "users_deg.yaml").write_text(text)

    return write


def test_a_metric_of_a_user_is_measured_and_optimised(write_metric):
    write_metric("_target_: handpose.metrics.pck.PckAuc\nmax_mm: 30.0\n")
    assert make_target_metric("val/users_deg", None, group="sweep") == TargetMetric("val/users_deg", "max")
    assert make_metrics(prefix="val/")["val/users_deg"].max_mm == 30.0
    truth = 0.05 * np.random.default_rng(0).normal(size=(3, 21, 3)) + (0.0, 0.0, 0.7)
    assert compute_errors(truth, truth, np.eye(3)[None].repeat(3, 0))["users_deg"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("_target_: handpose.metrics.no_such.Metric", "there is no handpose.metrics.no_such.Metric"),
        ("_target_: torchmetrics.Metric", r"must be a torchmetrics\.Metric whose higher_is_better is True or False"),
        ("_target_: torchmetrics.MeanSquaredError", "asks for preds, target, but there are predicted_m"),
        ("_target_: handpose.metrics.pck.PckAuc\nmost: 1", "unexpected keyword|Unexpected keyword"),
        ("max_mm: 1", "must name the class of a metric as _target_"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_metric_that_cannot_be_made_is_one_sentence_with_its_file(write_metric, text, sentence):
    write_metric(text)
    with pytest.raises(UserError, match=rf"users_deg\.yaml.*({sentence})") as refused:
        make_metrics()
    assert "\n" not in str(refused.value)
