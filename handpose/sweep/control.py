"""Steer a sweep: stop, retry or keep a trial, add a configuration, change limits or the space, pause and resume.

    python -m handpose.sweep.control outputs/sweeps/NAME stop 17
    python -m handpose.sweep.control s3://bucket/folder/NAME stop 17

A command is a file in the folder of the sweep, or in its object store. The process that runs the sweep executes it and
answers. This program needs neither Ray nor the process itself, only the folder or the store.
"""

import argparse
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from handpose.errors import UserError
from handpose.locks import is_locked
from handpose.program import exit_on_user_error, make_parser
from handpose.sweep.record.events import (
    EVENTS_FILE,
    SpaceRecord,
    SweepClosed,
    SweepSteered,
    TrialSteered,
    read_events,
)
from handpose.sweep.record.interventions import (
    BUDGET_LIMITS,
    Intervention,
    InterventionAnswer,
    InterventionFiles,
    describe_intervention,
    find_sweep_folder,
    make_command_name,
    make_intervention,
)
from handpose.sweep.record.settings import LOCK, format_resume_command
from handpose.sweep.storage.control_sync import (
    CODE_REFUSAL,
    StoredInterventions,
    download_interventions,
    make_stored_name,
)
from handpose.sweep.storage.lease import RENEW_EVERY_S, read_lease
from handpose.sweep.storage.object_store import ObjectStore, summarise_store_error
from handpose.sweep.storage.stored_sweep import download_events, open_stored_sweep, open_sweep_for_reading
from handpose.urls import is_url, join_url
from handpose.utf8 import read_utf8, use_utf8

_DESCRIPTION = """\
Steer a sweep, from any shell that sees its folder or its object store. The process that runs the sweep executes a
command within two seconds and answers; with the URL of a store, it takes about six seconds. If no process runs the
sweep, the command waits until the sweep is resumed.

  python -m handpose.sweep.control outputs/sweeps/NAME stop 17
  python -m handpose.sweep.control s3://bucket/folder/NAME stop 17
  python -m handpose.sweep.control outputs/sweeps/NAME add 'model.decoder.depth=4 optimizer.lr=3e-3'
  python -m handpose.sweep.control outputs/sweeps/NAME

Without a command it lists the commands that were given, with their answers. The exit status is 0 if the command was
executed, 2 if it was refused or is wrong, and 75 if it still waits.
"""

_WAITING_STATUS = 75
"""Exit status for a command that waits; sysexits.h calls it a temporary failure."""
_WAIT_S, _STORE_WAIT_S = 10.0, 30.0
_LOOK_EVERY_S, _LOOK_IN_STORE_EVERY_S = 0.1, 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Raises:
        SystemExit: with status 2, if an argument is wrong or the command cannot be given.
    """
    options = _make_parser().parse_args(arguments)
    with exit_on_user_error():
        if options.action is None:
            print(*_list_interventions(options.place), sep="\n")
            return 0
        give = _give_to_store if is_url(options.place) else _give_to_folder
        answer = give(options)
    if isinstance(answer, str):
        print(answer)
        return _WAITING_STATUS
    print(_format_answer(answer))
    return 0 if answer.is_accepted else 2


def _give_to_folder(options: argparse.Namespace) -> InterventionAnswer | str:
    """Give a command to the sweep in a folder. Returns the answer, or a sentence about a command that waits."""
    folder = find_sweep_folder(options.place)
    given, files = _make_intervention(options), InterventionFiles(folder)
    file = files.write(given)
    is_run = is_locked(folder / LOCK)
    wait_s = (_WAIT_S if is_run else 0.0) if options.wait_s is None else options.wait_s
    answer = _wait_for_answer(files.read_answer, given.id, wait_s, every_s=_LOOK_EVERY_S)
    return answer or _describe_waiting(folder, file)


def _give_to_store(options: argparse.Namespace) -> InterventionAnswer | str:
    """Give a command to the sweep at a URL. Returns the answer, or a sentence about a command that waits."""
    url = options.place
    store = open_stored_sweep(url)
    given, stored = _make_intervention(options), StoredInterventions(store)
    if given.space is not None and given.space.name.endswith(".py"):
        raise UserError(f"space {given.space.name}: {CODE_REFUSAL}")
    wait_s = _STORE_WAIT_S if options.wait_s is None else options.wait_s
    try:
        before = read_lease(store)
        stored.give(given)
    except OSError as error:
        raise UserError(
            f"the command cannot be written to {url} ({summarise_store_error(error)}); it needs the permission to "
            "write there, and credentials in the environment"
        ) from error
    file = join_url(url, make_stored_name(make_command_name(given.id)))
    try:
        answer = _wait_for_answer(stored.read_answer, given.id, wait_s, every_s=_LOOK_IN_STORE_EVERY_S)
        return answer or _describe_stored_waiting(store, file, before, wait_s)
    except OSError as error:
        said = summarise_store_error(error)
        return f"waiting: the command is in {url}, which does not answer now ({said}); to withdraw it, remove {file}"


def _make_parser() -> argparse.ArgumentParser:
    parser = make_parser("handpose.sweep.control", _DESCRIPTION)
    parser.add_argument("place", metavar="DIR", help="folder of the sweep, such as outputs/sweeps/NAME, or its URL")
    parser.add_argument(
        "--wait-s",
        type=_parse_seconds,
        metavar="S",
        help=f"how long to wait for the answer (default: {_WAIT_S:g}, or {_STORE_WAIT_S:g} with a URL)",
    )
    commands = parser.add_subparsers(dest="action", metavar="COMMAND", title="commands")
    for name, text in (
        ("stop", "end a trial; its results so far count"),
        ("retry", "resume a trial that has failed, or that you have stopped, from its newest checkpoint"),
        ("keep", "train a trial to sweep.max_epochs, whatever the scheduler decides"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("trial", type=int, metavar="TRIAL", help="number of the trial, as in trials.csv")
    add = commands.add_parser("add", help="try a configuration next", description="try a configuration next")
    add.add_argument(
        "assignments", nargs="+", metavar="KEY=VALUE", help="values of searched keys; the others have their defaults"
    )
    for name, text in (
        ("trials", "change the number of trials (sweep.num_trials)"),
        ("epochs", "raise the number of epochs of a complete trial (sweep.max_epochs)"),
        ("slots", "change how many trials run at a time at most (sweep.max_concurrent)"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("number", type=int, metavar="N", help="the new number")
    text = "propose trials from another search space from now on"
    space = commands.add_parser("space", help=text, description=text)
    space.add_argument("file", metavar="FILE", help="a name in search_spaces/ or a file, as search_space= takes it")
    for name, text in (
        ("pause", "start no trial, and interrupt running ones when they have saved a checkpoint"),
        ("resume", "end a pause"),
    ):
        commands.add_parser(name, help=text, description=text)
    text = "change a limit of the trials; null removes it"
    budget = commands.add_parser("budget", help=text, description=text)
    limits = ", ".join(f"{name}=AMOUNT" for name in BUDGET_LIMITS)
    budget.add_argument("assignments", nargs="+", metavar="KEY=VALUE", help=limits)
    return parser


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError(text)
    return seconds


def _make_intervention(options: argparse.Namespace) -> Intervention:
    if options.action in ("stop", "retry", "keep"):
        return make_intervention(options.action, trial=options.trial)
    if options.action == "trials":
        return make_intervention("trials", limits={"num_trials": options.number})
    if options.action == "epochs":
        return make_intervention("epochs", limits={"max_epochs": options.number})
    if options.action == "slots":
        return make_intervention("slots", limits={"max_concurrent": options.number})
    if options.action == "budget":
        return make_intervention("budget", limits=_parse_amounts(options.assignments))
    if options.action == "space":
        return make_intervention("space", space=_read_space(options.file))
    if options.action == "add":
        from handpose.config import parse_assignments  # imports Hydra, which the other commands do not need

        return make_intervention("add", params=parse_assignments(_split(options.assignments)))
    return make_intervention(options.action)


def _read_space(name: str) -> SpaceRecord:
    """Read the file of a search space, after a check that it can be searched. A file in Python is executed for that."""
    from handpose.search.space import find_space, parse_space  # imports Optuna, which the other commands do not need

    file = find_space(name)
    text = read_utf8(file)
    parse_space(text, file)
    return SpaceRecord(file.name, text)


def _split(assignments: Sequence[str]) -> list[str]:
    """Split `a=1 b=2`, which may be one argument, before each key."""
    return [part for each in assignments for part in re.split(r"\s+(?=[\w./+@]+=)", each.strip()) if part]


def _parse_amounts(assignments: Sequence[str]) -> dict[str, float | None]:
    amounts: dict[str, float | None] = {}
    for each in _split(assignments):
        key, _, text = each.partition("=")
        try:
            amounts[key.removeprefix("sweep.")] = None if text == "null" else float(text)
        except ValueError:
            raise UserError(f"budget: {each} is not an amount; write {BUDGET_LIMITS[0]}=3600, or null") from None
    return amounts


def _wait_for_answer(
    read_answer: Callable[[str], InterventionAnswer | None], name: str, wait_s: float, *, every_s: float
) -> InterventionAnswer | None:
    end = time.monotonic() + wait_s
    while (answer := read_answer(name)) is None and (left_s := end - time.monotonic()) > 0:
        time.sleep(min(every_s, left_s))
    return answer


def _format_answer(answer: InterventionAnswer) -> str:
    return f"accepted: {answer.sentence}" if answer.is_accepted else f"refused: {answer.sentence}"


def _describe_waiting(folder: Path, file: Path) -> str:
    withdraw = f"to withdraw it, remove {file}"
    if not is_locked(folder / LOCK):
        return f"waiting: no process runs the sweep; {format_resume_command(folder)} executes it; {withdraw}"
    return f"waiting: {_explain_silence(folder, format_resume_command(folder))}; {withdraw}"


def _describe_stored_waiting(store: ObjectStore, file: str, before: Mapping[str, Any] | None, wait_s: float) -> str:
    """Describe why a command in a store waits.

    Args:
        store: the store, opened at the URL of the sweep.
        file: URL of the command.
        before: the lease of the sweep before the program waited.
        wait_s: how long it waited.

    Raises:
        OSError: the store does not answer.
    """
    withdraw, resume = f"to withdraw it, remove {file}", format_resume_command(store.url)
    lease = read_lease(store)
    if lease is None:
        return f"waiting: no process runs the sweep; {resume} executes it; {withdraw}"
    if lease == before and wait_s > 2 * RENEW_EVERY_S:
        who = f"process {lease.get('pid')} on {lease.get('host')}"
        return (
            f"waiting: {who}, which ran the sweep, does not answer; if it has ended, {resume} executes it; {withdraw}"
        )
    with tempfile.TemporaryDirectory(prefix="handpose-sweep-") as folder:
        download_events(store, Path(folder))
        return f"waiting: {_explain_silence(Path(folder), resume)}; {withdraw}"


def _explain_silence(folder: Path, resume: str) -> str:
    """Explain why a process that runs the sweep does not answer."""
    events = read_events(folder / EVENTS_FILE)
    if events and isinstance(events[-1], SweepClosed) and events[-1].reason in ("interrupted", "halted"):
        return f"the process that runs the sweep is ending; {resume} executes it"
    if events and isinstance(events[-1], SweepClosed):
        return (
            "the trials of the sweep have ended, and it confirms or retrains now; when that is done, "
            f"{resume} executes it"
        )
    return "the process that runs the sweep has not answered yet"


def _list_interventions(place: str) -> list[str]:
    """Return a line for each command that was given to the sweep in a folder or at a URL, in order."""
    if not is_url(place):
        return _list_in_folder(find_sweep_folder(place))
    store = open_stored_sweep(place)
    with open_sweep_for_reading(place) as folder:
        download_interventions(store, folder)
        return _list_in_folder(folder)


def _list_in_folder(folder: Path) -> list[str]:
    files = InterventionFiles(folder)
    steered = (TrialSteered, SweepSteered)
    executed = {event.intervention: event for event in read_events(folder / EVENTS_FILE) if isinstance(event, steered)}
    lines = [_describe_listed(files, name, executed.get(name)) for name in sorted({*files.list_ids(), *executed})]
    return lines or ["no command was given"]


def _describe_listed(files: InterventionFiles, name: str, event: TrialSteered | SweepSteered | None) -> str:
    given_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(name.partition("-")[0]) / 1000))
    answer = files.read_answer(name)
    try:
        command = describe_intervention(files.read(name))
    except (UserError, OSError) as error:  # the file is gone, or is ignored
        command = event.action if event is not None else str(error)
    if event is None and (answer is None or answer.is_accepted):
        return f"{given_at}  {command}: waiting"
    return f"{given_at}  {command}: {'accepted' if answer is None else _format_answer(answer)}"


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
