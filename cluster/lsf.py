"""Submit a sweep to LSF, which goes on through as many jobs as it needs.

    python cluster/lsf.py --nodes 4 --gpus-per-node 4 --wall-time 04:00:00 -q gpu -P hands \\
        --setup 'module load cuda; source .venv/bin/activate' -- data=freihand data.root=DIR sweep.num_trials=200

Options that are not ours are those of bsub: -q, -P, -R, -M, -G, ... Prints the script and submits it; --dry-run only
prints. See docs/cluster/lsf.md.
"""

import math
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import Submission, make_job_parser, make_script, parse_wall_time, read_submission, submit
from cluster.sweep import INTERRUPTED_STATUS
from handpose.config import exit_on_user_error
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
    """The #BSUB lines. LSF counts slots, which are cores, and times in minutes."""
    given = submission.options
    slots = given.cpus_per_node or 1
    options = [
        f"-J {shlex.quote(submission.name)}",
        f"-n {given.nodes * slots}",
        f'-R "span[ptile={slots}]"',
        *(["-x"] if given.cpus_per_node is None else []),
        *([f'-gpu "num={given.gpus_per_node}:mode=shared:j_exclusive=yes"'] if given.gpus_per_node else []),
        f"-W {math.ceil(parse_wall_time(given.wall_time) / 60)}",
        "-wa USR1",
        f"-wt {math.ceil(given.warning_s / 60)}",
        f'-Q "{INTERRUPTED_STATUS}"',  # a job that ends so comes again, without anybody's rights
        "-r",  # and one whose host was lost
        "-o /dev/null",  # of a job that comes again LSF keeps no output, so that the script writes its own
        *submission.scheduler_options,
    ]
    return [f"#BSUB {option}" for option in options]


def main(argv: list[str]) -> None:
    """Check, print and submit."""
    with exit_on_user_error():
        submission = read_submission(make_job_parser(__doc__ or ""), argv, reserved=_RESERVED_OPTIONS)
        own_log = f"exec >> {shlex.quote(str(submission.log))} 2>&1"
        submit(submission, make_script(submission, make_directives(submission), before=[own_log]), ["bsub"])


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
