"""The metric that a training or a sweep optimises: its name and its direction."""

from typing import Literal, NamedTuple, TypeAlias

Mode: TypeAlias = Literal["min", "max"]


class TargetMetric(NamedTuple):
    """A metric with its direction.

    Attributes:
        name: name of the metric, such as `val/pa_mpjpe_mm`.
        mode: `min` if smaller values are better, `max` if larger values are better.
    """

    name: str
    mode: Mode

    @property
    def sign(self) -> float:
        """Factor that turns a value into a loss (smaller is better)."""
        return 1.0 if self.mode == "min" else -1.0

    def to_loss(self, value: float) -> float:
        """Return the value as a loss (smaller is better). NaN stays NaN."""
        return self.sign * value
