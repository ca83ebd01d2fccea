"""The time that a sweep has used, over all its processes."""

import json
from types import SimpleNamespace

import pytest

import handpose
from handpose.budget import BudgetSettings
from handpose.errors import UserError
from handpose.sweep.budget import clock as clock_module
from handpose.sweep.budget.clock import BUDGET_FILE, BudgetClock

FIVE_MINUTES = BudgetSettings(minutes=5, hours=None, gpu_hours=None, finish_by=None)


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets, as `now.seconds`."""

    class Now:
        seconds = 1000.0

        def time(self):
            return self.seconds

    now = Now()
    monkeypatch.setattr(clock_module, "time", now)
    monkeypatch.setattr(handpose, "IMPORTED_AT", 1000.0)
    return now


def test_each_stage_has_its_time_from_the_start_of_the_process(now, tmp_path):
    clock = BudgetClock(FIVE_MINUTES, tmp_path)
    for stage, seconds in (("trials", 20), ("confirmation", 100), ("retraining", 30)):
        now.seconds += seconds
        clock.enter(stage)
    now.seconds += 60
    assert clock.count_used_s() == 210
    assert clock.seconds == {"preparation": 20, "trials": 100, "confirmation": 30, "retraining": 60}


def test_the_end_of_a_job_is_named_if_it_comes_first(now, tmp_path, monkeypatch):
    clock = BudgetClock(FIVE_MINUTES, tmp_path)
    monkeypatch.setattr(clock_module, "Deadline", lambda settings, used_s: SimpleNamespace(is_end_of_job=True))
    assert clock.describe_limit() == "budget.minutes=5 (the Slurm job ends earlier)"
    monkeypatch.setattr(clock_module, "Deadline", lambda settings, used_s: SimpleNamespace(is_end_of_job=False))
    assert clock.describe_limit() == "budget.minutes=5"


def test_nothing_is_written_before_the_sweep_has_its_folder(now, tmp_path):
    clock = BudgetClock(FIVE_MINUTES, tmp_path / "sweep")
    clock.enter("trials")
    clock.save()
    assert not (tmp_path / "sweep").exists()


def test_a_later_process_adds_its_time_and_keeps_the_decisions(now, tmp_path, monkeypatch):
    first = BudgetClock(FIVE_MINUTES, tmp_path)
    first.decisions.top_k, first.decisions.reserved_s = 2, 140.0
    with first.close_at_end():
        first.start_saving()
        now.seconds += 70
        first.enter("trials")
        now.seconds += 30
    now.seconds += 10_000  # nothing runs
    monkeypatch.setattr(handpose, "IMPORTED_AT", now.seconds)
    second = BudgetClock(FIVE_MINUTES, tmp_path)
    assert second.used_s == 100
    assert second.decisions == first.decisions
    assert second.deadline.at == now.seconds + 300 - 100
    now.seconds += 5
    assert second.count_used_s() == 105


def test_a_killed_process_has_saved_its_time_a_moment_ago(tmp_path, monkeypatch):
    monkeypatch.setattr(clock_module, "_SAVE_EVERY_S", 0.01)
    clock = BudgetClock(FIVE_MINUTES, tmp_path)
    clock.start_saving()
    first = json.loads((tmp_path / BUDGET_FILE).read_text())["seconds"]["preparation"]
    while json.loads((tmp_path / BUDGET_FILE).read_text())["seconds"]["preparation"] == first:
        pass  # the thread writes without being asked
    with clock.close_at_end():
        pass


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"seconds": {}}',
        '{"seconds": {"trials": -5}, "decisions": {}}',
        '{"seconds": {"trials": "5"}, "decisions": {}}',
        '{"seconds": {"trials": NaN}, "decisions": {}}',
        '{"seconds": {"holidays": 5}, "decisions": {}}',
        '{"seconds": {}, "decisions": {"planned_keys": 3}}',
        '{"seconds": {}, "decisions": {"reserved_s": null}}',
        '{"seconds": {}, "decisions": {"top_k": -1}}',
        b"\xff\x00",
    ],
)
def test_a_damaged_file_is_refused_with_a_remedy_that_works(tmp_path, content):
    file = tmp_path / BUDGET_FILE
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"budget.json is damaged \(.*\); remove it, and the time .* from now on$"):
        BudgetClock(FIVE_MINUTES, tmp_path)
    file.unlink()
    clock = BudgetClock(FIVE_MINUTES, tmp_path)
    with clock.close_at_end():
        clock.start_saving()
    assert BudgetClock(FIVE_MINUTES, tmp_path).seconds.keys() == {"preparation"}


def test_the_times_are_saved_while_another_thread_counts_the_first_seconds_of_a_stage(tmp_path):
    """Without a lock: dictionary changed size during iteration."""

    class Counting(dict):
        def items(self):
            for item in super().items():
                assert clock._lock.locked()
                yield item

    clock = BudgetClock(FIVE_MINUTES, tmp_path)
    clock.seconds = Counting(trials=1.0)
    with clock.close_at_end():
        clock.start_saving()


def test_the_file_is_written_to_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("handpose.files.os.fsync", lambda descriptor: synced.append((tmp_path / BUDGET_FILE).exists()))
    clock = BudgetClock(FIVE_MINUTES, tmp_path)
    with clock.close_at_end():
        clock.start_saving()
    assert synced[0] is False
    assert len(synced) >= 2
