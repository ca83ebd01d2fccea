"""The file of events: whole lines, whatever happened to the process or the disk."""

import os
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handpose.errors import UserError
from handpose.sweep.events import (
    Asked,
    Begun,
    Closed,
    Ended,
    EventLog,
    Failed,
    Measured,
    Opened,
    Reported,
    Saved,
    SetAside,
    read_events,
)

CHECKPOINT = Saved("checkpoints/trial_0003/epoch_0002_stretch_1.ckpt", 2, 1000, 77)
EVENTS = [
    Opened(0.0, 12),
    Asked(0.5, 3, {"optimizer.lr": 1e-3, "model/decoder": "pyramid", "list": [1, 2], "none": None}),
    Begun(0.6, 3, 1, 0),
    Measured(0.7, 3, {"num_parameters": 1e6}, "continue"),
    Reported(1.0, 3, 2, {"val/pa_mpjpe_mm": 12.345678901234567}, "node\n\r\u2028", 0, CHECKPOINT, "pause"),
    Begun(2.0, 3, 2, 2, 0.5, 1, CHECKPOINT, {"optimizer.lr": 2e-3}),
    Failed(2.5, 3, "killed", "gone", "a\nlong\nstory", True, 1.0, "gpu17"),
    SetAside(2.6, "gpu17"),
    Ended(3.0, 3, "stopped"),
    Closed(4.0, "finished"),
]


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
        Opened,
        Asked,
        Begun,
        Measured,
        Reported,
        Failed,
        SetAside,
        Ended,
        Closed,
    }
    assert all(field.name != "event" for event in EVENTS for field in fields(event))


def test_values_that_are_no_numbers_come_back(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(Reported(1.0, 0, 1, {"val/a": float("nan"), "val/b": float("-inf")}, "", 0, None, "diverged"))
    log.close()
    (event,) = read_events(tmp_path / "events.jsonl")
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
    tail = data.draw(st.sampled_from([b"", b"\0" * 50, b"{", b'{"event": "ask', b"\n"]))
    # A line that lacks nothing but its end is made whole by a line end, and so is told.
    ends = [end - 1 if tail == b"\n" and cut == end - 1 else end for end in ends]
    os.truncate(file, cut)
    with file.open("ab") as stream:
        stream.write(tail)
    whole = sum(end <= cut for end in ends)
    log = EventLog(file)
    assert log.events == EVENTS[:whole]
    log.append(EVENTS[-1])
    log.close()
    assert read_events(file) == [*EVENTS[:whole], EVENTS[-1]]


def test_a_damaged_line_before_the_last_is_told_with_its_number(file):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b'{"event": "reported", "at"\n', *lines[4:]]))
    with pytest.raises(UserError, match=r"events\.jsonl: line 4 of 10 is damaged .* remove it and all after it"):
        EventLog(file)


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
