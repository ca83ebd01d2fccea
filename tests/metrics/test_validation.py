"""Which metrics a validation logs, and which direction of each is better."""

import pytest

from handpose.config import compose
from handpose.errors import UserError
from handpose.metrics.target import TargetMetric
from handpose.metrics.validation import direction, list_validation_metrics, target_metric
from handpose.training.build import build


def test_errors_are_minimised_and_the_area_under_pck_is_maximised():
    assert {name: direction(name) for name in list_validation_metrics()} == {
        "val/pa_mpjpe_mm": "min",
        "val/rr_mpjpe_mm": "min",
        "val/keypoint_error_px": "min",
        "val/pck_auc": "max",
    }


@pytest.mark.parametrize("mode", [None, "max"])
def test_the_mode_follows_the_metric(mode):
    target = target_metric("val/pck_auc", mode, group="sweep")
    assert target == TargetMetric("val/pck_auc", "max")
    assert target.loss(0.8) < target.loss(0.3)


@pytest.mark.parametrize("group", ["sweep", "checkpoints"])
@pytest.mark.parametrize(("metric", "mode"), [("val/pck_auc", "min"), ("val/rr_mpjpe_mm", "max")])
def test_a_mode_that_contradicts_the_metric_is_refused_with_both(metric, mode, group):
    with pytest.raises(UserError, match=rf"^{group}\.mode={mode} contradicts {group}\.metric={metric}, of which"):
        target_metric(metric, mode, group=group)


@pytest.mark.parametrize("name", ["val/loss", "train/loss", "val/pck", "latency_ms", ""])
def test_a_metric_that_no_validation_logs_is_refused_with_those_that_there_are(name):
    with pytest.raises(UserError) as refused:
        target_metric(name, None, group="sweep")
    assert f"sweep.metric={name} is not measured" in str(refused.value)
    assert all(known in str(refused.value) for known in list_validation_metrics())


def test_the_table_has_what_the_module_logs():
    config = compose("train", ["model.encoder.name=lcnet_035", "model.decoder.depth=1"])
    module, _ = build(config, pretrained=False, quiet=True)
    assert list(module.val_metrics) == list_validation_metrics()
