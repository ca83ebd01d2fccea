"""Trials and their GPUs."""

import pytest
import torch

from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.trainable import trial
from handpose.sweep.trainable.gpu_memory import GpuNotVisibleError, check_gpu_is_visible
from handpose.sweep.trainable.trial import TrainingFunction, TrialRecipe
from handpose.sweep.trainable.trial_cost import MIN_STEPS, DataSize, TrialCostProbe


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_trial_that_holds_a_gpu_which_its_node_does_not_show_fails(no_gpu):
    with pytest.raises(GpuNotVisibleError, match=r"holds 0\.5 GPUs \(sweep\.gpus_per_trial\), but torch finds none"):
        check_gpu_is_visible("auto", 0.5)
    check_gpu_is_visible("auto", 0.0)
    check_gpu_is_visible("cpu", 1.0)


@pytest.mark.filterwarnings("ignore:.*is meant to only be called inside a function that is executed by a Tuner")
def test_a_trial_with_a_gpu_does_not_train_on_cores_in_silence(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "_get_trial_gpus", lambda: 1.0)
    monkeypatch.setattr(trial, "fit", lambda *given, **more: pytest.fail("it trains on cores"))
    function = TrainingFunction(TrialRecipe([], [], max_epochs=1, num_threads=1), "val/pa_mpjpe_mm", None)
    with pytest.raises(GpuNotVisibleError):
        function(TrialSegment(0, 1, {}, 0, [], str(tmp_path), None))


def test_the_preflight_finds_a_gpu_that_is_not_there(no_gpu):
    found = TrialCostProbe().measure_cost([], {}, DataSize(64, 10, 10), num_steps=MIN_STEPS, weights=False, gpus=1.0)
    assert found.kind == "error"
    assert "torch finds none" in found.reason
