"""Inside a job of a scheduler: run Ray on all hosts and tune.py on the first one, and requeue the job when time is up.

    python cluster/job.py --folder FOLDER --warning-s 300 -- sweep.name=hands sweep.num_trials=100

The launchers write this command. When the scheduler warns that the wall time is about to end (SIGUSR1), the job sends
SIGTERM to tune.py, which saves its state and exits with status 75. Then the job stops the nodes and is requeued. The
next job finds the sweep and resumes it. The job is not requeued if the sweep has finished or failed, or if two jobs in
a row made no progress.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.allocation import Allocation, find_allocation, remove_scheduler_variables
from cluster.sweep import INTERRUPTED_STATUS, find_sweep_folder, make_tune_command, measure_progress, split_arguments
from handpose.dotenv_file import load_dotenv_file
from handpose.files import read_json, write_json
from handpose.program import exit_on_user_error
from handpose.sweep.execution.interpreter import check_interpreter
from handpose.sweep.execution.privacy import AUTH_MODE_VARIABLE, TOKEN_PATH_VARIABLE, TOKEN_VARIABLE, write_token
from handpose.sweep.record.settings import format_resume_command
from handpose.utf8 import use_utf8

_NODE_SCRIPT = Path(__file__).resolve().with_name("node.py")
_POLL_INTERVAL_S = 0.5
_MARGIN_S = 30.0
"""The part of the time between warning and end that is kept for stopping the nodes and requeueing the job."""
_NODE_TIMEOUT_S = 20.0
_RESTART_AFTER_S = 60.0
_MAX_STARTS = 5
"""Largest number of starts of a node in one job."""
_NUM_LOG_LINES = 20
"""Lines of a node's log that are shown when the node has ended by itself."""
_MAX_IDLE_JOBS = 2
_SIGNAL_STATUSES = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT, 130, INTERRUPTED_STATUS)
"""Exit statuses of a tune.py that was told to end. One that has not started its sweep yet does not exit with 75."""


class JobEnd:
    """Whether this job should end, and why.

    The warning signal stays blocked, in this process and in all that it starts. It is polled, not handled, because some
    schedulers send it to all processes of a job, and Ray Tune stops a run on SIGUSR1 (2.60).
    """

    def __init__(self) -> None:
        self._is_ended = False
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_ended = True

    @property
    def is_warned(self) -> bool:
        """The wall time is about to end."""
        return bool({signal.SIGUSR1, signal.SIGUSR2} & signal.sigpending())

    @property
    def is_due(self) -> bool:
        """The job should end, because it was warned or cancelled. A cancelled job is not requeued."""
        return self._is_ended or self.is_warned


def log_line(text: str) -> None:
    print(f"job: {text}", flush=True)


class RayNodes:
    """The Ray nodes of a job.

    `ray symmetric-run` (Ray 2.60) does less. It refuses to start if another job runs Ray on the host, and its `ray
    stop` ends the Ray of all jobs there. It gives up if a node is missing after 30 s, and never restarts a node. On
    SIGTERM it exits without telling tune.py, and leaves Ray running.

    Args:
        allocation: the hosts of the job.
        folder: where each node writes its address and its log.
        options: options of node.py for every node.
        wrap: the beginning of every command line of a node, such as `apptainer exec IMAGE`. Python is then that of the
            image.
    """

    def __init__(
        self, allocation: Allocation, folder: Path, options: Sequence[str], *, wrap: Sequence[str] = ()
    ) -> None:
        self._folder, self._options, self._allocation, self._wrap = folder, options, allocation, wrap
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._gone: dict[str, float] = {}  # host -> time when it was found to have ended
        self._starts: Counter[str] = Counter()

    def start_head(self, job_end: JobEnd, timeout_s: float) -> str | None:
        """Start the head and return the address of the cluster.

        Return None if the head does not come up, or if the job should end.
        """
        host, others = self._allocation.hosts[0], self._allocation.hosts[1:]
        self._start(host, [f"--other={others[0]}"] if others else [], is_here=True)
        _wait_until(lambda: self._is_up(host) or self._has_ended(host) or job_end.is_due, timeout_s)
        return (self._folder / f"{host}.up").read_text(encoding="utf-8") if self._is_up(host) else None

    def start_others(self, address: str, job_end: JobEnd, timeout_s: float, *, min_nodes: int = 1) -> list[str]:
        """Start the other nodes.

        Nodes that end are waited for, and restarted, only while there are fewer than `min_nodes`.

        Args:
            address: the address of the cluster.
            job_end: ends the wait when the job should end.
            timeout_s: longest time to wait, in seconds.
            min_nodes: number of nodes that the job needs, with the head.

        Returns:
            The hosts whose nodes have not joined. They may still do so.
        """
        others = self._allocation.hosts[1:]
        for host in others:
            self._start(host, [f"--head={address}"], is_here=False)

        def list_missing() -> list[str]:
            return [host for host in others if not self._is_up(host) or self._has_ended(host)]

        def is_settled() -> bool:
            self.report_ended_nodes()
            missing = list_missing()
            if 1 + len(others) - len(missing) < min_nodes:
                self.restart_ended_nodes(address)
                return job_end.is_due
            return all(self._has_ended(host) for host in missing) or job_end.is_due

        _wait_until(is_settled, timeout_s)
        return list_missing()

    def report_ended_nodes(self) -> None:
        """Log each node that has ended by itself, with the end of its log."""
        for host in self._processes:
            if self._has_ended(host) and host not in self._gone:
                self._gone[host] = time.monotonic()
                lines = self._read_last_lines(host)
                ended = f"the Ray node on {host} has ended with status {self._processes[host].returncode}"
                has_log = f"; the end of its log {self._get_log(host)}:"
                log_line(ended + (has_log if lines else " before it wrote a log; the reason is above"))
                for line in lines:
                    log_line(f"  {host}: {line}")

    def restart_ended_nodes(self, address: str) -> None:
        """Restart the nodes that ended a minute ago, because the cause may have been temporary."""
        for host, since in list(self._gone.items()):
            is_due = time.monotonic() - since >= _RESTART_AFTER_S
            if is_due and host != self._allocation.hosts[0] and self._starts[host] < _MAX_STARTS:
                del self._gone[host]
                (self._folder / f"{host}.up").unlink(missing_ok=True)
                log_line(f"restarting the Ray node on {host}")
                self._start(host, [f"--head={address}"], is_here=False)

    @property
    def num_hosts(self) -> int:
        return len(self._allocation.hosts)

    @property
    def has_head(self) -> bool:
        return not self._has_ended(self._allocation.hosts[0])

    def stop(self) -> None:
        """Stop the nodes, the head last, because a node without a head logs errors."""
        *others, head = reversed(self._processes.values())
        for group in (others, [head]):
            for process in group:
                process.terminate()
            for process in group:
                _kill_at(process, time.monotonic() + _NODE_TIMEOUT_S)

    def _start(self, host: str, more: Sequence[str], *, is_here: bool) -> None:
        self._starts[host] += 1
        command = [
            *self._wrap,
            "python" if self._wrap else sys.executable,
            str(_NODE_SCRIPT),
            f"--folder={self._folder}",
            f"--host={host}",
            *self._options,
            *more,
        ]
        # In its own session: Ctrl-C in a terminal reaches only the job, which then stops the others in order.
        self._processes[host] = subprocess.Popen(
            command if is_here else self._allocation.command_on(host, command), start_new_session=True
        )

    def _is_up(self, host: str) -> bool:
        return (self._folder / f"{host}.up").exists()

    def _has_ended(self, host: str) -> bool:
        return self._processes[host].poll() is not None

    def _get_log(self, host: str) -> Path:
        return self._folder / f"{host}.log"

    def _read_last_lines(self, host: str) -> list[str]:
        log = self._get_log(host)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return [line for line in text.split("\n") if line.strip()][-_NUM_LOG_LINES:]


def main() -> None:
    """Run the job. Its exit status is that of tune.py, or 75 if it is requeued."""
    given, arguments = parse_arguments(sys.argv[1:])
    os.umask(0o077)
    job_end = JobEnd()
    wrap = shlex.split(given.wrap)
    with exit_on_user_error():
        allocation = find_allocation(os.environ)
        if not wrap:
            check_interpreter(sys.executable)
        load_dotenv_file()
        folder = find_sweep_folder(arguments)
        before = measure_progress(folder)
    with exit_on_user_error(), _make_run_folder(given.folder, allocation.job) as run_folder:
        write_token(run_folder / "token")
        os.environ[AUTH_MODE_VARIABLE], os.environ[TOKEN_PATH_VARIABLE] = "token", str(run_folder / "token")
        os.environ.pop(TOKEN_VARIABLE, None)
        os.environ.pop("RAY_ADDRESS", None)
        options = [f"--{name}={value}" for name in ("cpus", "gpus", "network") if (value := getattr(given, name))]
        options += ["--gpus=0"] if given.gpus == 0 else []
        nodes = RayNodes(allocation, run_folder, options, wrap=wrap)
        status = run_job(nodes, job_end, given, arguments, folder)
    if not job_end.is_warned and status != INTERRUPTED_STATUS:
        sys.exit(status if status >= 0 else 128 - status)
    # Cancelled by a user or the scheduler; with status 75, LSF would requeue it.
    if job_end.is_due and not job_end.is_warned:
        sys.exit(128 + signal.SIGTERM)
    if status not in _SIGNAL_STATUSES:  # it finished or failed at the last moment
        sys.exit(status if status >= 0 else 128 - status)
    with exit_on_user_error():
        sys.exit(_requeue(allocation, given.folder, has_moved=measure_progress(folder) > before, folder=folder))


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options, and return them with the arguments of tune.py, which follow `--`."""
    before, arguments = split_arguments(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of the job; all hosts must be able to access it"
    )
    parser.add_argument(
        "--warning-s", type=float, required=True, help="seconds between the warning signal and the end of the wall time"
    )
    parser.add_argument("--wait-s", type=float, default=300.0, help="longest time to wait for nodes, in seconds")
    parser.add_argument("--cpus", type=int, help="cores to use on each host; default: all that the job has")
    parser.add_argument("--gpus", type=int, help="GPUs to use on each host; default: all that Ray finds")
    parser.add_argument("--network", help="network for traffic between nodes, such as 10.1.0.0/16")
    parser.add_argument("--min-nodes", type=int, default=1, help="number of nodes below which the job fails")
    parser.add_argument("--wrap", default="", help="beginning of the commands on all hosts: apptainer exec --nv IMAGE")
    return parser.parse_args(before), arguments


def run_job(
    nodes: RayNodes, job_end: JobEnd, options: argparse.Namespace, arguments: Sequence[str], folder: Path
) -> int:
    """Run Ray and tune.py until tune.py ends or the job should end.

    Returns:
        The exit status of tune.py; 75 if it was interrupted, or if there was no time to start it.
    """
    try:
        address = nodes.start_head(job_end, options.wait_s)
        if address is None:
            nodes.report_ended_nodes()
            return INTERRUPTED_STATUS if job_end.is_due else 1
        missing = nodes.start_others(address, job_end, options.wait_s, min_nodes=options.min_nodes)
        if job_end.is_due:
            return INTERRUPTED_STATUS
        num_nodes = nodes.num_hosts - len(missing)
        if num_nodes < options.min_nodes:
            log_line(
                f"only {num_nodes} of {nodes.num_hosts} nodes have joined after {options.wait_s:.0f} s, fewer than "
                f"--min-nodes {options.min_nodes}, so the job ends; missing: {', '.join(missing)}"
            )
            return 1
        if missing:
            log_line(f"continues with {num_nodes} nodes; not available yet: {', '.join(missing)}")
        environment = remove_scheduler_variables(os.environ) | {"RAY_ADDRESS": address}
        command = make_tune_command(arguments, folder)
        if wrap := shlex.split(options.wrap):
            command = [*wrap, "python", *command[1:]]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and not job_end.is_due and nodes.has_head:
            nodes.report_ended_nodes()
            nodes.restart_ended_nodes(address)
            time.sleep(_POLL_INTERVAL_S)
        nodes.report_ended_nodes()
        if process.poll() is None:
            log_line(
                "the wall time ends; saving the sweep"
                if job_end.is_warned
                else "the job was told to end; saving the sweep"
            )
            process.terminate()
            _kill_at(process, time.monotonic() + max(options.warning_s - _MARGIN_S, options.warning_s / 2))
            return INTERRUPTED_STATUS if process.returncode in _SIGNAL_STATUSES else process.returncode
        return process.returncode
    finally:
        nodes.stop()


@contextlib.contextmanager
def _make_run_folder(folder: Path, job: str) -> Iterator[Path]:
    """Make a private folder for the token, and for the addresses and logs of the nodes.

    The logs of an earlier run of the job are removed.
    """
    run_folder = folder / f"nodes_{job}"
    shutil.rmtree(run_folder, ignore_errors=True)
    run_folder.mkdir(mode=0o700, parents=True)
    try:
        yield run_folder
    finally:
        (run_folder / "token").unlink(missing_ok=True)


def _requeue(allocation: Allocation, place: Path, *, has_moved: bool, folder: Path) -> int:
    """Requeue the job, unless it makes no progress. Return the exit status of the job."""
    file = place / "idle_jobs.json"
    num_idle = 0 if has_moved else (read_json(file) if file.exists() else 0) + 1
    write_json(file, num_idle)
    resume = format_resume_command(folder)
    if num_idle >= _MAX_IDLE_JOBS:
        log_line(
            f"not queued again: {num_idle} jobs in a row finished no epoch; resume with a longer wall time: {resume}"
        )
        return 1
    reason = allocation.requeue()
    if reason is not None:
        log_line(f"the job could not be queued again ({reason}); to resume: {resume}")
        return INTERRUPTED_STATUS
    log_line("queued again")
    return INTERRUPTED_STATUS


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(_POLL_INTERVAL_S)


def _kill_at(process: subprocess.Popen[bytes], moment: float) -> None:
    """Kill a process at a given time if it has not ended. Nothing that was reported is lost."""
    try:
        process.wait(max(0.0, moment - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    use_utf8()
    main()
