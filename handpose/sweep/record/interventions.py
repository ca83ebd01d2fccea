"""Interventions: commands of a user to a running sweep. Each is a file in the folder of the sweep and has an answer.

`python -m handpose.sweep.control` writes the command, and the process that runs the sweep writes the answer. For a
sweep in an object store, `handpose.sweep.storage.control_sync` copies both between the folder and the store. What was
executed is an event of the sweep (`TrialSteered`, `SweepSteered`); the answer only tells the user. So an intervention
is executed exactly once, even if a process is killed between the event and the answer.
"""

import contextlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from handpose.errors import UserError
from handpose.files import expand_home, write_atomically
from handpose.sweep.record.events import SpaceRecord, SweepAction, TrialAction, is_space_name
from handpose.urls import is_url

CONTROL_FOLDER = "control"
"""Folder of the interventions, in the folder of a sweep."""

BUDGET_LIMITS = ("time_budget_s", "gpu_hours", "stop_when")
"""What the action `budget` changes."""

_COUNT_LIMITS = {"trials": "num_trials", "slots": "max_concurrent"}
"""Action -> name of the limit that it changes."""

LIMITS = (*_COUNT_LIMITS.values(), *BUDGET_LIMITS)
"""Names in the configuration group `sweep` that interventions may change, and so may the command line that resumes.

`max_epochs` is not one of them: what was decided before it was raised depends on its first value.
"""

_COUNTS = {**_COUNT_LIMITS, "epochs": "max_epochs"}
"""Action with a whole number -> what it changes."""

_TRIAL_ACTIONS, _SWEEP_ACTIONS = get_args(TrialAction), get_args(SweepAction)
_FILE_NAME = re.compile(r"(\d{14}-[0-9a-f]{8})(\.answer)?\.json", re.ASCII)
MAX_COMMAND_BYTES = 2**16
"""Largest size of a command file."""


@dataclass(frozen=True)
class Intervention:
    """A command of a user.

    Attributes:
        id: unique name; interventions are executed in the order of their ids, which is that of their times.
        given_at: Unix time in seconds.
        action: what to do.
        trial: number of the trial; None for an action on the sweep.
        limits: name in the configuration group `sweep` -> its new value; None: no limit.
        params: with `add`, configuration key -> value.
        space: with `space`, the search space.
    """

    id: str
    given_at: float
    action: TrialAction | SweepAction
    trial: int | None = None
    limits: Mapping[str, float | None] = field(default_factory=dict)
    params: Mapping[str, Any] | None = None
    space: SpaceRecord | None = None


@dataclass(frozen=True)
class InterventionAnswer:
    """The answer to an intervention.

    Attributes:
        is_accepted: whether it has been executed.
        sentence: what has changed, or why it was refused.
    """

    is_accepted: bool
    sentence: str


def make_intervention(
    action: TrialAction | SweepAction,
    *,
    trial: int | None = None,
    limits: Mapping[str, float | None] | None = None,
    params: Mapping[str, Any] | None = None,
    space: SpaceRecord | None = None,
) -> Intervention:
    """Make an intervention with a new id.

    Args:
        action: what to do.
        trial: number of the trial.
        limits: name in the configuration group `sweep` -> its new value.
        params: with `add`, configuration key -> value.
        space: with `space`, the search space.

    Raises:
        UserError: a value is not possible.
    """
    now_s = time.time()
    name = f"{int(1000 * now_s):014d}-{secrets.token_hex(4)}"
    made = Intervention(name, now_s, action, trial, limits or {}, params, space)
    _check_values(made)
    return made


def describe_intervention(given: Intervention) -> str:
    """Return the command that gives an intervention, as the user types it."""
    if given.trial is not None:
        return f"{given.action} {given.trial}"
    if given.params is not None:
        return f"{given.action} '{' '.join(f'{key}={value}' for key, value in given.params.items())}'"
    if given.space is not None:
        return f"{given.action} {given.space.name}"
    if given.action == "budget":
        values = (f"{name}={'null' if value is None else value}" for name, value in given.limits.items())
        return f"{given.action} {' '.join(values)}"
    return " ".join([given.action, *map(str, given.limits.values())])


def encode_intervention(given: Intervention) -> bytes:
    """Return the content of the file of an intervention.

    Raises:
        UserError: it is too long.
    """
    content = json.dumps({name: value for name, value in asdict(given).items() if value not in (None, {})}).encode()
    if len(content) > MAX_COMMAND_BYTES:
        said = f"{describe_intervention(given)}: it is too long"
        raise UserError(f"{said}; a command has at most {MAX_COMMAND_BYTES} bytes, this one has {len(content)}")
    return content


def contains_code(content: bytes, name: str) -> bool:
    """Return whether a command file holds a search space in Python, which the sweep would execute.

    Args:
        content: the content of the file.
        name: id of the intervention.
    """
    try:
        given = _parse_intervention(content, name)
    except UserError:
        return False
    return given.space is not None and given.space.name.endswith(".py")


def encode_answer(answer: InterventionAnswer) -> bytes:
    """Return the content of the file of an answer."""
    return (json.dumps(asdict(answer)) + "\n").encode()


def parse_answer(content: bytes) -> InterventionAnswer | None:
    """Parse the file of an answer. Returns None if it is damaged."""
    try:
        values = json.loads(content)
        return InterventionAnswer(values["is_accepted"] is True, str(values["sentence"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def make_command_name(name: str) -> str:
    """Return the name of the file of an intervention (its id)."""
    return f"{name}.json"


def make_answer_name(name: str) -> str:
    """Return the name of the file with the answer to an intervention (its id)."""
    return f"{name}.answer.json"


def list_command_ids(file_names: Iterable[str]) -> list[str]:
    """Return the ids of the interventions among names of files, in the order of their execution.

    Other names, such as those of answers, are left out.
    """
    found = map(_FILE_NAME.fullmatch, file_names)
    return sorted(match[1] for match in found if match is not None and match[2] is None)


def list_answer_ids(file_names: Iterable[str]) -> list[str]:
    """Return the ids of the interventions whose answers are among names of files."""
    found = map(_FILE_NAME.fullmatch, file_names)
    return sorted(match[1] for match in found if match is not None and match[2] is not None)


def find_sweep_folder(place: str) -> Path:
    """Return the folder of a sweep that can be steered.

    Raises:
        UserError: it is a URL, or holds no sweep.
    """
    if is_url(place):
        raise UserError(
            f"{place} is a URL; give the folder of the sweep on the machine that runs tune.py, which has the same "
            "files at once"
        )
    folder = expand_home(place).resolve()
    if not (folder / "sweep.yaml").is_file():
        raise UserError(f"{place} has no sweep: there is no sweep.yaml in it; give the folder of a sweep")
    return folder


class InterventionFiles:
    """The interventions in the folder of a sweep.

    Args:
        folder: the folder of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self._sweep_folder = folder
        self._folder = folder / CONTROL_FOLDER

    def write(self, given: Intervention) -> Path:
        """Write an intervention.

        Only the owner of the sweep can read and change the file.

        Returns:
            The file.

        Raises:
            UserError: the folder of the sweep belongs to another user, or the intervention is too long.
            OSError: the file cannot be written.
        """
        return self.write_content(given.id, encode_intervention(given))

    def write_content(self, name: str, content: bytes) -> Path:
        """Write the content of a command file, as `write` does, without checking it.

        Args:
            name: id of the intervention.
            content: what the file holds. `read` checks it.

        Returns:
            The file.

        Raises:
            UserError: the folder of the sweep belongs to another user.
            OSError: the file cannot be written.
        """
        owner = self._sweep_folder.stat()
        if os.geteuid() not in (owner.st_uid, 0):
            raise UserError(f"{self._sweep_folder} belongs to another user, who alone can steer the sweep")
        self._make_folder(owner)
        file = self._folder / make_command_name(name)
        with write_atomically(file) as part:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            self._give_to_owner(part, owner)
        return file

    def list_ids(self) -> list[str]:
        """List the ids of all interventions, in the order of their execution."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(self._folder.lstat().st_mode):
                return list_command_ids(os.listdir(self._folder))
        return []

    def list_waiting(self, executed: Collection[str]) -> list[str]:
        """List the ids of the interventions that are neither executed nor refused, in the order of their execution.

        Args:
            executed: ids that the events of the sweep contain. An answer alone does not count: its event may have been
                lost together with the machine.
        """
        return [each for each in self.list_ids() if each not in executed and not self._is_refused(each)]

    def read(self, name: str) -> Intervention:
        """Read an intervention.

        Args:
            name: its id.

        Raises:
            PermissionError: another user may have written the file.
            UserError: it is not an intervention.
            OSError: it cannot be read.
        """
        return _parse_intervention(self.read_content(name), name)

    def read_content(self, name: str) -> bytes:
        """Read a command file without checking its content.

        Args:
            name: its id.

        Raises:
            PermissionError: another user may have written the file.
            UserError: it is too large.
            OSError: it cannot be read.
        """
        return _read_own_file(self._folder / make_command_name(name))

    def withdraw(self, name: str) -> None:
        """Remove an intervention that waits, if it is still there.

        Raises:
            OSError: the file cannot be removed.
        """
        (self._folder / make_command_name(name)).unlink(missing_ok=True)

    def write_answer(self, name: str, answer: InterventionAnswer) -> None:
        """Write the answer to an intervention.

        Raises:
            OSError: the file cannot be written.
        """
        self._make_folder(self._sweep_folder.stat())
        with write_atomically(self._folder / make_answer_name(name)) as part:
            part.write_bytes(encode_answer(answer))

    def read_answer(self, name: str) -> InterventionAnswer | None:
        """Return the answer to an intervention; None if there is none yet."""
        try:
            return parse_answer((self._folder / make_answer_name(name)).read_bytes())
        except OSError:
            return None

    def _is_refused(self, name: str) -> bool:
        answer = self.read_answer(name)
        return answer is not None and not answer.is_accepted

    def _make_folder(self, owner: os.stat_result) -> None:
        """Make the folder with the permissions of the sweep's folder."""
        if not self._folder.exists():
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._folder.chmod(stat.S_IMODE(owner.st_mode))
            self._give_to_owner(self._folder, owner)

    @staticmethod
    def _give_to_owner(path: Path, owner: os.stat_result) -> None:
        if os.geteuid() == 0 and owner.st_uid != 0:  # otherwise the sweep of a user could not read what root writes
            os.chown(path, owner.st_uid, owner.st_gid)


def _read_own_file(file: Path) -> bytes:
    """Read a file that nobody but this user and root can have written.

    Raises:
        PermissionError: it is a link or no file, or belongs to another user, or others can change it.
        UserError: it is too large.
        OSError: it cannot be read.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{file} is not a file")
        if found.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{file} belongs to another user")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"other users can change {file}")
        content = stream.read(MAX_COMMAND_BYTES + 1)
    if len(content) > MAX_COMMAND_BYTES:
        raise UserError(f"the file has more than {MAX_COMMAND_BYTES} bytes")
    return content


def _parse_intervention(content: bytes, name: str) -> Intervention:
    """Parse the content of a command file.

    Raises:
        UserError: it is not an intervention with this id.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the file does not hold JSON ({type(error).__name__})") from error
    allowed = {"id", "given_at", "action", "trial", "limits", "params", "space"}
    if not isinstance(values, dict) or not {"id", "given_at", "action"} <= values.keys() <= allowed:
        raise UserError(
            "the file is not a command: it needs id, given_at and action, and may have trial, limits, params, space"
        )
    if values["id"] != name:
        raise UserError(f"the file has the id {values['id']!r}, which is not that of its name")
    if values["action"] not in (*_TRIAL_ACTIONS, *_SWEEP_ACTIONS):
        raise UserError(f"there is no command {values['action']!r}")
    if not isinstance(values["given_at"], (int, float)) or isinstance(values["given_at"], bool):
        raise UserError(f"given_at={values['given_at']!r} is not a number")
    for key in ("limits", "params"):
        if key in values and not isinstance(values[key], dict):
            raise UserError(f"{key}={values[key]!r} is not a mapping")
    if "space" in values:
        values["space"] = _parse_space_record(values["space"])
    given = Intervention(**values)
    _check_values(given)
    return given


def _parse_space_record(value: Any) -> SpaceRecord:
    is_whole = isinstance(value, dict) and value.keys() == {"name", "text"}
    if not is_whole or not all(isinstance(each, str) for each in value.values()) or not is_space_name(value["name"]):
        raise UserError("space: give the name of a file (.yaml, .yml or .py) and its text")
    return SpaceRecord(**value)


def _check_values(given: Intervention) -> None:
    """Check that an intervention has the values that its action needs, and no others.

    Raises:
        UserError: it does not.
    """
    action, limits = given.action, given.limits
    if (action in _TRIAL_ACTIONS) != (given.trial is not None):
        raise UserError(f"{action}: " + ("give the number of a trial" if action in _TRIAL_ACTIONS else "give no trial"))
    if given.trial is not None and (isinstance(given.trial, bool) or not isinstance(given.trial, int)):
        raise UserError(f"{action}: {given.trial!r} is not the number of a trial")
    if (action == "add") != (given.params is not None):
        raise UserError("add: give a configuration" if action == "add" else f"{action}: give no configuration")
    if (action == "space") != (given.space is not None):
        raise UserError("space: give a search space" if action == "space" else f"{action}: give no search space")
    if action == "add":
        _check_params(given.params or {})
    elif action == "budget":
        _check_budget(limits)
    elif limits.keys() != ({_COUNTS[action]} if action in _COUNTS else set()):
        raise UserError(f"{action}: give one number" if action in _COUNTS else f"{action}: give no number")
    elif action in _COUNTS:
        number = limits[_COUNTS[action]]
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"{action}: {number!r} must be a whole number of at least 1")
    if action == "add" and limits:
        raise UserError("add: give no limits")


def _check_budget(limits: Mapping[str, float | None]) -> None:
    unknown = [name for name in limits if name not in BUDGET_LIMITS]
    if unknown or not limits:
        raise UserError(f"budget: {', '.join(unknown) or 'nothing'} is not one of {', '.join(BUDGET_LIMITS)}")
    for name, amount in limits.items():
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if amount is not None and not (is_number and math.isfinite(amount) and amount > 0):
            raise UserError(f"budget: {name}={amount!r} must be a number above 0, or null for no limit")


def _check_params(params: Mapping[str, Any]) -> None:
    if not params:
        raise UserError("add: give at least one key=value")
    for key, value in params.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise UserError(f"add: {key}={value!r} must be a number, a text, true, false, null, or a list of these")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))
