"""Copies the commands to a sweep, and their answers, between the folder of the sweep and its object store.

A command to a sweep in a store is the file `control/ID.json` there. The process that runs the sweep downloads it to the
folder of the sweep, where it is executed as any other command, and uploads the answer. A command that was executed is
an event of the sweep, so it is not executed again, no matter how often it is downloaded or on which machine the sweep
is resumed. An answer is uploaded after the events, so that no user reads of a change that a resumed sweep lacks.
"""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handpose.errors import UserError
from handpose.sweep.record.interventions import (
    CONTROL_FOLDER,
    MAX_COMMAND_BYTES,
    Intervention,
    InterventionAnswer,
    InterventionFiles,
    contains_code,
    encode_answer,
    encode_intervention,
    list_answer_ids,
    list_command_ids,
    make_answer_name,
    make_command_name,
    parse_answer,
)
from handpose.sweep.storage.object_store import ObjectStore, summarise_store_error

_NUM_THREADS = 8

CODE_REFUSAL = (
    "a search space in Python is executed by the sweep, so it must be given in the folder of the sweep, on the machine "
    "that runs tune.py; give a YAML file by the URL"
)
"""Why a command with a search space in Python is not executed if it comes from the store."""


def make_stored_name(file_name: str) -> str:
    """Return the name of a file with a command or an answer in the store of its sweep."""
    return f"{CONTROL_FOLDER}/{file_name}"


class StoredInterventions:
    """The commands to a sweep and their answers in its object store.

    All methods raise OSError if the store does not answer.

    Args:
        store: the store, opened at the URL of the sweep.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def give(self, given: Intervention) -> None:
        """Write a command."""
        self.write_content(given.id, encode_intervention(given))

    def list_ids(self) -> tuple[list[str], list[str]]:
        """List the ids of the commands, and the ids of those that have an answer. Other files are ignored.

        Raises:
            UserError: a name leads out of the folder.
        """
        names = [name.removeprefix(f"{CONTROL_FOLDER}/") for name in self._store.list_files(CONTROL_FOLDER)]
        return list_command_ids(names), list_answer_ids(names)

    def read_content(self, name: str) -> bytes:
        """Read the file of a command, of a larger one only so much that it is refused.

        Args:
            name: id of the command.
        """
        return self._store.read(make_stored_name(make_command_name(name)), max_bytes=MAX_COMMAND_BYTES + 1)

    def write_content(self, name: str, content: bytes) -> None:
        """Write the file of a command.

        Args:
            name: id of the command.
            content: what the file holds.
        """
        self._store.write(make_stored_name(make_command_name(name)), content)

    def withdraw(self, name: str) -> None:
        """Remove a command, if it is still there."""
        self._store.remove(make_stored_name(make_command_name(name)))

    def read_answer(self, name: str) -> InterventionAnswer | None:
        """Return the answer to a command; None if there is none yet."""
        try:
            return parse_answer(self._store.read(make_stored_name(make_answer_name(name)), max_bytes=MAX_COMMAND_BYTES))
        except FileNotFoundError:
            return None

    def write_answer(self, name: str, answer: InterventionAnswer) -> None:
        """Write the answer to a command."""
        self._store.write(make_stored_name(make_answer_name(name)), encode_answer(answer))


def download_interventions(store: ObjectStore, folder: Path) -> None:
    """Download the commands to a sweep, and their answers, to a folder without any.

    Raises:
        UserError: the store does not answer, or has a name that leads out of the folder.
    """
    stored, files = StoredInterventions(store), InterventionFiles(folder)

    def download(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it has been withdrawn
            files.write_content(name, stored.read_content(name))

    try:
        commands, answered = stored.list_ids()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(download, commands))
            for name, answer in zip(answered, pool.map(stored.read_answer, answered), strict=True):
                if answer is not None and name in commands:
                    files.write_answer(name, answer)
    except OSError as error:
        raise UserError(f"{store} cannot be read ({summarise_store_error(error)})") from error


class ControlSync:
    """Keeps the commands and answers in the folder of a sweep and in its store the same.

    A command with a search space in Python that comes from the store is refused, because the sweep would execute it.

    A file that is removed in one place after this process has seen it in both is a command that was withdrawn, and is
    removed in the other place, too. All methods raise OSError if the store does not answer, or a local file cannot be
    written, and UserError if the folder belongs to another user or the store has a name that leads out of it.

    Args:
        folder: folder of the sweep.
        store: the store, opened at the URL of the sweep.
        check_lease: raises an exception if another process runs the sweep. It is called before each change.
    """

    def __init__(self, folder: Path, store: ObjectStore, *, check_lease: Callable[[], None]) -> None:
        self._files = InterventionFiles(folder)
        self._stored = StoredInterventions(store)
        self._check_lease = check_lease
        self._in_both: set[str] = set()
        self._stored_answers: dict[str, InterventionAnswer] = {}

    def connect(self) -> None:
        """Download what another process has left, before the sweep runs.

        A refusal in the store replaces a local answer: its user has read it, so the command must not be executed later.
        """
        _, answered = self._stored.list_ids()
        self.sync_commands()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for name, answer in zip(answered, pool.map(self._stored.read_answer, answered), strict=True):
                if answer is None or name not in self._in_both:
                    continue
                self._stored_answers[name] = answer
                if not answer.is_accepted or self._files.read_answer(name) is None:
                    self._files.write_answer(name, answer)

    def sync_commands(self) -> None:
        """Download new commands from the store, and upload those that were given in the folder."""
        stored, local = set(self._stored.list_ids()[0]), set(self._files.list_ids())
        self._in_both |= stored & local
        for name in sorted(stored ^ local):
            self._check_lease()
            if name in self._in_both:
                self._withdraw(name, is_stored=name in stored)
            elif name in stored:
                self._download(name)
            else:
                self._upload(name)

    def find_new_answers(self, *, with_changed: bool) -> dict[str, InterventionAnswer]:
        """Find the local answers that the store lacks.

        Args:
            with_changed: also read those again that are in the store, to find the ones that have changed since. This
                happens only after a process was killed.

        Returns:
            Id of the command -> answer.
        """
        names = [name for name in self._files.list_ids() if with_changed or name not in self._stored_answers]
        answers = {name: answer for name in names if (answer := self._files.read_answer(name)) is not None}
        return {name: answer for name, answer in answers.items() if self._stored_answers.get(name) != answer}

    def upload_answers(self, answers: Mapping[str, InterventionAnswer]) -> None:
        """Upload answers. The events of their commands must be in the store."""
        for name, answer in answers.items():
            self._check_lease()
            self._stored.write_answer(name, answer)
            self._stored_answers[name] = answer

    def _download(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it has been withdrawn
            content = self._stored.read_content(name)
            if contains_code(content, name):  # whoever can write to the store could have the sweep execute it
                self._files.write_answer(name, InterventionAnswer(False, CODE_REFUSAL))
            self._files.write_content(name, content)
            self._in_both.add(name)

    def _upload(self, name: str) -> None:
        """Upload a local command, unless another user may have written its file: a process elsewhere would trust it."""
        try:
            content = self._files.read_content(name)
        except (PermissionError, FileNotFoundError, UserError):
            return
        self._stored.write_content(name, content)
        self._in_both.add(name)

    def _withdraw(self, name: str, *, is_stored: bool) -> None:
        if is_stored:
            self._stored.withdraw(name)
        elif self._files.read_answer(name) is None:
            self._files.withdraw(name)
        else:  # it has been executed or refused, and stays in the folder as a record
            return
        self._in_both.discard(name)
