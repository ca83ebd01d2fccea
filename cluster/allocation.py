"""The hosts that a scheduler has allocated to this job, how to run commands on them, and how to requeue the job."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

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
    """A Slurm job. Its step on each host gets everything that the job has there."""

    job: str
    hosts: Sequence[str]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        # --overlap: next to the batch step. --cpus-per-task: since 22.05, srun does not take it from sbatch.
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
        options = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", f"--cpus-per-task={cpus}", "--mem=0"]
        return ["srun", *options, "--overlap", "--unbuffered", "--quiet", *command]

    def requeue(self) -> str | None:
        """Run `scontrol requeue`, which the owner of a job may do. The job keeps its number, script, priority and log.

        Many clusters forbid sbatch from within a job.
        """
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
    """Return the allocation of the job that this process runs in."""
    if "SLURM_JOB_ID" in environment and shutil.which("scontrol"):
        listed = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
        hosts = subprocess.run(
            listed, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.split()
        return Slurm(environment["SLURM_JOB_ID"], hosts)
    if "LSB_JOBID" in environment:
        # "host1 8 host2 8": names and slots
        return Lsf(environment["LSB_JOBID"], list(dict.fromkeys(environment["LSB_MCPU_HOSTS"].split()[::2])))
    return SingleMachine(str(os.getpid()), [os.uname().nodename])
