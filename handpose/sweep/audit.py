"""Whether a sweep's files agree: what was lost, what was done twice, what was decided wrongly.

    python -m handpose.sweep.audit outputs/sweeps/NAME

The events are held against themselves, decided again by fresh rules, and compared with the study and trials.csv.
"""

import csv
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import optuna
from hydra.utils import instantiate
from optuna.trial import FrozenTrial, TrialState

from handpose.errors import UserError
from handpose.report.table import TrialRow, TrialTable
from handpose.sweep.events import EVENTS, Asked, Begun, Event, Reported, read_events
from handpose.sweep.history import History, empty_table
from handpose.sweep.resume import Task, recorded_task
from handpose.sweep.scheduler import rule_maker
from handpose.sweep.study import close_storage, read_storage

_STUDY_STATE = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
    "waiting": TrialState.WAITING,
    "paused": TrialState.WAITING,
    "running": TrialState.RUNNING,
}


class Findings(NamedTuple):
    """One sentence for each thing that is not as it should be."""

    lost: list[str]
    repeated: list[str]
    wrong: list[str]

    def __bool__(self) -> bool:
        return any(self)


def audit(folder: Path) -> Findings:
    """Look through the sweep in a folder, which does not run at the moment. Raises UserError where there is none."""
    task = recorded_task(folder, [])
    sweep = instantiate(task.config.sweep)
    events = read_events(folder / EVENTS)
    table = empty_table(sweep)
    history = History(sweep, rule=rule_maker(instantiate(task.config.scheduler), sweep, task.space)(), table=table)
    wrong = []
    for line, event in enumerate(events, start=1):
        try:
            history.check(event, line=line)
        except UserError as error:
            wrong.append(str(error))
        history.apply(event)
    lost, repeated = audit_events(events, history)
    lost += _in_csv(folder / "trials.csv", table)
    with _study(task) as study:
        found = _in_study(study.get_trials(deepcopy=False), history)
    return Findings(lost + found.lost, repeated + found.repeated, wrong + found.wrong)


@contextmanager
def _study(task: Task) -> Iterator[optuna.Study]:
    """The study of a sweep, to be read."""
    storage = read_storage(task.config.searcher.storage, Path(task.config.sweep.folder) / "study")
    try:
        yield optuna.load_study(study_name=task.config.sweep.name, storage=storage)
    finally:
        close_storage(storage)


def audit_events(events: Sequence[Event], history: History) -> tuple[list[str], list[str]]:
    """What was lost and what was done twice, by the events alone. history: that they lead to."""
    asked = [event.trial for event in events if isinstance(event, Asked)]
    expected = range(asked[0], asked[0] + history.num_trials) if asked else range(0)
    lost = []
    if history.table.end != "spent":  # else trials wait for a larger budget
        lost += [f"trial {number} was never asked for" for number in expected if number not in set(asked)]
        lost += [f"trial {number} has no end" for number, trial in history.trials.items() if not trial.row.is_over]
    repeated = [f"trial {number} was asked for twice" for number, times in Counter(asked).items() if times > 1]
    by_trial: dict[int, list[Begun | Reported]] = defaultdict(list)
    for event in events:
        if isinstance(event, (Begun, Reported)):
            by_trial[event.trial].append(event)
    for number, own in sorted(by_trial.items()):
        for kind, sentence in _in_trial(number, own):
            (lost if kind == "lost" else repeated).append(sentence)
    return lost, repeated


def _in_trial(number: int, events: Sequence[Begun | Reported]) -> Iterator[tuple[str, str]]:
    epoch, newest, begun_from, is_over = 0, 0, 0, False
    for event in events:
        if isinstance(event, Begun):
            if is_over:
                yield "repeated", f"trial {number} was begun again after its end"
            if event.source is not None:  # goes on from another one's epoch
                epoch = newest = event.epoch
            begun_from = newest
            continue
        if event.epoch <= epoch:
            yield "repeated", f"epoch {event.epoch} of trial {number} was reported twice"
        if event.epoch > epoch + 1:
            yield "lost", f"trial {number} has nothing between the epochs {epoch} and {event.epoch}"
        if event.resumed_from < begun_from:
            yield "repeated", f"trial {number} went on from epoch {event.resumed_from}, though {begun_from} was saved"
        epoch, is_over = event.epoch, event.decision not in ("continue", "pause")
        newest = newest if event.checkpoint is None else event.checkpoint.epoch


def _in_csv(file: Path, table: TrialTable) -> list[str]:
    with file.open(newline="", encoding="utf-8") as stream:
        rows = {int(row["number"]): row for row in csv.DictReader(stream)}
    return [
        f"trials.csv has not what the events say of trial {number}"
        for number, row in table.rows.items()
        if number not in rows or not _is_same(rows[number], row)
    ]


def _is_same(written: dict[str, str], row: TrialRow) -> bool:
    numbers = {**row.metrics, **row.costs}
    return (written["state"], int(written["epochs"])) == (row.state, row.epochs) and all(
        _equal(float(written.get(name) or "nan"), value) for name, value in numbers.items()
    )


def _in_study(trials: Sequence[FrozenTrial], history: History) -> Findings:
    objectives = history.table.objectives
    stored = {trial.number: trial for trial in trials}
    lost = [f"the study has no trial {number}" for number in history.trials if number not in stored]
    first = min(history.trials, default=0)
    repeated = [
        f"the study has a trial {number} that the sweep does not know"
        for number, trial in stored.items()
        if number >= first and number not in history.trials and trial.state != TrialState.FAIL
    ]
    wrong = []
    for number, trial in history.trials.items():
        if number not in stored:
            continue
        if not trial.is_perturbed and stored[number].state != _STUDY_STATE[trial.row.state]:
            wrong.append(f"trial {number} is {trial.row.state}, but {stored[number].state.name} in the study")
        finite = {epoch: value for epoch, value in trial.values.items() if math.isfinite(value)}
        if {epoch: stored[number].intermediate_values.get(epoch) for epoch in finite} != finite:
            lost.append(f"the study lacks values of trial {number}")
        costs = {name: cost for name, cost in trial.row.costs.items() if math.isfinite(cost)}
        if {name: stored[number].user_attrs.get(name) for name in costs} != costs:
            lost.append(f"the study lacks costs of trial {number}")
        expected = [] if not finite else [finite[max(finite)], *(trial.row.costs[each.name] for each in objectives)]
        if stored[number].values is not None and stored[number].values != expected:
            wrong.append(f"trial {number} has {expected} by its events, but {stored[number].values} in the study")
    return Findings(lost, repeated, wrong)


def _equal(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def main() -> None:
    """Print what was found; status 1 where that is anything."""
    try:
        found = audit(Path(sys.argv[1]).resolve())
    except (UserError, IndexError) as error:
        sys.exit(f"error: {error or 'give the folder of a sweep'}")
    for kind, sentences in found._asdict().items():
        print(f"{kind}: {len(sentences)}", *sentences, sep="\n  ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
