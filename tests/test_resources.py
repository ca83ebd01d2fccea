"""Cores and memory of a container, on stand-ins for the kernel's files and in real cgroups where they can be made."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray._common.utils import get_system_memory
from ray._private.utils import _get_docker_cpus

from handpose.resources import Memory, count_cores, count_oom_kills, measure_memory

REPOSITORY = Path(__file__).resolve().parent.parent
GB = 2**30
UNLIMITED_V1 = 9223372036854771712  # what the kernel writes where cgroup v1 has no limit
MEMINFO = f"MemTotal: {32 * GB // 1024} kB\nMemFree: 1024 kB\nMemAvailable: {20 * GB // 1024} kB\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes the files of a machine with 8 cores and 32 GB; returns its root folder."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(cgroup, files):
        for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}.items():
            file = tmp_path / (name if name.startswith("proc") else f"sys/fs/cgroup/{name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return write


V2 = "0::/"
V1 = "5:cpu,cpuacct:/\n4:memory:/\n1:name=systemd:/\n0::/"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        pytest.param(V2, {"cpu.max": "100000 100000"}, 1, id="docker --cpus 1"),
        pytest.param(V2, {"cpu.max": "150000 100000"}, 1, id="1.5 cores are one"),
        pytest.param(V2, {"cpu.max": "50000 100000"}, 1, id="half a core is one"),
        pytest.param(V2, {"cpu.max": "300000 100000"}, 3, id="three"),
        pytest.param(V2, {"cpu.max": "40000 10000"}, 4, id="another period"),
        pytest.param(V2, {"cpu.max": "max 100000"}, 8, id="no quota"),
        pytest.param(V2, {"cpu.max": "1600000 100000"}, 8, id="a quota above the machine's cores"),
        pytest.param(V2, {}, 8, id="no files"),
        pytest.param("", {"cpu.max": "200000 100000"}, 2, id="no /proc/self/cgroup"),
        pytest.param(
            "0::/kubepods/pod1/main",
            {
                "cpu.max": "max 100000",
                "kubepods/cpu.max": "max 100000",
                "kubepods/pod1/cpu.max": "200000 100000",
                "kubepods/pod1/main/cpu.max": "max 100000",
            },
            2,
            id="the quota of a group above",
        ),
        pytest.param("0::/docker/abc", {"cpu.max": "200000 100000"}, 2, id="without a namespace, v2"),
        pytest.param("0::/../../other", {"cpu.max": "200000 100000"}, 2, id="outside of the namespace"),
        pytest.param(V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1, id="v1"),
        pytest.param(V1, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2, id="v1, 2.5 cores"),
        pytest.param(V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, id="v1 without a quota"),
        pytest.param(
            "2:cpu,cpuacct:/slurm/uid_1/job_2/step_3",
            {
                "cpu,cpuacct/slurm/uid_1/job_2/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/slurm/uid_1/job_2/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/slurm/uid_1/job_2/step_3/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/slurm/uid_1/job_2/step_3/cpu.cfs_period_us": "100000",
            },
            3,
            id="v1, the quota of a Slurm job",
        ),
    ],
)
def test_the_cpu_quota_limits_the_cores(machine, cgroup, files, cores):
    assert count_cores(machine(cgroup, files)) == cores


def test_the_affinity_limits_the_cores(machine, monkeypatch):
    root = machine(V2, {"cpu.max": "400000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5})
    assert count_cores(root) == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert count_cores(root) == 4


@pytest.mark.parametrize("quota", ["100000", "150000", "299999", "400000"])
def test_ray_counts_the_same_cores(machine, quota):
    names = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    root = machine(V1, dict(zip(names, (quota, "100000"), strict=True)))
    rays = _get_docker_cpus(*(str(root / "sys/fs/cgroup" / name) for name in names), *[str(root / "missing")] * 2)
    assert count_cores(root) == int(rays)


@pytest.mark.parametrize(
    ("cgroup", "files", "memory"),
    [
        pytest.param(V2, {"memory.max": "max", "memory.current": "1"}, Memory(32 * GB, 20 * GB, False), id="no limit"),
        pytest.param(V2, {}, Memory(32 * GB, 20 * GB, False), id="no files"),
        pytest.param(
            V2,
            {
                "memory.max": str(4 * GB),
                "memory.current": str(3 * GB),
                "memory.stat": f"anon 7\ninactive_file {GB}\nactive_file {GB // 2}",
            },
            Memory(4 * GB, 4 * GB - 3 * GB // 2, True),
            id="file caches are available",
        ),
        pytest.param(
            "0::/a/b",
            {"a/memory.max": str(2 * GB), "a/memory.current": "0", "a/b/memory.max": "max"},
            Memory(2 * GB, 2 * GB, True),
            id="the limit of a group above",
        ),
        pytest.param(
            V2,
            {"memory.max": str(30 * GB), "memory.current": "0"},
            Memory(30 * GB, 20 * GB, True),
            id="machine is full",
        ),
        pytest.param(
            V2, {"memory.max": str(64 * GB)}, Memory(32 * GB, 20 * GB, False), id="a limit above the machine's"
        ),
        pytest.param(
            V1,
            {"memory/memory.limit_in_bytes": str(UNLIMITED_V1), "memory/memory.usage_in_bytes": "5"},
            Memory(32 * GB, 20 * GB, False),
            id="v1 without a limit",
        ),
        pytest.param(
            "4:memory:/docker/abc",
            {
                "memory/memory.limit_in_bytes": str(4 * GB),
                "memory/memory.usage_in_bytes": str(3 * GB),
                "memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {GB}\ntotal_active_file 0",
            },
            Memory(4 * GB, 2 * GB, True),
            id="v1 in a container",
        ),
        pytest.param(
            "4:memory:/job/step",
            {
                "memory/memory.limit_in_bytes": str(UNLIMITED_V1),
                "memory/job/memory.limit_in_bytes": str(3 * GB),
                "memory/job/memory.usage_in_bytes": str(GB),
                "memory/job/step/memory.limit_in_bytes": str(UNLIMITED_V1),
            },
            Memory(3 * GB, 2 * GB, True),
            id="v1, the limit of a job",
        ),
    ],
)
def test_memory_is_the_smaller_of_the_machines_and_the_cgroups(machine, cgroup, files, memory):
    assert measure_memory(machine(cgroup, files)) == memory


def test_this_machines_memory_is_that_of_ray():
    assert measure_memory().total <= get_system_memory()
    assert 0 < measure_memory().available <= measure_memory().total


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/a", {"memory.events": "oom 4\noom_kill 3", "a/memory.events": "oom 1\noom_kill 1"}),
        ("4:memory:/a", {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3"}),
    ],
)
def test_kills_for_want_of_memory_are_counted(machine, cgroup, files):
    assert count_oom_kills(machine(cgroup, files)) == 3
    assert count_oom_kills(machine("0::/nowhere", {"memory.events": ""})) in (0, 3)


# --- real cgroups -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def make_cgroup(controller, limits):
    """Make a cgroup with the first of the limits that this kernel has; skips the test where that is not allowed."""
    made = None
    for parent in (Path("/sys/fs/cgroup") / controller, Path("/sys/fs/cgroup")):
        made = parent / f"handpose-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            for name, value in limits.items():
                if (made / name).exists():
                    (made / name).write_text(value)
                    yield made
                    return
        except OSError:
            continue
        finally:
            _remove(made)
    pytest.skip("no cgroup can be made here")


def _remove(folder):
    for _ in range(50):  # the kernel lets go of a process a moment after its end
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.02)


def run_in(folder, code):
    """Run Python in a process of a cgroup."""
    join = f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0')\n"
    return subprocess.run(
        [sys.executable, "-c", f"{join}import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_real_cpu_quota_limits_the_cores():
    with make_cgroup("cpu", {"cpu.max": "100000 100000", "cpu.cfs_quota_us": "100000"}) as group:
        done = run_in(group, "from handpose.resources import count_cores; print(count_cores())")
        assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_real_memory_limit_is_seen_and_its_kills_are_counted():
    limit = 200 * 2**20
    use = "from handpose.resources import *; print(*measure_memory(), count_oom_kills()); "
    with make_cgroup("memory", {"memory.max": str(limit), "memory.limit_in_bytes": str(limit)}) as group:
        total, available, limited, kills = run_in(group, f"{use} bytearray(10**6)").stdout.split()
        assert (int(total), limited, kills) == (limit, "True", "0")
        assert limit / 2 < int(available) < limit
        held = run_in(group, f"{use} x = bytearray(10**8); print(measure_memory().available)").stdout.split()
        assert 0.9e8 < int(held[1]) - int(held[4]) < 1.1e8
        if "swap" not in Path("/proc/swaps").read_text(encoding="utf-8"):
            assert run_in(group, "bytearray(10**9)").returncode == -9
            assert int(run_in(group, use).stdout.split()[3]) >= 1


# --- and nothing else counts ------------------------------------------------------------------------------------------


def test_cores_and_memory_are_counted_in_one_place():
    counts = re.compile(r"cpu_count\(|sched_getaffinity\(|SC_PHYS_PAGES|SC_NPROCESSORS|virtual_memory\(")
    files = [file for folder in ("handpose", "cluster", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py")]
    found = [file.relative_to(REPOSITORY).as_posix() for file in files if counts.search(file.read_text())]
    assert found == ["handpose/resources.py"]
