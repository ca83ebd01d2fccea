"""Where the slot-time went, against accounts made by hand."""

import pytest

from handpose.report.slot_time import account_slot_time, compute_spent
from handpose.report.sweep_record import EpochReport, SegmentRecord, TrialRecord
from handpose.report.utilisation import PHASES, EpochUtilisation, Utilisation
from tests.report.fabricated_records import make_record


def make_reports(*moments):
    return [EpochReport(epoch, at, 0.0, 1.0) for epoch, at in moments]


def test_the_first_epoch_of_a_stretch_has_the_start_up_in_it():
    whole = TrialRecord(
        0,
        {},
        "complete",
        4,
        1.0,
        18.0,
        reports=make_reports((1, 12), (2, 14), (3, 16), (4, 18)),
        segments=[SegmentRecord(0, 18, 0, "over")],
    )
    account = account_slot_time(make_record([whole]))
    assert account.trained == {"complete": 8.0}
    assert (account.startup, account.lost, account.idle, account.saved) == (10.0, 0.0, 0.0, 0.0)


def test_a_start_up_that_was_measured_is_not_estimated():
    seconds = dict.fromkeys(PHASES, 0.0)
    whole = TrialRecord(
        0,
        {},
        "complete",
        2,
        1.0,
        14.0,
        reports=make_reports((1, 12), (2, 14)),
        segments=[SegmentRecord(0, 14, 0, "over")],
        utilisation=[
            EpochUtilisation(1, 1, Utilisation(seconds | {"start_up": 7.0, "training": 5.0})),
            EpochUtilisation(1, 2, Utilisation(seconds | {"training": 2.0})),
        ],
    )
    account = account_slot_time(make_record([whole]))
    assert (account.startup, account.trained) == (7.0, {"complete": 7.0})


def test_epochs_that_are_trained_again_after_a_failure_are_lost():
    # Epochs 1 and 2 take 2 s each after 10 s of start-up; it fails 1 s into epoch 3. Its checkpoint is of epoch 1, so
    # that epoch 2 is trained again, unheard, before epoch 3 is reported.
    tried = TrialRecord(
        0,
        {},
        "complete",
        4,
        1.0,
        33.0,
        reports=make_reports((1, 12), (2, 14), (3, 34), (4, 36)),
        segments=[SegmentRecord(0, 15, 0, "lost"), SegmentRecord(20, 36, 1, "over")],
    )
    account = account_slot_time(make_record([tried]))
    assert account.trained == {"complete": pytest.approx(8.0)}
    assert account.startup == pytest.approx(20.0)
    assert account.lost == pytest.approx(3.0)
    assert account.idle == pytest.approx(5.0)
    assert account.total == pytest.approx(36.0)


def test_stopping_saves_the_epochs_that_were_left():
    stopped = TrialRecord(
        0,
        {},
        "stopped",
        2,
        1.0,
        14.0,
        reports=make_reports((1, 12), (2, 14)),
        segments=[SegmentRecord(0, 14, 0, "over")],
    )
    assert account_slot_time(make_record([stopped], max_epochs=10)).saved == pytest.approx(16.0)


def test_all_of_a_stretch_without_a_report_is_lost_or_start_up():
    failed = TrialRecord(0, {}, "failed", 0, 1.0, 7.0, segments=[SegmentRecord(0, 7, 0, "lost")])
    costly = TrialRecord(1, {}, "infeasible", 0, 1.0, 3.0, segments=[SegmentRecord(7, 10, 0, "over")])
    account = account_slot_time(make_record([failed, costly]))
    assert (account.lost, account.startup, account.trained) == (7.0, 3.0, {})


def test_what_is_spent_grows_with_the_trials_that_run():
    both = [
        TrialRecord(number, {}, "complete", 1, 1.0, 10.0, segments=[SegmentRecord(began, began + 10, 0, "over")])
        for number, began in enumerate((0, 5))
    ]
    assert compute_spent(make_record(both), [0, 5, 10, 15, 20]).tolist() == [0, 5, 15, 20, 20]
