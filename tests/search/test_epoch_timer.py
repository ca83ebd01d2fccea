"""The time of epochs, without starts."""

import pytest

from handpose.search.epoch_timer import EpochTimer


def test_a_start_is_kept_apart_from_the_epochs():
    timer = EpochTimer()
    timer.start_segment(100.0)
    timer.report(1, 161.0)
    assert timer.typical_epoch_s is None
    timer.report(2, 162.5)
    timer.report(4, 164.5)  # two epochs
    assert (timer.first_epoch_s, timer.epoch_s) == ([61.0], [1.5, 1.0])
    assert timer.typical_epoch_s == pytest.approx(1.25)


def test_the_time_between_segments_does_not_count():
    timer = EpochTimer()
    timer.start_segment(0.0)
    timer.report(1, 3.0)
    timer.start_segment(1000.0)
    timer.report(2, 1005.0)
    timer.report(3, 1006.0)
    assert (timer.first_epoch_s, timer.epoch_s) == ([3.0, 5.0], [1.0])
