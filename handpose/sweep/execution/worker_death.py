"""Finds out how a worker process died. Ray says that a worker is gone; the worker's log says which signal ended it."""

import contextlib
import re
import signal
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from handpose.resources import count_oom_kills, measure_memory
from handpose.sweep.execution.ray_internals import find_newest_worker_log

_LOG_TIMEOUT_S = 15.0
_CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_UNKNOWN = "the worker process died: it was killed, ran out of memory or crashed"

_NO_TRACE = (
    "the worker process died without a crash: most likely by SIGKILL, which the system sends when memory is full"
)


_BY_RAY = "the worker process was killed by Ray because the memory of its node was almost full"
_MEMORY_REMEDY = "fewer trials at a time (sweep.max_concurrent) or a smaller data.batch_size need less memory"


class WorkerDeath(NamedTuple):
    """The end of a worker process.

    Attributes:
        sentence: how it died.
        is_crash: whether a fault in its own code ended it, so that memory is not the reason.
    """

    sentence: str
    is_crash: bool


def diagnose_worker_death(message: str) -> WorkerDeath:
    """Find out how a worker process died.

    Args:
        message: what Ray (2.60) says about the worker's actor.
    """
    if "running low on memory" in message:
        return WorkerDeath(f"{_BY_RAY}; {_MEMORY_REMEDY}", False)
    if match := re.search(r"receives? a (SIG[A-Z]+)", message):
        return WorkerDeath(f"the worker process was ended by {match[1]}", False)
    if match := re.search(r"exit code (\d+)", message):
        return WorkerDeath(f"the worker process exited with status {match[1]}", False)
    traces = _find_traces(message)
    if traces is None:
        return WorkerDeath(_UNKNOWN, False)
    received = re.findall(r"\*\*\* (SIG[A-Z]+) received", traces.log)
    if not received:
        return WorkerDeath(_explain_without_crash(traces), False)
    number = signal.Signals[received[-1]]
    return WorkerDeath(
        f"the worker process crashed with {number.name} ({signal.strsignal(number)})", number in _CRASH_SIGNALS
    )


def describe_exit(status: int) -> str:
    """Describe the exit status of a program: `ended with status 3`, or the signal that ended it."""
    if status >= 0:
        return f"ended with status {status}"
    number = signal.Signals(-status)
    return f"was ended by {number.name} ({signal.strsignal(number)})"


class _Traces(NamedTuple):
    """What a dead process has left on its node.

    Attributes:
        log: what it wrote to stderr; Ray's handler of fatal signals writes there.
        memory_limit: memory limit of its container or job in bytes; None: there is none.
        num_oom_kills: processes that the kernel has killed because the limit was reached, since the limit was set.
    """

    log: str
    memory_limit: int | None
    num_oom_kills: int


def _explain_without_crash(traces: _Traces) -> str:
    if traces.memory_limit is None or not traces.num_oom_kills:
        return _NO_TRACE
    return (
        "the worker process was most likely killed by the kernel because the memory limit of its container or job "
        f"({traces.memory_limit / 1e9:.2g} GB) was reached (the kernel's counter oom_kill is {traces.num_oom_kills}); "
        f"{_MEMORY_REMEDY}"
    )


def _find_traces(message: str) -> _Traces | None:
    """Collect the traces of the process in Ray's message; None if its log cannot be found."""
    pid, address = re.search(r"\bpid: (\d+)", message), re.search(r"\bip: (\S+)", message)
    if pid is None or address is None or not ray.is_initialized():
        return None
    if address[1] == ray.util.get_node_ip_address():
        return _read_local_traces(int(pid[1]))
    with contextlib.suppress(RayError):  # its node is gone too, or too busy to answer
        there = ray.remote(_read_local_traces).options(num_cpus=0, resources={f"node:{address[1]}": 0.001})
        return ray.get(there.remote(int(pid[1])), timeout=_LOG_TIMEOUT_S)
    return None


def _read_local_traces(pid: int) -> _Traces | None:
    """Collect the traces of a worker process of this node."""
    log = find_newest_worker_log(pid)
    if log is None:
        return None
    memory = measure_memory()
    limit = memory.total if memory.is_limited else None
    return _Traces(log.read_text(encoding="utf-8", errors="replace"), limit, count_oom_kills())
