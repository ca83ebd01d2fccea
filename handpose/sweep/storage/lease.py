"""The lease of a sweep in an object store: only one process, on any machine, runs the sweep at a time."""

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from handpose.errors import UserError
from handpose.sweep.storage.object_store import ObjectStore

LEASE_FILE = "owner.json"
"""Name of the file in the store that identifies the holder of the lease."""

RENEW_EVERY_S = 5.0
"""Seconds between two renewals. An upload may take minutes, so renewals have a thread of their own."""

_EXPIRY_S = 60.0


class LeaseLostError(Exception):
    """Another process has taken over the sweep."""


class Lease:
    """A file in the store that says which process runs the sweep, and that this process is alive.

    Not all stores offer locks, so the lease is weaker than a lock: two processes that start within the same second can
    both acquire it. A process that loses its connection to the store and gets it back notices at its next renewal
    whether another process has taken over, and then stops.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._num_renewals = 0
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Acquire the lease. If it has a holder that may be alive, wait 60 s for a sign of life of that process first.

        Raises:
            UserError: another process runs the sweep.
            OSError: the store does not answer.
        """
        before = read_lease(self._store)
        if before is not None and not _is_holder_gone(before):
            who = f"process {before.get('pid')} on {before.get('host')}"
            print(
                f"storage     {self._store} was used by {who}; waiting {_EXPIRY_S:.0f} s to see whether it still is",
                flush=True,
            )
            end = time.monotonic() + _EXPIRY_S
            while time.monotonic() < end:
                time.sleep(1.0)
                if (now := read_lease(self._store)) != before and now is not None:
                    raise UserError(f"the sweep in {self._store} is already running as {who}")
        self._write()

    def renew(self) -> None:
        """Renew the lease: tell other processes that this one is alive.

        Raises:
            LeaseLostError: another process has taken over the sweep.
            OSError: the store does not answer.
        """
        with self._lock:
            now = read_lease(self._store)
            if now is not None and now.get("id") != self._id:
                raise LeaseLostError(
                    f"storage     {self._store} is run by process {now.get('pid')} on {now.get('host')} now, so this "
                    f"process stops"
                )
            self._write()

    def release(self) -> None:
        """Release the lease. Raises OSError if the store does not answer."""
        with self._lock:
            self._store.remove(LEASE_FILE)

    def _write(self) -> None:
        self._num_renewals += 1
        said = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "beat": self._num_renewals}
        self._store.write(LEASE_FILE, json.dumps(said).encode())


def read_lease(store: ObjectStore) -> dict[str, Any] | None:
    """Read the lease of a sweep: the host and process that hold it, and the number of renewals.

    Args:
        store: the store, opened at the URL of the sweep.

    Returns:
        None: no process holds it.

    Raises:
        OSError: the store does not answer.
    """
    try:
        said = json.loads(store.read(LEASE_FILE))
    except (FileNotFoundError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _is_holder_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended; False for a holder on another machine."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False
