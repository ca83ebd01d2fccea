"""The file of events: whole lines, whatever happened to the process or the disk."""

import json
import os
import re
from dataclasses import asdict, fields, replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from handpose.errors import UserError
from handpose.report.trial_table import TrialTable
from handpose.schedulers.reason import Reason
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.analysis.status import render_status
from handpose.sweep.controller.history import History
from handpose.sweep.driver.run import read_finished_table
from handpose.sweep.record import events as module
from handpose.sweep.record.events import (
    EVENTS_FORMAT,
    CheckpointRecord,
    CostsMeasured,
    EpochReported,
    EventLog,
    NodeQuarantined,
    SegmentFailed,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialEnded,
    TrialSteered,
    TrialSuggested,
    get_kind,
    read_events,
)
from tests.sweep.objectives import METRIC
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.sweeps import make_asha, make_settings

CHECKPOINT = CheckpointRecord("checkpoints/trial_0003/epoch_0002_segment_1.ckpt", 2, 1000, 77)
RUNG = Reason("rung", value=12.345678901234567, cutoff=1 / 3, rank=2, num_compared=7, num_passing=3)
EVENTS = [
    SweepOpened(0.0, 12),
    TrialSuggested(0.5, 3, {"optimizer.lr": 1e-3, "model/decoder": "pyramid", "list": [1, 2], "none": None}, "a grid"),
    SegmentStarted(0.6, 3, 1, 0),
    CostsMeasured(0.7, 3, {"num_parameters": 1e6}, "continue", Reason("cost_limit", 2.0, 1.5, subject="latency_ms")),
    EpochReported(
        1.0, 3, 2, {"val/pa_mpjpe_mm": 12.345678901234567}, "node\n\r\u2028", 0, CHECKPOINT, "pause", "", RUNG
    ),
    SegmentStarted(2.0, 3, 2, 2, 0.5, 1, CHECKPOINT, {"optimizer.lr": 2e-3}, RUNG),
    SegmentFailed(2.5, 3, "killed", "gone", "a\nlong\nstory", True, 1.0, "gpu17", Reason("retries", 1, 2)),
    NodeQuarantined(2.6, "gpu17", [1, 3]),
    TrialEnded(3.0, 3, "stopped", "", Reason("not_promoted")),
    SweepClosed(4.0, "finished", Reason("sweep.gpu_hours", 2.5, 2.0)),
]

STEERED = [
    *EVENTS[:-1],
    TrialSteered(3.5, "00001766000000-0a1b2c3d", "keep", 3),
    SweepSteered(3.6, "00001766000001-0a1b2c3d", "add", {"num_trials": 13}, {"optimizer.lr": 2e-3}),
    SweepSteered(3.7, "00001766000002-0a1b2c3d", "budget", {"time_budget_s": None, "gpu_hours": 2.5}),
]
"""The events of a sweep in which the user has intervened."""


@pytest.fixture
def file(tmp_path):
    """Holds all kinds of events."""
    log = EventLog(tmp_path / "events.jsonl")
    for event in EVENTS:
        log.append(event)
    log.close()
    return tmp_path / "events.jsonl"


def test_events_are_read_as_they_were_written(file):
    assert read_events(file) == EVENTS
    assert {type(event) for event in EVENTS} == {
        SweepOpened,
        TrialSuggested,
        SegmentStarted,
        CostsMeasured,
        EpochReported,
        SegmentFailed,
        NodeQuarantined,
        TrialEnded,
        SweepClosed,
    }
    assert all(field.name != "event" for event in EVENTS for field in fields(event))


def test_interventions_are_read_as_they_were_written_and_earlier_formats_do_not_have_them(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for event in STEERED:
        log.append(event)
    log.close()
    assert read_events(path) == STEERED
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "added_by"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="line 2 of 12 is damaged: 'trial_suggested' lacks 'added_by'"):
        read_events(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in [lines[0] | {"version": 5}, *lines[1:]]))
    assert read_events(path)[1].added_by == ""


def test_events_of_format_3_are_read_under_their_new_names(tmp_path):
    names = {
        "sweep_opened": "opened",
        "trial_suggested": "asked",
        "segment_started": "begun",
        "costs_measured": "measured",
    }
    names |= {"epoch_reported": "reported", "segment_failed": "failed", "node_quarantined": "setaside"}
    names |= {"trial_ended": "ended", "sweep_closed": "closed"}
    kinds = {"user_error": "mistake", "unfit_worker": "worn"}
    events = [*EVENTS, *(SegmentFailed(5.0, 3, kind, "no", "no", False) for kind in kinds)]
    lines = []
    for event in events:
        values = {"event": names[get_kind(event)], **asdict(event)}
        values |= {"version": 3} if isinstance(event, SweepOpened) else {}
        values |= {"stretch": values.pop("segment")} if isinstance(event, SegmentStarted) else {}
        values |= {"kind": kinds.get(event.kind, event.kind)} if isinstance(event, SegmentFailed) else {}
        lines.append(json.dumps(values))
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(lines) + "\n")
    read = read_events(file)
    assert read == [replace(events[0], version=3), *events[1:]]
    log = EventLog(file)
    log.append(SweepOpened(6.0, 12))
    log.append(SegmentStarted(6.1, 3, 3, 2))
    log.close()
    assert read_events(file) == [*read, SweepOpened(6.0, 12), SegmentStarted(6.1, 3, 3, 2)]


def test_events_of_format_4_have_no_former_names(file):
    change_line(file, 2, event="asked")
    check_refused(file, "line 2 of 10 has an event 'asked', which is unknown")


def test_a_reason_is_written_without_the_fields_that_it_does_not_need(file):
    written = [json.loads(line).get("reason") for line in file.read_text().splitlines()]
    assert written[8] == {"rule": "not_promoted"}
    assert written[6] == {"rule": "retries", "value": 1, "cutoff": 2}
    assert written[4] == {name: value for name, value in asdict(RUNG).items() if value is not None}


def test_a_reason_that_lacks_its_rule_is_refused(file):
    change_line(file, 5, reason={"value": 1.0})
    check_refused(file, r"line 5 of 10 is damaged: 'reason' lacks 'rule'")


def test_events_of_format_4_have_no_reasons_and_no_origins(file):
    added = ("origin", "reason", "trials", "budget")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name not in added} for line in lines]
    lines[0]["version"], lines[-1]["reason"] = 4, "finished"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = read_events(file)
    assert [getattr(event, "reason", None) for event in events] == [None] * 9 + ["finished"]
    assert (events[1].origin, events[7].trials, events[9].budget) == ("", [], None)
    log = EventLog(file)
    log.append(SweepOpened(5.0, 12))
    log.append(TrialSuggested(5.1, 4, {}))
    log.close()
    change_line(file, 12, origin="LEFT OUT")
    check_refused(file, r"line 12 of 12 is damaged: 'trial_suggested' lacks 'origin'")


def test_values_that_are_no_numbers_come_back(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(TrialSuggested(0.5, 0, {}))
    log.append(EpochReported(1.0, 0, 1, {"val/a": float("nan"), "val/b": float("-inf")}, "", 0, None, "diverged"))
    log.close()
    _, event = read_events(tmp_path / "events.jsonl")
    assert repr(event.metrics) == "{'val/a': nan, 'val/b': -inf}"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_gives_the_events_before_and_can_be_gone_on_with(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("cut") / "events.jsonl"
    log = EventLog(file)
    ends = []
    for event in EVENTS:
        log.append(event)
        ends.append(file.stat().st_size)
    log.close()
    cut = data.draw(st.integers(0, ends[-1]))
    tail = data.draw(st.sampled_from([b"", b"\0" * 50, b"{", b'{"event": "ask']))
    os.truncate(file, cut)
    with file.open("ab") as stream:
        stream.write(tail)
    whole = sum(end <= cut for end in ends)
    log = EventLog(file)
    assert log.events == EVENTS[:whole]
    log.append(EVENTS[-1])
    log.close()
    assert read_events(file) == [*EVENTS[:whole], EVENTS[-1]]


def check_refused(file, match):
    """Every reader refuses the file with this sentence, leaves it as it is, and never advises to delete from it."""
    before = file.read_bytes()
    for read in (read_events, EventLog):
        with pytest.raises(UserError, match=match) as error:
            read(file)
        assert not re.search(r"remov|delet", str(error.value))
    assert file.read_bytes() == before


def change_line(file, number, **values):
    """Set fields of a line, counted from 1; a field that is None in `values` is left out."""
    lines = file.read_text().splitlines()
    line = json.loads(lines[number - 1]) | values
    lines[number - 1] = json.dumps({key: value for key, value in line.items() if value != "LEFT OUT"})
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("number", [4, 10])
@pytest.mark.parametrize("line", [b'{"event": "epoch_reported", "at"', b"", b"[1]", b'{"at": 1.0}', b"\xff"])
def test_a_damaged_whole_line_is_refused_with_its_number(file, number, line):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[: number - 1], line + b"\n", *lines[number:]]))
    check_refused(file, rf"events\.jsonl: line {number} of 10 is damaged: .*restore the file from a copy")


def test_a_torn_line_before_a_whole_one_is_refused(file):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[3][:20], *lines[4:]]))
    check_refused(file, r"line 4 of 9 is damaged")


@pytest.mark.parametrize("number", [5, 10])
def test_an_event_of_a_later_version_is_neither_cut_off_nor_called_damaged(file, number):
    change_line(file, number, event="teleported")
    sentence = (
        rf"line {number} of 10 has an event 'teleported', which is unknown: the file is of format "
        rf"{EVENTS_FORMAT}, and this version of the project reads formats up to {EVENTS_FORMAT}; if a later version "
        "wrote the line, use that version"
    )
    check_refused(file, sentence)


@pytest.mark.parametrize(("number", "field"), [(1, "nodes"), (5, "rung"), (10, "why")])
def test_a_field_of_a_later_version_is_named(file, number, field):
    change_line(file, number, **{field: 1})
    check_refused(file, rf"line {number} of 10 has a field '{field}' of '\w+', which is unknown: .*use that version")


def test_the_number_of_a_trial_is_a_number(file):
    """It is part of identifiers of the report."""
    change_line(file, 2, trial='3" onmouseover="alert(1)')
    check_refused(file, r"line 2 of 10 is damaged: 'trial' of 'trial_suggested' cannot be")


@pytest.mark.parametrize("name", ["../victim", "/home/me/victim", "checkpoints/../../victim"])
def test_a_checkpoint_outside_the_sweep_is_refused(file, name):
    """The sweep removes checkpoints that it no longer needs."""
    change_line(file, 5, checkpoint=asdict(CHECKPOINT) | {"file": name})
    check_refused(file, rf"line 5 of 10 is damaged: 'file' of 'checkpoint' cannot be '{re.escape(name)}'")


def test_a_later_format_is_refused_with_both_versions(file):
    change_line(file, 1, version=EVENTS_FORMAT + 1, surprise=True)
    check_refused(
        file,
        rf"line 1 of 10 starts events of format {EVENTS_FORMAT + 1}, but .* reads formats up to "
        rf"{EVENTS_FORMAT}: use the",
    )


def test_a_program_before_the_spent_budget_says_that_the_file_is_of_a_later_version(file, monkeypatch):
    change_line(file, 10, reason="spent")
    assert read_events(file)[-1] == replace(EVENTS[-1], reason="spent")
    monkeypatch.setattr(module, "EVENTS_FORMAT", 2)
    check_refused(file, r"line 1 of 10 starts events of format 7, but .* reads formats up to 2: use the later version")


def test_a_sweep_that_a_later_version_continued_is_refused_there(file):
    with file.open("a") as log:
        log.write(
            json.dumps({"event": "sweep_opened", "at": 9.0, "num_trials": 12, "version": EVENTS_FORMAT + 3}) + "\n"
        )
        log.write(json.dumps({"event": "teleported"}) + "\n")
    check_refused(file, rf"line 11 of 12 starts events of format {EVENTS_FORMAT + 3}")


def test_events_without_a_version_are_of_format_1(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, lacking in ((0, ("version", "gpus")), (4, ("note", "reason")), (6, ("gpus", "node", "reason"))):
        for key in lacking:
            del lines[line][key]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = read_events(file)
    assert events[0] == SweepOpened(0.0, 12, 0.0, version=1)
    assert (events[4].note, events[6].node) == ("", "")


@pytest.mark.parametrize(
    ("number", "field", "value"),
    [
        (number, field.name, value)
        for number, event in enumerate(EVENTS, start=1)
        for field in fields(event)
        for value in ("LEFT OUT", [1], {"file": "x"})
        if (field.name, value) not in (("params", {"file": "x"}), ("version", "LEFT OUT"), ("trials", [1]))
    ],
)
def test_a_field_that_is_missing_or_of_another_type_is_named(file, number, field, value):
    change_line(file, number, **{field: value})
    check_refused(file, rf"line {number} of 10 .*'{field}'|line {number} of 10 .* version of its format")


@pytest.mark.parametrize(
    ("number", "field", "value"),
    [
        (2, "trial", True),
        (5, "epoch", 1.5),
        (5, "metrics", {"val/a": "12"}),
        (5, "decision", "go"),
        (5, "at", float("nan")),
        (7, "retry", 1),
        (7, "kind", "sad"),
        (10, "reason", "tired"),
        (1, "version", 0),
    ],
)
def test_a_wrong_value_is_shown(file, number, field, value):
    change_line(file, number, **{field: value})
    check_refused(file, rf"line {number} of 10 .*{re.escape(repr(value))}")


@pytest.mark.parametrize("field", ["file", "epoch", "size_bytes", "checksum"])
def test_a_checkpoint_that_lacks_a_field_is_refused(file, field):
    checkpoint = asdict(CHECKPOINT)
    del checkpoint[field]
    change_line(file, 5, checkpoint=checkpoint)
    check_refused(file, rf"line 5 of 10 is damaged: 'checkpoint' lacks '{field}'")


def test_a_trial_that_is_asked_for_again_is_refused_and_not_reset(file):
    with file.open("a") as log:
        log.write(file.read_text().splitlines()[1] + "\n")
    check_refused(file, r"line 11 of 11 suggests trial 3 again")


def test_a_trial_that_nobody_asked_for_is_refused(file):
    change_line(file, 5, trial=7)
    check_refused(file, r"line 5 of 10 is about trial 7, which no line before it suggests")


def test_every_reader_of_a_sweep_refuses_the_same_file_in_the_same_sentence(tmp_path):
    """Resume and its finished sweep, status and report; a warm start reads the study alone."""
    settings = make_settings(tmp_path / "sweep")
    SimulatedSweep(settings, make_asha(4), lambda number, params, epoch: number + 1 / epoch).run()
    (settings.path / "sweep.yaml").write_text(
        yaml.safe_dump({"config": {"sweep": asdict(settings), "search_space": "x"}})
    )
    change_line(settings.path / "events.jsonl", 4, event="teleported")

    def history():
        return History(settings, scheduler=make_asha(4)(), table=TrialTable(METRIC, "min", 6, 4))

    readers = [
        lambda: read_sweep(settings.path),
        lambda: render_status(settings.path, width=80),
        lambda: read_finished_table(settings.path, history()),
        lambda: SimulatedSweep(settings, make_asha(4), None),
    ]
    for read in readers:
        with pytest.raises(UserError, match=r"events\.jsonl: line 4 of \d+ has an event 'teleported'"):
            read()


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_the_lines_before(file, monkeypatch):
    log = EventLog(file)
    before = file.read_bytes()
    pwrite = os.pwrite

    def half(descriptor, content, place):
        if len(content) < 20:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, content[: len(content) // 2], place)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(UserError, match="No space left on device"):
        log.append(EVENTS[0])
    monkeypatch.undo()
    assert file.read_bytes() == before
    log.append(EVENTS[0])
    log.close()
    assert read_events(file) == [*EVENTS, EVENTS[0]]
