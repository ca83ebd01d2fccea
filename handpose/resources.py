"""How many cores and how much memory this process may use. In a container this is less than the machine has.

A container, a pod or a job of a scheduler is a Linux control group (cgroup) with limits. `os.cpu_count` and
/proc/meminfo ignore these limits and describe the whole machine.
"""

import contextlib
import math
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")
_SIOCGIFADDR = 0x8915
"""The ioctl request SIOCGIFADDR of Linux, which returns the address of a network interface."""


class Memory(NamedTuple):
    """Main memory in bytes.

    Attributes:
        total: the smaller of the machine's memory and of the cgroup's limit.
        available: how much of it can still be used without swapping. File caches count as available, because the kernel
            drops them on demand.
        is_limited: whether a cgroup, and not the machine, sets the total.
    """

    total: int
    available: int
    is_limited: bool


def count_cores(root: Path = _ROOT) -> int:
    """Count the cores that this process may use: at least 1.

    This is the minimum of the machine's cores, the process's CPU affinity (taskset, cpusets, Slurm), and the CPU quota
    of its cgroups (docker --cpus, limits of Kubernetes). A quota is rounded down, as in Ray: with 1.5 cores, a second
    busy thread would be throttled half of the time.

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else math.inf
    return max(1, int(min(count_machine_cores(), affinity, _read_cpu_quota(root))))


def count_machine_cores() -> int:
    """Count the cores of the machine, whether this process may use them or not."""
    return os.cpu_count() or 1


def measure_memory(root: Path = _ROOT) -> Memory:
    """Measure the memory that this process may use.

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    total, available = _read_machine_memory(root)
    limits = [
        (limit, max(0, limit - _read_used_memory(folder)))
        for folder in _list_cgroups(root, "memory")
        if (limit := _read_number(folder, "memory.max", "memory.limit_in_bytes")) is not None and limit < total
    ]
    if not limits:  # cgroup v1 expresses "no limit" as a number that is larger than any machine's memory
        return Memory(total, available, is_limited=False)
    return Memory(min(limit for limit, _ in limits), min(available, *(free for _, free in limits)), is_limited=True)


def count_oom_kills(root: Path = _ROOT) -> int:
    """Count the processes that the kernel killed because a cgroup of this process was full; 0 if this is not known."""
    # In cgroup v2, the counts of a group include those of the groups below it, so they are not added up.
    counts = [
        int(values["oom_kill"])
        for folder in _list_cgroups(root, "memory")
        for name in ("memory.events", "memory.oom_control")
        if "oom_kill" in (values := _read_table(folder / name))
    ]
    return max(counts, default=0)


def _read_cpu_quota(root: Path) -> float:
    """Return the smallest CPU quota in cores; infinity if there is none."""
    quotas = [math.inf]
    for folder in _list_cgroups(root, "cpu"):
        limit = _read_text(folder / "cpu.max").split()
        quota, period = (
            limit if len(limit) == 2 else (_read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        )
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean no limit
            quotas.append(int(quota) / int(period))
    return min(quotas)


def _read_machine_memory(root: Path) -> tuple[int, int]:
    """Return the total and the available memory of the machine in bytes."""
    values = _read_table(root / "proc/meminfo")
    if "MemTotal:" in values:
        total = 1024 * int(values["MemTotal:"])
        return total, 1024 * int(values["MemAvailable:"]) if "MemAvailable:" in values else total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # macOS, which does not report what is available
    return total, total


def _read_used_memory(cgroup: Path) -> int:
    """Return the memory that the processes of a cgroup use, without file caches."""
    used = _read_number(cgroup, "memory.current", "memory.usage_in_bytes") or 0
    values = _read_table(cgroup / "memory.stat")
    # In cgroup v1, only the totals include the groups below.
    cached = [values.get(f"total_{name}", values.get(name, "0")) for name in ("inactive_file", "active_file")]
    return used - sum(map(int, cached))


def _list_cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup for a controller, and of all groups above it.

    A container without a cgroup namespace sees the path of its group on the host, but only the group itself is mounted,
    as the root.
    """
    base = root / "sys/fs/cgroup"
    yield from (base, base / "unified", base / controller)
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:  # v2; next to v1 it is mounted one folder further down
            mounts = [base, base / "unified"]
        elif controller in controllers.split(","):
            mounts = [base / controllers, base / controller]
        else:
            continue
        parts = [] if ".." in Path(path).parts else Path(path).parts[1:]  # a group outside this namespace
        for mount in mounts:
            yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _read_number(folder: Path, *names: str) -> int | None:
    """Return the number in the first of the files that has one."""
    return next((int(text) for name in names if (text := _read_text(folder / name)).isdigit()), None)


def _read_table(file: Path) -> dict[str, str]:
    """Parse lines of a name and a value, which a unit may follow."""
    return {name: value for name, value, *_ in map(str.split, _read_text(file).splitlines())}


def _read_text(file: Path) -> str:
    """Read a file; return an empty text if it is missing or may not be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def list_addresses() -> dict[str, str]:
    """Return the IPv4 address of each network interface of this machine that has one (Linux)."""
    import fcntl  # imported here, since not every system has it

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no IPv4 address
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found
