"""Audit the files of a sweep: find what was lost, what was done twice and what was decided wrongly.

    python -m handpose.sweep.audit outputs/sweeps/NAME

The audit compares every fact that is stored in two places. It also repeats every decision from the events before it:
those of the scheduler, of retries and nodes, of constraints and budgets, and the choice of the winner. It changes
nothing in the folder.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import optuna
from filelock import FileLock, Timeout
from hydra.utils import instantiate

from handpose.config import CONFIGS, plain, told
from handpose.errors import UserError
from handpose.formats import rename_options
from handpose.search.points import count_possible_trials
from handpose.search.space import flatten_config
from handpose.search.study import JOURNAL_FILE, close_storage, get_trial_params, open_storage_for_reading, parse_limits
from handpose.sweep.audit.events import (
    AuditFinding,
    Expectations,
    ReadOnlyCheckpointFiles,
    ReplayResult,
    find_differences,
    replay_events,
)
from handpose.sweep.audit.records import (
    audit_checkpoints,
    audit_csv,
    audit_journal,
    audit_plan,
    audit_study,
    audit_tensorboard,
    load_study,
)
from handpose.sweep.audit.results import audit_results
from handpose.sweep.controller.history import History, make_empty_table
from handpose.sweep.controller.scheduler_factory import bind_scheduler
from handpose.sweep.driver.resume import SweepTask, load_recorded_task
from handpose.sweep.record.events import EVENTS_FILE, scan_event_lines
from handpose.sweep.record.provenance import fill_in_modes
from handpose.sweep.record.settings import LOCK, SweepSettings
from handpose.sweep.trainable.trial import TrialRecipe, add_checkpoint_metric, select_training_overrides
from handpose.utf8 import use_utf8
from handpose.values import same
from handpose.yaml_files import read_yaml

_NUM_ATTEMPTS = 5
"""Audits of a running sweep are repeated this often, to drop findings caused by a write in progress."""


class Findings(NamedTuple):
    """Findings of an audit. Each one is a sentence that names the file and the place in it.

    Attributes:
        lost: what is missing.
        repeated: what is there twice.
        wrong: what contradicts something else.
    """

    lost: list[str]
    repeated: list[str]
    wrong: list[str]

    def __bool__(self) -> bool:
        return any(self)


def audit(folder: Path) -> Findings:
    """Audit the sweep in a folder.

    Raises:
        UserError: the folder holds no sweep.
    """
    if not (folder / "sweep.yaml").is_file() and not (folder / EVENTS_FILE).is_file():
        raise UserError(f"{folder} holds no sweep: there is neither sweep.yaml nor {EVENTS_FILE} in it")
    found = list(dict.fromkeys(_audit_once(folder)))
    for _ in range(_NUM_ATTEMPTS):
        if not found or not _is_locked(folder):
            break
        again = set(_audit_once(folder))
        found = [finding for finding in found if finding in again]
    texts: dict[str, list[str]] = {"lost": [], "repeated": [], "wrong": []}
    for finding in found:
        texts[finding.kind].append(finding.text)
    return Findings(**texts)


def _is_locked(folder: Path) -> bool:
    lock = folder / LOCK
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _audit_once(folder: Path) -> Iterator[AuditFinding]:
    try:
        task = load_recorded_task(folder, [])
        sweep: SweepSettings = instantiate(task.config.sweep)
        scheduler = bind_scheduler(instantiate(task.config.scheduler), sweep, task.space)()
        limits = parse_limits(dict(task.config.searcher.constraints or {}))
        overrides = add_checkpoint_metric(select_training_overrides(task.overrides), task.config, sweep.target)
    except UserError as error:
        yield AuditFinding("wrong", f"sweep.yaml and search_space/: {error}")
        yield from _find_unreadable_lines(folder)
        return
    yield from _audit_description(folder, task)
    recipe = TrialRecipe(
        overrides,
        task.locations,
        sweep.max_epochs,
        sweep.cpus_per_trial,
        sweep.workers_per_trial,
    )
    with _open_study(task, folder) as (study, problem):
        yield from problem
        replayed = _replay_sweep(task, sweep, scheduler, limits, recipe, study)
        yield from replayed.findings
        if not replayed.events:
            return
        yield from _audit_records(task, sweep, limits, recipe, replayed, study)
    yield from audit_results(task, sweep, recipe, replayed)


def _find_unreadable_lines(folder: Path) -> Iterator[AuditFinding]:
    """Yield unreadable lines of the events, for a sweep whose description cannot be read either."""
    if (folder / EVENTS_FILE).is_file():
        for line in scan_event_lines((folder / EVENTS_FILE).read_bytes()):
            if line.problem:
                yield AuditFinding("wrong", f"{EVENTS_FILE}: line {line.number} {line.problem}")


def _replay_sweep(
    task: SweepTask,
    sweep: SweepSettings,
    scheduler: Any,
    limits: Mapping[str, float],
    recipe: TrialRecipe,
    study: optuna.Study | None,
) -> ReplayResult:
    files = ReadOnlyCheckpointFiles(sweep.path)
    history = History(
        sweep, scheduler=scheduler, table=make_empty_table(sweep), files=files, command=recipe.format_command
    )
    proposed = (
        {} if study is None else {trial.number: get_trial_params(trial) for trial in study.get_trials(deepcopy=False)}
    )
    plan = {} if study is None else study.user_attrs.get("plan", {})
    expected = Expectations(
        sweep.num_trials,
        count_possible_trials(
            task.space, is_grid=task.config.searcher.sampler is None, repeats=scheduler.perturbs_params
        ),
        plan.get("first_number", 0),
        limits,
        proposed.get,
        task.config.trainer.check_val_every_n_epoch,
        is_resuming=_is_newer(sweep.path / "sweep.yaml", sweep.path / EVENTS_FILE),
    )
    return replay_events(history, sweep.path, "", sweep, expected)


def _is_newer(file: Path, than: Path) -> bool:
    return file.is_file() and than.is_file() and file.stat().st_mtime_ns > than.stat().st_mtime_ns


def _audit_records(
    task: SweepTask,
    sweep: SweepSettings,
    limits: Mapping[str, float],
    recipe: TrialRecipe,
    replayed: ReplayResult,
    study: optuna.Study | None,
) -> Iterator[AuditFinding]:
    folder = sweep.path
    yield from audit_csv(replayed, folder / "trials.csv", "trials.csv")
    if study is not None:
        first: int = study.user_attrs.get("plan", {}).get("first_number", 0)
        journal = folder / "study" / JOURNAL_FILE
        label = f"study/{JOURNAL_FILE}" if task.config.searcher.storage is None else "the study"
        num_brought = len(task.config.searcher.get("warm_start") or [])
        yield from _audit_study_settings(study, sweep, label, num_brought=num_brought)
        if task.config.searcher.sampler is not None:  # a grid is enumerated in its own order
            yield from audit_plan(study, first_number=first, space=task.space, label=label)
        yield from audit_study(
            replayed,
            study.get_trials(deepcopy=False),
            first_number=first,
            space=task.space,
            limits=limits,
            second_objective=sweep.second_objective,
            label=label,
        )
        if task.config.searcher.storage is None:
            yield from audit_journal(replayed, journal, num_before=first, limits=limits, label=label)
    is_ahead = sweep.storage is not None
    yield from audit_tensorboard(replayed, folder / "tensorboard", "tensorboard", in_tab=True, is_ahead=is_ahead)
    if sweep.storage is None:
        yield from audit_checkpoints(replayed, folder, "")


def _audit_study_settings(
    study: optuna.Study, sweep: SweepSettings, label: str, *, num_brought: int
) -> Iterator[AuditFinding]:
    directions: list[str] = [sweep.target.mode, *(["min"] if sweep.second_objective else [])]
    names = [sweep.metric, *([sweep.second_objective] if sweep.second_objective else [])]
    if [each.name.lower()[:3] for each in study.directions] != directions:
        yield AuditFinding(
            "wrong", f"{label}: its directions are {study.directions}, but the sweep's {', '.join(directions)}"
        )
    if study.metric_names != names:
        yield AuditFinding("wrong", f"{label}: its values are {study.metric_names}, but the sweep's {', '.join(names)}")
    brought = study.user_attrs.get("warm_start", [])
    first = study.user_attrs.get("plan", {}).get("first_number", 0)
    if len(brought) != num_brought:
        yield AuditFinding(
            "wrong", f"{label}: it has learned from {len(brought)} sweeps, but sweep.yaml names {num_brought}"
        )
    if sum(each.get("brought", 0) for each in brought) != first:
        yield AuditFinding("wrong", f"{label}: the sweep begins at trial {first}, but its warm start says otherwise")


@contextlib.contextmanager
def _open_study(task: SweepTask, folder: Path) -> Iterator[tuple[optuna.Study | None, list[AuditFinding]]]:
    """Open the study of a sweep for reading; yield it with findings that say why it cannot be read."""
    url, name = task.config.searcher.storage, task.config.sweep.name
    label = "the study" if url else f"study/{JOURNAL_FILE}"
    if url is None and not (folder / "study" / JOURNAL_FILE).is_file():
        is_begun = (folder / EVENTS_FILE).is_file()
        yield None, [AuditFinding("lost", f"{label} is missing")] if is_begun else []
        return
    storage = None
    try:
        storage = open_storage_for_reading(url, folder / "study")
        study = load_study(storage, name)
        study and study.get_trials(deepcopy=False)
    except Exception as error:  # whatever Optuna raises for a damaged journal
        yield None, [AuditFinding("wrong", f"{label} cannot be read ({type(error).__name__}: {error})")]
        return
    try:
        yield study, [] if study else [AuditFinding("lost", f"{label} has no study {name}")]
    finally:
        close_storage(storage)


# --- sweep.yaml -------------------------------------------------------------------------------------------------------


_COMPARED = ("sweep.", "retrain.", "report.", "ray.", "search_space")
_IGNORED_KEYS = ("sweep.name", "sweep.folder", "sweep.resume", "sweep.status", "sweep.storage")


def _audit_description(folder: Path, task: SweepTask) -> Iterator[AuditFinding]:
    """Check that the configuration in sweep.yaml is what its overrides compose.

    This includes settings that may change when the sweep is resumed.
    """
    record = read_yaml(folder / "sweep.yaml")
    written, now = (fill_in_modes(flatten_config(each)) for each in (record["config"], plain(task.config)))
    for key in {**written, **now}:
        is_compared = key.startswith(_COMPARED) and not key.startswith(_IGNORED_KEYS)
        if is_compared and written.get(key) != now.get(key):
            yield AuditFinding(
                "wrong", f"sweep.yaml: config has {key}={written.get(key)}, but its overrides make it {now.get(key)}"
            )
    for key, value in task.fixed.items():
        if not same(value, task.defaults.get(key.lstrip("+"))):
            made = task.defaults.get(key.lstrip("+"))
            yield AuditFinding("wrong", f"sweep.yaml: fixed_params has {key}={value}, but its overrides make it {made}")
    given = dict(each.partition("=")[::2] for each in record["locations"])
    overridden = {each.partition("=")[0] for each in record["overrides"]}
    for key in sorted({"paths.data", "paths.output", "paths.packed"} - overridden):
        if key not in given:
            yield AuditFinding("lost", f"sweep.yaml: locations has no {key}, but config has {written.get(key)}")
        elif str(written.get(key)) != given[key].strip("'"):
            yield AuditFinding(
                "wrong", f"sweep.yaml: config has {key}={written.get(key)}, but its locations {given[key]}"
            )
    choices = compose_choices(record["overrides"])
    for group, theirs, ours in find_differences(rename_options(record["choices"]), rename_options(choices)):
        if not group.startswith("hydra"):
            yield AuditFinding("wrong", f"sweep.yaml: choices has {group}={theirs}, but its overrides make it {ours}")


def compose_choices(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the options of configuration groups that these overrides choose."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("tune", list(overrides), return_hydra_config=True)
    return dict(config.hydra.runtime.choices)


def main() -> None:
    """Print the findings; exit with status 1 if there are any."""
    with told():
        if len(sys.argv) != 2:
            raise UserError("give the folder of a sweep")
        found = audit(Path(sys.argv[1]).resolve())
    for kind, sentences in found._asdict().items():
        print(f"{kind}: {len(sentences)}", *sentences, sep="\n  ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    use_utf8()
    main()
