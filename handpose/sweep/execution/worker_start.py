"""Distinguishes worker processes that Ray cannot start from workers that wait for a free slot."""

import time
from collections.abc import Callable, Collection

import ray
from ray.tune.experiment import Trial

from handpose.errors import UserError
from handpose.sweep.execution.ray_internals import find_raylet_log

PATIENCE_S = 300.0
"""How long a worker process may take to start. Imports take most of it: minutes from a slow network disk."""
PROBE_AFTER_S = 120.0
_LONGEST_REASON = 300


class StartProbe:
    """A task that needs no resources: it runs as soon as Ray has started any worker process for this job."""

    def __init__(self) -> None:
        self._done = ray.remote(num_cpus=0)(_do_nothing).remote()

    def has_run(self) -> bool:
        """Return whether the task has run."""
        done, _ = ray.wait([self._done], timeout=0.0)
        return bool(done)


def never_started() -> UserError:
    """Return the error for a Ray that starts no worker process. It names the reason if this machine's logs have it."""
    reason = _last_line_of_raylet()
    said = f" ({reason})" if reason else ""
    return UserError(
        f"Ray has not started a worker process within {PATIENCE_S / 60:.0f} minutes{said}; check that every node "
        f"can run this Python and import this project"
    )


class StartWatch:
    """Ends a sweep for which Ray starts no worker; otherwise Tune would wait forever.

    Args:
        say: shows a line to the user.
        probe: sends a `StartProbe`.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        probe: Callable[[], StartProbe] = StartProbe,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._send = probe
        self._clock = clock
        self._since: float | None = None
        self._probe: StartProbe | None = None
        self._has_said = False

    def check(self, trials: Collection[Trial], *, has_slots: bool) -> None:
        """Check the trials that have not ended. Call this often.

        Args:
            trials: Tune's trials.
            has_slots: whether the cluster has any slot, free or taken.

        Raises:
            UserError: all trials have waited too long, and Ray starts no worker process at all.
        """
        if not trials or not has_slots or any(trial.status != Trial.PENDING for trial in trials):
            self._since = self._probe = None
            return
        if self._since is None:
            self._since = self._clock()
        waited_s = self._clock() - self._since
        if self._probe is None and waited_s > PROBE_AFTER_S:
            self._probe = self._send()
        if self._probe is None or self._has_said or waited_s <= PATIENCE_S:
            return
        if not self._probe.has_run():
            raise never_started()
        self._say("all slots are used by others; the sweep waits until one is free")
        self._has_said = True


def _do_nothing() -> None:
    pass


def _last_line_of_raylet() -> str:
    """Return the last line that this node's raylet wrote to stderr, for example that the interpreter cannot be run."""
    log = find_raylet_log()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_LONGEST_REASON]
