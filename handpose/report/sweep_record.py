"""The record of a sweep, from which reports, advice and comparisons are made. This module reads no files.

Values at different epochs are never compared: `SweepRecord.get_values_at` returns the values at one epoch, and
`SweepRecord.ranked` lists the trials with the most epochs first. Times are seconds of the sweep's own time, which does
not advance while no process runs the sweep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from handpose.metrics.target import Mode, TargetMetric
from handpose.plain_values import is_same
from handpose.report.trial_table import TrialState
from handpose.report.utilisation import EpochUtilisation, Utilisation, combine

Values = Mapping[str, Any]

_NO_RESULT: tuple[TrialState, ...] = ("diverged", "infeasible", "failed")


class EpochReport(NamedTuple):
    """A report of a trial after an epoch.

    Attributes:
        epoch: the epoch, counted from 1.
        at_s: time of the report, in the sweep's own seconds.
        trial_s: seconds that the trial had held a slot by then, over all its segments.
        value: value of the sweep's metric.
    """

    epoch: int
    at_s: float
    trial_s: float
    value: float


class SegmentRecord(NamedTuple):
    """A segment of a trial: the time from its start or resumption until it ends, pauses or fails.

    Attributes:
        started_s: start time, in the sweep's own seconds.
        ended_s: end time; the current time while the segment runs.
        epoch: epoch of the checkpoint that the segment started from; 0 without a checkpoint.
        end: `running`: the segment has not ended. `over`: the sweep ended it by a decision. `lost`: it failed, or the
            process that ran the sweep ended.
    """

    started_s: float
    ended_s: float
    epoch: int
    end: Literal["running", "over", "lost"]


class FailureRecord(NamedTuple):
    """A failure of a segment of a trial.

    Attributes:
        trial: number of the trial.
        kind: kind of the failure, such as `gpu_memory` or `preempted`.
        cause: the error message, in one line.
        is_retried: whether the trial was retried.
    """

    trial: int
    kind: str
    cause: str
    is_retried: bool


class StoryLine(NamedTuple):
    """A line of the story of a trial.

    Attributes:
        at_s: when it happened, in the sweep's own seconds.
        text: what happened, and why.
    """

    at_s: float
    text: str


@dataclass(frozen=True)
class TrialRecord:
    """A trial of a sweep.

    Attributes:
        number: number of the trial.
        params: configuration key -> value.
        state: whether the trial runs, or how it ended.
        epochs: epoch of its last report; 0 without a report.
        value: value of the sweep's metric in its last report; NaN without a report, and not always finite if the trial
            diverged.
        seconds: how long the trial has held a slot.
        metrics: metric -> value, in its last report.
        costs: cost -> value, measured before training.
        reports: its reports.
        segments: its segments.
        node: name of the node of its last segment.
        error: why it failed, in one line.
        is_perturbed: whether its parameters were changed during training, as in population based training.
        reason: why it is in its state, in one line; empty if it runs, or if the sweep is of an earlier version.
        story: what happened to it, in order.
        utilisation: what it used until each report; empty if it was not measured.
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
    reason: str = ""
    story: Sequence[StoryLine] = ()
    utilisation: Sequence[EpochUtilisation] = ()

    @cached_property
    def used(self) -> Utilisation | None:
        """What it used until its last report; None if it was not measured."""
        return combine([each.used for each in self.utilisation]) if self.utilisation else None

    @property
    def curve(self) -> dict[int, float]:
        """The learning curve: epoch -> value of the sweep's metric."""
        return {report.epoch: report.value for report in self.reports}


@dataclass(frozen=True)
class Parameter:
    """A searched parameter.

    Attributes:
        key: its configuration key.
        kind: `float` and `int` have `low` and `high`, and possibly a `step`; `choice` has `choices`.
        low: the lowest value.
        high: the highest value.
        log: whether the range is logarithmic.
        step: distance between neighbouring values; None if there is none.
        choices: the options.
        expression: the range as written in the search space file; empty for a search space in Python.
        is_declared: whether the search space declares the range. Otherwise, it is the range of the observed values.
        is_conditional: whether some trials do not have the parameter.
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
        """Convert a value to its place in the range, from 0 to 1; on a logarithmic scale if the range is logarithmic.

        The options of a choice are evenly spaced. A value outside the range has a place below 0 or above 1.
        """
        if self.kind == "choice":
            return self.find_option(value) / max(1, len(self.choices) - 1)
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, float(value)))
        return (at - low) / (high - low) if high > low else 0.5

    def to_value(self, place: float) -> float:
        """Convert a place to the value of a numeric parameter. The place may be below 0 or above 1."""
        if self.log:
            return math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        return self.low + place * (self.high - self.low)

    def find_option(self, value: Any) -> int:
        """Return the index of an option. The options 1 and True are different."""
        return next(i for i, choice in enumerate(self.choices) if is_same(choice, value))

    @property
    def num_values(self) -> int | None:
        """The number of possible values; None if the range is continuous."""
        if self.kind == "choice":
            return len(self.choices)
        if self.step is None:
            return int(self.high - self.low) + 1 if self.kind == "int" else None
        return round((self.high - self.low) / self.step) + 1


class ParameterEffect(NamedTuple):
    """The importance of a parameter for being among the best trials.

    Attributes:
        key: its configuration key.
        share: its share of the importance of all parameters.
        low: 5 % quantile of the share over random halves of the trials.
        high: 95 % quantile of the share over random halves of the trials.
        noise_level: the largest importance in 20 repetitions with the values shuffled among the trials, as a share of
            the same total. With a searcher that learns, pure noise can exceed this level too, so a share above it does
            not show an effect.
    """

    key: str
    share: float
    low: float
    high: float
    noise_level: float


class Importance(NamedTuple):
    """The importance of all parameters, computed from the values at one epoch.

    Attributes:
        epoch: the epoch.
        num_trials: number of trials with a value at this epoch.
        num_best: how many of them count as the best trials.
        effects: the importance of each parameter, the largest first.
    """

    epoch: int
    num_trials: int
    num_best: int
    effects: Sequence[ParameterEffect]


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval; the ends are NaN if there is no interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """A configuration that was trained again during the confirmation.

    Attributes:
        label: its name in reports.
        trial: number of its trial; None for the default configuration.
        params: configuration key -> value.
        values: seed -> value of the sweep's metric.
        mean: mean of the values.
        difference: mean difference to the winner; None if it is not known.
        is_distinguishable: whether the difference to the winner is significant; None if it is not known.
        out: why the candidate was excluded; empty if it was not.
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
    """The confirmation: the best trials and the default configuration, trained again over fresh seeds.

    Attributes:
        epochs: number of epochs of each run.
        seeds: the seeds.
        candidates: the configurations.
        winner: the candidate with the best mean; None if all were excluded.
        gain: improvement of the winner over the default configuration; positive is better. None if it is not known.
        method: a description of the statistical method.
        optimism: by how much the winner's mean is too good on average, because it was selected as the best of several
            means; NaN if it is not known.
        unknown: name of a result that the runs do not show (`interval`, `not_distinguishable_from`,
            `gain_over_default`) -> the reason.
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
        """The candidates that are compared with the winner; empty if the runs do not show how large the noise is."""
        return [
            each for each in self.candidates if each is not self.winner and each.is_distinguishable in (True, False)
        ]

    @property
    def why_not_compared(self) -> str:
        """The reason why no candidate is compared with the winner."""
        return self.unknown.get("not_distinguishable_from", "the runs do not show how large the noise is")


class HandPicture(NamedTuple):
    """A test image with its prediction drawn on it.

    Attributes:
        kind: `worst`, `best` or `other`.
        name: name of the image.
        error_mm: PA-MPJPE; NaN if the true joints are not known.
        jpeg: the picture.
    """

    kind: str
    name: str
    error_mm: float
    jpeg: bytes


@dataclass(frozen=True)
class CombinedSeeds:
    """What the networks of all seeds reach with which a winner was retrained.

    Attributes:
        seeds: the seeds.
        mean: metric of the test split -> mean over the seeds; NaN if it is unknown for one of them.
        deviation: metric of the test split -> standard deviation between the seeds.
        predict: whose predictions were written: `ensemble`, `best` or `first`.
        predicted_by: the seeds of these networks.
        metrics: metric of the test split -> value of these predictions.
    """

    seeds: Sequence[int]
    mean: Mapping[str, float]
    deviation: Mapping[str, float]
    predict: str
    predicted_by: Sequence[int]
    metrics: Mapping[str, float]

    def describe_predictions(self) -> str:
        """Describe in a few words whose predictions were written."""
        if self.predict == "ensemble":
            return f"the mean of the {len(self.seeds)} networks"
        which = "best on validation" if self.predict == "best" else "first"
        return f"the network with seed {self.predicted_by[0]}, the {which}"


@dataclass(frozen=True)
class RetrainedWinner:
    """The winner, retrained with its full schedule.

    Attributes:
        metrics: metric -> value, including those under `test/` and `baseline/` if they were measured. If there are
            several seeds, they are those of the first one.
        hands: test images with predictions.
        combined: the results of all seeds; None if there is only one.
    """

    metrics: Mapping[str, float]
    hands: Sequence[HandPicture] = ()
    combined: CombinedSeeds | None = None


class SecondObjective(NamedTuple):
    """The second objective of a sweep.

    Attributes:
        name: name of the cost that is optimised.
        mode: `min` or `max`.
        front: numbers of the trials on the Pareto front.
    """

    name: str
    mode: Mode
    front: Sequence[int]


class SpaceChange(NamedTuple):
    """A change of the search space by the user, while the sweep ran.

    Attributes:
        name: name of the file of the new space.
        at_s: when it was changed, in the sweep's own seconds.
        first_trial: the number of the first trial that was proposed from it, or that would be.
    """

    name: str
    at_s: float
    first_trial: int


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, which may still be running.

    Attributes:
        name: name of the sweep.
        folder: its folder.
        metric: the metric that is optimised.
        mode: `min` or `max`, the better direction of the metric.
        num_trials: planned number of trials.
        max_epochs: number of epochs of a complete trial.
        num_slots: the highest number of trials that ran at the same time.
        seconds: its own time so far.
        end: why it was closed, as in `SweepClosed.reason`; empty while it runs or after it was killed.
        trials: all trials.
        ranked: numbers of the trials with a finite value, without those that failed, diverged or were infeasible.
            Trials with more epochs come first, and among those with equally many, the better value.
        parameters: the searched parameters.
        rungs: epochs at which the scheduler compares trials.
        selects_only_at_rungs: as in `Scheduler`.
        fixed: configuration key -> value, for keys with the same value in all trials.
        failures: all failures of segments.
        limits: constraint -> upper limit of the cost.
        importance: the importance of the parameters at up to three epochs, ascending.
        second_objective: the second objective; None if there is none.
        confirmation: the confirmation; None if there is none.
        retrained: the retrained winner; None if there is none.
        defaults: configuration key -> default value.
        origin: versions, Git revision, fingerprint of the data, and command line.
        configuration: the composed configuration.
        best: the content of best.yaml.
        expected_gain: what doubling the number of trials was expected to gain, if the sweep ended for that.
        space_changes: the changes of the search space by the user, in order.
        earlier_max_epochs: the numbers of epochs of a complete trial before the user raised them, in order.
        folds: number of folds that a complete trial is trained with, one after another.
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
    expected_gain: float | None = None
    space_changes: Sequence[SpaceChange] = ()
    earlier_max_epochs: Sequence[int] = ()
    folds: int = 1

    @property
    def fold_epochs(self) -> int:
        """Number of epochs of each training of a trial. Values of later epochs are means over several of them."""
        return self.max_epochs // self.folds

    @cached_property
    def used(self) -> Utilisation | None:
        """What all trials used together; None if nothing was measured."""
        measured = [trial.used for trial in self.trials if trial.used is not None]
        return combine(measured) if measured else None

    @property
    def sign(self) -> float:
        """The factor that turns a value of the metric into a loss; a smaller loss is better."""
        return TargetMetric(self.metric, self.mode).sign

    def get_trial(self, number: int) -> TrialRecord:
        """Return the trial with this number."""
        return next(trial for trial in self.trials if trial.number == number)

    def list_leading_trials(self, num: int) -> list[TrialRecord]:
        """Return the first `num` ranked trials."""
        by_number = {trial.number: trial for trial in self.trials}
        return [by_number[number] for number in self.ranked[:num]]

    def get_values_at(self, epoch: int) -> dict[int, float]:
        """Return trial -> finite value at exactly this epoch.

        Trials that failed, diverged or were infeasible are left out, and so are trials whose parameters were changed
        during training, because their values are not the result of one set of parameters.
        """
        own = [trial for trial in self.trials if not trial.is_perturbed and trial.state not in _NO_RESULT]
        found = {trial.number: trial.curve.get(epoch, math.nan) for trial in own}
        return {number: value for number, value in found.items() if math.isfinite(value)}

    def list_compared_epochs(self, *, min_trials: int) -> list[int]:
        """List the rungs and the last epoch, ascending, if at least `min_trials` trials have a value there."""
        epochs = sorted({*self.rungs, self.max_epochs})
        return [epoch for epoch in epochs if len(self.get_values_at(epoch)) >= min_trials]

    def find_parameter(self, key: str) -> Parameter | None:
        """Return the searched parameter with this key; None if the key is not searched."""
        return next((parameter for parameter in self.parameters if parameter.key == key), None)

    def find_winner(self) -> TrialRecord | None:
        """Return the trial in best.yaml if that exists, otherwise the first ranked trial."""
        number = self.best.get("trial", self.ranked[0] if self.ranked else None)
        return next((trial for trial in self.trials if trial.number == number), None)
