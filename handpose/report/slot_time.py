"""Account of how a sweep used its slot-time. A slot is the CPUs and the fraction of a GPU that one trial holds.

The start-up time of a segment is measured (handpose/report/utilisation.py). A sweep of an earlier version has only the
times of its reports. There, it is how much longer the first epoch of a segment took than the later epochs of the trial
(or of the median trial, if there are none). Waiting for data and validation are counted as training.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handpose.report.sweep_record import EpochReport, SegmentRecord, SweepRecord, TrialRecord
from handpose.report.trial_table import TrialState


@dataclass(frozen=True)
class SlotTime:
    """The use of slot-time, in slot-seconds.

    Attributes:
        trained: state of the trial -> time of the epochs that counted.
        startup: start-up of workers and measurement of costs.
        lost: after a failure or a kill, the time since the last report, and the time to train epochs again.
        idle: time in which a slot held no trial.
        saved: what the stopped trials would have needed up to the last epoch. It was not spent.
    """

    trained: dict[TrialState, float]
    startup: float
    lost: float
    idle: float
    saved: float

    @property
    def total(self) -> float:
        """All slot-time that was spent, without `saved`."""
        return sum(self.trained.values()) + self.startup + self.lost + self.idle


def account_slot_time(record: SweepRecord) -> SlotTime:
    """Compute how a sweep used its slot-time."""
    paces = {trial.number: pace for trial in record.trials if (pace := _estimate_epoch_s(trial)) is not None}
    typical = statistics.median(paces.values()) if paces else 0.0
    trained: dict[TrialState, float] = {}
    start_up = lost = saved = 0.0
    for trial in record.trials:
        pace = paces.get(trial.number, typical)
        measured = _get_start_ups(trial)
        parts = [
            _split_segment(trial, segment, pace, measured.get(number))
            for number, segment in enumerate(trial.segments, start=1)
        ]
        trained[trial.state] = trained.get(trial.state, 0.0) + sum(part[0] for part in parts)
        start_up += sum(part[1] for part in parts)
        lost += sum(part[2] for part in parts)
        saved += pace * (record.max_epochs - trial.epochs) if trial.state == "stopped" else 0.0
    busy = sum(trained.values()) + start_up + lost
    idle = max(0.0, record.num_slots * record.seconds - busy)
    return SlotTime({state: seconds for state, seconds in trained.items() if seconds}, start_up, lost, idle, saved)


def compute_spent(record: SweepRecord, at_s: Sequence[float]) -> NDArray[np.float64]:
    """Compute the slot-seconds that all trials together had used by each time.

    Args:
        record: the sweep.
        at_s: (N,) times, in the sweep's own seconds.

    Returns:
        (N,) slot-seconds.
    """
    segments = [segment for trial in record.trials for segment in trial.segments]
    changes = sorted([(segment.started_s, 1) for segment in segments] + [(segment.ended_s, -1) for segment in segments])
    times, held, total, running = [0.0], [0.0], 0.0, 0
    for moment, change in changes:
        total += running * (moment - times[-1])
        running += change
        times.append(moment)
        held.append(total)
    return np.interp(np.asarray(at_s, dtype=float), times, held)


def _list_segment_reports(trial: TrialRecord, segment: SegmentRecord) -> list[EpochReport]:
    return [report for report in trial.reports if segment.started_s < report.at_s <= segment.ended_s]


def _estimate_epoch_s(trial: TrialRecord) -> float | None:
    """Estimate the seconds per epoch from consecutive reports in the same segment; None if there are none."""
    paces = []
    for segment in trial.segments:
        reports = _list_segment_reports(trial, segment)
        pairs = itertools.pairwise(reports)
        paces += [(later.at_s - report.at_s) / (later.epoch - report.epoch) for report, later in pairs]
    return statistics.median(paces) if paces else None


def _get_start_ups(trial: TrialRecord) -> dict[int, float]:
    """Return number of a segment -> measured seconds of its start-up."""
    return {each.segment: seconds for each in trial.utilisation if (seconds := each.used.seconds["start_up"])}


def _split_segment(
    trial: TrialRecord, segment: SegmentRecord, pace: float, start_up_s: float | None = None
) -> tuple[float, float, float]:
    """Split the seconds of a segment into training, start-up and lost time.

    Args:
        trial: the trial.
        segment: the segment.
        pace: seconds of an epoch; 0 if they are not known.
        start_up_s: measured seconds of the start-up; None: not measured.
    """
    reports = _list_segment_reports(trial, segment)
    if not reports:
        seconds = segment.ended_s - segment.started_s
        return (0.0, 0.0, seconds) if segment.end == "lost" else (0.0, seconds, 0.0)
    reported_epoch = max((report.epoch for report in trial.reports if report.at_s <= segment.started_s), default=0)
    first = reports[0].at_s - segment.started_s
    num_repeated = max(0, min(reported_epoch, reports[0].epoch) - segment.epoch)
    num_epochs = max(1, reports[0].epoch - segment.epoch)
    training = min(first, num_epochs * pace) if pace else first
    if start_up_s is not None:
        training = max(0.0, first - start_up_s)
    repeated = training * num_repeated / num_epochs
    tail = segment.ended_s - reports[-1].at_s
    trained = training - repeated + reports[-1].at_s - reports[0].at_s + (tail if segment.end != "lost" else 0.0)
    return trained, first - training, repeated + (tail if segment.end == "lost" else 0.0)
