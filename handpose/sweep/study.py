"""The Optuna study of a sweep: where it is kept, and what a sampler is shown of it.

The truth about a sweep are its events; the study is what samplers learn from and what optuna-dashboard shows.
"""

import copy
import json
import os
import re
import statistics
import warnings
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from handpose.errors import UserError
from handpose.sweep.space import Params, from_label

JOURNAL = "journal.log"

PARAMS = "params"
"""User attribute with a trial's configuration keys and values, where these are not the draws themselves."""

COSTS = ("num_parameters", "latency_ms", "memory_mb")
"""What a trial is measured for; user attributes of it, too. Constraints limit them."""

PENDING = -1
"""Identifier of the trial that is being proposed, which no storage has yet."""

_CONSTRAINT = "constraints:"
"""What `Trial.set_constraint` puts before a constraint's name among the system attributes (Optuna 5.0)."""

_OF_STUDY = "study:"
_SHARED = ":relative_params:"


# --- where it is kept -------------------------------------------------------------------------------------------------


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The database at a URL, or the journal file in the folder, which is mended first; nobody else may be writing.

    Raises UserError for a URL that cannot be opened.
    """
    if url is not None:
        return _open_database(url)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JOURNAL
    mend_journal(file)
    return JournalStorage(_Journal(file))


def read_storage(url: str | None, folder: Path) -> BaseStorage:
    """The same for reading: nothing is mended or made. Raises UserError where there is none."""
    if url is not None:
        return _open_database(url)
    file = folder / JOURNAL
    if not file.is_file():
        raise UserError(f"there is no {file}, where a sweep keeps its study")
    return JournalStorage(JournalFileBackend(str(file)))


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database."""
    storage.remove_session()
    backend = getattr(storage, "_backend", None)  # of the cache that Optuna puts before a database
    if isinstance(backend, RDBStorage):
        backend.engine.dispose()


def mend_journal(file: Path) -> None:
    """Cut off what a killed process or a full disk left half-written, and its lock.

    The next line would be written behind it, and Optuna cannot read past a broken line.
    """
    lock = Path(f"{file}.lock")
    if lock.is_symlink():
        lock.unlink()
    if not file.exists():
        return
    size = 0
    with file.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") or not _is_json(line):
                break
            size += len(line)
    if size < file.stat().st_size:
        os.truncate(file, size)


class _Journal(BaseJournalBackend):
    """Optuna's journal file, flushed to the disk with each new trial and not with each line.

    A killed process loses nothing by that; what a power failure may take is in the sweep's events, and is told again
    when it goes on. An fsync takes milliseconds, for a line that is written while a worker waits.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = JournalFileSymlinkLock(str(file))
        self._journal = JournalFileBackend(str(file), self._lock)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._journal.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._lock.acquire()
        try:
            with self._file.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(lines) != len(lines):
                    os.truncate(self._file, size)  # the disk is full: nothing may be written behind half a line
                    raise OSError(f"{self._file} cannot be written: is the disk full?")
                if any("datetime_start" in log for log in logs):
                    os.fsync(file.fileno())
        finally:
            self._lock.release()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _open_database(url: str) -> BaseStorage:
    try:
        return optuna.storages.get_storage(RDBStorage(url))
    except Exception as error:  # of SQLAlchemy, of the database's driver, or that there is no driver
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"searcher.storage={_without_password(url)} cannot be opened ({_without_password(reason)}); give the URL "
            "of a database, as sqlite:////folder/study.db, or null for a file in the sweep's folder"
        ) from error


def _without_password(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def create_study(storage: BaseStorage, name: str, metric: str, mode: str, *, url: str | None) -> int:
    """Make a study; returns its identifier. Raises UserError where there is one of that name."""
    direction = StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of the name of the metric
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        except DuplicatedStudyError as error:
            where = "the sweep's folder" if url is None else f"searcher.storage={_without_password(url)}"
            raise UserError(f"there is a study {name} in {where} already; choose another sweep.name") from error
        study.set_metric_names([metric])
    return study._study_id


def find_study(storage: BaseStorage, name: str) -> int | None:
    """The identifier of a study, if it is there."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


# --- what a trial of it says ------------------------------------------------------------------------------------------


def params_of(trial: FrozenTrial) -> Params:
    """Configuration key -> value of a trial."""
    drawn = {name: from_label(value) for name, value in trial.params.items()}
    return dict(trial.user_attrs.get(PARAMS, drawn))


def last_value(trial: FrozenTrial) -> float | None:
    """The value that was reported last."""
    return trial.intermediate_values[trial.last_step] if trial.last_step is not None else trial.value


def excess(costs: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """System attributes of the constraints: how far each cost is over its limit, as a part of the limit.

    So that parameters and milliseconds weigh alike where a sampler adds them up.
    """
    return {f"{_CONSTRAINT}{name}": costs[name] / limit - 1 for name, limit in limits.items() if name in costs}


# --- what a sampler sees ----------------------------------------------------------------------------------------------


class SamplerView(BaseStorage):
    """A study as a sampler sees it while it proposes one trial, the pending one; nothing is written to the storage.

    So a proposal is written with all it consists of at once, and there are no halves after a crash. What the sampler
    keeps for the study (QMC its place in the sequence) goes with the trial too.

    pending: takes what is drawn. A trial that waits counts with the values it has reported, like one that was stopped
    there; before it has any, it counts as running. constraints: names; of a trial that has not been measured against
    all of them nothing is learnt. completes_infeasible: one that is over a limit appears complete, with a value that
    says nothing, the median.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        pending: FrozenTrial,
        *,
        constraints: Collection[str] = (),
        completes_infeasible: bool = False,
    ) -> None:
        self._storage = storage
        self._study_id = study_id
        self._pending = pending
        self._constraints = frozenset(constraints)
        self._completes_infeasible = completes_infeasible

    @cached_property
    def _trials(self) -> list[FrozenTrial]:
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        shown = _shown(stored, self._constraints, completes_infeasible=self._completes_infeasible)
        return [*shown, self._pending]

    # What it answers differently from the storage.

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.copy(self._pending) if trial_id == PENDING else self._storage.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        attributes = dict(self._storage.get_study_system_attrs(study_id))
        for trial in self._trials:
            for key, value in trial.system_attrs.items():
                if key.startswith(_OF_STUDY):
                    attributes[key.removeprefix(_OF_STUDY)] = value
        return attributes

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._pending.system_attrs = {**self._pending.system_attrs, f"{_OF_STUDY}{key}": value}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        assert trial_id == PENDING
        if _SHARED not in key:  # drawn in advance, for others to see; here the trial shows itself whole
            self._pending.system_attrs = {**self._pending.system_attrs, key: value}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        assert trial_id == PENDING
        self._pending.user_attrs = {**self._pending.user_attrs, key: value}

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        assert trial_id == PENDING
        value = distribution.to_external_repr(param_value_internal)
        self._pending.params = {**self._pending.params, param_name: value}
        self._pending.distributions = {**self._pending.distributions, param_name: distribution}

    # What it passes on.

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._storage.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(study_id)

    def get_all_studies(self) -> list[Any]:
        return self._storage.get_all_studies()

    # What no sampler does.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        raise NotImplementedError

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        raise NotImplementedError

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        raise NotImplementedError

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        raise NotImplementedError

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        raise NotImplementedError


def pending_trial(number: int, point: dict[str, Any] | None) -> FrozenTrial:
    """A trial that is to be proposed. point: draws by name that are decided already."""
    return FrozenTrial(
        number=number,
        trial_id=PENDING,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={"fixed_params": point} if point else {},  # as Study.enqueue_trial has it
        intermediate_values={},
    )


def _shown(
    trials: Sequence[FrozenTrial], constraints: frozenset[str], *, completes_infeasible: bool
) -> Iterator[FrozenTrial]:
    values = [trial.value for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    for trial in trials:
        state, value = trial.state, trial.value
        if state == TrialState.WAITING:
            state = TrialState.PRUNED if trial.intermediate_values else TrialState.RUNNING
            value = last_value(trial)
        if constraints and state in (TrialState.COMPLETE, TrialState.PRUNED):
            if not constraints <= trial.constraints.keys():
                state, value = TrialState.FAIL, None
            elif completes_infeasible and values and any(excess > 0 for excess in trial.constraints.values()):
                state, value = TrialState.COMPLETE, statistics.median(values)
        yield trial if (state, value) == (trial.state, trial.value) else _with(trial, state, value)


def _with(trial: FrozenTrial, state: TrialState, value: float | None) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.state, changed.values = state, None if value is None else [value]
    return changed
