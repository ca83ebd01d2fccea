"""The Optuna study of a sweep: its storage, and what it stores for each trial.

The events of a sweep are the authoritative record. The study is what samplers learn from and optuna-dashboard shows.
"""

import errno
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from handpose.errors import UserError, add_file_name, join_lines
from handpose.search.distributions import parse_label
from handpose.search.space import Params
from handpose.urls import hide_secrets

JOURNAL_FILE = "journal.log"

PARAMS_ATTRIBUTE = "params"
"""User attribute of a trial: its configuration keys and values, if they differ from its draws."""

PLACED_ATTRIBUTE = "placed"
"""User attribute of a trial from an earlier search space: its parameters as the newest space has them, if they differ.

Its draws are those of the newest space. It has none if that space does not contain it.
"""

ORIGIN_ATTRIBUTE = "origin"
"""User attribute of a trial: where its parameters come from, in words."""

COST_NAMES = ("num_parameters", "latency_ms", "memory_mb")
"""The costs that are measured for a trial, which are also user attributes of it. Constraints limit them."""

_CONSTRAINT_PREFIX = "constraints:"
"""Prefix that `Trial.set_constraint` adds to the name of a constraint in the system attributes (Optuna 5.0)."""

STUDY_ID_ATTRIBUTE = "id"
"""User attribute of a study with a unique identifier, since several studies may have the same name."""

SWEEP_ATTRIBUTE, RAISED_EPOCHS_ATTRIBUTE, SPACE_ATTRIBUTE = "sweep", "max_epochs", "search_space"
"""User attributes of a study with which a sweep goes on after a command of the user.

These are its sweep, the number of epochs to which `sweep.max_epochs` has been raised, and the number of the search
space, counted from 1. The last two are missing as long as the user has not changed them.
"""

PLAN_ATTRIBUTE = "plan"
"""User attribute that marks a complete study.

It holds the points to try first (`points`), where they come from (`origins`; not in studies of earlier versions), and
the number of the sweep's first own trial (`first_number`). In the study of a later search space, `start` is the number
of the first trial that is proposed from it.
"""


# --- storage ----------------------------------------------------------------------------------------------------------


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open the storage of a study for writing. No other process may be writing to it.

    Args:
        url: the URL of a database, or None for the journal file in the folder, which is repaired first.
        folder: the folder of the journal file. It is created if it does not exist.

    Raises:
        UserError: the URL cannot be opened.
    """
    if url is not None:
        return _open_database(url)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JOURNAL_FILE
    repair_journal(file)
    return JournalStorage(_Journal(file))


def open_storage_for_reading(url: str | None, folder: Path) -> BaseStorage:
    """Open the storage of a study for reading. Nothing is repaired or created.

    Args:
        url: the URL of a database, or None for the journal file in the folder.
        folder: the folder of the journal file.

    Raises:
        UserError: there is no such file, or the URL cannot be opened.
    """
    file = folder / JOURNAL_FILE if url is None else _find_sqlite_file(url)
    if file is not None and not file.is_file():
        raise UserError(f"there is no {file}")
    return JournalStorage(JournalFileBackend(str(file))) if url is None else _open_database(url)


def check_storage_url(url: str | None) -> None:
    """Raise UserError if the URL of a database, as the user wrote it, contains a password.

    The sweep saves this URL in its folder.
    """
    if url is not None and hide_secrets(url) != url:
        raise UserError(
            f"searcher.storage={hide_secrets(url)} would write its password into sweep.yaml; put the whole URL "
            "into the environment or into .env, as STUDY_URL=..., and give searcher.storage='${oc.env:STUDY_URL}'"
        )


def resolve_storage_url(url: str | None) -> str | None:
    """Return the URL of a database with its environment variables resolved.

    Args:
        url: the URL as the user wrote it, which may contain ${oc.env:...}.

    Raises:
        UserError: an environment variable is not set, or the text is malformed.
    """
    try:
        return OmegaConf.create({"url": url}).url
    except OmegaConfBaseException as error:
        raise UserError(f"searcher.storage={url}: {join_lines(error)}") from error


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database."""
    storage.remove_session()
    backend = getattr(storage, "_backend", None)  # Optuna wraps a database in a cache
    if isinstance(backend, RDBStorage):
        backend.engine.dispose()


def repair_journal(file: Path) -> None:
    """Truncate a journal file at its first broken line, and remove its lock.

    A killed process or a full disk may leave half a line. The next line would be appended to it, and Optuna cannot read
    past a broken line.
    """
    for lock in file.parent.glob(f"{file.name}.lock*"):
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
    """Optuna's journal file, with an fsync for each proposal and not for each line.

    A killed process loses nothing this way. What a power failure may lose is in the events of the sweep, and resuming
    the sweep restores it. An fsync takes milliseconds, and a worker waits while its report is written.
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
                with add_file_name(self._file):
                    written = file.write(lines)
                if written != len(lines):
                    os.truncate(self._file, size)  # nothing may be appended to half a line
                    raise OSError(errno.ENOSPC, "is the disk full?", str(self._file))
                if any("params" in log and log["state"] == TrialState.RUNNING for log in logs):
                    os.fsync(file.fileno())
        finally:
            self._lock.release()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _find_sqlite_file(url: str) -> Path | None:
    found = re.fullmatch(r"sqlite(?:\+\w+)?://(?:/([^?]*).*)?", url)
    return Path(found[1] or "") if found else None


def _open_database(url: str) -> BaseStorage:
    file = _find_sqlite_file(url)
    if file is not None and not file.is_absolute():  # a sweep may be resumed from another working directory
        raise UserError(
            f"searcher.storage={url} must have an absolute path, with four slashes: sqlite:////folder/study.db"
        )
    try:
        return optuna.storages.get_storage(RDBStorage(url))
    except Exception as error:  # from SQLAlchemy or the driver, or the driver is missing
        reason = join_lines(error.__cause__ or error)
        raise UserError(
            f"searcher.storage={hide_secrets(url)} cannot be opened ({hide_secrets(reason)}); give the URL "
            "of a database, as sqlite:////folder/study.db, or null for a file in the sweep's folder"
        ) from error


def create_study(storage: BaseStorage, name: str, objectives: Mapping[str, str], *, url: str | None) -> int:
    """Create a study.

    Args:
        storage: the storage to create it in.
        name: the name of the study.
        objectives: name -> `min` or `max`, one for each value of a trial.
        url: the URL of the storage, for the error message; None for the journal file of the sweep.

    Returns:
        The identifier of the study in the storage.

    Raises:
        UserError: the storage has a study of this name already.
    """
    directions = [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in objectives.values()]
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):  # set_metric_names is experimental
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        except DuplicatedStudyError as error:
            where = "the sweep's folder" if url is None else f"searcher.storage={hide_secrets(url)}"
            raise UserError(f"{where} already has a study {name}; choose another sweep.name") from error
        study.set_metric_names(list(objectives))
    storage.set_study_user_attr(study._study_id, STUDY_ID_ATTRIBUTE, uuid.uuid4().hex)
    return study._study_id


def find_study(storage: BaseStorage, name: str) -> int | None:
    """Return the identifier of a study in the storage, or None if it does not exist."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


def make_study_name(sweep: str, *, max_epochs: int | None, space: int) -> str:
    """Make the name of the study with which a sweep goes on after a command of the user.

    Optuna does not change a trial that has ended, so each number of epochs has a study of its own. Nor does it change
    the choices of a parameter, so each search space has one, too.

    Args:
        sweep: name of the sweep, which is the name of its first study.
        max_epochs: the number to which the epochs of a complete trial have been raised; None: they have not.
        space: the number of the search space, counted from 1.
    """
    parts = [] if space == 1 else [f"search space {space}"]
    parts += [] if max_epochs is None else [f"{max_epochs} epochs"]
    return f"{sweep} ({', '.join(parts)})" if parts else sweep


def find_newest_study(storage: BaseStorage, sweep: str) -> tuple[int, int | None] | None:
    """Find the study with which a sweep goes on.

    Args:
        storage: its storage.
        sweep: name of the sweep.

    Returns:
        The identifier of the study, and the number of epochs to which the user has raised `sweep.max_epochs`, or None
        if that has not happened. None if there is no study.
    """
    first = find_study(storage, sweep)
    if first is None:
        return None
    found = {(1, 0): first}  # neither number ever becomes smaller
    for study in storage.get_all_studies():
        attributes = study.user_attrs
        if attributes.get(SWEEP_ATTRIBUTE) == sweep and PLAN_ATTRIBUTE in attributes:
            place = (attributes.get(SPACE_ATTRIBUTE, 1), attributes.get(RAISED_EPOCHS_ATTRIBUTE, 0))
            found[place] = study._study_id
    newest = max(found)
    return found[newest], newest[1] or None


# --- trials -----------------------------------------------------------------------------------------------------------


def get_trial_params(trial: FrozenTrial) -> Params:
    """Return the parameters of a trial, as configuration key -> value."""
    drawn = {name: parse_label(value) for name, value in trial.params.items()}
    return dict(trial.user_attrs.get(PARAMS_ATTRIBUTE, drawn))


def get_placed_params(trial: FrozenTrial) -> Params:
    """Return the parameters of a trial as the search space of the study has them; its own if it does not contain it."""
    return dict(trial.user_attrs.get(PLACED_ATTRIBUTE) or get_trial_params(trial))


def keep_constraints(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the system attributes of a trial that say how far its costs are above their limits."""
    return {key: value for key, value in attributes.items() if key.startswith(_CONSTRAINT_PREFIX)}


def get_last_value(trial: FrozenTrial) -> float | None:
    """Return the last reported value of the metric, or None if there is none."""
    if trial.last_step is not None:
        return trial.intermediate_values[trial.last_step]
    return trial.values[0] if trial.values else None


def parse_limits(constraints: Mapping[str, float | None]) -> dict[str, float]:
    """Return the constraints that have a limit, in the order of `COST_NAMES`.

    Args:
        constraints: cost -> upper limit, or None for no limit.

    Raises:
        UserError: a cost is not measured, or its limit is not a finite number above 0.
    """
    for name, limit in constraints.items():
        if name not in COST_NAMES:
            raise UserError(f"searcher.constraints.{name}: only {', '.join(COST_NAMES)} are measured")
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (is_number and 0 < limit < math.inf):
            raise UserError(f"searcher.constraints.{name} must be a number above 0, or null, but it is {limit}")
    return {name: float(limit) for name in COST_NAMES if (limit := constraints.get(name)) is not None}


def compute_excess(costs: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """Compute the system attributes of the constraints: how far each cost is above its limit.

    The excess is a fraction of the limit, so that parameters and milliseconds have the same weight when a sampler adds
    them up. It is negative for a cost below its limit.

    Args:
        costs: the measured costs by name.
        limits: cost -> upper limit.
    """
    return {f"{_CONSTRAINT_PREFIX}{name}": costs[name] / limit - 1 for name, limit in limits.items() if name in costs}
