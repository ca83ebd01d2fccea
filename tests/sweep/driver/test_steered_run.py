"""Commands to a sweep that Ray runs: workers are released, and a sweep that has ended goes on."""

import threading
import time

import pytest

from handpose.schedulers.scheduler import Fifo
from handpose.sweep.control import main
from handpose.sweep.record.events import SegmentFailed, SegmentStarted, read_events
from handpose.sweep.record.interventions import InterventionFiles, make_intervention
from tests.sweep.driver.test_run import GROWING
from tests.sweep.objectives import curve, hangs_once, waits_for_a_command
from tests.sweep.simulation import load_space_record
from tests.sweep.sweeps import make_settings, run_small_sweep

pytestmark = pytest.mark.slow


class User(threading.Thread):
    """Gives commands once the events of a sweep have so many reports of epoch 2. Their exit statuses are kept."""

    def __init__(self, folder, commands, *, num_reports):
        super().__init__(daemon=True)
        self.folder, self.commands, self.num_reports = folder, commands, num_reports
        self.statuses = []
        self.start()

    def run(self):
        events = self.folder / "events.jsonl"
        while not events.is_file() or events.read_text().count('"epoch": 2, "metrics"') < self.num_reports:
            time.sleep(0.05)
        for command in self.commands:
            self.statuses.append(main(["--wait-s", "60", str(self.folder), *command]))


def test_a_worker_whose_trial_is_stopped_is_released_although_it_reports_no_more(ray_started, tmp_path, write_space):
    folder, space = tmp_path / "sweep", write_space(GROWING)
    settings = make_settings(folder, num_trials=2)
    user = User(folder, [("stop", "0"), ("retry", "0"), ("stop", "1"), ("stop", "7")], num_reports=2)
    table = run_small_sweep(settings, space, hangs_once, scheduler=Fifo)
    user.join(60)
    assert user.statuses == [0, 0, 0, 2]
    assert [row.state for row in table.rows.values()] == ["complete", "stopped"]
    events = read_events(folder / "events.jsonl")
    assert not any(isinstance(event, SegmentFailed) for event in events)
    started = [event.trial for event in events if isinstance(event, SegmentStarted)]
    assert sorted(started) == [0, 0, 1]


def test_a_sweep_that_has_ended_executes_what_waits_when_it_is_resumed(ray_started, tmp_path, write_space):
    folder, space = tmp_path / "sweep", write_space(GROWING)
    settings = make_settings(folder, num_trials=2)
    run_small_sweep(settings, space, curve, scheduler=Fifo)
    InterventionFiles(folder).write(make_intervention("add", params={"optimizer.lr": 0.5}))
    table = run_small_sweep(settings, space, curve, scheduler=Fifo, resume=True)
    assert [row.state for row in table.rows.values()] == ["complete"] * 3
    assert table.rows[2].params["optimizer.lr"] == 0.5
    size = (folder / "events.jsonl").stat().st_size
    run_small_sweep(settings, space, curve, scheduler=Fifo, resume=True)
    assert (folder / "events.jsonl").stat().st_size == size, "nothing waits any more, so it is only read"


def test_a_paused_sweep_waits_and_goes_on(ray_started, tmp_path, write_space):
    folder, space = tmp_path / "sweep", write_space(GROWING)
    settings = make_settings(folder, num_trials=6)
    user = User(folder, [("pause",), ("slots", "1"), ("resume",)], num_reports=1)
    table = run_small_sweep(settings, space, waits_for_a_command, scheduler=Fifo)
    user.join(60)
    assert user.statuses == [0, 0, 0]
    assert [row.state for row in table.rows.values()] == ["complete"] * 6


def test_a_running_sweep_goes_on_in_another_space(ray_started, tmp_path, write_space):
    folder, space = tmp_path / "sweep", write_space(GROWING)
    narrow = tmp_path / "narrow.yaml"
    narrow.write_text("optimizer.lr: tag(log, interval(0.05, 0.1))\nmodel.decoder.depth: choice(3, 5)\n")
    settings = make_settings(folder, num_trials=6)
    user = User(folder, [("pause",), ("space", str(narrow)), ("slots", "1"), ("resume",)], num_reports=1)
    table = run_small_sweep(settings, space, waits_for_a_command, scheduler=Fifo, load_space=load_space_record)
    user.join(60)
    assert user.statuses == [0, 0, 0, 0]
    assert [row.state for row in table.rows.values()] == ["complete"] * 6
    depths = [row.params["model.decoder.depth"] for row in table.rows.values()]
    assert (set(depths[:2]) <= {1, 2, 4}, set(depths[2:]) <= {3, 5}) == (True, True)
    assert (folder / "search_space_2" / "narrow.yaml").read_text() == narrow.read_text()
    again = run_small_sweep(settings, space, curve, scheduler=Fifo, resume=True, load_space=load_space_record)
    assert [row.params for row in again.rows.values()] == [row.params for row in table.rows.values()]
