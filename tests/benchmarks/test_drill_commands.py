"""The commands of the crash drill: all kinds are given, and what is lost, repeated or wrong is found."""

import json
import random
import shutil
from dataclasses import replace

import pytest

from benchmarks.drill_commands import CommandGiver, check_commands, count_late_answers, draw_command
from handpose.sweep.control import main
from handpose.sweep.driver.intervention_inbox import LATE_ANSWER
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.interventions import InterventionAnswer, InterventionFiles
from tests.sweep.whole_sweep import WholeSweep

COMMANDS = (("stop", "0"), ("trials", "7"), ("stop", "17"), ("pause",))


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A sweep that was killed, got commands that wait, and was resumed; and what was given."""
    folder = tmp_path_factory.mktemp("steered") / "sweep"
    WholeSweep(folder, "scheduler.reduction_factor=2", "searcher=random").run(num_reports=5, last=None)
    giver = CommandGiver(folder, random.Random(0))
    for arguments in COMMANDS:
        giver.give(arguments, "not running")
    giver.give_last()
    WholeSweep.from_folder(folder).run()
    return folder, giver.given


@pytest.fixture
def folder(steered, tmp_path):
    return shutil.copytree(steered[0], tmp_path / "sweep")


def test_commands_that_were_executed_or_refused_are_in_order(steered):
    folder, given = steered
    assert [each.arguments for each in given] == [*COMMANDS, ("budget", "time_budget_s=null"), ("resume",)]
    assert {each.status for each in given} == {75}
    assert not any(check_commands(folder, given))


def test_a_command_without_an_answer_is_lost(folder, steered):
    given = steered[1]
    (folder / "control" / f"{given[0].id}.answer.json").unlink()
    found = check_commands(folder, [*given, replace(given[0], id="")])
    assert [len(sentences) for sentences in found] == [2, 0, 0]
    assert "(stop 0, given not running) has no answer but was executed" in found.lost[0]


def test_a_command_that_was_executed_twice_or_never_given_is_found(folder, steered):
    given = steered[1]
    lines = (folder / EVENTS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    again = next(line for line in lines if json.loads(line).get("intervention") == given[1].id)
    (folder / EVENTS_FILE).write_text("".join([*lines, again]), encoding="utf-8")
    assert "(trials 7, given not running) was executed 2 times" in check_commands(folder, given).repeated[0]
    assert "was never given" in " ".join(check_commands(folder, given[2:]).wrong)


def test_an_answer_an_event_or_a_status_that_contradicts_the_command_is_wrong(folder, steered):
    given = steered[1]
    files = InterventionFiles(folder)
    files.write_answer(given[2].id, InterventionAnswer(True, "trial 17 is stopped"))
    assert "answered as accepted, but was executed 0 times" in check_commands(folder, given).wrong[0]
    files.write_answer(given[2].id, InterventionAnswer(False, "there is no trial 17"))
    assert (
        "ended with status 0" in check_commands(folder, [replace(given[2], status=0), *given[:2], *given[3:]]).wrong[0]
    )
    file = folder / "control" / f"{given[1].id}.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"num_trials": 7', '"num_trials": 8'), encoding="utf-8")
    assert "the event has the limits {'num_trials': 7}" in check_commands(folder, given).wrong[0]


def test_answers_after_a_kill_are_counted(folder, steered):
    assert count_late_answers(folder, steered[1]) == 0
    InterventionFiles(folder).write_answer(steered[1][0].id, InterventionAnswer(True, LATE_ANSWER))
    assert count_late_answers(folder, steered[1]) == 1


def test_random_commands_are_valid_and_of_every_kind(folder, capsys):
    generator = random.Random(1)
    drawn = {draw_command(generator, 5) for _ in range(100)}
    assert {arguments[0] for arguments in drawn} == {
        *("stop", "retry", "keep", "add", "trials", "slots", "pause", "budget", "epochs")
    }
    for arguments in drawn:
        assert main([str(folder), "--wait-s", "0", *arguments]) == 75, arguments
    capsys.readouterr()


def test_a_pause_ends_and_the_number_of_commands_is_limited(folder, monkeypatch):
    monkeypatch.setattr("benchmarks.drill_commands._GAP_S", (0.0, 0.0))
    monkeypatch.setattr("benchmarks.drill_commands._PAUSE_S", (0.0, 0.0))
    monkeypatch.setattr("benchmarks.drill_commands.draw_command", lambda generator, num_trials: ("pause",))
    giver = CommandGiver(folder, random.Random(2), num_left=2)
    monkeypatch.setattr(giver.generator, "choice", lambda values: 0.0)
    for _ in range(6):
        giver.give_if_due()
    assert [each.arguments[0] for each in giver.given] == ["pause", "resume", "pause", "resume"]


def test_no_command_is_given_before_the_sweep_is_written(tmp_path):
    giver = CommandGiver(tmp_path, random.Random(3))
    giver.give_random("not running")
    assert giver.given == []
