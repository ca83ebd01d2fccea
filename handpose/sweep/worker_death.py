"""How a process died. Ray says that a worker is gone, but not which signal ended it; the worker's log does."""

import contextlib
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError

_LOG_PATIENCE_S = 15.0
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_UNKNOWN = "the worker process died: it was killed, ran out of memory or crashed"

_NO_TRACE = (
    "the worker process died without a crash: most likely by SIGKILL, which the system sends when memory is full"
)


class Death(NamedTuple):
    """The end of a worker process. crashed: by a fault of its own code, so that memory is not the reason."""

    sentence: str
    crashed: bool


def death_of_worker(message: str) -> Death:
    """Find out how a worker process died, from what Ray (2.60) says of its actor and from its log on its node."""
    if "running low on memory" in message:
        return Death("the worker process was killed by Ray because the memory of its node was almost full", False)
    if told := re.search(r"receives? a (SIG[A-Z]+)", message):
        return Death(f"the worker process was ended by {told[1]}", False)
    if told := re.search(r"exit code (\d+)", message):
        return Death(f"the worker process exited with status {told[1]}", False)
    log = _log(message)
    if log is None:
        return Death(_UNKNOWN, False)
    received = re.findall(r"\*\*\* (SIG[A-Z]+) received", log)
    if not received:
        return Death(_NO_TRACE, False)
    number = signal.Signals[received[-1]]
    return Death(f"the worker process crashed with {number.name} ({signal.strsignal(number)})", number in _CRASHES)


def describe_exit(status: int) -> str:
    """What the exit status of a program means: `ended with status 3`, or the signal that ended it."""
    if status >= 0:
        return f"ended with status {status}"
    number = signal.Signals(-status)
    return f"was ended by {number.name} ({signal.strsignal(number)})"


def _log(message: str) -> str | None:
    """What the process wrote to stderr, where Ray's handler of fatal signals reports them; None if it is not found."""
    pid, address = re.search(r"\bpid: (\d+)", message), re.search(r"\bip: (\S+)", message)
    if pid is None or address is None or not ray.is_initialized():
        return None
    if address[1] == ray.util.get_node_ip_address():
        return _last_log(int(pid[1]))
    with contextlib.suppress(RayError):  # its node is gone as well, or too busy to answer
        there = ray.remote(_last_log).options(num_cpus=0, resources={f"node:{address[1]}": 0.001})
        return ray.get(there.remote(int(pid[1])), timeout=_LOG_PATIENCE_S)
    return None


def _last_log(pid: int) -> str | None:
    """The log of this node's worker process with this id; Ray has no public call for it."""
    node: Any = ray_worker._global_node
    folder = Path(node.get_logs_dir_path())
    logs = sorted(folder.glob(f"worker-*-{pid}.err"), key=lambda file: file.stat().st_mtime)
    return logs[-1].read_text(encoding="utf-8", errors="replace") if logs else None
