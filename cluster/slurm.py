"""Submit a sweep to Slurm. It runs through as many jobs as it needs.

    python cluster/slurm.py --nodes 4 --gpus-per-node 4 --wall-time 04:00:00 --partition gpu \\
        --setup 'module load cuda; source .venv/bin/activate' -- data=freihand data.root=DIR sweep.num_trials=200

All other options are passed to sbatch: --partition, --account, --qos, --constraint, --mem, ... Prints the script and
submits it; with --dry-run only prints it. See docs/cluster/slurm.md.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import Submission, make_job_parser, make_script, read_submission, submit
from handpose.program import exit_on_user_error
from handpose.utf8 import use_utf8

_RESERVED_OPTIONS = (
    *("--nodes", "-N", "--time", "-t", "--signal", "--requeue", "--no-requeue", "--output", "-o", "--open-mode"),
    *("--ntasks", "-n", "--ntasks-per-node", "--cpus-per-task", "-c", "--gpus-per-node", "--job-name", "-J", "--array"),
)


def make_directives(submission: Submission) -> list[str]:
    """Build the #SBATCH lines."""
    given = submission.options
    whole_nodes = ["--exclusive", "--mem=0"]  # all cores and all memory of each node
    options = [
        f"--job-name={shlex.quote(submission.name)}",
        f"--nodes={given.nodes}",
        "--ntasks-per-node=1",
        *(whole_nodes if given.cpus_per_node is None else [f"--cpus-per-task={given.cpus_per_node}"]),
        *([f"--gpus-per-node={given.gpus_per_node}"] if given.gpus_per_node else []),
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
        submission = read_submission(make_job_parser(__doc__ or ""), argv, reserved=_RESERVED_OPTIONS)
        submit(submission, make_script(submission, make_directives(submission)), ["sbatch"])


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
