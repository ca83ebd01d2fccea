"""Runs of trials, read back by TensorBoard's own reader and by the backend of its HParams tab."""

import math

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from handpose.report.tensorboard import TrialLog

TRIALS = {
    "trial_0000": (
        {"optimizer.lr": 1e-3, "model.decoder.depth": 3, "model/decoder": "pyramid", "skips": None},
        [20.0, 15.5],
    ),
    "trial_0001": ({"optimizer.lr": 1e-4, "model/decoder": "effpose", "flag": True, "milestones": [1, 2]}, [19.0]),
    "trial_0002": (
        {"optimizer.lr": 1.0, "model.decoder.depth": 1, "model/decoder": "pyramid", "skips": "add"},
        [math.nan],
    ),
}


@pytest.fixture
def folder(tmp_path):
    for number, (name, (params, values)) in enumerate(TRIALS.items()):
        log = TrialLog(tmp_path / name, name=name, params=params, started_s=100.0 + number)
        for epoch, value in enumerate(values, start=1):
            log.report(epoch, {"val/pa_mpjpe_mm": value, "val/pck_auc": 0.5})
        log.close(failed=number == 2, ended_s=200.0)
    return tmp_path


def hparams_tab(folder):
    """What the HParams tab of a TensorBoard on this folder is served: the experiment and its session groups by name."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request, content = RequestContext(), ("exp", True)
    metadata = backend.hparams_metadata(request, content[0])
    experiment = backend.experiment_from_metadata(
        request, content[0], True, metadata, backend.hparams_from_data_provider(request, content[0], limit=100)
    )
    ask = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=100,
        include_metrics=True,
        col_params=[api_pb2.ColParams(metric=m.name) for m in experiment.metric_infos],
    )
    ask.allowed_statuses.extend(
        [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN]
    )
    answer = list_session_groups.Handler(request, backend, content[0], ask).run()
    return experiment, {group.name: group for group in answer.session_groups}


def test_hparams_tab_shows_every_trial_with_typed_values(folder):
    experiment, groups = hparams_tab(folder)
    assert set(groups) == set(TRIALS)
    types = {info.name: info.type for info in experiment.hparam_infos}
    assert types == {
        "optimizer.lr": api_pb2.DATA_TYPE_FLOAT64,
        "model.decoder.depth": api_pb2.DATA_TYPE_FLOAT64,
        "model/decoder": api_pb2.DATA_TYPE_STRING,
        "skips": api_pb2.DATA_TYPE_STRING,
        "flag": api_pb2.DATA_TYPE_BOOL,
        "milestones": api_pb2.DATA_TYPE_STRING,
    }
    for name, (params, _) in TRIALS.items():
        shown = {key: value for key, value in groups[name].hparams.items() if value.WhichOneof("kind")}
        assert set(shown) == {key for key, value in params.items() if value is not None}
    assert groups["trial_0000"].hparams["optimizer.lr"].number_value == 1e-3


def test_hparams_tab_shows_the_last_value_of_the_metric(folder):
    experiment, groups = hparams_tab(folder)
    assert {info.name.tag for info in experiment.metric_infos} == {"val/pa_mpjpe_mm", "val/pck_auc"}
    values = {
        name: next(value for value in group.metric_values if value.name.tag == "val/pa_mpjpe_mm")
        for name, group in groups.items()
    }
    assert (values["trial_0000"].value, values["trial_0000"].training_step) == (15.5, 2)
    assert values["trial_0001"].value == 19.0
    assert math.isnan(values["trial_0002"].value)


def test_a_failed_trial_is_marked_as_failed(folder):
    _, groups = hparams_tab(folder)
    status = {name: group.sessions[0].status for name, group in groups.items()}
    assert status["trial_0000"] == api_pb2.STATUS_SUCCESS
    assert status["trial_0002"] == api_pb2.STATUS_FAILURE


def test_a_running_trial_is_shown_before_its_first_report(tmp_path):
    TrialLog(tmp_path / "trial_0000", name="trial_0000", params={"optimizer.lr": 0.1}, started_s=1.0)
    assert hparams_tab(tmp_path)[1]["trial_0000"].sessions[0].status in (api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING)


def test_scalars_are_logged_by_epoch(folder):
    events = EventAccumulator(str(folder / "trial_0000")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/pa_mpjpe_mm")] == [(1, 20.0), (2, 15.5)]
