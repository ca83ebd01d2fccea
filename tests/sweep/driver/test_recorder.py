"""What the driver records of what trials use: beside the events, and without a part in any decision."""

import json

import pytest

from handpose.report.trial_table import TrialRow, TrialTable
from handpose.report.utilisation import Utilisation
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.driver.recorder import Recorder
from handpose.sweep.record.events import EpochReported, SegmentStarted, TrialSuggested
from handpose.sweep.record.utilisation_file import UTILISATION_FILE, read_utilisation
from tests.sweep.objectives import METRIC
from tests.sweep.whole_sweep import SilentView, WholeSweep


def make_used(training_s, *, start_up_s=0.0, memory_mb=800.0):
    seconds = {"start_up": start_up_s, "data": 0.0, "training": training_s, "validation": 0.0, "report": 0.0}
    return Utilisation(seconds, memory_mb=memory_mb)


class Log:
    """A log that remembers what it is given."""

    def __init__(self):
        self.used = []

    def log_utilisation(self, row, used):
        self.used.append((row.epochs, used))

    def __getattr__(self, name):
        return lambda *arguments, **options: None


@pytest.fixture
def recorder(tmp_path):
    """A recorder of trial 0 with its log; `report` says that an epoch was reported when the trial had run so long."""
    table, log = TrialTable(METRIC, "min", 1, 4), Log()
    row = table.rows[0] = TrialRow(0, {})
    made = Recorder(
        table, folder=tmp_path, retention=None, refresh_times=lambda: None, view=SilentView(), logs=[log], notifier=None
    )
    made.on_event(TrialSuggested(0.0, 0, {}), row)

    def start(segment, seconds):
        row.seconds = seconds
        made.on_event(SegmentStarted(seconds, 0, segment, 0), row)

    def report(epoch, seconds):
        row.seconds, row.epochs = seconds, epoch
        made.on_event(EpochReported(seconds, 0, epoch, {METRIC: 1.0}, "vm", 0, None, "continue"), row)

    made.start, made.report, made.log = start, report, log
    return made


def test_time_before_the_worker_ran_counts_as_start_up(recorder, tmp_path):
    recorder.start(1, 0.0)
    recorder.add_utilisation(0, make_used(3.0, start_up_s=1.0))
    recorder.report(1, 10.0)
    recorder.add_utilisation(0, make_used(3.0))
    recorder.report(2, 13.5)
    first, second = read_utilisation(tmp_path / UTILISATION_FILE)[0]
    assert first.used.seconds == {"start_up": 7.0, "data": 0, "training": 3.0, "validation": 0, "report": 0}
    assert second.used.seconds["report"] == 0.5
    assert [(epoch, used.total_s) for epoch, used in recorder.log.used] == [(1, 10.0), (2, 3.5)]


def test_an_epoch_that_was_reported_before_counts_for_the_next_one(recorder, tmp_path):
    """After a retry the driver records no event of it, but its time was spent."""
    recorder.start(2, 20.0)
    recorder.add_utilisation(0, make_used(3.0, start_up_s=1.0, memory_mb=900.0))  # epoch 1 again
    recorder.add_utilisation(0, make_used(3.0))
    recorder.report(2, 28.0)
    ((segment, epoch, used),) = read_utilisation(tmp_path / UTILISATION_FILE)[0]
    assert (segment, epoch, used.memory_mb) == (2, 2, 900.0)
    assert (used.seconds["training"], used.seconds["start_up"]) == (6.0, 2.0)


def test_what_a_segment_has_used_is_forgotten_when_the_next_one_starts(recorder, tmp_path):
    recorder.start(1, 0.0)
    recorder.add_utilisation(0, make_used(3.0, start_up_s=1.0))
    recorder.start(2, 50.0)  # it failed before its report was recorded
    recorder.report(1, 60.0)
    assert read_utilisation(tmp_path / UTILISATION_FILE) == {}


def test_a_full_disk_does_not_end_the_sweep(recorder, tmp_path):
    (tmp_path / UTILISATION_FILE).mkdir()
    recorder.start(1, 0.0)
    recorder.add_utilisation(0, make_used(3.0, start_up_s=1.0))
    recorder.report(1, 10.0)
    assert len(recorder.log.used) == 1


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    return WholeSweep(folder, "sweep.num_trials=5", "scheduler=fifo", fails={(1, 2): "killed"}).run().folder


def test_a_report_has_what_every_trial_used_and_its_start_up(swept):
    record = read_sweep(swept, with_importance=False)
    assert [len(trial.utilisation) for trial in record.trials] == [trial.epochs for trial in record.trials]
    assert [each.segment for each in record.get_trial(1).utilisation] == [1, *[2] * (record.get_trial(1).epochs - 1)]
    for trial in record.trials:
        lost_s = sum(each.ended_s - each.started_s for each in trial.segments if each.end == "lost")
        assert 0 < trial.used.total_s <= trial.seconds + 0.01
        assert trial.used.total_s == pytest.approx(trial.seconds, abs=lost_s + 0.01)


def test_nothing_of_it_is_in_the_events(swept):
    events = [json.loads(line) for line in (swept / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if "cpu_percent" in json.dumps(event)]
