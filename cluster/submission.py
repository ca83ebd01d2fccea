"""What the launchers share: their options, the checks before a submission, and the script of the job."""

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from cluster.sweep import find_sweep_folder, split_arguments  # noqa: E402
from handpose.budget import BudgetSettings, add_offset  # noqa: E402
from handpose.config import compose, override_key, parse_override_value, quote_override  # noqa: E402
from handpose.dotenv_file import load_dotenv_file  # noqa: E402
from handpose.errors import UserError  # noqa: E402
from handpose.files import write_atomically  # noqa: E402
from handpose.sweep.execution.interpreter import check_interpreter  # noqa: E402
from handpose.urls import hide_secrets  # noqa: E402

_FORBIDDEN_KEYS = ("ray.address", "ray.num_cpus", "sweep.status", "sweep.folder")


class Submission(NamedTuple):
    """A sweep to submit.

    Attributes:
        name: the name of the sweep and of the job.
        folder: the folder of the sweep.
        job_folder: the folder of the job's script and log.
        options: the options of the launcher.
        scheduler_options: options for the scheduler, one per item.
        arguments: arguments of tune.py.
    """

    name: str
    folder: Path
    job_folder: Path
    options: argparse.Namespace
    scheduler_options: Sequence[str]
    arguments: Sequence[str]

    @property
    def log(self) -> Path:
        return self.job_folder / "job.log"


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every launcher."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument(
        "--gpus-per-node",
        default="0",
        metavar="[TYPE:]NUMBER",
        help="GPUs of each machine, such as 8 or a100:8; default: 0, trials run on cores",
    )
    parser.add_argument("--cpus-per-node", type=int, help="cores of each machine; default: whole machines")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and exit")
    return parser


def make_job_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser that also has the options for a job of a scheduler."""
    parser = make_parser(description)
    parser.add_argument("--setup", default="", help="shell commands to run before Python, such as 'module load cuda'")
    parser.add_argument(
        "--wall-time", required=True, help="wall time of each job, HH:MM:SS; a sweep uses as many jobs as needed"
    )
    parser.add_argument(
        "--warning-s", type=int, default=300, help="seconds before the end of the wall time at which the sweep is saved"
    )
    parser.add_argument("--wait-s", type=int, default=300, help="longest time to wait for nodes, in seconds")
    parser.add_argument("--min-nodes", type=int, help="nodes below which the job fails; default: half of --nodes")
    parser.add_argument(
        "--network", help="network for traffic between nodes, such as 10.1.0.0/16; default: that of their names"
    )
    parser.add_argument(
        "--wrap",
        default="",
        help="beginning of the commands that need the project's Python, such as 'apptainer exec --nv IMAGE'",
    )
    return parser


class GpuRequest(NamedTuple):
    """GPUs of each machine.

    Attributes:
        number: how many.
        type: the cluster's name of their type, such as a100, or 1g.10gb for parts of GPUs (MIG); None: any type.
    """

    number: int
    type: str | None = None

    def __str__(self) -> str:
        return str(self.number) if self.type is None else f"{self.type}:{self.number}"


def parse_gpus(text: str) -> GpuRequest:
    """Parse the value of --gpus-per-node: `8` or `a100:8`.

    Raises:
        UserError: the text has another form.
    """
    found = re.fullmatch(r"(?:([A-Za-z0-9][\w.-]*):)?(\d+)", text)
    if found is None:
        raise UserError(f"--gpus-per-node {text} must be a number of GPUs, or TYPE:NUMBER such as a100:8")
    return GpuRequest(int(found[2]), found[1])


def read_submission(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, reserved: Sequence[str] | None = None, is_here: bool = True
) -> Submission:
    """Parse a command line and check it.

    Args:
        parser: the parser.
        argv: the command line.
        reserved: options of the scheduler that the launcher sets itself; all others are passed on to the scheduler.
            None: there is no scheduler.
        is_here: whether the folder of the sweep is accessible from this machine.

    Raises:
        UserError: a mistake in the command line.
    """
    before, arguments = split_arguments(argv)
    options, unknown = parser.parse_known_args(before)
    if reserved is None and unknown:
        raise UserError(f"{unknown[0]} is not an option (see --help); put arguments of tune.py after two dashes")
    more = _select_scheduler_options(unknown, reserved or ())
    load_dotenv_file()
    _check_options(options)
    _check_arguments(arguments)
    arguments = [_resolve_finish_by(item) for item in arguments]
    given = {override_key(item) for item in arguments}
    if not {"sweep.name", "sweep.resume"} & given:
        arguments.append(f"sweep.name={datetime.now():sweep-%Y-%m-%d-%H-%M-%S}")
    # Environment variables of the other machines need not exist here.
    checked = arguments if is_here else [_replace_variables(item) for item in arguments]
    folder = find_sweep_folder(checked)
    if is_here:
        _check_folder(folder, is_resumed="sweep.resume" in given)
    _check_sweep(checked, folder if is_here else None)
    return Submission(folder.name, folder, folder.parents[1] / "jobs" / folder.name, options, more, arguments)


def _select_scheduler_options(unknown: Sequence[str], reserved: Sequence[str]) -> list[str]:
    """Return the options for the scheduler, each with its value: `--partition gpu`, `-q gpu`, `--exclusive`."""
    selected: list[str] = []
    for item in unknown:
        if item.startswith("-"):
            name, equals, value = item.partition("=")
            selected.append(f"{name}={shlex.quote(value)}" if equals else name)
        elif selected:
            selected[-1] += f" {shlex.quote(item)}"
        else:
            raise UserError(f"{item} is not an option; put arguments of tune.py after two dashes: -- {item}")
    for item in selected:
        name = re.split(r"[= ]", item)[0]
        # sbatch also reads -N4, without a space; bsub has no options of two dashes.
        is_short = "--nodes" in reserved and not name.startswith("--")
        if name in reserved or (is_short and name[:2] in reserved):
            raise UserError(
                f"{item}: {name} is set by this launcher from its own options, such as --nodes and --gpus-per-node "
                "(see --help)"
            )
        if "\n" in item:
            raise UserError(f"{item!r}: an option must not contain a line break")
    return selected


def _check_options(options: argparse.Namespace) -> None:
    options.gpus_per_node = parse_gpus(options.gpus_per_node)
    for name, least in (("nodes", 1), ("cpus_per_node", 1), ("wait_s", 1), ("warning_s", 1), ("min_nodes", 1)):
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, but it is {value}")
    try:
        shlex.split(getattr(options, "wrap", ""))
    except ValueError as error:
        raise UserError(f"--wrap {options.wrap} is not a command line ({error})") from error
    if (getattr(options, "min_nodes", None) or 1) > options.nodes:
        raise UserError(f"--min-nodes {options.min_nodes} is more than --nodes {options.nodes}")
    if "wall_time" in options and options.warning_s >= parse_wall_time(options.wall_time):
        raise UserError(
            f"--warning-s {options.warning_s} leaves no time to train within --wall-time {options.wall_time}"
        )


def parse_wall_time(wall_time: str) -> int:
    """Convert a wall time, HH:MM:SS or D-HH:MM:SS, to seconds.

    Raises:
        UserError: the text has another format.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", wall_time)
    if found is None:
        raise UserError(f"--wall-time {wall_time} must be HH:MM:SS, or D-HH:MM:SS")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _check_arguments(arguments: Sequence[str]) -> None:
    for item in arguments:
        if override_key(item) in _FORBIDDEN_KEYS:
            raise UserError(f"{item} cannot be set in a job, which starts its own Ray and finds the sweep by its name")
        if (shown := hide_secrets(item)) != item:
            remedy = (
                "put the whole URL into .env, as STUDY_URL=..., and give searcher.storage='${oc.env:STUDY_URL}'"
                if override_key(item) == "searcher.storage"
                else "put it into the environment or into .env, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
            raise UserError(f"{shown} would write a secret into the job's script and into lists of processes; {remedy}")


def _resolve_finish_by(argument: str) -> str:
    """Add the offset from UTC to `budget.finish_by`, because the machines of the job may be in another time zone.

    Raises:
        UserError: the value is not a date with a time, or is in the past.
    """
    key, value = override_key(argument), parse_override_value(argument)
    if key != "budget.finish_by" or not isinstance(value, str) or "${" in value:
        return argument
    BudgetSettings(minutes=None, hours=None, gpu_hours=None, finish_by=value).check_is_ahead()
    return quote_override(key, add_offset(value))


def _replace_variables(argument: str) -> str:
    value = "file:///elsewhere" if override_key(argument) == "sweep.storage" else "elsewhere"
    return re.sub(r"\$\{oc\.env:\w+\}", value, argument)


def _check_sweep(arguments: Sequence[str], folder: Path | None) -> None:
    """Check what tune.py would check, so that a mistake does not wait for hours in the queue.

    Args:
        arguments: the arguments of tune.py.
        folder: the folder of the sweep; None: it is not accessible from this machine.
    """
    # Imported here because they take seconds.
    from hydra.utils import instantiate

    from handpose.config import insert_best_overrides, instantiate_key, is_group, to_plain_values
    from handpose.search.space import fix_params, flatten_config, load_space
    from handpose.sweep.driver.resume import (
        check_study_url,
        check_task_overrides,
        find_fixed_params,
        load_recorded_task,
    )
    from handpose.sweep.preflight.checks import check_search, check_settings

    if any(override_key(item) == "sweep.resume" for item in arguments):
        check_task_overrides(arguments)
        if folder is None:
            return
        task = load_recorded_task(folder, arguments)
        config, space, overrides = task.config, task.space, list(task.overrides)
    else:
        config = compose("tune", list(arguments))
        instantiate_key(config, "budget").check_is_ahead()
        check_study_url(config)
        options = {key: parse_override_value(item) for item in arguments if is_group(key := override_key(item))}
        values = flatten_config(to_plain_values(config)) | options
        given = [override_key(item) for item in arguments if not item.startswith("~")]
        space = load_space(config.search_space)
        space = fix_params(space, find_fixed_params(space, given, values))
        overrides = [item for item in insert_best_overrides(list(arguments)) if override_key(item) != "best"]
    sweep = instantiate(config.sweep)
    check_settings(sweep)
    check_search(config, sweep, space, overrides)


def _check_folder(folder: Path, *, is_resumed: bool) -> None:
    there = (folder / "sweep.yaml").is_file()
    if is_resumed and not there:
        raise UserError(f"sweep.resume={folder}: this folder has no sweep")
    if there and not is_resumed:
        raise UserError(f"{folder} already has a sweep; give sweep.resume={folder}, or another sweep.name")


def make_script(
    submission: Submission, directives: Sequence[str], *, num_gpus: int | None, before: Sequence[str] = ()
) -> str:
    """Build the script of the job: the scheduler's directives, the setup, and cluster/job.py.

    job.py replaces the shell, so that it receives the scheduler's signals.

    Args:
        submission: the submission.
        directives: the lines for the scheduler.
        num_gpus: GPUs of each machine; None: as many as Ray finds there.
        before: lines of shell that come first.
    """
    given = submission.options
    options = [f"--folder={submission.job_folder}", f"--warning-s={given.warning_s}", f"--wait-s={given.wait_s}"]
    options += [f"--min-nodes={given.min_nodes or math.ceil(given.nodes / 2)}"]
    options += [] if num_gpus is None else [f"--gpus={num_gpus}"]
    options += [] if given.cpus_per_node is None else [f"--cpus={given.cpus_per_node}"]
    options += [] if given.network is None else [f"--network={given.network}"]
    options += [f"--wrap={given.wrap}"] if given.wrap else []
    if not given.setup and not given.wrap:
        check_interpreter(sys.executable)
    python = "python" if given.setup else sys.executable
    command = shlex.join([python, str(REPOSITORY / "cluster" / "job.py"), *options, "--", *submission.arguments])
    setup = [given.setup] if given.setup else []
    lines = ["#!/bin/bash", *directives, *before, f"cd {shlex.quote(os.getcwd())}", *setup, f"exec {command}"]
    return "\n".join([*lines, ""])


def submit(submission: Submission, script: str, command: Sequence[str]) -> None:
    """Save the script and submit it; with --dry-run only print it.

    Args:
        submission: the submission.
        script: the script.
        command: the command of the scheduler, which reads the script from its standard input.

    Raises:
        UserError: the scheduler refuses the script, or is not installed here.
    """
    if submission.options.dry_run:
        print(script, end="")
        return
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not installed on this machine; use a machine that has it, or print the job with --dry-run"
        )
    submission.job_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (submission.job_folder / "idle_jobs.json").unlink(missing_ok=True)
    file = submission.job_folder / "job.sh"
    with write_atomically(file) as part:
        part.write_text(script, encoding="utf-8")
        part.chmod(0o600)
    done = subprocess.run(command, input=script, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise UserError(f"{command[0]} rejected {file}: {' '.join((done.stderr or done.stdout).split())}")
    print(script, done.stdout.strip(), f"log:    {submission.log}", sep="\n")
    shown = quote_override("sweep.status", str(submission.folder))
    print("status: " + shlex.join(["python", "tune.py", shown]))
