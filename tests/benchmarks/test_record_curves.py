"""Which trainings are recorded."""

import importlib

import pytest

curves = importlib.import_module("benchmarks.record_curves")


@pytest.mark.parametrize("name", curves.RECORDINGS)
def test_the_default_configuration_is_first_and_more_configurations_only_add_to_the_list(name):
    recording = curves.RECORDINGS[name]
    few, more = (curves.list_trainings(recording.space, recording.overrides, num) for num in (4, 8))
    assert few[0].params["heatmap.sigma"] == 0.04
    assert few[0].params["optimizer.lr"] == 0.005
    assert [training for training in more if training.number < 4] == few
    assert [training.seed for training in few[:3]] == [0, 1, 2]
    assert len({str(training.params) for training in more}) == 8
