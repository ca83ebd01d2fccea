"""Runs of trials, read back by TensorBoard's own reader and from the HTTP endpoint of its HParams tab."""

import io
import json
import math
import warnings

import numpy as np
import pytest
import simplejpeg
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2
from werkzeug.test import Client

from handpose.report.sweep_record import StoryLine
from handpose.report.tensorboard import ABSENT, NOT_OVER, STATE, HParamsSchema, TensorBoardSweepLog
from handpose.report.trial_table import TrialRow
from handpose.report.utilisation import PHASES, Utilisation

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of the html5lib that TensorBoard brings
    from tensorboard.backend.application import TensorBoardWSGI
    from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin

METRIC = "val/pa_mpjpe_mm"

TRIALS = {
    0: ({"optimizer.lr": 1e-3, "model.decoder.depth": 3, "model/decoder": "pyramid", "skips": None}, [20.0, 15.5]),
    1: ({"optimizer.lr": 1e-4, "model/decoder": "effpose", "flag": True, "milestones": [1, 2]}, [19.0]),
    2: ({"optimizer.lr": 1.0, "model.decoder.depth": 1, "model/decoder": "pyramid", "skips": "add"}, [math.nan]),
    3: ({"optimizer.lr": 0.1 + 0.2, "model.decoder.depth": 2, "model/decoder": "pyramid", "skips": "add"}, []),
}
STATES = {0: "complete", 1: "stopped", 2: "diverged", 3: "failed"}


def make_run_name(number):
    return f"trial_{number:04d}"


def write(folder, rows=(), trials=TRIALS, *, states=STATES):
    """The runs of these trials, one after another."""
    log = TensorBoardSweepLog(folder, run_name=make_run_name, rows=rows)
    for number, (params, values) in trials.items():
        row = TrialRow(number, params)
        log.open_run(row)
        for row.epochs, value in enumerate(values, start=1):
            row.metrics = {METRIC: value, "val/pck_auc": 0.5}
            row.seconds = 10.0 * row.epochs
            log.log_epoch(row, {})
        if number in states:
            row.state = states[number]
            log.close_run(row, ended_s=200.0)
    log.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tensorboard")
    write(made)
    return made


def hparams_tab(folder):
    """What the HParams tab of a TensorBoard on this folder asks for and is sent: experiment, and run name -> group."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    plugin = HParamsPlugin(base_plugin.TBContext(data_provider=provider))
    client = Client(TensorBoardWSGI([plugin], data_provider=provider))

    def asked(route, request, kind):
        answer = client.post(f"/data/plugin/hparams/{route}", data=json.dumps(request))
        assert answer.status_code == 200, answer.text
        return json_format.Parse(answer.text, kind())

    experiment = asked("experiment", {"experimentName": "", "hparamsLimit": 1000}, api_pb2.Experiment)
    columns = [{"hparam": info.name, "includeInResult": True} for info in experiment.hparam_infos]
    columns += [{"metric": {"tag": info.name.tag}, "includeInResult": True} for info in experiment.metric_infos]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    request = {"colParams": columns, "allowedStatuses": statuses, "startIndex": 0, "sliceSize": 1000}
    answer = asked("session_groups", request, api_pb2.ListSessionGroupsResponse)
    return experiment, {group.name: group for group in answer.session_groups}


def get_values(group):
    """Column -> value of a row of the tab."""
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in group.hparams.items()}


def test_every_trial_has_a_value_in_every_column_of_the_tab(folder):
    """Else TensorBoard leaves it out of the parallel coordinates view, and of the table once a filter is set."""
    experiment, groups = hparams_tab(folder)
    assert set(groups) == {make_run_name(number) for number in TRIALS}
    assert {info.name: info.type for info in experiment.hparam_infos} == {
        STATE: api_pb2.DATA_TYPE_STRING,
        "optimizer.lr": api_pb2.DATA_TYPE_FLOAT64,
        "model.decoder.depth": api_pb2.DATA_TYPE_STRING,  # trial 1 has none
        "model/decoder": api_pb2.DATA_TYPE_STRING,
        "skips": api_pb2.DATA_TYPE_STRING,
        "flag": api_pb2.DATA_TYPE_STRING,
        "milestones": api_pb2.DATA_TYPE_STRING,
    }
    assert get_values(groups["trial_0000"]) == {
        STATE: "complete",
        "optimizer.lr": 1e-3,
        "model.decoder.depth": "3",
        "model/decoder": "pyramid",
        "skips": "null",
        "flag": ABSENT,
        "milestones": ABSENT,
    }
    assert get_values(groups["trial_0001"])["model.decoder.depth"] == ABSENT
    assert get_values(groups["trial_0001"])["milestones"] == "[1, 2]"
    assert get_values(groups["trial_0003"])["optimizer.lr"] == 0.1 + 0.2
    for info in experiment.hparam_infos:
        fields = {group.hparams[info.name].WhichOneof("kind") for group in groups.values()}
        assert fields == {"number_value" if info.type == api_pb2.DATA_TYPE_FLOAT64 else "string_value"}


def test_the_tab_finds_trials_by_every_value_that_it_offers(folder):
    """The boxes that a user ticks are made of the columns' values; a word among numbers would not be found."""
    experiment, groups = hparams_tab(folder)
    for info in experiment.hparam_infos:
        if info.type == api_pb2.DATA_TYPE_STRING:
            offered = {value.string_value for value in info.domain_discrete.values}
            assert offered == {get_values(group)[info.name] for group in groups.values()}


def get_metric_values(group):
    return {value.name.tag: (value.training_step, value.value) for value in group.metric_values}


def test_the_tab_shows_the_metrics_of_the_last_epoch(folder):
    experiment, groups = hparams_tab(folder)
    tags = [info.name.tag for info in experiment.metric_infos]
    assert set(tags) == {METRIC, "val/pck_auc", "work/epochs", "work/seconds"}
    assert METRIC in tags[:5]  # more are not shown unless they are asked for
    values = {name: get_metric_values(group) for name, group in groups.items()}
    assert values["trial_0000"][METRIC] == (2, 15.5)
    assert values["trial_0001"][METRIC] == (1, 19.0)
    assert math.isnan(values["trial_0002"][METRIC][1])
    assert values["trial_0003"] == {"work/epochs": (0, 0.0), "work/seconds": (0, 0.0)}
    assert {name: value["work/epochs"][1] for name, value in values.items()} == {
        "trial_0000": 2.0,
        "trial_0001": 1.0,
        "trial_0002": 1.0,
        "trial_0003": 0.0,
    }


def test_diverged_and_failed_trials_say_so_twice(folder):
    _, groups = hparams_tab(folder)
    assert {name: get_values(group)[STATE] for name, group in groups.items()} == {
        make_run_name(number): state for number, state in STATES.items()
    }
    failed = {name for name, group in groups.items() if group.sessions[0].status == api_pb2.STATUS_FAILURE}
    assert failed == {"trial_0002", "trial_0003"}


def test_a_running_trial_is_shown_before_its_first_report(tmp_path):
    write(tmp_path, trials={0: ({"optimizer.lr": 0.1}, [])}, states={})
    group = hparams_tab(tmp_path)[1]["trial_0000"]
    assert get_values(group) == {STATE: NOT_OVER, "optimizer.lr": 0.1}
    assert group.sessions[0].status in (api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING)


def test_a_column_that_is_numbers_stays_numbers_where_every_trial_has_it(tmp_path):
    write(tmp_path, trials={0: ({"depth": 2, "flag": True}, []), 1: ({"depth": 3, "flag": False}, [])})
    types = {info.name: info.type for info in hparams_tab(tmp_path)[0].hparam_infos}
    assert types["depth"] == api_pb2.DATA_TYPE_FLOAT64
    assert types["flag"] == api_pb2.DATA_TYPE_BOOL


def test_a_process_that_goes_on_adds_to_the_runs(tmp_path):
    first = {0: TRIALS[0]}
    write(tmp_path, trials=first, states={})
    before = TrialRow(0, TRIALS[0][0], "waiting", 2, {METRIC: 15.5}, 20.0)
    log = TensorBoardSweepLog(tmp_path, run_name=make_run_name, rows=[before])
    log.open_run(before)
    before.epochs, before.metrics, before.state = 3, {METRIC: 14.0}, "complete"
    log.log_epoch(before, {})
    log.close_run(before, ended_s=9.0)
    write(tmp_path, rows=[before], trials={1: TRIALS[1]})
    groups = hparams_tab(tmp_path)[1]
    assert get_metric_values(groups["trial_0000"])[METRIC] == (3, 14.0)
    assert get_values(groups["trial_0000"])[STATE] == "complete"
    assert get_values(groups["trial_0000"])["flag"] == ABSENT
    events = EventAccumulator(str(tmp_path / "trial_0000")).Reload().Scalars(METRIC)
    assert [(event.step, event.value) for event in events] == [(1, 20.0), (2, 15.5), (3, 14.0)]


def test_the_story_of_a_trial_is_a_text(tmp_path):
    log = TensorBoardSweepLog(tmp_path, run_name=make_run_name)
    row = TrialRow(0, {"optimizer.lr": 0.1}, "paused", 1)
    log.open_run(row)
    log.close_run(row, ended_s=9.0, story=[StoryLine(5.0, "paused")])
    row.state, row.epochs = "stopped", 3
    log.open_run(row)
    log.close_run(row, ended_s=9.0, story=[StoryLine(5.0, "paused"), StoryLine(65.0, "stopped")])
    log.close()
    events = EventAccumulator(str(tmp_path / "trial_0000")).Reload().Tensors("story/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events}
    assert texts == {1: "- 0:05 paused", 3: "- 0:05 paused\n- 1:05 stopped"}


def test_two_sweeps_under_one_folder_keep_their_trials_apart(tmp_path):
    for name, value in (("one", 1.0), ("two", 3.0)):
        write(tmp_path / name / "tensorboard", trials={0: ({"optimizer.lr": 0.1}, [value])})
    values = {name: get_metric_values(group)[METRIC] for name, group in hparams_tab(tmp_path)[1].items()}
    assert values == {"one/tensorboard/trial_0000": (1, 1.0), "two/tensorboard/trial_0000": (1, 3.0)}


def test_costs_and_pictures_are_in_the_trials_run(tmp_path):
    picture = np.tile(np.arange(32, dtype=np.uint8)[:, None, None], (1, 48, 3))
    file = tmp_path / "picture.jpg"
    file.write_bytes(simplejpeg.encode_jpeg(picture))
    row = TrialRow(0, {"a": 1}, epochs=4, metrics={METRIC: 1.0})
    log = TensorBoardSweepLog(tmp_path / "log", run_name=make_run_name)
    log.open_run(row)
    log.log_costs(row, {"latency_ms": 2.5})
    log.log_epoch(row, {"keypoints": file})
    log.close()
    events = EventAccumulator(str(tmp_path / "log" / "trial_0000")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("work/latency_ms")] == [(0, 2.5)]
    (image,) = events.Images("val_pictures/keypoints")
    assert (image.step, image.width, image.height) == (4, 48, 32)
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (48, 32)


def test_the_utilisation_of_a_trial_is_in_its_run_by_epoch_and_after_the_metrics_in_the_tab(tmp_path):
    row = TrialRow(0, {"a": 1})
    log = TensorBoardSweepLog(tmp_path, run_name=make_run_name)
    log.open_run(row)
    for row.epochs in (1, 2):
        row.metrics = {METRIC: 3.0}
        seconds = dict.fromkeys(PHASES, 0.0) | {"data": 1.0, "training": 4.0 - row.epochs}
        log.log_utilisation(row, Utilisation(seconds, cpu_percent=90.0 + row.epochs))
        log.log_epoch(row, {})
    log.close()
    events = EventAccumulator(str(tmp_path / "trial_0000")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("worker/cpu_percent")] == [(1, 91.0), (2, 92.0)]
    assert [event.value for event in events.Scalars("worker/data_percent")] == pytest.approx([25.0, 100 / 3])
    assert sorted(events.Tags()["scalars"])[0] == METRIC  # the tab shows the first ones by name


PARAMS = st.dictionaries(
    st.sampled_from(["a", "b.c", "d/e"]),
    st.sampled_from([None, True, False, 0, 1, 3, 0.1, math.inf, math.nan, "", "add", "3", [1, 2]]),
)


@settings(max_examples=60)
@given(st.lists(PARAMS, max_size=5))
def test_after_the_last_announced_change_no_trials_row_differs_from_what_was_written(trials):
    """What is written when a trial begins, or for all when the schema says so, is what it would be at the end."""
    schema, written = HParamsSchema(), []
    for number, params in enumerate(trials):
        if schema.add(params):
            written = [schema.to_column_values(before) for before in trials[:number]]
        written.append(schema.to_column_values(params))
    assert repr(written) == repr([schema.to_column_values(params) for params in trials])
    for key in {key for params in trials for key in params}:
        assert len({type(row[key]) in (int, float) for row in written}) == 1
        assert None not in {row[key] for row in written}
        assert len({isinstance(row[key], str) for row in written}) == 1


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 1.0, True], ["1", "1.0", "true"]),
        ([0, False], ["0", "false"]),
        ([0.0, -0.0], ["0.0", "-0.0"]),
        ([None, "null"], ["null", "'null'"]),
        ([1, 2.5], [1, 2.5]),
    ],
)
def test_values_that_differ_are_shown_as_different(values, shown):
    schema = HParamsSchema()
    for value in values:
        schema.add({"key": value})
    assert [schema.to_column_values({"key": value})["key"] for value in values] == shown
