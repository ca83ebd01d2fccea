"""What a scheduler says of the job that it has started: which hosts, how to reach them, how to come again."""

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
    """The environment for what runs inside a job without being a task of it: Ray, and through it every trial.

    Lightning takes the rank of a process from SLURM_PROCID and the like when it is imported, and what has another rank
    than 0 logs and saves nothing (lightning #6389).
    """
    return {name: value for name, value in environment.items() if not _SCHEDULER_VARIABLE.match(name)}


class Allocation(Protocol):
    """job: its identifier, which stays when it is queued again. hosts: the first one runs this process."""

    @property
    def job(self) -> str: ...
    @property
    def hosts(self) -> Sequence[str]: ...

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on another host of the job, as long as itself runs."""
        ...

    def requeue(self) -> str | None:
        """Have the scheduler start the job again when it has ended; why that failed, in a line, or None."""
        ...


class Slurm(NamedTuple):
    """A Slurm job, whose step on each host gets all that the job has there."""

    job: str
    hosts: Sequence[str]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        # --overlap: beside the batch step. --cpus-per-task: srun 22.05 no longer takes it from sbatch by itself.
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1")
        options = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", f"--cpus-per-task={cpus}", "--mem=0"]
        return ["srun", *options, "--overlap", "--unbuffered", "--quiet", *command]

    def requeue(self) -> str | None:
        """By `scontrol requeue`, which the owner of a job may do: the same number, script, place in the queue and log.

        A new sbatch from within a job is forbidden on many clusters.
        """
        done = subprocess.run(
            ["scontrol", "requeue", self.job], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


class Lsf(NamedTuple):
    """An LSF job. It is queued again by its exit status (`bsub -Q 75`), for which nobody needs any rights."""

    job: str
    hosts: Sequence[str]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        return ["blaunch", host, *command]

    def requeue(self) -> str | None:
        return None


class SingleMachine(NamedTuple):
    """No scheduler: this machine only."""

    job: str
    hosts: Sequence[str]

    def command_on(self, host: str, command: Sequence[str]) -> list[str]:
        return list(command)

    def requeue(self) -> str | None:
        return "there is no scheduler"


def find_allocation(environment: Mapping[str, str]) -> Allocation:
    """The job that this process runs in."""
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
