"""Workers that are started before they are needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from handpose.sweep.controller.slots import Slots
from handpose.sweep.execution import warm_up as module
from handpose.sweep.execution.warm_up import _count_needed_workers, _make_setup_hook, prepare_warm_up
from tests.sweep.objectives import curve


@pytest.mark.slow
def test_preflight_and_trials_run_in_processes_that_were_started_ahead():
    told = subprocess.run(
        [sys.executable, "-m", "tests.sweep.execution.warm_sweep"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(told.splitlines()[-1])
    workers = [found["preflight"], *found["trials"]]
    assert sorted(pid for pid, _, _ in workers) == found["ready"]
    assert [(imported, threads) for _, imported, threads in workers] == [(True, "1")] * 3


def test_in_a_ray_that_others_have_started_nothing_is_started_or_waited_for(ray_started):
    with prepare_warm_up(curve, num_threads=1) as warm:
        warm.start_workers(Slots(2, 1, 0.0))
        warm.wait(num_more=1)
        assert warm.pids == set()


def test_a_ray_without_that_call_only_begins_later(ray_started, monkeypatch):
    asked = []

    def missing(node, num_workers, *, keep_alive_s):
        asked.append(num_workers)
        raise AttributeError("no such call")

    monkeypatch.setattr(module, "prestart_workers", missing)
    with prepare_warm_up(curve, num_threads=1) as warm:
        warm._request_workers({"NodeID": "x"}, 2)
        warm.wait(num_more=1)
    assert asked == [2]


@pytest.mark.parametrize(
    ("slots", "resources", "num"),
    [
        (Slots(8, 1, 0.0), {"CPU": 4.0}, 4),
        (Slots(2, 1, 0.0), {"CPU": 4.0}, 2),
        (Slots(8, 2, 0.5), {"CPU": 16.0, "GPU": 2.0}, 4),
        (Slots(8, 1, 1.0), {"CPU": 16.0}, 0),
        (Slots(2, 1, 0.0, num_workers=2), {"CPU": 4.0}, 0),
    ],
)
def test_a_node_is_asked_for_as_many_as_fit_into_it(slots, resources, num):
    assert _count_needed_workers(slots, resources) == num


def test_a_worker_that_cannot_import_starts_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    _make_setup_hook("no.such.module", num_threads=1, folder=tmp_path)()
    assert [file.suffix for file in tmp_path.iterdir()] == [".started"]
