"""Why a decision about a trial was made, as numbers that can be checked.

Schedulers give reasons, and the events of a sweep store them. `handpose.report.reasons` makes sentences of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a decision was made. A field that the rule does not need is None.

    Attributes:
        rule: name of the rule, such as `rung`, or a few words that a reader understands.
        value: what was compared. A scheduler gives a loss, and the event stores the value of the metric.
        cutoff: what it was compared with, in the same unit.
        rank: place of the trial among those compared, counted from 1; None if it is not known.
        num_compared: number of trials compared, including this one.
        num_passing: how many of the best of them continue.
        subject: name of what was compared if it is not the metric, such as the name of a cost.
    """

    rule: str
    value: float | None = None
    cutoff: float | None = None
    rank: int | None = None
    num_compared: int | None = None
    num_passing: int | None = None
    subject: str | None = None
