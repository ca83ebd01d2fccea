"""The one-euro filter (Casiez, Roussel and Vogel, CHI 2012): less jitter in a slow signal, less lag in a fast one."""

import math

import numpy as np
from numpy.typing import NDArray


class OneEuroFilter:
    """Filters an array of signals, each on its own.

    Each signal is smoothed by a low-pass filter of first order, whose cut-off frequency grows with the speed of the
    signal: `min_cutoff_hz + beta * |speed|`. The speed is smoothed by a filter of its own.

    Args:
        min_cutoff_hz: cut-off frequency of a signal at rest. A lower one removes more jitter.
        beta: by how many Hz the cut-off frequency grows with each unit of speed. A larger one removes lag.
        speed_cutoff_hz: cut-off frequency of the speed; the paper's value is 1 Hz.

    Example:
        >>> smooth = OneEuroFilter(min_cutoff_hz=1.0, beta=0.0)
        >>> [float(smooth(np.array(x), time_s=t)) for x, t in ((5.0, 0.0), (5.0, 0.1))]
        [5.0, 5.0]
    """

    def __init__(self, *, min_cutoff_hz: float, beta: float, speed_cutoff_hz: float = 1.0) -> None:
        self.min_cutoff_hz = min_cutoff_hz
        self.beta = beta
        self.speed_cutoff_hz = speed_cutoff_hz
        self._time_s = math.nan
        self._value: NDArray[np.float64] | None = None
        self._speed: NDArray[np.float64] = np.zeros(())

    def __call__(self, value: NDArray[np.float64], *, time_s: float) -> NDArray[np.float64]:
        """Filter the next values. The first ones are returned as they are.

        Args:
            value: (...) the values, always of the same shape.
            time_s: when they were measured, in seconds; later than the values before.
        """
        if self._value is None:
            self._value, self._speed = np.array(value, np.float64), np.zeros_like(value, np.float64)
        else:
            step_s = time_s - self._time_s
            assert step_s > 0.0, f"time must increase, but {time_s} s follows {self._time_s} s"
            speed = (value - self._value) / step_s
            self._speed = _mix(speed, self._speed, compute_weight(self.speed_cutoff_hz, step_s))
            cutoff_hz = self.min_cutoff_hz + self.beta * np.abs(self._speed)
            self._value = _mix(value, self._value, compute_weight(cutoff_hz, step_s))
        self._time_s = time_s
        return self._value.copy()


def compute_weight(cutoff_hz: float | NDArray[np.float64], step_s: float) -> float | NDArray[np.float64]:
    """Compute the weight of a new value in a low-pass filter of first order, in (0, 1).

    Args:
        cutoff_hz: the cut-off frequency.
        step_s: seconds since the value before.
    """
    return 1.0 / (1.0 + 1.0 / (2.0 * math.pi * cutoff_hz * step_s))


def _mix(
    new: NDArray[np.float64], old: NDArray[np.float64], weight: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    return weight * new + (1.0 - weight) * old
