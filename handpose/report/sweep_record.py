"""A sweep as its files tell of it: what reports, advice and comparisons are made of. Nothing here reads a file.

Values of different epochs are never compared: `values_at` gives those of one epoch, and `best` the order in which the
most trained come first. A second is the sweep's own, which stands still while no process runs it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from handpose.metrics.target import Mode, TargetMetric
from handpose.plain_values import is_same
from handpose.report.trial_table import TrialState

Values = Mapping[str, Any]

_NO_RESULT: tuple[TrialState, ...] = ("diverged", "infeasible", "failed")


class EpochReport(NamedTuple):
    """A trial reported an epoch.

    trial_s: seconds in its slot so far. value: of the sweep's metric.
    """

    epoch: int
    at_s: float
    trial_s: float
    value: float


class SegmentRecord(NamedTuple):
    """A part of a trial in one worker.

    epoch: of the checkpoint that it began with. end: running; over, by a decision of the sweep; lost, by a failure or
    with the process that ran the sweep.
    """

    started_s: float
    ended_s: float
    epoch: int
    end: Literal["running", "over", "lost"]


class FailureRecord(NamedTuple):
    """A stretch failed. cause: in a line. is_retried: the trial was tried again."""

    trial: int
    kind: str
    cause: str
    is_retried: bool


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    epochs, value: of its last report; NaN where it diverged or reported nothing. seconds: in its slot. error: why it
    failed, in a line. costs: measured before it was trained. is_perturbed: its parameters were changed on the way, as
    population based training does.
    """

    number: int
    params: Values
    state: TrialState
    epochs: int
    value: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    reports: Sequence[EpochReport] = ()
    segments: Sequence[SegmentRecord] = ()
    node: str = ""
    error: str = ""
    is_perturbed: bool = False

    @property
    def curve(self) -> dict[int, float]:
        """Epoch -> value."""
        return {report.epoch: report.value for report in self.reports}


@dataclass(frozen=True)
class Parameter:
    """What is searched under one configuration key.

    kind: numbers have low and high, whole ones a step; a choice has choices. expression: of the space's file, empty for
    a space in Python. is_declared: the range is the space's own, and not only what was seen. is_conditional: it is not
    drawn in every trial.
    """

    key: str
    kind: Literal["float", "int", "choice"]
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    step: float | None = None
    choices: Sequence[Any] = ()
    expression: str = ""
    is_declared: bool = True
    is_conditional: bool = False

    def to_place(self, value: Any) -> float:
        """Where a value lies, 0 to 1: along the range, by its logarithm where the range is logarithmic."""
        if self.kind == "choice":
            return self.find_option(value) / max(1, len(self.choices) - 1)
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, float(value)))
        return (at - low) / (high - low) if high > low else 0.5

    def to_value(self, place: float) -> float:
        """The number at a place, which may lie outside of 0 to 1."""
        if self.log:
            return math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        return self.low + place * (self.high - self.low)

    def find_option(self, value: Any) -> int:
        """The number of a choice; 1 and True differ."""
        return next(i for i, choice in enumerate(self.choices) if is_same(choice, value))

    @property
    def num_values(self) -> int | None:
        """How many values there are; None: any number of the range."""
        if self.kind == "choice":
            return len(self.choices)
        if self.step is None:
            return int(self.high - self.low) + 1 if self.kind == "int" else None
        return round((self.high - self.low) / self.step) + 1


class ParameterEffect(NamedTuple):
    """How much a parameter matters for being among the best.

    share: of all parameters' importance; low, high: where it lies for 90 % of the halves of the trials. noise_level:
        the
    most that came out with the values shuffled among the trials, 20 times; a searcher that learns exceeds it in noise
    too, so that it shows no effect by itself.
    """

    key: str
    share: float
    low: float
    high: float
    noise_level: float


class Importance(NamedTuple):
    """Of all parameters, by the values of one epoch. num_best: trials that count as best, of num_trials."""

    epoch: int
    num_trials: int
    num_best: int
    effects: Sequence[ParameterEffect]


class Interval(NamedTuple):
    """A mean with its 95 % interval; NaN ends where there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """A configuration that was confirmed.

    trial: None for the default one. values: by seed. difference: to the winner. out: why it does not count, or nothing.
    """

    label: str
    trial: int | None
    params: Values
    values: Mapping[int, float]
    mean: Interval
    difference: Interval | None
    is_distinguishable: bool | None
    out: str = ""


@dataclass(frozen=True)
class Confirmation:
    """The best trials and the default configuration, trained again over fresh seeds.

    winner: the candidate with the best mean; None where none came through. gain: over the default, more is better.
    optimism: by how much the winner's mean is too good on average, NaN where that is not known. unknown: name of what
    the runs do not show -> why (`interval`, `not_distinguishable_from`, `gain_over_default`).
    """

    epochs: int
    seeds: Sequence[int]
    candidates: Sequence[Candidate]
    winner: Candidate | None
    gain: Interval | None
    method: str
    optimism: float = math.nan
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def compared(self) -> list[Candidate]:
        """The candidates that the runs compare with the winner; none where they do not show how large the noise is."""
        return [
            each for each in self.candidates if each is not self.winner and each.is_distinguishable in (True, False)
        ]

    @property
    def why_not_compared(self) -> str:
        """Why nothing is compared with the winner."""
        return self.unknown.get("not_distinguishable_from", "the runs do not show how large the noise is")


class HandPicture(NamedTuple):
    """A test picture with its prediction. kind: worst, best or other. error_mm: NaN where the truth is not known."""

    kind: str
    name: str
    error_mm: float
    jpeg: bytes


@dataclass(frozen=True)
class RetrainedWinner:
    """The winner, trained with its full schedule. metrics: test/ and baseline/ where they were measured."""

    metrics: Mapping[str, float]
    hands: Sequence[HandPicture] = ()


class SecondObjective(NamedTuple):
    """A second objective: one of the trials' costs. front: trials that no other beats in both, by number."""

    name: str
    mode: Mode
    front: Sequence[int]


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, also while it runs.

    metric, mode: what is optimised. num_trials, max_epochs: as planned. seconds: of its own time; end: how the last
    process left it, empty while it runs or after it was killed. rungs: epochs at which trials are compared.
    selects_only_at_rungs: as in `Scheduler`. ranked: sound trials by number, the most trained first and among equals
    the best. defaults: configuration key -> value. origin: versions, revision, data and command. configuration: as
    composed. best: what best.yaml has.
    """

    name: str
    folder: str
    metric: str
    mode: Mode
    num_trials: int
    max_epochs: int
    num_slots: int
    seconds: float
    end: Literal["", "finished", "spent", "interrupted", "halted"]
    trials: Sequence[TrialRecord]
    ranked: Sequence[int]
    parameters: Sequence[Parameter]
    rungs: Sequence[int] = ()
    selects_only_at_rungs: bool = False
    fixed: Values = field(default_factory=dict)
    failures: Sequence[FailureRecord] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    importance: Sequence[Importance] = ()
    second_objective: SecondObjective | None = None
    confirmation: Confirmation | None = None
    retrained: RetrainedWinner | None = None
    defaults: Values = field(default_factory=dict)
    origin: Values = field(default_factory=dict)
    configuration: Values = field(default_factory=dict)
    best: Values = field(default_factory=dict)

    @property
    def sign(self) -> float:
        """The factor that turns a value of the metric into a loss, of which smaller is better."""
        return TargetMetric(self.metric, self.mode).sign

    def get_trial(self, number: int) -> TrialRecord:
        return next(trial for trial in self.trials if trial.number == number)

    def list_leading_trials(self, num: int) -> list[TrialRecord]:
        """The first so many of the ranked trials."""
        by_number = {trial.number: trial for trial in self.trials}
        return [by_number[number] for number in self.ranked[:num]]

    def get_values_at(self, epoch: int) -> dict[int, float]:
        """Trial -> finite value of exactly that epoch, which all its parameters led to."""
        own = [trial for trial in self.trials if not trial.is_perturbed and trial.state not in _NO_RESULT]
        found = {trial.number: trial.curve.get(epoch, math.nan) for trial in own}
        return {number: value for number, value in found.items() if math.isfinite(value)}

    def list_compared_epochs(self, *, min_trials: int) -> list[int]:
        """Rungs and the last epoch, ascending: those with the values of at least so many trials."""
        epochs = sorted({*self.rungs, self.max_epochs})
        return [epoch for epoch in epochs if len(self.get_values_at(epoch)) >= min_trials]

    def find_parameter(self, key: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.key == key), None)

    def find_winner(self) -> TrialRecord | None:
        """The trial of best.yaml where there is one, else the first of the ranked."""
        number = self.best.get("trial", self.ranked[0] if self.ranked else None)
        return next((trial for trial in self.trials if trial.number == number), None)
