"""Notifies people of what happens to a sweep, through Apprise: by mail, Slack, Telegram, ntfy and many others.

The addresses come from the environment variable NOTIFY_URLS alone (or from the file .env), because most of them contain
a password or a token: an override would be written to sweep.yaml and shown to all users of the machine by `ps`.
"""

import contextlib
import logging
import os
import queue
import re
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from handpose.errors import UserError, join_lines
from handpose.report.formatting import format_metric, format_params, get_test_name
from handpose.report.trial_table import TrialRow, TrialTable

NotifiedEvent: TypeAlias = Literal["finished", "failed", "interrupted", "new_best", "quarantined"]
NOTIFIED_EVENTS: tuple[NotifiedEvent, ...] = get_args(NotifiedEvent)
URLS_VARIABLE = "NOTIFY_URLS"
_CLOSE_TIMEOUT_S = 15.0
_SERVICE = re.compile(r"[a-z0-9+.-]{1,20}://")


class Notifier:
    """Sends messages about a sweep in a background thread. A message that cannot be sent never harms the sweep.

    Args:
        addresses: what `open_addresses` returns; None: nothing is sent.
        events: the events that are notified.
        gap_s: seconds between two messages about a new best trial; those in between are left out.
        name: name of the sweep.
    """

    def __init__(self, addresses: Any, *, events: Collection[NotifiedEvent], gap_s: float, name: str) -> None:
        self._addresses = addresses
        self._events, self._gap_s, self._name = events, gap_s, name
        self._best: int | None = None
        self._next_best_at = 0.0
        self._queue: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread: threading.Thread | None = None
        if addresses is not None:
            self._thread = threading.Thread(target=self._send_all, name="notify", daemon=True)
            self._thread.start()

    def send(self, event: NotifiedEvent, text: str) -> None:
        """Send a message, unless the event is not to be notified."""
        if self._thread is not None and event in self._events:
            self._queue.put((f"Sweep {self._name}: {event.replace('_', ' ')}", text))

    def on_trial_end(self, table: TrialTable, row: TrialRow) -> None:
        """Notify of a new best trial, if the trial that has just ended is one.

        Args:
            table: the trials, with this one.
            row: the trial.
        """
        if self._thread is None or "new_best" not in self._events:
            return
        ranked = table.rank_trials()
        if not ranked or ranked[0].number != row.number or self._best == row.number:
            return
        self._best = row.number
        if time.monotonic() < self._next_best_at:
            return
        self._next_best_at = time.monotonic() + self._gap_s
        value = format_metric(table.metric, table.get_value(row))
        num_ended = sum(each.is_over for each in table.rows.values())
        self.send(
            "new_best",
            f"trial {row.number}: {value} after {row.epochs} of {table.max_epochs} epochs, with "
            f"{format_params(row.params)}; {num_ended} of {table.num_trials} trials have ended",
        )

    def close(self) -> None:
        """Wait until the messages are sent, for at most 15 s."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _send_all(self) -> None:
        while (message := self._queue.get()) is not None:
            title, text = message
            try:
                was_sent = bool(self._addresses.notify(title=title, body=text, body_format="text"))
            except Exception:  # of whatever library an address needs
                was_sent = False
            if not was_sent and not self._has_failed:
                self._has_failed = True
                print(f"a notification could not be sent to all addresses in {URLS_VARIABLE}", file=sys.stderr)


def open_addresses() -> Any:
    """Open the addresses in the environment variable NOTIFY_URLS, which are separated by white space.

    Returns:
        An `apprise.Apprise`; None if there are no addresses.

    Raises:
        UserError: an address is not one that Apprise can read.
    """
    urls = os.environ.get(URLS_VARIABLE, "").split()
    if not urls:
        return None
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of the libraries that it imports
        import apprise  # takes a fifth of a second

        logging.getLogger("apprise").setLevel(logging.CRITICAL)  # its messages may contain secrets
        addresses = apprise.Apprise()
        for place, url in enumerate(urls, start=1):
            if not addresses.add(url):
                service = _SERVICE.match(url)  # what follows may be a secret
                raise UserError(
                    f"{URLS_VARIABLE}: address {place} of {len(urls)}{f' ({service[0]}...)' if service else ''} is not "
                    "one that Apprise can read; see https://github.com/caronc/apprise for how to write it"
                )
        return addresses


@contextlib.contextmanager
def notify_of_end(notifier: Notifier, *, interruptions: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Notify of the exception with which the block ends, and wait until all messages are sent.

    Args:
        notifier: sends the messages.
        interruptions: the exceptions, besides KeyboardInterrupt, after which the sweep can be resumed; any other is a
            failure.
    """
    interrupted: tuple[type[BaseException], ...] = (KeyboardInterrupt, *interruptions)
    try:
        yield
    except interrupted as error:
        notifier.send("interrupted", join_lines(error) or "by Ctrl-C")
        raise
    except Exception as error:
        notifier.send("failed", join_lines(error) or type(error).__name__)
        raise
    finally:
        notifier.close()


def format_result(table: TrialTable, winner: TrialRow, retrained: Mapping[str, float] | None, report: Path) -> str:
    """Format the result of a sweep in a sentence.

    Args:
        table: the trials.
        winner: the winner.
        retrained: the metrics of the retrained winner; None: it was not retrained.
        report: the report.
    """
    text = f"the winner is trial {winner.number}: {format_metric(table.metric, table.get_value(winner))}"
    tested = get_test_name(table.metric)
    if retrained is not None and (value := retrained.get(tested)) is not None:
        text += f"; retrained: test {format_metric(tested, value)}"
    return f"{text}; report: {report}"
