"""The settings of a budget and the time that is left."""

import math
import time
from datetime import UTC, datetime, timedelta

import pytest

from cluster.allocation import remove_scheduler_variables
from handpose.budget import BudgetSettings, Deadline, add_offset, read_job_end
from handpose.config import compose
from handpose.errors import UserError

NOTHING = {"minutes": None, "hours": None, "gpu_hours": None, "finish_by": None}


def make_budget(**given):
    return BudgetSettings(**(NOTHING | given))


@pytest.mark.parametrize(
    ("given", "limit_s"),
    [({"minutes": 5}, 300), ({"hours": 1.5}, 5400), ({"minutes": "auto"}, math.inf), ({}, math.inf)],
)
def test_the_limit_is_in_seconds(given, limit_s):
    assert make_budget(**given).limit_s == limit_s
    assert make_budget(**given).is_limited == math.isfinite(limit_s)


def test_minutes_and_hours_together_are_refused():
    with pytest.raises(UserError, match=r"budget.minutes=5 and budget.hours=1 contradict"):
        make_budget(minutes=5, hours=1)


@pytest.mark.parametrize("text", ["tomorrow", "18:00", "2026-12-04", "2026-13-04T18:00"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=f"budget.finish_by={text} is not a date with a time"):
        make_budget(finish_by=text)


def test_a_time_with_an_offset_is_that_moment_and_one_without_is_local():
    moment = datetime(2030, 5, 6, 7, 8, tzinfo=UTC)
    assert make_budget(finish_by="2030-05-06T09:08+02:00").parse_finish_by() == moment.timestamp()
    local = datetime(2030, 5, 6, 7, 8)
    assert make_budget(finish_by="2030-05-06 07:08").parse_finish_by() == time.mktime(local.timetuple())


def test_a_local_time_gets_its_offset_and_another_one_is_unchanged(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert add_offset("2026-12-04T18:00") == "2026-12-04T18:00:00+01:00"
        assert add_offset("2026-07-04 18:00") == "2026-07-04T18:00:00+02:00"
        assert add_offset("2026-12-04T18:00+00:00") == "2026-12-04T18:00+00:00"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("given", ["budget.hours=1e9", "budget.minutes=1e9"])
def test_a_budget_of_many_years_is_refused(given):
    with pytest.raises(
        UserError, match=r"^budget.(hours|minutes) must be at most (87600|100000), but it is 1000000000.0"
    ):
        compose("tune", [given])


def test_a_time_in_the_past_is_refused_when_a_run_begins():
    past = (datetime.now(tz=UTC) - timedelta(hours=1)).isoformat()
    with pytest.raises(UserError, match="is in the past; give a later time"):
        make_budget(finish_by=past).check_is_ahead()
    make_budget(minutes=1).check_is_ahead()


def test_the_time_of_earlier_processes_counts_and_the_earlier_limit_holds():
    now = time.time()
    assert Deadline(make_budget(minutes=10), started_at=now, used_s=120, environment={}).at == now + 480
    soon = datetime.fromtimestamp(now + 60, tz=UTC).isoformat()
    both = Deadline(make_budget(hours=1, finish_by=soon), started_at=now, environment={})
    assert both.at == pytest.approx(now + 60)
    assert 55 < both.left_s < 60  # a part is kept in reserve


def test_it_is_known_whether_the_end_of_the_job_comes_first():
    job = {"SLURM_JOB_END_TIME": str(int(time.time()) + 7200)}
    assert Deadline(make_budget(hours=8), environment=job).is_end_of_job
    assert not Deadline(make_budget(hours=1), environment=job).is_end_of_job
    assert not Deadline(make_budget(), environment=job).is_end_of_job


def test_a_larger_budget_has_twice_the_size():
    assert make_budget(hours=8, gpu_hours=1.5).describe_larger() == "budget.hours=16 budget.gpu_hours=3"
    assert make_budget(finish_by="2030-05-06T07:08").describe_larger() == "budget.finish_by=LATER"


def test_the_removal_of_a_budget_names_each_key_once():
    removal = make_budget(minutes=5, finish_by="2030-05-06 07:08+02:00").describe_removal()
    assert removal == "budget.minutes=null budget.finish_by=null"


def test_without_a_limit_any_time_is_left():
    deadline = Deadline(make_budget(), environment={"SLURM_JOB_END_TIME": "1"})
    assert not deadline.is_limited
    assert deadline.left_s == math.inf


def test_the_end_of_a_job_limits_a_run_unless_the_job_is_requeued():
    end = int(time.time()) + 600
    job = {"SLURM_JOB_END_TIME": str(end)}
    assert read_job_end(job) == end - 60
    assert read_job_end(remove_scheduler_variables(job)) == math.inf  # what tune.py sees in a job of cluster/slurm.py
    assert Deadline(make_budget(hours=5), environment=job).at == end - 60
