"""Worker processes that really die, each in its own way."""

import os
import signal
import subprocess
import sys
import time

import pytest
import ray
from ray.exceptions import RayActorError

from handpose.resources import Memory
from handpose.sweep.execution import worker_death
from handpose.sweep.execution.tune_bridge import summarise_error_text
from handpose.sweep.execution.worker_death import describe_exit, diagnose_worker_death


def error_of(call):
    with pytest.raises(RayActorError) as raised:
        ray.get(call)
    return str(raised.value)


@pytest.fixture
def mortal(ray_started):
    """A worker that dies as it is told; of a nested class, which is sent whole, so that the worker imports nothing."""

    class Mortal:
        def die(self, number):
            os.kill(os.getpid(), number)
            time.sleep(60)

        def leave(self):
            sys.exit(3)

    return ray.remote(num_cpus=0)(Mortal).remote()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said", "crashed"),
    [
        (signal.SIGSEGV, "the worker process crashed with SIGSEGV (Segmentation fault)", True),
        (signal.SIGABRT, "the worker process crashed with SIGABRT (Aborted)", True),
        (signal.SIGKILL, worker_death._NO_TRACE, False),
        (signal.SIGTERM, "the worker process was ended by SIGTERM", False),
    ],
)
def test_the_signal_that_ended_a_worker_is_named(mortal, number, said, crashed):
    message = error_of(mortal.die.remote(number))
    assert diagnose_worker_death(message) == (said, crashed)
    assert summarise_error_text(message) == said


@pytest.mark.parametrize(
    ("limit", "num_kills", "is_blamed"), [(4 * 10**9, 2, True), (4 * 10**9, 0, False), (None, 2, False)]
)
def test_the_memory_limit_of_a_container_is_named_where_the_kernel_has_killed_for_it(
    tmp_path, monkeypatch, limit, num_kills, is_blamed
):
    (tmp_path / "worker-1-7.err").write_text("nothing of a signal")
    memory = Memory(limit or 10**10, 10**9, is_limited=limit is not None)
    monkeypatch.setattr(worker_death, "measure_memory", lambda: memory)
    monkeypatch.setattr(worker_death, "count_oom_kills", lambda: num_kills)
    monkeypatch.setattr(worker_death.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(worker_death.ray.util, "get_node_ip_address", lambda: "here")
    monkeypatch.setattr(worker_death, "find_newest_worker_log", lambda pid: tmp_path / f"worker-1-{pid}.err")
    sentence, crashed = diagnose_worker_death("The actor died unexpectedly.\n\tpid: 7\n\tip: here")
    assert not crashed
    if not is_blamed:
        assert sentence == worker_death._NO_TRACE
        return
    assert "killed by the kernel because the memory limit of its container or job (4 GB) was reached" in sentence
    assert "oom_kill is 2" in sentence
    assert "sweep.max_concurrent" in sentence


def test_what_helps_is_said_where_ray_has_killed_a_worker():
    death = diagnose_worker_death("Task was killed due to the node running low on memory.")
    assert "killed by Ray because the memory of its node was almost full; fewer trials at a time" in death.sentence


@pytest.mark.slow
def test_the_log_of_a_worker_on_another_address_is_read_there(mortal, monkeypatch):
    message = error_of(mortal.die.remote(signal.SIGSEGV))
    monkeypatch.setattr(worker_death.ray.util, "get_node_ip_address", lambda: "another")
    assert diagnose_worker_death(message).is_crash


@pytest.mark.slow
def test_a_worker_that_exits_is_not_said_to_have_been_killed(mortal):
    assert diagnose_worker_death(error_of(mortal.leave.remote())).sentence == "the worker process exited with status 3"


def test_without_a_log_no_signal_is_named(monkeypatch):
    monkeypatch.setattr(worker_death, "_LOG_TIMEOUT_S", 0.5)
    assert diagnose_worker_death("The actor died unexpectedly.\n\tpid: 1\n\tip: nowhere").sentence == (
        "the worker process died: it was killed, ran out of memory or crashed"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(3)", "ended with status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV (Segmentation fault)"),
    ],
)
def test_the_end_of_a_program_is_described(code, said):
    assert describe_exit(subprocess.run([sys.executable, "-c", code], check=False).returncode) == said
