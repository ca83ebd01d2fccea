"""The audit finds what it is there to find: faults are planted into the files of a sound sweep."""

from dataclasses import replace

import pytest

from handpose.report.table import TrialTable
from handpose.sweep.audit import audit_events
from handpose.sweep.events import Asked, Begun, Reported, Saved, read_events
from handpose.sweep.history import History
from tests.sweep.conftest import asha, make_settings
from tests.sweep.objectives import METRIC
from tests.sweep.simulation import Simulation


@pytest.fixture
def events(tmp_path):
    """Of a sweep that was killed now and then."""
    settings = make_settings(tmp_path / "sweep", num_trials=9, max_epochs=9)
    rule = asha(9, mode="promote", reduction_factor=3)
    swept = Simulation(settings, rule, lambda number, params, epoch: number % 5 + 1 / epoch)
    swept.run(kill_when=lambda num_reports: num_reports % 5 == 0)
    return read_events(swept.file)


@pytest.fixture
def found(tmp_path, events):
    """Audits events; returns the kinds of faults."""

    def audited(changed):
        settings = make_settings(tmp_path / "sweep", num_trials=9, max_epochs=9)
        rule = asha(9, mode="promote", reduction_factor=3)()
        history = History(settings, rule=rule, table=TrialTable(METRIC, "min", 9, 9))
        history.replay(events)
        lost, repeated = audit_events(changed, history)
        return bool(lost), bool(repeated)

    return audited


def place(events, kind, condition=lambda event: True):
    return next(i for i, event in enumerate(events) if isinstance(event, kind) and condition(event))


def test_a_sound_sweep_has_nothing(events, found):
    assert found(events) == (False, False)


def test_a_lost_report_is_found(events, found):
    i = place(events, Reported, lambda event: event.epoch == 2)
    assert found(events[:i] + events[i + 1 :]) == (True, False)


def test_a_lost_trial_is_found(events, found):
    i = place(events, Asked, lambda event: event.trial == 4)
    assert found(events[:i] + events[i + 1 :])[0]


def test_a_repeated_report_is_found(events, found):
    i = place(events, Reported, lambda event: event.epoch == 2)
    assert found([*events[: i + 1], *events[i:]]) == (False, True)


def test_a_finished_trial_that_is_begun_again_is_found(events, found):
    last = next(event for event in reversed(events) if isinstance(event, Reported) and event.decision == "complete")
    again = Begun(last.at, last.trial, 9, 0)
    assert found([*events, again]) == (False, True)


def test_work_that_is_done_again_from_an_old_checkpoint_is_found(events, found):
    i = place(events, Reported, lambda event: event.resumed_from > 0)
    assert found([*events[:i], replace(events[i], resumed_from=0), *events[i + 1 :]]) == (False, True)


def test_a_newest_checkpoint_that_was_never_saved_is_no_repetition(found):
    begun = [Asked(0, 0, {}), Begun(0, 0, 1, 0)]
    reports = [
        Reported(1, 0, 1, {}, "", 0, Saved("a", 1, 1, 1), "continue"),
        Reported(2, 0, 2, {}, "", 0, None, "continue"),
    ]
    again = [Begun(3, 0, 2, 1), Reported(4, 0, 3, {}, "", 1, None, "complete")]
    assert not found(begun + reports + again)[1]


def test_a_checkpoint_that_is_told_an_epoch_later_counts_as_of_its_own_epoch(found):
    begun = [Asked(0, 0, {}), Begun(0, 0, 1, 0)]
    reports = [
        Reported(1, 0, 1, {}, "", 0, None, "continue"),
        Reported(2, 0, 2, {}, "", 0, Saved("a", 1, 1, 1), "continue"),
    ]
    again = [Begun(3, 0, 2, 1), Reported(4, 0, 3, {}, "", 1, None, "complete")]
    assert not found(begun + reports + again)[1]
