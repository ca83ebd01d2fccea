"""The metric that a training or a sweep optimises: its name, and which direction of it is better."""

from typing import Literal, NamedTuple, TypeAlias

Mode: TypeAlias = Literal["min", "max"]


class TargetMetric(NamedTuple):
    """A metric with its direction. mode: `min` where smaller values are better, `max` where larger ones are."""

    name: str
    mode: Mode

    @property
    def sign(self) -> float:
        """The factor that turns a value into a loss, of which smaller is better."""
        return 1.0 if self.mode == "min" else -1.0

    def to_loss(self, value: float) -> float:
        """The value as a loss: smaller is better, NaN stays NaN."""
        return self.sign * value
