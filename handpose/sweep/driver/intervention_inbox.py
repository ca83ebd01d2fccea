"""Executes the interventions of the user, which are files in the folder of a running sweep."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from handpose.errors import UserError, explain_file_error
from handpose.sweep.controller.controller import SweepController
from handpose.sweep.record.interventions import InterventionAnswer, InterventionFiles, describe_intervention

_EVERY_S = 0.5
"""Seconds between two looks into the folder."""

LATE_ANSWER = "executed; the process ended before it could say more"
"""Answer to a command whose process was killed between the event and the answer."""


class InterventionInbox:
    """The interventions that wait in the folder of a sweep.

    Each one is executed once because its event is written first, and then its answer. After a kill in between, the
    resumed sweep finds the event, and only writes the answer.

    Args:
        folder: folder of the sweep.
        controller: executes the interventions.
        show_note: shows a sentence to the user.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        controller: SweepController,
        *,
        show_note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = InterventionFiles(folder)
        self._controller = controller
        self._show_note = show_note
        self._clock = clock
        self._next_look = 0.0
        self._done: set[str] = set()
        self._ignored: set[str] = set()

    def process(self, *, at_once: bool = False) -> bool:
        """Execute the interventions that wait, at most once in a certain time.

        Args:
            at_once: look into the folder in any case.

        Returns:
            Whether one was executed.

        Raises:
            UserError: an event cannot be written.
        """
        if self._controller.is_closed or (self._clock() < self._next_look and not at_once):
            return False
        self._next_look = self._clock() + _EVERY_S
        has_changed = False
        for name in self._files.list_ids():
            if name not in self._done:
                has_changed |= self._process(name)
        return has_changed

    def _process(self, name: str) -> bool:
        """Execute or refuse one intervention. Returns whether it was executed now."""
        executed = self._controller.history.interventions
        answer = self._files.read_answer(name)
        if name in executed or (answer is not None and not answer.is_accepted):
            if answer is None or answer.is_accepted != (name in executed):
                self._answer(name, InterventionAnswer(True, LATE_ANSWER))
            self._done.add(name)
            return False
        try:
            given = self._files.read(name)
        except PermissionError as error:
            if name not in self._ignored:
                self._show_note(f"{error}, so this command is ignored")
            self._ignored.add(name)
            return False
        except FileNotFoundError:  # the user has withdrawn it
            return False
        except (UserError, OSError) as error:
            said = explain_file_error(error) if isinstance(error, OSError) else str(error)
            answer = InterventionAnswer(False, said)
        else:
            answer = self._controller.steer(given)
            refused = "" if answer.is_accepted else "refused: "
            self._show_note(f"{describe_intervention(given)}: {refused}{answer.sentence}")
        self._answer(name, answer)
        return answer.is_accepted

    def _answer(self, name: str, answer: InterventionAnswer) -> None:
        with contextlib.suppress(OSError):  # the event counts; the user sees it in the sweep
            self._files.write_answer(name, answer)
            self._done.add(name)
