"""The files of commands to a running sweep: who may write them, what they may hold, and their answers."""

import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handpose.errors import UserError
from handpose.sweep.record import interventions
from handpose.sweep.record.events import SpaceRecord
from handpose.sweep.record.interventions import (
    InterventionAnswer,
    InterventionFiles,
    describe_intervention,
    make_intervention,
)

EACH = [
    ("stop 3", make_intervention("stop", trial=3)),
    ("retry 0", make_intervention("retry", trial=0)),
    ("keep 3", make_intervention("keep", trial=3)),
    ("add 'model.decoder.depth=4 optimizer.lr=0.003'", {"model.decoder.depth": 4, "optimizer.lr": 3e-3}),
    ("trials 12", make_intervention("trials", limits={"num_trials": 12})),
    ("space near.yaml", make_intervention("space", space=SpaceRecord("near.yaml", "a: interval(0, 1)\n"))),
    ("slots 2", make_intervention("slots", limits={"max_concurrent": 2})),
    ("pause", make_intervention("pause")),
    ("resume", make_intervention("resume")),
    (
        "budget time_budget_s=3600.0 stop_when=null",
        make_intervention("budget", limits={"time_budget_s": 3600.0, "stop_when": None}),
    ),
]
EACH[3] = (EACH[3][0], make_intervention("add", params=EACH[3][1]))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "sweep").mkdir(mode=0o700)
    return InterventionFiles(tmp_path / "sweep")


@pytest.mark.parametrize(("text", "command"), EACH, ids=[text for text, _ in EACH])
def test_a_command_is_read_as_it_was_written(files, text, command):
    files.write(command)
    assert files.read(command.id) == command
    assert describe_intervention(command) == text


def test_commands_are_listed_in_the_order_of_their_times(files, monkeypatch):
    given_ids = []
    for seconds in (5.0, 7.0, 6.0):
        monkeypatch.setattr(interventions.time, "time", lambda now=seconds: now)
        command = make_intervention("pause")
        files.write(command)
        given_ids.append(command.id)
    assert files.list_ids() == [given_ids[0], given_ids[2], given_ids[1]]


def test_the_folder_has_the_permissions_of_the_sweep_and_only_the_owner_reads_a_command(files, tmp_path):
    (tmp_path / "sweep").chmod(0o750)
    file = files.write(make_intervention("pause"))
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o750
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_change_is_not_read(files, mode):
    command = make_intervention("pause")
    files.write(command).chmod(mode)
    with pytest.raises(PermissionError, match="other users can change"):
        files.read(command.id)


def test_a_file_of_another_user_is_not_read(files, monkeypatch):
    command = make_intervention("pause")
    file = files.write(command)
    own = os.fstat

    def fstat_of_another_user(descriptor):
        found = list(own(descriptor))
        found[4] = 4711
        return os.stat_result(found)

    monkeypatch.setattr(interventions.os, "fstat", fstat_of_another_user)
    with pytest.raises(PermissionError, match=f"{file} belongs to another user"):
        files.read(command.id)


def test_a_link_and_a_folder_are_not_read(files):
    command, other = make_intervention("pause"), make_intervention("resume")
    file = files.write(command)
    content = file.rename(file.with_name("elsewhere"))
    file.symlink_to(content)
    with pytest.raises(OSError, match="symbolic"):
        files.read(command.id)
    (file.parent / f"{other.id}.json").mkdir()
    with pytest.raises(OSError, match=r"not a file|directory"):
        files.read(other.id)


def test_a_folder_that_is_a_link_is_not_looked_into(files, tmp_path):
    file = files.write(make_intervention("pause"))
    file.parent.rename(tmp_path / "elsewhere")
    file.parent.symlink_to(tmp_path / "elsewhere")
    assert files.list_ids() == []


def test_a_large_file_is_refused(files):
    command = make_intervention("pause")
    files.write(command).write_text(json.dumps({"id": "x" * 2**17}))
    with pytest.raises(UserError, match="more than 65536 bytes"):
        files.read(command.id)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"id": "00000000000000-00000000"}, "not that of its name"),
        ({"action": "rm -rf"}, "no command 'rm -rf'"),
        ({"more": 1}, "is not a command"),
        ({"trial": True}, "not the number of a trial"),
        ({"trial": "3"}, "not the number of a trial"),
        ({"trial": None}, "give the number of a trial"),
        ({"limits": {"num_trials": 3}}, "give no number"),
        ({"params": {"optimizer.lr": 1}}, "give no configuration"),
        ({"action": "trials", "trial": None, "limits": {"num_trials": 0}}, "must be a whole number"),
        ({"action": "trials", "trial": None, "limits": {"num_trials": 2.5}}, "must be a whole number"),
        ({"action": "trials", "trial": None, "limits": {"max_concurrent": 2}}, "give one number"),
        ({"action": "budget", "trial": None, "limits": {"seed": 2}}, "seed is not one of time_budget_s"),
        ({"action": "budget", "trial": None, "limits": {"gpu_hours": -1}}, "above 0"),
        ({"action": "budget", "trial": None, "limits": {}}, "nothing is not one of"),
        ({"action": "budget", "trial": None, "limits": [1]}, "is not a mapping"),
        ({"action": "add", "trial": None, "params": {}}, "at least one key=value"),
        ({"action": "add", "trial": None, "params": {"a": {"_target_": "os.system"}}}, "must be a number, a text"),
        ({"given_at": "now"}, "is not a number"),
        ({"space": {"name": "a.yaml", "text": ""}}, "give no search space"),
        ({"action": "space", "trial": None}, "give a search space"),
        ({"action": "space", "trial": None, "space": "a.yaml"}, "give the name of a file"),
        ({"action": "space", "trial": None, "space": {"name": "a.yaml", "text": 1}}, "give the name of a file"),
        ({"action": "space", "trial": None, "space": {"name": "../a.yaml", "text": ""}}, "give the name of a file"),
        ({"action": "space", "trial": None, "space": {"name": "a.sh", "text": ""}}, "give the name of a file"),
    ],
)
def test_a_file_with_other_content_is_refused(files, changes, sentence):
    command = make_intervention("stop", trial=3)
    file = files.write(command)
    values = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence):
        files.read(command.id)


@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["id", "given_at", "action", "trial", "limits", "params"]), inner, max_size=6
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_content_is_a_command_or_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    files = InterventionFiles(folder)
    command = make_intervention("pause")
    files.write(command).write_bytes(content)
    with pytest.raises(UserError):
        files.read(command.id)


def test_an_answer_is_read_as_it_was_written_and_a_refused_command_does_not_wait(files):
    first, second = make_intervention("pause"), make_intervention("resume")
    for command in (first, second):
        files.write(command)
    assert files.read_answer(first.id) is None
    assert files.list_waiting({second.id}) == [first.id]
    refusal = InterventionAnswer(False, "the sweep is paused already")
    files.write_answer(first.id, refusal)
    assert files.read_answer(first.id) == refusal
    assert files.list_waiting({second.id}) == []
    files.write_answer(second.id, InterventionAnswer(True, "trials start again"))
    assert files.list_waiting(set()) == [second.id], "an answer alone does not count"
