"""Audits what a sweep writes in addition to its events: trials.csv, the study, TensorBoard files and checkpoints."""

import csv
import itertools
import json
import math
import re
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial, TrialState
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from handpose.errors import UserError
from handpose.plain_values import is_same
from handpose.report.tensorboard import ABSENT, EPOCHS, NOT_OVER, SECONDS, STATE, to_column_value
from handpose.report.trial_table import TrialRow, TrialTable
from handpose.report.utilisation import WORKER_PREFIX
from handpose.search.distributions import parse_label
from handpose.search.points import find_finite_points, place_added_point, place_configuration, place_values
from handpose.search.searcher import TrialSnapshot
from handpose.search.space import Params, Space, YamlSpace
from handpose.search.study import (
    COST_NAMES,
    JOURNAL_FILE,
    ORIGIN_ATTRIBUTE,
    PARAMS_ATTRIBUTE,
    PLACED_ATTRIBUTE,
    PLAN_ATTRIBUTE,
    compute_excess,
    get_placed_params,
    get_trial_params,
)
from handpose.sweep.audit.events import AuditFinding, Lost, Repeated, ReplayResult, Wrong, find_differences
from handpose.sweep.controller.history import TrialHistory, snapshot_trial
from handpose.sweep.driver.resume import SweepTask
from handpose.sweep.record.events import (
    EVENTS_FILE,
    FORMAT_WITH_REASONS,
    CheckpointRecord,
    CostsMeasured,
    EpochReported,
    SegmentStarted,
    SweepClosed,
    SweepOpened,
    SweepSteered,
    TrialSuggested,
)
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, make_run_name
from handpose.sweep.storage.retention import is_intact
from handpose.sweep.trainable.trial import TrialRecipe


class AuditedSweep(NamedTuple):
    """A sweep as sweep.yaml and its search space describe it.

    Attributes:
        task: what tune.py was asked to run.
        settings: settings of the sweep.
        limits: cost -> upper limit.
        recipe: how its trials are started.
    """

    task: SweepTask
    settings: SweepSettings
    limits: Mapping[str, float]
    recipe: TrialRecipe


def is_truncated(file: Path) -> bool:
    """Return whether a text file exists but does not end with a line break."""
    return file.is_file() and not file.read_bytes().endswith(b"\n")


def audit_trial_files(
    replayed: ReplayResult, settings: SweepSettings, label: str = "", *, in_tab: bool
) -> Iterator[AuditFinding]:
    """Compare trials.csv, the TensorBoard files and the checkpoints of trials with the events.

    Args:
        replayed: the replayed events.
        settings: settings of the sweep.
        label: prefix of file names in findings.
        in_tab: whether the HParams tab of TensorBoard shows the trials.
    """
    folder, is_ahead = settings.path, settings.storage is not None
    yield from _audit_csv(replayed, folder / "trials.csv", f"{label}trials.csv")
    yield from _audit_tensorboard(
        replayed, folder / "tensorboard", f"{label}tensorboard", in_tab=in_tab, is_ahead=is_ahead
    )
    if settings.storage is None:
        yield from _audit_checkpoints(replayed, folder, label)


# --- trials.csv -------------------------------------------------------------------------------------------------------


def _audit_csv(replayed: ReplayResult, file: Path, label: str) -> Iterator[AuditFinding]:
    """Compare trials.csv with the table that results from the events, cell by cell.

    While a sweep runs, and after it was killed, trials.csv may show an earlier moment.

    Args:
        replayed: the replayed events.
        file: path of trials.csv.
        label: name of the file in findings.
    """
    if not file.is_file():
        if any(isinstance(event, SegmentStarted) for _, event in replayed.events):
            yield Lost(f"{label} is missing")
        return
    if is_truncated(file):
        yield Wrong(f"{label} is truncated: its last line has no line break")
    try:
        header, lines = _read_csv(file)
    except (csv.Error, UnicodeDecodeError) as error:
        yield Wrong(f"{label} is damaged ({error})")
        return
    numbers = [line[0] if line else "" for line in lines]
    for number in {each for each in numbers if numbers.count(each) > 1}:
        yield Repeated(f"{label} has {numbers.count(number)} rows of trial {number}")
    rows = {line[0]: dict(zip(header, line, strict=False)) for line in lines if line}
    expected = _make_table_at(replayed, _find_csv_moment(replayed, rows))
    with tempfile.TemporaryDirectory() as folder:
        expected.write_csv(Path(folder) / "trials.csv")
        wanted_header, wanted_lines = _read_csv(Path(folder) / "trials.csv")
    wanted = {line[0]: dict(zip(wanted_header, line, strict=True)) for line in wanted_lines}
    if "reason" not in header and _is_without_reasons(replayed):
        wanted_header.remove("reason")
        for cells in wanted.values():
            del cells["reason"]
    if header != wanted_header:
        yield Wrong(f"{label}: line 1 names the columns {', '.join(header)} instead of {', '.join(wanted_header)}")
    if numbers != sorted(numbers, key=lambda number: (len(number), number)):
        yield Wrong(f"{label}: the rows are not in the order of the trial numbers")
    for place, line in enumerate(lines, start=2):
        if len(line) != len(header):
            yield Wrong(f"{label}: line {place} has {len(line)} cells, but line 1 has {len(header)}")
            break
    yield from (Lost(f"{label} has no row of trial {number}") for number in wanted if number not in rows)
    has_commands = any(row.get("command") for row in rows.values())
    for number, cells in rows.items():
        if number not in wanted:
            yield Wrong(f"{label} has a row of trial {number}, which is not in {EVENTS_FILE}")
            continue
        row = expected.rows[int(number)]
        for name, cell in wanted[number].items():
            if name == "command" or (name == "seconds" and row.state == "running"):  # increases between reports
                continue
            if cells.get(name) != cell and not (name == "reason" and _has_same_numbers(cells.get(name), cell)):
                said = f"{name}={cells.get(name)!r}, but {EVENTS_FILE} gives {cell!r}"
                yield Wrong(f"{label}: trial {number} has {said}")
        if has_commands and not _is_same_command(cells.get("command", ""), row, replayed):
            yield Wrong(f"{label}: trial {number} has a command that does not train its parameters")


def _is_without_reasons(replayed: ReplayResult) -> bool:
    """Return whether only earlier versions of the project, whose trials.csv has no reasons, have run the sweep."""
    versions = [event.version for _, event in replayed.events if isinstance(event, SweepOpened)]
    return max(versions, default=0) < FORMAT_WITH_REASONS


def _has_same_numbers(ours: str | None, theirs: str) -> bool:
    """Return whether two sentences have the same numbers. Another version of the project may word them otherwise."""
    return bool(ours) and bool(theirs) and re.findall(r"\d[\d.]*", ours or "") == re.findall(r"\d[\d.]*", theirs)


def _read_csv(file: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and the other lines."""
    with file.open(newline="", encoding="utf-8") as stream:
        header, *lines = [*csv.reader(stream)] or [[]]
    return header, lines


def _find_csv_moment(replayed: ReplayResult, rows: Mapping[str, Mapping[str, str]]) -> int:
    """Return the index of the event after which the table agrees with most rows of trials.csv.

    If several events qualify, the last one counts.
    """
    num_events = len(replayed.events)
    if replayed.is_closed or not num_events:
        return num_events - 1
    change = [0] * (num_events + 1)  # of the number of rows that agree, from one event to the next
    for number, states in replayed.rows.items():
        shown = rows.get(str(number))
        spans = [(-1, None), *states, (num_events, None)]
        for (begin, row), (end, _) in itertools.pairwise(spans):
            if (shown is None) if row is None else (shown is not None and _matches_row(shown, row)):
                change[max(begin, 0)] += 1
                change[end] -= 1
    agreeing, best, most = 0, num_events - 1, -1
    for index in range(num_events):
        agreeing += change[index]
        if agreeing >= most:
            best, most = index, agreeing
    return best


def _matches_row(shown: Mapping[str, str], row: TrialRow) -> bool:
    written = (shown.get("state"), shown.get("epochs"), any(shown.get(name) for name in row.costs or COST_NAMES))
    return written == (row.state, str(row.epochs), bool(row.costs)) and (
        row.state == "running" or shown.get("seconds") == str(round(row.seconds, 2))
    )


def _make_table_at(replayed: ReplayResult, moment: int) -> TrialTable:
    """Return the table after the event with this index."""
    begun = [number for number, states in replayed.rows.items() if states[0][0] <= moment]
    return replace(replayed.history.table, rows={number: replayed.get_row(number, moment) for number in begun})


def _is_same_command(written: str, row: TrialRow, replayed: ReplayResult) -> bool:
    """Return whether a command line trains the row's parameters.

    If several processes ran the sweep, paths are ignored: each of them may have had others.
    """
    try:
        ours, theirs = shlex.split(row.command), shlex.split(written)
    except ValueError:
        return False
    if replayed.num_processes > 1:
        ours, theirs = (
            [each for each in words if not each.startswith(("paths.", "data.root"))] for words in (ours, theirs)
        )
    return ours == theirs


# --- the study --------------------------------------------------------------------------------------------------------


def audit_study(audited: AuditedSweep, replayed: ReplayResult, study: optuna.Study) -> Iterator[AuditFinding]:
    """Compare the study of a sweep with its settings and its events."""
    task, first = audited.task, get_first_number(study)
    is_journal = task.config.searcher.storage is None
    label = f"study/{JOURNAL_FILE}" if is_journal else "the study"
    yield from _audit_study_settings(audited, study, label)
    if task.config.searcher.sampler is not None:  # a grid is enumerated in its own order
        yield from _audit_plan(study, replayed, audited, label=label)
    yield from _audit_study_trials(audited, replayed, study, label)
    if is_journal:
        file = audited.settings.path / "study" / JOURNAL_FILE
        yield from _audit_journal(replayed, file, num_before=first, limits=audited.limits, label=label)


def get_first_number(study: optuna.Study) -> int:
    """Return the number of the sweep's first trial; the ones before it come from earlier sweeps."""
    return int(study.user_attrs.get("plan", {}).get("first_number", 0))


def _audit_study_settings(audited: AuditedSweep, study: optuna.Study, label: str) -> Iterator[AuditFinding]:
    settings, first = audited.settings, get_first_number(study)
    names = [settings.metric, *filter(None, [settings.second_objective])]
    directions = [settings.target.mode, "min"][: len(names)]
    if [each.name.lower()[:3] for each in study.directions] != directions:
        yield Wrong(f"{label} has the directions {study.directions}, but the sweep has {', '.join(directions)}")
    if study.metric_names != names:
        yield Wrong(f"{label} has the objectives {study.metric_names}, but the sweep has {', '.join(names)}")
    brought = study.user_attrs.get("warm_start", [])
    num_brought = len(audited.task.config.searcher.get("warm_start") or [])
    if len(brought) != num_brought:
        yield Wrong(f"{label} was warm-started from {len(brought)} sweeps, but sweep.yaml names {num_brought}")
    num_earlier = sum(each.get("brought", 0) for each in brought)
    if num_earlier != first:
        yield Wrong(f"{label}: the first trial of the sweep is {first}, but its warm start has {num_earlier} trials")


def _audit_study_trials(
    audited: AuditedSweep, replayed: ReplayResult, study: optuna.Study, label: str
) -> Iterator[AuditFinding]:
    first_number, histories = get_first_number(study), replayed.history.trials
    stored = {each.number: each for each in study.get_trials(deepcopy=False) if each.number >= first_number}
    newest = first_number + len(histories)
    for number, trial in sorted(stored.items()):
        is_next = number == newest and not (replayed.is_closed and replayed.num_processes == 1)
        if number not in histories and not is_next and trial.state != TrialState.FAIL:
            yield Repeated(f"{label} has a trial {number}, which is not in {EVENTS_FILE}")
    lagging = replayed.events[-1][1] if replayed.events and not replayed.is_closed else None
    origins = {event.trial: event.origin for _, event in replayed.events if isinstance(event, TrialSuggested)}
    for number, history in histories.items():
        if number not in stored:
            yield Lost(f"{label} has no trial {number}")
            continue
        place, params = f"{label}: trial {number}", replayed.suggested_params.get(number, {})
        spaces = audited.task.spaces
        own = spaces[min(replayed.history.count_spaces(number), len(spaces) - 1)]
        yield from _audit_study_params(place, stored[number], params, own=own, space=spaces[-1])
        if own is not spaces[-1]:
            yield from _audit_moved_trial(place, stored[number], params, audited)
        origin = stored[number].user_attrs.get(ORIGIN_ATTRIBUTE)  # None in earlier versions, and in a restored study
        if origin is not None and origins.get(number) not in (None, "", origin):
            yield Wrong(f"{place} is {origin!r}, but {EVENTS_FILE} has {origins[number]!r}")
        if getattr(lagging, "trial", None) != number:  # else the process may have been killed before it updated it
            yield from _audit_study_outcome(place, stored[number], history, audited, replayed)
    yield from _audit_dates(list(stored.values()), replayed, label)
    starts = [(number, trial.datetime_start) for number, trial in sorted(stored.items())]
    for (_, before), (number, start) in itertools.pairwise(starts):
        if before is not None and start is not None and (before - start).total_seconds() > _CLOCK_CHANGE_S:
            yield Wrong(f"{label}: trial {number} has an earlier start date than the trial before it")


_CLOCK_CHANGE_S = 3 * 3600.0
"""Tolerance for dates: neither the end of daylight saving time nor an adjusted clock is a finding."""


def _audit_dates(trials: Sequence[FrozenTrial], replayed: ReplayResult, label: str) -> Iterator[AuditFinding]:
    """Check that the trials took no longer by their dates than by the events, if a single process ran the sweep."""
    if replayed.num_processes != 1 or not replayed.events:
        return
    first, last = replayed.events[0][1].at, replayed.events[-1][1].at
    dated = [
        (date, trial.number)
        for trial in trials
        for date in (trial.datetime_start, trial.datetime_complete)
        if date is not None
    ]
    if not dated:
        return
    (earliest, one), (latest, other) = min(dated), max(dated)
    if (latest - earliest).total_seconds() > last - first + _CLOCK_CHANGE_S:
        said = f"trial {one} has the date {earliest} and trial {other} has {latest}"
        yield Wrong(f"{label}: {said}, but according to {EVENTS_FILE} the sweep took {last - first:.0f} s")


def _audit_plan(
    study: optuna.Study, replayed: ReplayResult, audited: AuditedSweep, *, label: str
) -> Iterator[AuditFinding]:
    """Check draws that were decided before their trial was proposed.

    They must be those of the study's plan, or those that the user has added, and the trial must have them.
    """
    plan = study.user_attrs.get(PLAN_ATTRIBUTE, {})
    points, space = plan.get("points", []), audited.task.space
    start = plan.get("start", get_first_number(study))  # trials of earlier search spaces have lower numbers
    added = {number: draws for number, draws in _place_added_points(replayed, audited).items() if number >= start}
    list_points = cache(partial(find_finite_points, space))  # a Python space is called for each of its points
    own = [trial for trial in study.get_trials(deepcopy=False)[start:] if trial.number not in added]
    for number, draws in added.items():
        decided = study.get_trials(deepcopy=False)[number].system_attrs.get(_DECIDED, draws)
        if not is_same(decided, draws):
            yield Wrong(f"{label}: trial {number} was enqueued with {decided}, but the user has added {draws}")
    for index, trial in enumerate(own):
        decided = trial.system_attrs.get(_DECIDED)
        if decided is None:  # the sampler drew all of its values
            continue
        place_of = f"{label}: trial {trial.number}"
        for name in decided.keys() & trial.params.keys():
            if not is_same(decided[name], trial.params[name]):
                said = f"{name}={trial.params[name]}, but was enqueued with {decided[name]}"
                yield Wrong(f"{place_of} has {said}")
        if index < len(points) and not is_same(decided, points[index]):
            yield Wrong(f"{place_of} was enqueued with {decided}, but the plan of the study has {points[index]}")
        elif index >= len(points) and list_points() is None:
            yield Lost(f"{place_of} was enqueued with {decided}, which is not in the plan of the study")


def _place_added_points(replayed: ReplayResult, audited: AuditedSweep) -> dict[int, Params]:
    """Return the draws that were decided for the trials which the user has added."""
    task, events = audited.task, [event for _, event in replayed.events]
    params = {event.intervention: event.params for event in events if isinstance(event, SweepSteered)}
    suggested = [event for event in events if isinstance(event, TrialSuggested) and event.added_by]
    numbers = {event.trial: replayed.history.count_spaces(event.trial) for event in suggested}
    return {
        event.trial: place_added_point(
            task.spaces[numbers[event.trial]], params.get(event.added_by) or {}, task.defaults
        )
        for event in suggested
    }


_DECIDED = "fixed_params"
"""System attribute that Optuna gives to enqueued trials."""


def _audit_moved_trial(
    place_of: str, trial: FrozenTrial, suggested: Params, audited: AuditedSweep
) -> Iterator[AuditFinding]:
    """Check that the searcher learns from a trial of an earlier search space if the newest one contains it."""
    task = audited.task
    if not trial.params and place_configuration(task.space, suggested, task.defaults) is not None:
        yield Lost(f"{place_of} has no draws, although {task.space.file.name} contains its parameters")


def _audit_study_params(
    place_of: str, trial: FrozenTrial, suggested: Params, *, own: Space, space: Space
) -> Iterator[AuditFinding]:
    """Compare the parameters of a trial in the study with those in the events and with its draws.

    Args:
        place_of: what to call the trial in findings.
        trial: the trial in the study.
        suggested: its parameters according to the events.
        own: the search space from which it was proposed.
        space: the search space of the study, to which its draws belong.
    """
    for name, theirs, ours in find_differences(get_trial_params(trial), suggested):
        yield Wrong(f"{place_of} has the parameter {name}={theirs}, but {EVENTS_FILE} has {ours}")
    if isinstance(own, YamlSpace) and list(suggested) != list(own.expressions):
        searched = ", ".join(own.expressions)
        yield Wrong(f"{place_of} has the parameters {', '.join(suggested)}, but {own.file.name} searches {searched}")
    if not trial.params:
        return
    try:
        placed = place_values(space, {name: parse_label(value) for name, value in trial.params.items()})
    except UserError as error:
        yield Wrong(f"{place_of}: {error}")
        return
    for name in trial.params.keys() - placed.draws.keys():
        yield Wrong(f"{place_of} has a value for {name}, which {space.file.name} does not search")
    for name in placed.out_of_range:
        yield Wrong(f"{place_of} has {name}={trial.params[name]}, which is not among the values in {space.file.name}")
    for name in placed.missing:
        yield Lost(f"{place_of} has no value for {name}, which {space.file.name} searches")
    declared: Mapping[str, BaseDistribution] = (
        space.parameters if isinstance(space, YamlSpace) else placed.distributions
    )
    for name, distribution in trial.distributions.items():
        if name in declared and distribution_to_json(declared[name]) != distribution_to_json(distribution):
            yield Wrong(f"{place_of} has {name} drawn from {distribution}, but {space.file.name} has {declared[name]}")
    for name in placed.draws.keys() & trial.params.keys() - {*placed.out_of_range}:
        theirs, ours = trial.params[name], placed.draws[name]
        if isinstance(placed.distributions[name], CategoricalDistribution) and not is_same(theirs, ours):
            yield Wrong(f"{place_of} has {name}={theirs!r}, but {space.file.name} has {ours!r}")
    written = get_placed_params(trial)
    if {PARAMS_ATTRIBUTE, PLACED_ATTRIBUTE} & trial.user_attrs.keys() and not placed.out_of_range:
        for name, theirs, ours in find_differences(written, placed.params):
            yield Wrong(f"{place_of} has {name}={theirs}, but its drawn values give {ours}")


def _audit_study_outcome(
    place_of: str, trial: FrozenTrial, history: TrialHistory, audited: AuditedSweep, replayed: ReplayResult
) -> Iterator[AuditFinding]:
    snapshots = [snapshot_trial(history)]
    if history.reopened_from is not None:  # a study does not store what follows the end of a trial
        snapshots.insert(0, _snapshot_before_reopening(history))
    findings = [list(_compare_outcome(place_of, trial, each, audited, replayed)) for each in snapshots]
    if all(findings):
        yield from findings[0]


def _snapshot_before_reopening(history: TrialHistory) -> TrialSnapshot:
    assert history.reopened_from is not None
    (state, epoch), snapshot = history.reopened_from, snapshot_trial(history)
    values = {each: value for each, value in snapshot.values.items() if each <= epoch}
    return snapshot._replace(state=state, values=values)


def _compare_outcome(
    place_of: str, trial: FrozenTrial, snapshot: TrialSnapshot, audited: AuditedSweep, replayed: ReplayResult
) -> Iterator[AuditFinding]:
    finite = {epoch: value for epoch, value in snapshot.values.items() if math.isfinite(value)}
    for epoch in sorted({*finite, *trial.intermediate_values}):
        ours, theirs = finite.get(epoch), trial.intermediate_values.get(epoch)
        if ours != theirs:
            kind = Lost if theirs is None else Wrong
            yield kind(f"{place_of} has the value {theirs} at epoch {epoch}, but {EVENTS_FILE} has {ours}")
    costs = {name: float(cost) for name, cost in snapshot.costs.items() if math.isfinite(cost)}
    wanted = costs | compute_excess(costs, audited.limits)
    attributes = {**trial.user_attrs, **trial.system_attrs}
    stored = {
        name: value for name, value in attributes.items() if name in COST_NAMES or name.startswith("constraints:")
    }
    for name, theirs, ours in find_differences(stored, wanted):
        yield Wrong(f"{place_of} has {name}={theirs}, but {EVENTS_FILE} has {ours}")
    state, values = _get_expected_outcome(snapshot, audited.settings.second_objective)
    was_killed = trial.state == TrialState.WAITING and snapshot.state == "running" and not replayed.is_closed
    if trial.state != state and not was_killed:
        yield Wrong(f"{place_of} is {trial.state.name}, but {snapshot.state} according to {EVENTS_FILE}")
    elif trial.values != values:
        yield Wrong(f"{place_of} has the final values {trial.values}, but {EVENTS_FILE} has {values}")
    if (trial.datetime_complete is not None) != state.is_finished() and trial.state == state:
        yield Wrong(f"{place_of} is {state.name}, but its completion date is {trial.datetime_complete}")
    if trial.duration is not None and trial.duration.total_seconds() < -_CLOCK_CHANGE_S:
        yield Wrong(f"{place_of} has a completion date before its start date")


_STATES = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "running": TrialState.RUNNING,
    "waiting": TrialState.WAITING,
    "paused": TrialState.WAITING,
}


def _get_expected_outcome(
    snapshot: TrialSnapshot, second_objective: str | None
) -> tuple[TrialState, list[float] | None]:
    """Return the state and the values that a trial should have in the study."""
    state = _STATES.get(snapshot.state, TrialState.FAIL)
    if not state.is_finished() or state == TrialState.FAIL:
        return state, None
    finite = {epoch: value for epoch, value in snapshot.values.items() if math.isfinite(value)}
    values = [finite[max(finite)]] if finite else None
    if values and second_objective is not None:
        cost = snapshot.costs.get(second_objective, math.nan)
        values = [*values, cost] if math.isfinite(cost) else None
    if values is None and snapshot.state != "infeasible":
        return TrialState.FAIL, None
    return state, values


# --- the study's journal ----------------------------------------------------------------------------------------------


def _audit_journal(
    replayed: ReplayResult, file: Path, *, num_before: int, limits: Mapping[str, float], label: str
) -> Iterator[AuditFinding]:
    """Check the lines of journal.log: none is incomplete or repeated, and they follow the events."""
    done: list[tuple[int, _JournalAct]] = []
    seen: set[_JournalAct] = set()
    last_state: dict[int, object] = {}
    content = file.read_bytes()
    if content and not content.endswith(b"\n") and replayed.is_closed:
        yield Wrong(f"{label}: the last line is incomplete: it has no line break")
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            act = kind, trial, what = _parse_act(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Wrong(f"{label}: line {number} is damaged ({type(error).__name__}: {error})")
            continue
        done.append((number, act))
        is_again = last_state.get(trial) == what if kind == "state" else act in seen and kind != "created"
        if is_again:
            yield Repeated(f"{label}: line {number} repeats {_format_act(act)}")
        seen.add(act)
        if kind == "state":
            last_state[trial] = what
    is_copied = bool(replayed.history.search_changes)  # the sweep has gone on with a copy of its study
    if replayed.num_processes == 1 and replayed.is_closed and not (replayed.findings or is_copied):
        created = [number for number, act in done if act[0] == "created"][num_before:]
        acts = [(number, act) for number, act in done if number in created or act[1] >= num_before]
        yield from _audit_act_order(acts, list(_list_expected_acts(replayed, limits)), label)


_JournalAct = tuple[str, int, object]
"""What a line of the journal records: kind, trial, and the state, epoch or attribute."""


def _parse_act(line: Mapping[str, Any]) -> _JournalAct:
    operation = JournalOperation(line["op_code"])
    match operation:
        case JournalOperation.CREATE_TRIAL:
            return "created", -1, line["study_id"]
        case JournalOperation.SET_TRIAL_STATE_VALUES:
            return "state", line["trial_id"], TrialState(line["state"])
        case JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE:
            return "value", line["trial_id"], line["step"]
        case JournalOperation.SET_TRIAL_USER_ATTR:
            return "attribute", line["trial_id"], next(iter(line["user_attr"]))
        case JournalOperation.SET_TRIAL_SYSTEM_ATTR:
            return "attribute", line["trial_id"], next(iter(line["system_attr"]))
    return "study", -1, json.dumps({key: value for key, value in line.items() if key != "worker_id"}, sort_keys=True)


def _format_act(act: _JournalAct) -> str:
    kind, trial, what = act
    match kind:
        case "created":
            return "the creation of a trial"
        case "state":
            return f"the state {getattr(what, 'name', what)} of trial {trial}"
        case "value":
            return f"the value of trial {trial} at epoch {what}"
        case "attribute":
            return f"the attribute {what} of trial {trial}"
    return f"the operation {what} on the study"


def _list_expected_acts(replayed: ReplayResult, limits: Mapping[str, float]) -> Iterator[_JournalAct]:
    """Yield the acts that the journal should contain, in order, for a sweep that a single process ran."""
    states: dict[int, TrialState] = {}
    params: dict[int, Params] = {}
    perturbed: set[int] = set()

    def move(number: int, state: TrialState) -> Iterator[_JournalAct]:
        if states[number] != state:
            states[number] = state
            yield "state", number, state

    for index, (_, event) in enumerate(replayed.events):
        if isinstance(event, SweepClosed) and event.reason != "finished":
            for number, state in states.items():
                if not state.is_finished():
                    yield from move(number, TrialState.WAITING)
        if isinstance(event, (SweepOpened, SweepClosed)) or not hasattr(event, "trial"):
            continue
        number = event.trial
        if number in states and states[number].is_finished():  # the user has resumed a trial after its end
            continue
        if isinstance(event, TrialSuggested):
            states[number], params[number] = TrialState.RUNNING, dict(event.params)
            yield "created", -1, 0
        elif isinstance(event, SegmentStarted):
            if event.params is not None and not is_same(event.params, params[number]):
                params[number] = dict(event.params)
                perturbed.add(number)
            yield from move(number, TrialState.RUNNING)
            continue
        elif isinstance(event, CostsMeasured):
            costs = {name: cost for name, cost in event.costs.items() if math.isfinite(cost)}
            yield from (("attribute", number, name) for name in (*costs, *compute_excess(costs, limits)))
        elif isinstance(event, EpochReported):
            value = event.metrics[replayed.history.table.metric]
            if number not in perturbed and math.isfinite(value):
                yield "value", number, event.epoch
        row, second = replayed.get_row(number, index), replayed.history.table.objectives
        if row.is_over:
            history = replayed.history.trials[number]
            is_reopened = history.reopened_from is not None
            snapshot = _snapshot_before_reopening(history) if is_reopened else snapshot_trial(history)
            state, _ = _get_expected_outcome(snapshot, second[0].name if second else None)
            yield from move(number, state)
        elif row.state != "running" and not isinstance(event, TrialSuggested):
            yield from move(number, TrialState.WAITING)


def _audit_act_order(
    done: Sequence[tuple[int, _JournalAct]], wanted: Sequence[_JournalAct], label: str
) -> Iterator[AuditFinding]:
    for (number, act), each in zip(done, wanted, strict=False):
        if act[0] != each[0] or (act[0] != "created" and act != each):
            yield Wrong(
                f"{label}: line {number} records {_format_act(act)}, but according to {EVENTS_FILE} "
                f"{_format_act(each)} comes next"
            )
            return
    if len(done) != len(wanted):
        kind = Lost if len(done) < len(wanted) else Repeated
        yield kind(f"{label} has {len(done)} lines about trials, but {EVENTS_FILE} gives {len(wanted)}")


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def _audit_tensorboard(
    replayed: ReplayResult, folder: Path, label: str, *, in_tab: bool, is_ahead: bool
) -> Iterator[AuditFinding]:
    """Compare the scalars and parameters of all trials with the events; nothing if there are no TensorBoard files.

    Args:
        replayed: the replayed events.
        folder: folder of the TensorBoard files.
        label: name of the folder in findings.
        in_tab: whether the HParams tab shows the trials.
        is_ahead: whether the folder may have been copied after the events, and so contain more than they do.
    """
    if not folder.is_dir():
        return
    begun = [number for number, trial in replayed.history.trials.items() if trial.num_segments]
    runs = {each.name for each in folder.iterdir() if each.is_dir()}
    for name in sorted(runs - {make_run_name(number) for number in begun}):
        yield Wrong(f"{label}/{name} belongs to no trial that was started")
    wanted = _collect_scalars(replayed)
    for number in begun:
        name = make_run_name(number)
        if name not in runs:
            yield Lost(f"{label}/{name} is missing")
            continue
        try:
            shown, params, has_end = _read_run(folder / name)
        except Exception as error:  # whatever TensorBoard's reader raises for a damaged file
            yield Wrong(f"{label}/{name} is damaged ({type(error).__name__}: {error})")
            continue
        place_of = f"{label}/{name}"
        if replayed.is_closed and replayed.num_processes == 1:
            for file in sorted((folder / name).glob("events.out.*")):
                if not _ends_with_whole_record(file):
                    yield Wrong(f"{place_of}/{file.name} is truncated")
        yield from _compare_scalars(place_of, shown, wanted[number], replayed, number, is_ahead=is_ahead)
        if in_tab:
            yield from _compare_params(place_of, params, replayed, number)
            if not has_end and _has_certain_end(replayed, number):
                yield Lost(f"{place_of} does not show that the trial is over, although {EVENTS_FILE} does")


def _has_certain_end(replayed: ReplayResult, number: int) -> bool:
    """Return whether a trial is over and its process was certainly not killed at that moment."""
    end = replayed.rows[number][-1][0]
    following = [event for _, event in replayed.events[end + 1 : end + 2]]
    is_over = replayed.history.table.rows[number].is_over
    return is_over and bool(following) and not isinstance(following[0], SweepOpened)


_Scalars = dict[tuple[str, int], set[float]]


def _collect_scalars(replayed: ReplayResult) -> dict[int, _Scalars]:
    """Collect the scalars that the events report: trial -> (tag, step) -> values."""
    wanted: dict[int, _Scalars] = defaultdict(lambda: defaultdict(set))
    for index, (_, event) in enumerate(replayed.events):
        if isinstance(event, CostsMeasured):
            for name, cost in event.costs.items():
                wanted[event.trial][f"work/{name}", 0].add(_to_float32(cost))
        elif isinstance(event, EpochReported):
            row = replayed.get_row(event.trial, index)
            for name, value in {**event.metrics, SECONDS: row.seconds, EPOCHS: row.epochs}.items():
                wanted[event.trial][name, event.epoch].add(_to_float32(value))
    return wanted


def _to_float32(value: float) -> float:
    """Round to a 32-bit float. NaN is always the same object, so that it equals itself in sets."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return math.nan if math.isnan(rounded) else rounded


def _read_run(folder: Path) -> tuple[_Scalars, dict[str, Any] | None, bool]:
    """Return (tag, step) -> values, the parameters in the HParams tab, and whether the tab shows the run as over."""
    has_end = False
    shown: _Scalars = defaultdict(set)
    params: dict[str, Any] | None = None
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            event = TensorBoardEvent.FromString(record)
            for value in event.summary.value:
                if value.tag.startswith(WORKER_PREFIX):  # measured, and not in the events
                    continue
                if value.HasField("simple_value"):
                    shown[value.tag, event.step].add(_to_float32(value.simple_value))
                elif value.tag == SESSION_END_INFO_TAG:
                    has_end = True
                elif value.tag == SESSION_START_INFO_TAG:
                    content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    params = {
                        key: getattr(each, each.WhichOneof("kind"))
                        for key, each in content.session_start_info.hparams.items()
                    }
    return shown, params, has_end


def _ends_with_whole_record(file: Path) -> bool:
    """Return whether a file ends with a complete record.

    A record is its length (8 bytes), a checksum (4 bytes), the content, and another checksum (4 bytes).
    """
    content, place_of = file.read_bytes(), 0
    while place_of < len(content):
        place_of += 16 + int.from_bytes(content[place_of : place_of + 8], "little")
    return place_of == len(content)


def _compare_scalars(
    place_of: str, shown: _Scalars, wanted: _Scalars, replayed: ReplayResult, number: int, *, is_ahead: bool
) -> Iterator[AuditFinding]:
    """Compare the scalars of a trial. Those of its row may be recorded more than once per step."""
    last = replayed.events[-1][1]
    is_lagging = isinstance(last, (CostsMeasured, EpochReported)) and last.trial == number
    for (tag, step), values in wanted.items():
        if (lacking := values - shown[tag, step]) and not is_lagging:
            yield Lost(f"{place_of} lacks {tag} = {min(lacking)} at step {step}, which {EVENTS_FILE} reports")
    for _, row in replayed.rows[number]:
        wanted[EPOCHS, row.epochs].add(float(row.epochs))
        wanted[SECONDS, row.epochs].add(_to_float32(row.seconds))
    for (tag, step), values in shown.items():
        if (extra := values - wanted[tag, step]) and not is_ahead:
            yield Wrong(f"{place_of} has {tag} = {min(extra)} at step {step}, which {EVENTS_FILE} does not report")


def _compare_params(
    place_of: str, shown: Mapping[str, Any] | None, replayed: ReplayResult, number: int
) -> Iterator[AuditFinding]:
    """Compare the HParams tab with a trial's parameters and state.

    For a trial that is not over, the tab shows `not over` instead of its state. It shows some values as words.
    """
    row, is_last = replayed.history.table.rows[number], getattr(replayed.events[-1][1], "trial", None) == number
    if shown is None:
        if not is_last:
            yield Lost(f"{place_of} has no parameters for the HParams tab")
        return
    state = row.state if row.is_over else NOT_OVER
    if shown.get(STATE) != state and not (is_last and shown.get(STATE) == NOT_OVER):
        yield Wrong(f"{place_of} shows the state {shown.get(STATE)}, but {EVENTS_FILE} gives {state}")
    keys = (
        {key for each in replayed.history.table.rows.values() for key in each.params}
        if replayed.is_closed
        else row.params
    )
    for key in {*keys, *shown} - {STATE}:
        value, theirs = row.params.get(key, ABSENT), shown.get(key, ABSENT)
        if theirs != value and theirs != to_column_value(value, "word"):
            yield Wrong(f"{place_of} shows {key}={theirs}, but {EVENTS_FILE} gives {value}")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _audit_checkpoints(replayed: ReplayResult, folder: Path, label: str) -> Iterator[AuditFinding]:
    """Check that the checkpoints which were not removed exist and are intact.

    A trial that has adopted a checkpoint that no event mentions may have lost its earlier ones. If the checkpoint
    budget may have been reached at that moment, only the newest checkpoints of trials that are not over are certain to
    exist.
    """
    retention, history = replayed.history.retention, replayed.history
    is_tight = bool(replayed.adopted_trials) and retention.total_bytes > 0.5 * retention.budget_bytes
    for number, trial in history.trials.items():
        held = retention.list_checkpoints(number)
        has_adopted = number in replayed.adopted_trials or _has_unreported_checkpoint(trial, held, folder)
        if has_adopted or (is_tight and not trial.row.is_over):
            held = held[-1:]
        elif is_tight:
            continue
        for checkpoint in held:
            if not (folder / checkpoint.file).is_file():
                yield Lost(f"{label}{checkpoint.file} is missing, although {EVENTS_FILE} lists it for trial {number}")
            elif not is_intact(checkpoint, folder):
                said = f"the size or checksum that {EVENTS_FILE} has for trial {number} at epoch {checkpoint.epoch}"
                yield Wrong(f"{label}{checkpoint.file} is damaged: it does not have {said}")


def _has_unreported_checkpoint(trial: TrialHistory, held: Sequence[CheckpointRecord], folder: Path) -> bool:
    """Return whether a trial has a checkpoint that is newer than those in the events.

    A resumed sweep adopts it at once, even if the trial does not run again.
    """
    newest = held[-1].epoch if held else 0
    files = (folder / CHECKPOINTS_FOLDER / make_run_name(trial.row.number)).glob("epoch_*.ckpt")
    epochs = [file.name.split("_")[1] for file in files]
    return any(newest < int(epoch) <= trial.row.epochs for epoch in epochs if epoch.isdigit())
