"""Audit the files of a sweep: find what was lost, what was done twice and what was decided wrongly.

    python -m handpose.sweep.audit outputs/sweeps/NAME

The audit compares every fact that is stored in two places. It also repeats every decision from the events before it:
those of the scheduler, of retries and nodes, of constraints and budgets, and the choice of the winner. It changes
nothing in the folder.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import optuna
from hydra.utils import get_class, instantiate

from handpose.config import search_path_override, to_plain_values
from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.formats import rename_options
from handpose.locks import is_locked
from handpose.plain_values import is_same
from handpose.program import exit_on_user_error, make_parser
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.searcher import count_points
from handpose.search.space import flatten_config
from handpose.search.study import (
    JOURNAL_FILE,
    close_storage,
    find_newest_study,
    get_trial_params,
    open_storage_for_reading,
    parse_limits,
)
from handpose.sweep.audit.events import (
    AuditFinding,
    Expectations,
    Lost,
    Repeated,
    ReplayResult,
    Wrong,
    find_differences,
    replay_events,
)
from handpose.sweep.audit.records import (
    AuditedSweep,
    audit_study,
    audit_trial_files,
    get_first_number,
)
from handpose.sweep.audit.results import audit_results
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.driver.resume import SweepTask, load_recorded_task
from handpose.sweep.record.events import EVENTS_FILE, scan_event_lines
from handpose.sweep.record.provenance import fill_in_modes
from handpose.sweep.record.settings import LOCK, SweepSettings
from handpose.sweep.trainable.trial import (
    add_checkpoint_metric,
    make_recipe,
    select_training_overrides,
)
from handpose.utf8 import use_utf8
from handpose.yaml_files import read_yaml

_NUM_ATTEMPTS = 5
"""Audits of a running sweep are repeated this often, to drop findings caused by a write in progress."""


_DESCRIPTION = """\
Check that no result of a sweep was lost, repeated or changed. The audit compares the files of the sweep with each
other. It also repeats the decisions of the scheduler, those about retries, budgets and constraints, and the choice of
the winner. It changes nothing.

  python -m handpose.sweep.audit outputs/sweeps/NAME

Each finding is one sentence under one of three headings: lost (something is missing), repeated (something exists twice)
or wrong (two files contradict each other). The exit status is 1 if there is a finding, else 0.
"""


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
        raise UserError(f"{folder} has no sweep: it contains neither sweep.yaml nor {EVENTS_FILE}")
    found = list(dict.fromkeys(_audit_once(folder)))
    for _ in range(_NUM_ATTEMPTS):
        if not found or not is_locked(folder / LOCK):
            break
        again = set(_audit_once(folder))
        found = [finding for finding in found if finding in again]
    return Findings(*([each.text for each in found if isinstance(each, kind)] for kind in (Lost, Repeated, Wrong)))


def _audit_once(folder: Path) -> Iterator[AuditFinding]:
    try:
        task = load_recorded_task(folder, [])
        sweep: SweepSettings = instantiate(task.config.sweep)
        scheduler = bind_scheduler(instantiate(task.config.scheduler), sweep, task.spaces[0])()
        limits = parse_limits(dict(task.config.searcher.get("constraints") or {}))
        overrides = add_checkpoint_metric(select_training_overrides(task.overrides), task.config, sweep.target)
    except UserError as error:
        yield Wrong(f"sweep.yaml and search_space/: {error}")
        yield from _find_unreadable_lines(folder)
        return
    yield from _audit_description(folder, task)
    recipe = make_recipe(sweep, overrides, task.locations)
    audited = AuditedSweep(task, sweep, limits, recipe)
    with _open_study(task, folder) as (study, problem):
        yield from problem
        replayed = _replay_sweep(audited, scheduler, study)
        yield from replayed.findings
        if not replayed.events:
            return
        audited, sweep = _apply_raised_epochs(audited, replayed)
        if study is not None:
            yield from audit_study(audited, replayed, study)
    yield from audit_trial_files(replayed, sweep, in_tab=True)
    yield from audit_results(audited, replayed)


def _apply_raised_epochs(audited: AuditedSweep, replayed: ReplayResult) -> tuple[AuditedSweep, SweepSettings]:
    """Return what is audited, and its settings, with the number of epochs to which the user has raised it."""
    max_epochs = replayed.history.settings.max_epochs
    settings = replace(audited.settings, max_epochs=max_epochs)
    return audited._replace(settings=settings, recipe=replace(audited.recipe, max_epochs=max_epochs)), settings


def _find_unreadable_lines(folder: Path) -> Iterator[AuditFinding]:
    """Yield unreadable lines of the events, for a sweep whose description cannot be read either."""
    if (folder / EVENTS_FILE).is_file():
        for line in scan_event_lines((folder / EVENTS_FILE).read_bytes()):
            if line.problem:
                yield Wrong(f"{EVENTS_FILE}: line {line.number} {line.problem}")


def _replay_sweep(audited: AuditedSweep, scheduler: Any, study: optuna.Study | None) -> ReplayResult:
    task, sweep = audited.task, audited.settings
    trials = [] if study is None else study.get_trials(deepcopy=False)
    expected = Expectations(
        sweep.num_trials,
        count_points(instantiate(task.config.searcher), task.spaces[0], repeats=scheduler.perturbs_params),
        0 if study is None else get_first_number(study),
        audited.limits,
        {trial.number: get_trial_params(trial) for trial in trials}.get,
        task.config.trainer.check_val_every_n_epoch,
        is_resuming=_is_newer(sweep.path / "sweep.yaml", sweep.path / EVENTS_FILE),
    )
    return replay_events(
        sweep,
        expected,
        scheduler=scheduler,
        command=audited.recipe.format_command,
        load_space=task.load_space,
    )


def _is_newer(file: Path, than: Path) -> bool:
    return file.is_file() and than.is_file() and file.stat().st_mtime_ns > than.stat().st_mtime_ns


@contextlib.contextmanager
def _open_study(task: SweepTask, folder: Path) -> Iterator[tuple[optuna.Study | None, list[AuditFinding]]]:
    """Open the study of a sweep for reading; yield it with findings that say why it cannot be read.

    Yield None for a searcher without a study.
    """
    if not issubclass(get_class(task.config.searcher._target_), OptunaSearcher):
        yield None, []
        return
    url, name = task.config.searcher.storage, task.config.sweep.name
    label = "the study" if url else f"study/{JOURNAL_FILE}"
    if url is None and not (folder / "study" / JOURNAL_FILE).is_file():
        is_begun = (folder / EVENTS_FILE).is_file()
        yield None, [Lost(f"{label} is missing")] if is_begun else []
        return
    try:
        storage = open_storage_for_reading(url, folder / "study")
        found = find_newest_study(storage, name)
        study = None if found is None else optuna.Study(storage.get_study_name_from_id(found[0]), storage)
        study and study.get_trials(deepcopy=False)
    except Exception as error:  # whatever Optuna raises for a damaged journal
        yield None, [Wrong(f"{label} cannot be read ({type(error).__name__}: {error})")]
        return
    try:
        yield study, [] if study else [Lost(f"{label} has no study {name}")]
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
    written, now = (fill_in_modes(flatten_config(each)) for each in (record["config"], to_plain_values(task.config)))
    for key in {**written, **now}:
        is_compared = key.startswith(_COMPARED) and not key.startswith(_IGNORED_KEYS)
        # Sweeps of earlier versions lack the keys that came later.
        if is_compared and key in written and written[key] != now.get(key):
            yield Wrong(f"sweep.yaml: config has {key}={written.get(key)}, but its overrides give {now.get(key)}")
    for key, value in task.fixed.items():
        if not is_same(value, task.defaults.get(key.lstrip("+"))):
            made = task.defaults.get(key.lstrip("+"))
            yield Wrong(f"sweep.yaml: fixed_params has {key}={value}, but its overrides give {made}")
    given = dict(each.partition("=")[::2] for each in record["locations"])
    overridden = {each.partition("=")[0] for each in record["overrides"]}
    for key in sorted({"paths.data", "paths.output", "paths.packed"} - overridden):
        if key not in given:
            yield Lost(f"sweep.yaml: locations has no {key}, but config has {written.get(key)}")
        elif str(written.get(key)) != given[key].strip("'"):
            yield Wrong(f"sweep.yaml: config has {key}={written.get(key)}, but locations has {given[key]}")
    choices = compose_choices(task.overrides)
    for group, theirs, ours in find_differences(rename_options(record["choices"]), rename_options(choices)):
        is_new = group == "budget" and group not in record["choices"]  # sweeps of earlier versions have no budget
        if not group.startswith("hydra") and not is_new:
            yield Wrong(f"sweep.yaml: choices has {group}={theirs}, but its overrides give {ours}")


def compose_choices(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the options of configuration groups that these overrides choose."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("tune", [*overrides, *search_path_override()], return_hydra_config=True)
    return dict(config.hydra.runtime.choices)


def main() -> None:
    """Print the findings; exit with status 1 if there are any."""
    parser = make_parser("handpose.sweep.audit", _DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the sweep, such as outputs/sweeps/NAME")
    given = parser.parse_args()
    with exit_on_user_error():
        found = audit(given.folder.resolve())
        for kind, sentences in found._asdict().items():
            print(f"{kind}: {len(sentences)}", *sentences, sep="\n  ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    use_utf8()
    main()
