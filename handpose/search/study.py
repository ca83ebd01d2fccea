"""The Optuna study of a sweep: where it is kept, and what is kept of a trial.

The truth about a sweep are its events; the study is what samplers learn from and what optuna-dashboard shows.
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

from handpose.errors import UserError, naming
from handpose.search.distributions import parse_label
from handpose.search.space import Params

JOURNAL_FILE = "journal.log"

PARAMS_ATTRIBUTE = "params"
"""User attribute with a trial's configuration keys and values, where these are not the draws themselves."""

COST_NAMES = ("num_parameters", "latency_ms", "memory_mb")
"""What a trial is measured for; user attributes of it, too. Constraints limit them."""

_CONSTRAINT_PREFIX = "constraints:"
"""What `Trial.set_constraint` puts before a constraint's name among the system attributes (Optuna 5.0)."""

STUDY_ID_ATTRIBUTE = "id"
"""User attribute of a study that tells it from others, also of the same name."""


# --- where it is kept -------------------------------------------------------------------------------------------------


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The database at a URL, or the journal file in the folder, which is mended first; nobody else may be writing.

    Raises UserError for a URL that cannot be opened.
    """
    if url is not None:
        return _open_database(url)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JOURNAL_FILE
    repair_journal(file)
    return JournalStorage(_Journal(file))


def open_storage_for_reading(url: str | None, folder: Path) -> BaseStorage:
    """The same for reading: nothing is mended or made. Raises UserError where there is none."""
    file = folder / JOURNAL_FILE if url is None else _find_sqlite_file(url)
    if file is not None and not file.is_file():
        raise UserError(f"there is no {file}")
    return JournalStorage(JournalFileBackend(str(file))) if url is None else _open_database(url)


def check_storage_url(url: str | None) -> None:
    """Refuse the URL of a database, as it was written, that says a password: a sweep writes it down in its folder."""
    if url is not None and hide_password(url) != url:
        raise UserError(
            f"searcher.storage={hide_password(url)} would write its password into sweep.yaml; put the whole URL "
            "into the environment or into .env, as STUDY_URL=..., and give searcher.storage='${oc.env:STUDY_URL}'"
        )


def resolve_storage_url(url: str | None) -> str | None:
    """The URL of a database from what was written, which may name a variable of the environment.

    Raises UserError where that is not set.
    """
    try:
        return OmegaConf.create({"url": url}).url
    except OmegaConfBaseException as error:
        raise UserError(f"searcher.storage={url}: {' '.join(str(error).split())}") from error


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database."""
    storage.remove_session()
    backend = getattr(storage, "_backend", None)  # of the cache that Optuna puts before a database
    if isinstance(backend, RDBStorage):
        backend.engine.dispose()


def repair_journal(file: Path) -> None:
    """Cut off what a killed process or a full disk left half-written, and its lock.

    The next line would be written behind it, and Optuna cannot read past a broken line.
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
    """Optuna's journal file, flushed to the disk with each proposal and not with each line.

    A killed process loses nothing by that; what a power failure may take is in the sweep's events, and is told again
    when it goes on. An fsync takes milliseconds, and a worker waits while its report is written.
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
                with naming(self._file):
                    written = file.write(lines)
                if written != len(lines):
                    os.truncate(self._file, size)  # nothing may be written behind half a line
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
    if file is not None and not file.is_absolute():  # a sweep may go on from another folder, and needs it then
        raise UserError(
            f"searcher.storage={url} must name a file from the root on, with four slashes: sqlite:////folder/study.db"
        )
    try:
        return optuna.storages.get_storage(RDBStorage(url))
    except Exception as error:  # of SQLAlchemy, of the database's driver, or that there is no driver
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"searcher.storage={hide_password(url)} cannot be opened ({hide_password(reason)}); give the URL "
            "of a database, as sqlite:////folder/study.db, or null for a file in the sweep's folder"
        ) from error


def hide_password(text: str) -> str:
    """The text with three stars in place of each URL's password."""
    return re.sub(r"([?&]password=)[^&\s]*", r"\1***", re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text))


def create_study(storage: BaseStorage, name: str, objectives: Mapping[str, str], *, url: str | None) -> int:
    """Make a study; returns its identifier. Raises UserError where there is one of that name.

    objectives: name -> min or max, of the values that its trials will have.
    """
    directions = [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in objectives.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of the name of the metric
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        except DuplicatedStudyError as error:
            where = "the sweep's folder" if url is None else f"searcher.storage={hide_password(url)}"
            raise UserError(f"there is a study {name} in {where} already; choose another sweep.name") from error
        study.set_metric_names(list(objectives))
    storage.set_study_user_attr(study._study_id, STUDY_ID_ATTRIBUTE, uuid.uuid4().hex)
    return study._study_id


def find_study(storage: BaseStorage, name: str) -> int | None:
    """The identifier of a study, if it is there."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


# --- what a trial of it says ------------------------------------------------------------------------------------------


def get_trial_params(trial: FrozenTrial) -> Params:
    """Configuration key -> value of a trial."""
    drawn = {name: parse_label(value) for name, value in trial.params.items()}
    return dict(trial.user_attrs.get(PARAMS_ATTRIBUTE, drawn))


def get_last_value(trial: FrozenTrial) -> float | None:
    """The value of the metric that was reported last."""
    if trial.last_step is not None:
        return trial.intermediate_values[trial.last_step]
    return trial.values[0] if trial.values else None


def parse_limits(constraints: Mapping[str, float | None]) -> dict[str, float]:
    """The constraints that have a limit, in one order. Raises UserError for a limit that is none."""
    for name, limit in constraints.items():
        if name not in COST_NAMES:
            raise UserError(f"searcher.constraints.{name}: a trial is measured for {', '.join(COST_NAMES)} only")
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (is_number and 0 < limit < math.inf):
            raise UserError(f"searcher.constraints.{name} must be a number above 0, or null, but it is {limit}")
    return {name: float(limit) for name in COST_NAMES if (limit := constraints.get(name)) is not None}


def compute_excess(costs: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """System attributes of the constraints: how far each cost is over its limit, as a part of the limit.

    So that parameters and milliseconds weigh alike where a sampler adds them up.
    """
    return {f"{_CONSTRAINT_PREFIX}{name}": costs[name] / limit - 1 for name, limit in limits.items() if name in costs}
