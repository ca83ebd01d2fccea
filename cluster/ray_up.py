"""Write the file with which `ray up` makes a cluster in a cloud, or of machines that answer ssh, and say what to type.

    python cluster/ray_up.py --provider aws --region us-west-2 --instance-type g5.2xlarge --nodes 4 \\
        --output hands.yaml -- sweep.storage=s3://BUCKET/sweeps sweep.num_trials=200
    python cluster/ray_up.py --provider local --hosts 10.1.0.1 10.1.0.2 --ssh-user me --output hands.yaml -- ...

See cluster/ray_up.md.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import REPOSITORY, Submission, parser, read
from handpose.config import told
from handpose.errors import UserError
from handpose.sweep.privacy import keep_token

_TOKEN = "~/.ray/auth_token"
_START = "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ray start --object-store-memory=104857600"


def cluster(submission: Submission) -> dict[str, Any]:
    """What the file holds, as ray/autoscaler/ray-schema.json has it."""
    given = submission.options
    setup = [given.setup] if given.setup else []
    return {
        "cluster_name": submission.name,
        **_machines(submission),
        "auth": {"ssh_user": given.ssh_user},
        # The token travels as a file, with its mode; in a command it would stand in logs and lists of processes.
        "file_mounts": {"~/handpose": str(REPOSITORY), _TOKEN: str(Path(_TOKEN).expanduser())},
        "rsync_exclude": [".git", ".venv", "outputs", "data", "__pycache__"],
        "setup_commands": [*setup, f"chmod 600 {_TOKEN}", "python3 -m pip install -q -r ~/handpose/requirements.txt"],
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_START} --address=$RAY_HEAD_IP:6379"],
    }


def _machines(submission: Submission) -> dict[str, Any]:
    given = submission.options
    if given.provider == "local":
        head, *workers = given.hosts
        return {"provider": {"type": "local", "head_ip": head, "worker_ips": workers}}
    config = {"aws": {"InstanceType": given.instance_type}, "gcp": {"machineType": given.instance_type}}[given.provider]
    provider = {"type": given.provider, "region": given.region}
    if given.provider == "gcp":
        provider |= {"project_id": given.project_id, "availability_zone": given.zone}
    kinds = {
        "head": {"node_config": config, "resources": {}},
        "worker": {
            "node_config": config,
            "resources": {},
            "min_workers": given.nodes - 1,
            "max_workers": given.nodes - 1,
        },
    }
    return {
        "provider": provider,
        "max_workers": given.nodes - 1,
        "available_node_types": kinds,
        "head_node_type": "head",
    }


def _check(submission: Submission) -> None:
    given = submission.options
    needed = {
        "local": ("hosts",),
        "aws": ("region", "instance_type"),
        "gcp": ("region", "zone", "project_id", "instance_type"),
    }[given.provider]
    missing = [f"--{name.replace('_', '-')}" for name in needed if not getattr(given, name)]
    if missing:
        raise UserError(f"--provider {given.provider} needs {', '.join(missing)}")


def main(argv: list[str]) -> None:
    """Check, write the file, and print the three commands."""
    made = parser(__doc__ or "")
    made.add_argument("--provider", choices=("aws", "gcp", "local"), required=True)
    made.add_argument("--region", help="of the cloud")
    made.add_argument("--zone", help="of gcp")
    made.add_argument("--project-id", help="of gcp")
    made.add_argument("--instance-type", help="kind of machine, which decides its cores and GPUs")
    made.add_argument("--hosts", nargs="+", help="addresses of your own machines, the head first")
    made.add_argument("--setup", default="", help="shell commands on each machine, before pip")
    made.add_argument("--ssh-user", default="ubuntu")
    made.add_argument("--output", type=Path, required=True, help="the file to write")
    with told():
        submission = read(made, argv, is_here=False)
        _check(submission)
        text = yaml.safe_dump(cluster(submission), sort_keys=False)
        print(text, end="")
        given = submission.options
        if not given.dry_run:
            keep_token(os.environ, home=Path.home())
            given.output.write_text(text)
        command = shlex.join(["python3", "cluster/sweep.py", "--", *submission.arguments])
        exported = "export RAY_AUTH_MODE=token"
        print(f"\nray up -y {given.output}")
        print(f"ray exec --tmux {given.output} {shlex.quote(f'cd ~/handpose && {exported} && {command}')}")
        print(f"ray down -y {given.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
