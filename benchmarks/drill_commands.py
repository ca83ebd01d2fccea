"""Random commands to a sweep that is being killed, and the check that each one was executed once or refused."""

import contextlib
import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from handpose.errors import UserError
from handpose.sweep import control
from handpose.sweep.driver.intervention_inbox import LATE_ANSWER
from handpose.sweep.record.events import EVENTS_FILE, SweepSteered, TrialSteered, TrialSuggested, read_events
from handpose.sweep.record.interventions import InterventionFiles

Moment = Literal["running", "before a kill", "not running"]
"""When a command is given: while a process runs the sweep, just before its SIGKILL, or while no process runs it."""

_ACTIONS = ("stop", "retry", "keep", "add", "trials", "slots", "pause", "budget", "epochs")
_NUM_COMMANDS = 30  # of a sweep, without those that end a pause
_GAP_S = (1.0, 8.0)
_MAX_LOOK_S = 0.6  # the driver looks for commands every half second
_PAUSE_S = (2.0, 8.0)


@dataclass(frozen=True)
class GivenCommand:
    """A command that was given.

    Attributes:
        id: its id; empty if the program gave no command.
        arguments: what the user types after the folder.
        moment: when it was given.
        status: exit status of the program.
    """

    id: str
    arguments: tuple[str, ...]
    moment: Moment
    status: int


class CommandFindings(NamedTuple):
    """What is wrong with the commands of a sweep. Each finding is a sentence.

    Attributes:
        lost: commands that were neither executed nor refused, or have no answer.
        repeated: commands that were executed more than once.
        wrong: commands whose event, answer and exit status contradict each other.
    """

    lost: list[str]
    repeated: list[str]
    wrong: list[str]


def draw_command(generator: random.Random, num_trials: int) -> tuple[str, ...]:
    """Draw a command. Some of those that are drawn are refused.

    Args:
        generator: random numbers.
        num_trials: number of trials that have been started.

    Returns:
        What the user types after the folder of the sweep.
    """
    action = generator.choice(_ACTIONS)
    if action in ("stop", "retry", "keep"):
        return action, str(generator.randrange(num_trials + 1))
    if action == "add":
        rate, depth = 10 ** generator.uniform(-4.0, -2.0), generator.randint(1, 3)
        return action, f"optimizer.lr={rate:.2e} model.decoder.depth={depth}"  # 2e-4 is the smallest valid rate
    if action == "budget":
        amounts = ["null", "600", *(["1"] if num_trials >= 4 else [])]  # after one second, the budget is spent
        return action, f"time_budget_s={generator.choice(amounts)}"
    number = {"trials": (5, 11), "slots": (1, 3), "epochs": (9, 12)}.get(action)
    return (action,) if number is None else (action, str(generator.randint(*number)))


@dataclass
class CommandGiver:
    """Gives random commands to a sweep, with the program that users have.

    Args:
        folder: folder of the sweep.
        generator: random numbers.
        num_left: how many commands it gives. A pause ends by a further one.
    """

    folder: Path
    generator: random.Random
    num_left: int = _NUM_COMMANDS
    given: list[GivenCommand] = field(default_factory=list)
    _next: float = 0.0
    _pause_end: float | None = None

    @property
    def can_give(self) -> bool:
        """Whether the sweep has been written, so that it can be given commands."""
        return (self.folder / "sweep.yaml").is_file()

    def give_if_due(self) -> None:
        """Give a command to the running sweep if the random time since the last one is over."""
        now = time.monotonic()
        if self._pause_end is not None and now >= self._pause_end:
            self._pause_end = None
            self.give(("resume",), "running")
        elif now >= self._next:
            self._next = now + self.generator.uniform(*_GAP_S)
            self.give_random("running")

    def give_random(self, moment: Moment) -> None:
        """Give a random command, if the sweep has been written and commands are left."""
        if self.num_left <= 0 or not self.can_give:
            return
        self.num_left -= 1
        events = read_events(self.folder / EVENTS_FILE) if (self.folder / EVENTS_FILE).is_file() else []
        arguments = draw_command(self.generator, sum(isinstance(event, TrialSuggested) for event in events))
        self.give(arguments, moment)
        if arguments == ("pause",):
            self._pause_end = time.monotonic() + self.generator.uniform(*_PAUSE_S)

    def give_before_kill(self) -> None:
        """Give a command, and wait for a random moment or until an event is written: its answer is written next."""
        size = _get_size(self.folder / EVENTS_FILE)
        self.give_random("before a kill")
        waits_for_event = self.generator.random() < 0.5
        end = time.monotonic() + (2 * _MAX_LOOK_S if waits_for_event else self.generator.uniform(0.0, _MAX_LOOK_S))
        while time.monotonic() < end:
            if waits_for_event and _get_size(self.folder / EVENTS_FILE) > size:
                return
            time.sleep(0.0005)

    def give_last(self) -> None:
        """Give the commands that let the sweep finish: no limit of time, and no pause."""
        self.num_left, self._pause_end = 0, None
        self.give(("budget", "time_budget_s=null"), "not running")
        self.give(("resume",), "not running")

    def give(self, arguments: tuple[str, ...], moment: Moment) -> None:
        """Give a command, and sometimes wait for its answer while the sweep runs."""
        wait_s = self.generator.choice((0.0, 0.0, 3.0)) if moment == "running" else 0.0
        before = set(InterventionFiles(self.folder).list_ids())
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                status = control.main([str(self.folder), "--wait-s", str(wait_s), *arguments])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        new = sorted(set(InterventionFiles(self.folder).list_ids()) - before)
        if len(new) != 1:
            print(f"  {' '.join(arguments)} gave {len(new)} commands: {output.getvalue()}")
        self.given.append(GivenCommand(new[0] if len(new) == 1 else "", arguments, moment, status))


def _get_size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def count_late_answers(folder: Path, given: Sequence[GivenCommand]) -> int:
    """Count the commands whose process was killed between the event and the answer, so that the next one answered."""
    files = InterventionFiles(folder)
    answers = [files.read_answer(command.id) for command in given if command.id]
    return sum(answer is not None and answer.sentence == LATE_ANSWER for answer in answers)


def check_commands(folder: Path, given: Sequence[GivenCommand]) -> CommandFindings:
    """Check that each command was executed exactly once, or refused with an answer.

    Args:
        folder: folder of a sweep that no process runs and for which no command waits.
        given: the commands that were given to it.

    Returns:
        What is lost, repeated and wrong.
    """
    found = CommandFindings([], [], [])
    files = InterventionFiles(folder)
    steered = [event for event in read_events(folder / EVENTS_FILE) if isinstance(event, (TrialSteered, SweepSteered))]
    counts = Counter(event.intervention for event in steered)
    for command in given:
        name = f"command {command.id or 'without id'} ({' '.join(command.arguments)}, given {command.moment})"
        answer = files.read_answer(command.id) if command.id else None
        if counts[command.id] > 1:
            found.repeated.append(f"{name} was executed {counts[command.id]} times")
        if answer is None:
            found.lost.append(f"{name} has no answer" + (" but was executed" if counts[command.id] else ""))
        elif answer.is_accepted != (counts[command.id] > 0):
            said = "accepted" if answer.is_accepted else "refused"
            found.wrong.append(f"{name} is answered as {said}, but was executed {counts[command.id]} times")
        elif command.status != 75 and (command.status == 0) != answer.is_accepted:
            found.wrong.append(f"{name} ended with status {command.status}, but its answer is {answer.sentence!r}")
    found.wrong.extend(f"command {name} was never given" for name in counts.keys() - {each.id for each in given})
    for event in steered:
        if event.intervention in files.list_ids() and (problem := _compare_with_file(files, event)):
            found.wrong.append(f"command {event.intervention}: {problem}")
    return found


def _compare_with_file(files: InterventionFiles, event: TrialSteered | SweepSteered) -> str:
    """Describe how an event differs from its command; empty if it does not. With `add`, an event has one limit more."""
    try:
        wanted = asdict(files.read(event.intervention))
    except (UserError, OSError) as error:
        return f"its file cannot be read ({error})"
    done = asdict(event)
    names = ("action", "trial") if isinstance(event, TrialSteered) else ("action", "params")
    if any(done[name] != wanted[name] for name in names):
        return f"the event {done} is not what the file says: {wanted}"
    limits = done.get("limits", {})
    if any(limits.get(name) != value for name, value in wanted["limits"].items()):
        return f"the event has the limits {limits}, but the file has {wanted['limits']}"
    return ""
