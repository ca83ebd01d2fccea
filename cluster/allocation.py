"""The hosts that a scheduler has allocated to this job, how to run commands on them, and how to requeue the job."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from handpose.errors import UserError

_SCHEDULER_VARIABLE = re.compile(
    r"^(SLURM|SLURMD|SRUN|SBATCH|LSB|LSF|JSM|PMI|PMIX|OMPI|RANK|LOCAL_RANK|WORLD_SIZE)(_|$)"
)


def remove_scheduler_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Remove the scheduler's variables from an environment, for processes in a job that are not tasks of the job.

    These are Ray and, through it, all trials. Lightning reads the rank of a process from SLURM_PROCID and similar
    variables when it is imported. A process with a rank other than 0 logs and saves nothing (lightning #6389).
    """
    return {name: value for name, value in environment.items() if not _SCHEDULER_VARIABLE.match(name)}


class Allocation(Protocol):
    """The hosts of a job.

    Attributes:
        job: the identifier of the job, which stays the same when the job is requeued.
        hosts: the hosts of the job. This process runs on the first one.
    """

    @property
    def job(self) -> str: ...
    @property
    def hosts(self) -> Sequence[str]: ...

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command on another host of the job. It runs as long as the command."""
        ...

    def requeue(self) -> str | None:
        """Tell the scheduler to start the job again after it has ended. Return the reason if that failed, else None."""
        ...


class Slurm(NamedTuple):
    """A Slurm job. Its step on each host gets everything that the job has there.

    Attributes:
        job: as in `Allocation`.
        hosts: as in `Allocation`.
        cpus: host -> CPUs of the job on it. Hosts can differ.
    """

    job: str
    hosts: Sequence[str]
    cpus: Mapping[str, int]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        # --overlap: next to the batch step. --cpus-per-task: since 22.05, srun does not take it from sbatch.
        # --export: sites can set SBATCH_EXPORT=NONE, which srun inherits, so that it would not find Python.
        options = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", f"--cpus-per-task={self.cpus[host]}", "--mem=0"]
        return ["srun", *options, "--export=ALL", "--overlap", "--unbuffered", "--quiet", *command]

    def requeue(self) -> str | None:
        """Run `scontrol requeue`, which the owner of a job may do. The job keeps its number, script, priority and log.

        Many clusters forbid sbatch from within a job.
        """
        if shutil.which("scontrol") is None:
            return "scontrol is not installed here"
        done = subprocess.run(
            ["scontrol", "requeue", self.job], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


class Lsf(NamedTuple):
    """An LSF job. Its exit status requeues it (`bsub -Q 75`), which needs no permissions."""

    job: str
    hosts: Sequence[str]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        return ["blaunch", host, *command]

    def requeue(self) -> str | None:
        return None


class SingleMachine(NamedTuple):
    """This machine only, without a scheduler."""

    job: str
    hosts: Sequence[str]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        return list(command)

    def requeue(self) -> str | None:
        return "there is no scheduler"


def find_allocation(environment: Mapping[str, str]) -> Allocation:
    """Return the allocation of the job that this process runs in.

    Raises:
        UserError: the job has several hosts, and this process cannot find or reach them.
    """
    if "SLURM_JOB_ID" in environment:
        hosts = _list_slurm_hosts(environment)
        return Slurm(environment["SLURM_JOB_ID"], hosts, _read_slurm_cpus(environment, hosts))
    if "LSB_JOBID" in environment:
        # "host1 8 host2 8": names and slots
        hosts = list(dict.fromkeys(environment["LSB_MCPU_HOSTS"].split()[::2]))
        if len(hosts) > 1:
            _check_programs(len(hosts), "blaunch")
        return Lsf(environment["LSB_JOBID"], hosts)
    return SingleMachine(str(os.getpid()), [os.uname().nodename])


def _list_slurm_hosts(environment: Mapping[str, str]) -> list[str]:
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if num_nodes == 1:  # this host, also in a container that has no programs of Slurm
        return [environment.get("SLURMD_NODENAME") or os.uname().nodename]
    _check_programs(num_nodes, "scontrol", "srun")
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    hosts = listed.stdout.split()
    if listed.returncode or len(hosts) != num_nodes:
        reason = " ".join((listed.stderr or listed.stdout).split())
        raise UserError(f"this job has {num_nodes} nodes, but `{' '.join(command)}` does not list them ({reason})")
    return hosts


def _check_programs(num_nodes: int, *names: str) -> None:
    """Raise UserError if programs that reach the other nodes are missing: the job would use only one of its nodes."""
    if missing := [name for name in names if shutil.which(name) is None]:
        raise UserError(
            f"this job has {num_nodes} nodes, but {' and '.join(missing)} cannot be found, with which it starts Ray on "
            "the others; if this is a container, run the job outside of it, and give --wrap 'apptainer exec --nv IMAGE'"
        )


def _read_slurm_cpus(environment: Mapping[str, str], hosts: Sequence[str]) -> dict[str, int]:
    """Read the CPUs of the job on each host.

    With --cpus-per-task they are the same on all hosts. Otherwise SLURM_JOB_CPUS_PER_NODE lists them in the order of
    the hosts, such as 16(x2),8.
    """
    per_task = environment.get("SLURM_CPUS_PER_TASK")
    listed = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    counts = [int(number) for number, times in listed for _ in range(int(times or 1))]
    if per_task or len(counts) != len(hosts):
        return dict.fromkeys(hosts, int(per_task or environment.get("SLURM_CPUS_ON_NODE", "1")))
    return dict(zip(hosts, counts, strict=True))
