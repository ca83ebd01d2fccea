"""Submit a sweep to Slurm. It runs through as many jobs as it needs.

    python cluster/slurm.py --nodes 4 --gpus-per-node 4 --wall-time 04:00:00 --partition gpu \\
        --setup 'module load cuda; source .venv/bin/activate' -- data=freihand data.root=DIR sweep.num_trials=200

All other options are passed to sbatch: --partition, --account, --qos, --constraint, --mem, ... Prints the script and
submits it; with --dry-run only prints it. See docs/cluster/slurm.md.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import Submission, make_job_parser, make_script, read_submission, submit
from handpose.errors import UserError
from handpose.program import exit_on_user_error
from handpose.utf8 import use_utf8

_RESERVED_OPTIONS = (
    *("--nodes", "-N", "--time", "-t", "--signal", "--requeue", "--no-requeue", "--output", "-o", "--open-mode"),
    *("--ntasks", "-n", "--ntasks-per-node", "--cpus-per-task", "-c", "--job-name", "-J", "--array", "-a"),
    # GPUs of the whole job or of a task: a step on one node would ask for those of all nodes.
    *("--gpus", "-G", "--gpus-per-task", "--gpus-per-socket", "--ntasks-per-gpu", "--cpus-per-gpu", "--tres-per-task"),
)


def count_gres_gpus(gres: str) -> int | None:
    """Count the GPUs in a value of --gres, such as `gpu:a100:8` or `gpu:2,nvme:1`.

    Returns:
        Their number; None if only the node knows it, as with parts of GPUs (`shard`, `mps`).
    """
    total = 0
    for item in gres.split(","):
        name, *parts = re.sub(r"\(.*\)", "", item).split(":")
        if name in ("shard", "mps"):
            return None
        if name == "gpu":
            total += int(parts[-1]) if parts and parts[-1].isdigit() else 1
    return total


def make_directives(submission: Submission) -> list[str]:
    """Build the #SBATCH lines."""
    given = submission.options
    whole_nodes = ["--exclusive", "--mem=0"]  # all cores and all memory of each node
    options = [
        f"--job-name={shlex.quote(submission.name)}",
        f"--nodes={given.nodes}",
        "--ntasks-per-node=1",
        *(whole_nodes if given.cpus_per_node is None else [f"--cpus-per-task={given.cpus_per_node}"]),
        *([f"--gpus-per-node={given.gpus_per_node}"] if given.gpus_per_node.number else []),
        *([f"--gres={shlex.quote(given.gres)}"] if given.gres else []),
        f"--time={given.wall_time}",
        f"--signal=B:USR1@{given.warning_s}",  # B: to the script only, which informs the others
        "--requeue",
        "--no-kill",  # if a node is lost, the job continues on the others
        f"--output={shlex.quote(str(submission.log).replace('%', '%%'))}",  # % starts a pattern, such as %j
        "--open-mode=append",
        *submission.scheduler_options,
    ]
    return [f"#SBATCH {option}" for option in options]


def main(argv: list[str]) -> None:
    """Check the submission, print the script and submit it."""
    with exit_on_user_error():
        parser = make_job_parser(__doc__ or "")
        parser.add_argument("--gres", help="resources of each node, such as gpu:a100:8, instead of --gpus-per-node")
        submission = read_submission(parser, argv, reserved=_RESERVED_OPTIONS)
        num_gpus = _count_gpus(submission.options)
        submit(submission, make_script(submission, make_directives(submission), num_gpus=num_gpus), ["sbatch"])


def _count_gpus(given: argparse.Namespace) -> int | None:
    """Return the GPUs of each node; None if only the node knows their number.

    Raises:
        UserError: two options ask for GPUs.
    """
    in_gres = count_gres_gpus(given.gres or "")
    if given.gpus_per_node.number and in_gres != 0:
        raise UserError(f"--gpus-per-node {given.gpus_per_node} and --gres {given.gres} both ask for GPUs; give one")
    return in_gres if in_gres is None else in_gres + given.gpus_per_node.number


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
