"""Who runs a sweep that lies in a store: one process at a time, on whichever machine."""

import json
import os
import socket
import time
import uuid
from typing import Any

from handpose.errors import UserError
from handpose.sweep.storage.object_store import Store

OWNER = "owner.json"
"""The file that says so."""

_SILENT_S = 60.0


class OtherOwnerError(Exception):
    """Another process has begun to run the sweep."""


class Owner:
    """Says in the store who runs the sweep, and that he is alive.

    There is no lock that all stores have. Two that begin within the same second are not told apart; one that was cut
    off from the store and comes back finds that another has taken over, and stops.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._beat = 0
        self._id = uuid.uuid4().hex

    def take(self) -> None:
        """Raises UserError where another process is alive, OSError where the store does not answer."""
        before = self._read()
        if before is not None and not _is_gone(before):
            who = f"process {before.get('pid')} on {before.get('host')}"
            print(
                f"storage     {self._store} was run by {who}; seeing for {_SILENT_S:.0f} s whether it still is",
                flush=True,
            )
            end = time.monotonic() + _SILENT_S
            while time.monotonic() < end:
                time.sleep(1.0)
                if (now := self._read()) != before and now is not None:
                    raise UserError(f"the sweep in {self._store} is running already, as {who}")
        self._write()

    def beat(self) -> None:
        """Say that this process is alive. Raises OtherOwnerError, OSError."""
        now = self._read()
        if now is not None and now.get("id") != self._id:
            raise OtherOwnerError(
                f"storage     {self._store} is run by process {now.get('pid')} on {now.get('host')} now: this one stops"
            )
        self._write()

    def release(self) -> None:
        self._store.remove(OWNER)

    def _write(self) -> None:
        self._beat += 1
        said = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "beat": self._beat}
        self._store.write(OWNER, json.dumps(said).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            said = json.loads(self._store.read(OWNER))
        except (FileNotFoundError, ValueError):
            return None
        return said if isinstance(said, dict) else None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more; of another machine nobody can tell at once."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False
