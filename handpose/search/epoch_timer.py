"""How long the epochs of a trial take, from the times of its reports."""

import statistics


class EpochTimer:
    """Seconds per epoch of a trial. The start of a segment is kept apart from the epochs.

    Attributes:
        epoch_s: seconds per epoch between two reports of the same segment, in order.
        first_epoch_s: seconds per epoch until the first report of each segment, with its start.
    """

    def __init__(self) -> None:
        self.epoch_s: list[float] = []
        self.first_epoch_s: list[float] = []
        self._since = 0.0
        self._has_reported = False
        self._epochs = 0

    def start_segment(self, now: float) -> None:
        """Record the start of a segment.

        Args:
            now: time in seconds.
        """
        self._since, self._has_reported = now, False

    def report(self, epoch: int, now: float) -> None:
        """Record a report.

        Args:
            epoch: epochs that the trial has been trained.
            now: time in seconds.
        """
        seconds = (now - self._since) / max(1, epoch - self._epochs)
        (self.epoch_s if self._has_reported else self.first_epoch_s).append(seconds)
        self._since, self._has_reported, self._epochs = now, True, epoch

    @property
    def typical_epoch_s(self) -> float | None:
        """Median seconds of an epoch without starts; None before a segment has reported twice."""
        return statistics.median(self.epoch_s) if self.epoch_s else None
