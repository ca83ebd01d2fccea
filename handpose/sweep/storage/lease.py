"""Who runs a sweep that lies in a store: one process at a time, on whichever machine."""

import json
import os
import socket
import time
import uuid
from typing import Any

from handpose.errors import UserError
from handpose.sweep.storage.object_store import ObjectStore

LEASE_FILE = "owner.json"
"""The file that says so."""

_EXPIRY_S = 60.0


class LeaseLostError(Exception):
    """Another process has begun to run the sweep."""


class Lease:
    """Says in the store who runs the sweep, and that he is alive.

    There is no lock that all stores have. Two that begin within the same second are not told apart; one that was cut
    off from the store and comes back finds that another has taken over, and stops.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._num_renewals = 0
        self._id = uuid.uuid4().hex

    def acquire(self) -> None:
        """Raises UserError where another process is alive, OSError where the store does not answer."""
        before = self._read()
        if before is not None and not _is_holder_gone(before):
            who = f"process {before.get('pid')} on {before.get('host')}"
            print(
                f"storage     {self._store} was run by {who}; seeing for {_EXPIRY_S:.0f} s whether it still is",
                flush=True,
            )
            end = time.monotonic() + _EXPIRY_S
            while time.monotonic() < end:
                time.sleep(1.0)
                if (now := self._read()) != before and now is not None:
                    raise UserError(f"the sweep in {self._store} is running already, as {who}")
        self._write()

    def renew(self) -> None:
        """Say that this process is alive. Raises OtherOwnerError, OSError."""
        now = self._read()
        if now is not None and now.get("id") != self._id:
            raise LeaseLostError(
                f"storage     {self._store} is run by process {now.get('pid')} on {now.get('host')} now: this one stops"
            )
        self._write()

    def release(self) -> None:
        self._store.remove(LEASE_FILE)

    def _write(self) -> None:
        self._num_renewals += 1
        said = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "beat": self._num_renewals}
        self._store.write(LEASE_FILE, json.dumps(said).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            said = json.loads(self._store.read(LEASE_FILE))
        except (FileNotFoundError, ValueError):
            return None
        return said if isinstance(said, dict) else None


def _is_holder_gone(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more; of another machine nobody can tell at once."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False
