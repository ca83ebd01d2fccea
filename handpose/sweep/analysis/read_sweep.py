"""Read a sweep from its folder, even while it runs; nothing is locked, repaired, decided or run.

The events are applied to the same `History` that a running sweep uses. Past decisions are taken as recorded and are not
repeated, so that sweeps of other versions can be read. What does not exist yet is left empty.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution

from handpose.errors import UserError
from handpose.files import join_inside, read_json
from handpose.report.sweep_record import (
    Candidate,
    CombinedSeeds,
    Confirmation,
    EpochReport,
    FailureRecord,
    HandPicture,
    Importance,
    Interval,
    RetrainedWinner,
    SecondObjective,
    SegmentRecord,
    SpaceChange,
    StoryLine,
    SweepRecord,
    TrialRecord,
)
from handpose.report.trial_table import TrialTable
from handpose.report.utilisation import EpochUtilisation
from handpose.schedulers.scheduler import Fifo
from handpose.search.space import flatten_config
from handpose.sweep.analysis.importance import MIN_TRIALS, TrialDraws, compute_importance
from handpose.sweep.analysis.searched_parameters import read_searched_space
from handpose.sweep.analysis.story import StoryEvents, tell_story
from handpose.sweep.controller.history import History, TrialHistory, make_empty_table
from handpose.sweep.controller.scheduler_and_searcher import restore_scheduler
from handpose.sweep.record.events import (
    EVENTS_FILE,
    CostsMeasured,
    EpochReported,
    Event,
    SegmentFailed,
    SegmentInterruptions,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialEnded,
    TrialSteered,
    read_events,
)
from handpose.sweep.record.settings import SweepSettings, restore_settings
from handpose.sweep.record.utilisation_file import UTILISATION_FILE, read_utilisation
from handpose.yaml_files import read_yaml

COMBINED_FOLDER = "combined"
"""Folder of what the networks of all seeds predict together, in the folder of the retraining."""

_PROVENANCE = ("data_fingerprint", "git", "versions", "command_line", "folder")


def read_sweep(folder: Path, *, with_importance: bool = True) -> SweepRecord:
    """Read everything that is known about the sweep in a folder.

    Args:
        folder: folder of the sweep.
        with_importance: whether to compute the importance of its parameters, which takes most of the time.

    Raises:
        UserError: the folder holds no sweep, or its files are damaged.
    """
    kept = read_yaml(folder / "sweep.yaml")
    config = kept.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("sweep"), dict):
        raise UserError(f"{folder} has no sweep: sweep.yaml is missing or incomplete; give the folder of a sweep")
    settings = restore_settings(config["sweep"], folder)
    table = make_empty_table(settings)
    history = History(settings, scheduler=Fifo(), table=table)
    course, stories = _Timeline(), StoryEvents()
    for event in read_events(folder / EVENTS_FILE):
        history.apply(event)
        course.add_event(event, settings.metric)
        stories.add(event)
    for number in history.live["running"]:
        history.trials[number].update_seconds(course.at)
    earlier_max_epochs = [settings.max_epochs, *history.raised_epochs][:-1]
    settings = replace(settings, max_epochs=history.settings.max_epochs)
    trials = _list_trial_records(folder, history, course, stories)
    fixed_params, later = kept.get("fixed_params") or {}, history.spaces
    searched = read_searched_space(folder, config, trials, fixed_params=fixed_params, later=later)
    parameters, distributions, fixed = searched
    rungs = None if course.has_steered_trials else _find_rungs(config, settings)  # a user selects from all trials
    record = SweepRecord(
        name=settings.name,
        folder=str(folder),
        metric=settings.metric,
        mode=settings.target.mode,
        num_trials=history.num_trials,
        max_epochs=settings.trial_epochs,
        num_slots=course.max_running,
        seconds=course.at,
        end=course.end,
        trials=trials,
        ranked=[row.number for row in table.rank_trials()],
        parameters=parameters,
        rungs=rungs or (),
        selects_only_at_rungs=rungs is not None,
        fixed=fixed,
        failures=course.failures,
        limits=_read_limits(config),
        second_objective=_make_second_objective(table),
        confirmation=_read_confirmation(folder / "confirm" / "confirm.yaml"),
        retrained=_read_retraining(folder / "retrain"),
        defaults=flatten_config(config) | dict(kept.get("choices") or {}),
        origin={name: kept[name] for name in _PROVENANCE if name in kept},
        configuration=config,
        best=read_yaml(folder / "best.yaml"),
        expected_gain=table.expected_gain,
        space_changes=_list_space_changes(history, course.steered_at),
        earlier_max_epochs=earlier_max_epochs,
        folds=settings.folds,
    )
    return replace(record, importance=_compute_sweep_importance(record, distributions)) if with_importance else record


def _list_trial_records(folder: Path, history: History, course: "_Timeline", stories: StoryEvents) -> list[TrialRecord]:
    measured, metric = read_utilisation(folder / UTILISATION_FILE), history.settings.metric
    return [
        _make_trial_record(trial, course, tell_story(stories.get(number), metric), metric, measured.get(number, ()))
        for number, trial in sorted(history.trials.items())
    ]


def _read_limits(config: Mapping[str, Any]) -> dict[str, float]:
    constraints = (config.get("searcher") or {}).get("constraints") or {}
    return {name: limit for name, limit in constraints.items() if limit is not None}


def _list_space_changes(history: History, steered_at: Sequence[float]) -> list[SpaceChange]:
    """List the changes of the search space, with the times at which the user made them."""
    numbers = list(history.trials)
    numbers.append(numbers[-1] + 1 if numbers else 0)
    counts = [change.num_trials for change in history.search_changes if change.space is not None]
    return [
        SpaceChange(space.name, at, numbers[count])
        for space, at, count in zip(history.spaces, steered_at, counts, strict=True)
    ]


def _find_rungs(config: Mapping[str, Any], settings: SweepSettings) -> tuple[int, ...] | None:
    """Return the only epochs at which trials were stopped or paused; None if it can have happened at others."""
    scheduler = restore_scheduler(config.get("scheduler") or {}, settings)
    return scheduler.rungs if scheduler is not None and scheduler.selects_only_at_rungs else None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass
class _Timeline:
    """What the table of trials does not contain: when each trial ran and reported, and what failed.

    Attributes:
        at: time of the last event, in seconds of the sweep's own time.
        end: why the sweep was closed; empty if the last event did not close it.
        max_running: highest number of trials that ran at a time.
        reports: trial -> its reports.
        segments: trial -> its segments that are over.
        failures: all failures.
        perturbed: trials that the scheduler gave other parameters.
        steered_at: when the user changed the search space.
        has_steered_trials: whether the user has stopped, retried or kept a trial, or has raised the number of epochs
            when some complete trials had no checkpoint to continue from.
    """

    at: float = 0.0
    end: Literal["", "finished", "spent", "interrupted", "halted"] = ""
    max_running: int = 0
    reports: dict[int, list[EpochReport]] = field(default_factory=dict)
    segments: dict[int, list[SegmentRecord]] = field(default_factory=dict)
    failures: list[FailureRecord] = field(default_factory=list)
    _running: dict[int, tuple[float, int]] = field(default_factory=dict)  # trial -> (start time, epoch)
    perturbed: set[int] = field(default_factory=set)
    steered_at: list[float] = field(default_factory=list)
    has_steered_trials: bool = False
    _complete: set[int] = field(default_factory=set)
    _interruptions: SegmentInterruptions = field(default_factory=SegmentInterruptions)

    def add_event(self, event: Event, metric: str) -> None:
        """Add the next event."""
        self.at, self.end = event.at, ""
        is_interrupted = bool(self._interruptions.add(event))
        match event:
            case SweepOpened():
                self._end_all_segments(event.at)
            case TrialSteered():
                self.has_steered_trials = True
                if event.action == "stop":
                    self._end_segment(event.trial, event.at, "over")
            case SweepSteered(action="epochs"):
                self.has_steered_trials |= self._complete != set(event.trials)
                self._complete.clear()
            case SweepSteered(action="space"):
                self.steered_at.append(event.at)
            case SegmentStarted():
                self._running[event.trial] = (event.at, event.epoch)
                self.max_running = max(self.max_running, len(self._running))
                if event.params is not None:
                    self.perturbed.add(event.trial)
            case CostsMeasured():
                if event.decision != "continue":
                    self._end_segment(event.trial, event.at, "over")
            case EpochReported():
                self._add_report(event, metric)
                if event.decision == "complete":
                    self._complete.add(event.trial)
                if event.decision != "continue" or is_interrupted:
                    self._end_segment(event.trial, event.at, "over")
            case SegmentFailed():
                self.failures.append(FailureRecord(event.trial, event.kind, event.cause, event.retry))
                self._end_segment(event.trial, event.at, "lost")
            case TrialEnded():
                self._end_segment(event.trial, event.at, "over")
            case SweepClosed():
                self._end_all_segments(event.at)
                self.end = event.reason

    def list_segments(self, number: int) -> list[SegmentRecord]:
        """List the segments of a trial that are over, followed by the running one."""
        done = self.segments.get(number, [])
        if number not in self._running:
            return done
        began, epoch = self._running[number]
        return [*done, SegmentRecord(began, self.at, epoch, "running")]

    def _add_report(self, event: EpochReported, metric: str) -> None:
        began = self._running.get(event.trial, (event.at, 0))[0]
        before = sum(segment.ended_s - segment.started_s for segment in self.segments.get(event.trial, []))
        value = event.metrics.get(metric, math.nan)
        report = EpochReport(event.epoch, event.at, before + event.at - began, value)
        self.reports.setdefault(event.trial, []).append(report)

    def _end_segment(self, trial: int, at: float, end: Literal["over", "lost"]) -> None:
        if trial in self._running:
            began, epoch = self._running.pop(trial)
            self.segments.setdefault(trial, []).append(SegmentRecord(began, at, epoch, end))

    def _end_all_segments(self, at: float) -> None:
        for trial in list(self._running):
            self._end_segment(trial, at, "lost")


def _make_trial_record(
    trial: TrialHistory,
    timeline: _Timeline,
    story: Sequence[StoryLine],
    metric: str,
    utilisation: Sequence[EpochUtilisation],
) -> TrialRecord:
    row = trial.row
    return TrialRecord(
        number=row.number,
        params=dict(row.params),
        state=row.state,
        epochs=row.epochs,
        value=row.metrics.get(metric, math.nan),
        seconds=row.seconds,
        metrics=dict(row.metrics),
        costs=dict(row.costs),
        reports=timeline.reports.get(row.number, ()),
        segments=timeline.list_segments(row.number),
        node=row.node,
        error=row.error,
        is_perturbed=row.number in timeline.perturbed,
        reason=row.reason,
        story=story,
        utilisation=utilisation,
    )


def _make_second_objective(table: TrialTable) -> SecondObjective | None:
    if not table.objectives:
        return None
    (other,) = table.objectives
    return SecondObjective(other.name, other.mode, [row.number for row in table.find_front()])


def _compute_sweep_importance(
    record: SweepRecord, distributions: Mapping[int, Mapping[str, BaseDistribution]]
) -> list[Importance]:
    values = {epoch: record.get_values_at(epoch) for epoch in record.list_compared_epochs(min_trials=MIN_TRIALS)}
    if not values:
        return []
    drawn = {
        trial.number: TrialDraws(
            {key: trial.params[key] for key in distributions[trial.number]}, distributions[trial.number]
        )
        for trial in record.trials
    }
    return compute_importance(drawn, values, sign=record.sign)


# --- confirmation and retraining --------------------------------------------------------------------------------------


def _read_confirmation(file: Path) -> Confirmation | None:
    content = read_yaml(file)
    if not content:
        return None
    with _explain_content_errors(file):
        candidates, gain = [_parse_candidate(each) for each in content["candidates"]], content.get("gain_over_default")
        confirmation = Confirmation(
            epochs=int(content["epochs"]),
            seeds=[int(seed) for seed in content["seeds"]],
            candidates=candidates,
            winner=None if content["winner"] is None else candidates[content["winner"]],
            gain=None if gain is None else _parse_interval(gain),
            method=str(content.get("method", "")),
            optimism=_parse_number(content.get("optimism")),
            unknown=dict(content.get("unknown") or {}),
        )
    return confirmation


@contextlib.contextmanager
def _explain_content_errors(file: Path) -> Iterator[None]:
    """Convert the errors of a file that has another structure or other types than a sweep writes."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} does not have the expected content ({type(error).__name__}: {error})") from error


def _parse_candidate(content: Mapping[str, Any]) -> Candidate:
    difference = content.get("difference_to_winner")
    return Candidate(
        label=str(content["label"]),
        trial=None if content["trial"] is None else int(content["trial"]),
        params=dict(content["params"] or {}),
        values={int(seed): _parse_number(value) for seed, value in content["values"].items()},
        mean=_parse_interval(content),
        difference=None if difference is None else _parse_interval(difference),
        is_distinguishable=content.get("distinguishable"),
        out=content.get("out") or "",
    )


def _parse_interval(content: Mapping[str, Any]) -> Interval:
    return Interval(*(_parse_number(content.get(name)) for name in ("mean", "low", "high")))


def _parse_number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _read_retraining(folder: Path) -> RetrainedWinner | None:
    file = folder / "metrics.json"
    if not file.is_file():
        return None
    with _explain_content_errors(file):
        metrics = _parse_numbers(read_json(file)["metrics"])
    combined = read_combined_seeds(folder)
    hands = folder if combined is None else folder / COMBINED_FOLDER
    return RetrainedWinner(metrics, _read_hands(hands / "hands"), combined)


def read_combined_seeds(folder: Path) -> CombinedSeeds | None:
    """Read what the networks of all seeds reach; None if the winner was retrained with one seed.

    Args:
        folder: folder of the retraining.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / COMBINED_FOLDER / "metrics.json"
    if not file.is_file():
        return None
    with _explain_content_errors(file):
        kept = read_json(file)
        return CombinedSeeds(
            seeds=[int(seed) for seed in kept["seeds"]],
            mean=_parse_numbers(kept["mean"]),
            deviation=_parse_numbers(kept["deviation"]),
            predict=str(kept["predict"]),
            predicted_by=[int(seed) for seed in kept["predicted_by"]],
            metrics=_parse_numbers(kept["metrics"]),
        )


def _parse_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _parse_number(value) for name, value in values.items()}


def _read_hands(folder: Path) -> list[HandPicture]:
    file, hands = folder / "hands.json", []
    with _explain_content_errors(file):
        for each in read_json(file) if file.is_file() else []:
            error_mm, jpeg = _parse_number(each["pa_mpjpe_mm"]), join_inside(folder, each["file"]).read_bytes()
            hands.append(HandPicture(str(each["kind"]), str(each["name"]), error_mm, jpeg))
    return hands
