"""Submit a sweep to LSF. It runs through as many jobs as it needs.

    python cluster/lsf.py --nodes 4 --gpus-per-node 4 --wall-time 04:00:00 -q gpu -P hands \\
        --setup 'module load cuda; source .venv/bin/activate' -- data=freihand data.root=DIR sweep.num_trials=200

All other options are passed to bsub: -q, -P, -R, -M, -G, ... Prints the script and submits it; with --dry-run only
prints it. See docs/cluster/lsf.md.
"""

import math
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import (
    GpuRequest,
    Submission,
    make_job_parser,
    make_script,
    parse_wall_time,
    read_submission,
    submit,
)
from cluster.sweep import INTERRUPTED_STATUS
from handpose.program import exit_on_user_error
from handpose.utf8 import use_utf8

_RESERVED_OPTIONS = (
    "-n",
    "-W",
    "-wa",
    "-wt",
    "-Q",
    "-o",
    "-oo",
    "-e",
    "-eo",
    "-J",
    "-x",
    "-gpu",
    "-r",
    "-rn",
    "-K",
    "-I",
)


def make_directives(submission: Submission) -> list[str]:
    """Build the #BSUB lines. LSF counts slots, which are cores, and measures time in minutes."""
    given = submission.options
    slots = given.cpus_per_node or 1
    options = [
        f"-J {shlex.quote(submission.name)}",
        f"-n {given.nodes * slots}",
        f'-R "span[ptile={slots}]"',
        *(["-x"] if given.cpus_per_node is None else []),
        *([f'-gpu "{_format_gpus(given.gpus_per_node)}"'] if given.gpus_per_node.number else []),
        f"-W {math.ceil(parse_wall_time(given.wall_time) / 60)}",
        "-wa USR1",
        f"-wt {math.ceil(given.warning_s / 60)}",
        f'-Q "{INTERRUPTED_STATUS}"',  # a job with this status is requeued, which needs no permissions
        "-r",  # also requeue a job whose host was lost
        "-o /dev/null",  # LSF keeps no output of a requeued job, so the script writes its own log
        *submission.scheduler_options,
    ]
    return [f"#BSUB {option}" for option in options]


def _format_gpus(gpus: GpuRequest) -> str:
    model = "" if gpus.type is None else f":gmodel={gpus.type}"
    return f"num={gpus.number}{model}:mode=shared:j_exclusive=yes"


def main(argv: list[str]) -> None:
    """Check the submission, print the script and submit it."""
    with exit_on_user_error():
        submission = read_submission(make_job_parser(__doc__ or ""), argv, reserved=_RESERVED_OPTIONS)
        own_log = f"exec >> {shlex.quote(str(submission.log))} 2>&1"
        num_gpus = submission.options.gpus_per_node.number
        script = make_script(submission, make_directives(submission), num_gpus=num_gpus, before=[own_log])
        submit(submission, script, ["bsub"])


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
