"""Write the file with which `ray up` starts a cluster in a cloud or on machines with ssh. Print the commands to run.

    python cluster/ray_up.py --provider aws --region us-west-2 --instance-type g5.2xlarge --image ami-... --nodes 4 \\
        --output hands.yaml -- sweep.storage=s3://BUCKET/sweeps sweep.num_trials=200
    python cluster/ray_up.py --provider local --hosts 10.1.0.1 10.1.0.2 --ssh-user me \\
        --ssh-private-key ~/.ssh/id_ed25519 --output hands.yaml -- ...

See docs/cluster/ray_up.md.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import REPOSITORY, Submission, make_parser, read_submission
from handpose.config import override_key
from handpose.errors import UserError
from handpose.files import check_output_file, expand_home, write_atomically
from handpose.program import exit_on_user_error
from handpose.sweep.execution.privacy import NO_USAGE_STATS, ensure_token
from handpose.utf8 import use_utf8

_TOKEN = "~/.ray/auth_token"
_PYTHON = "~/handpose_venv/bin"
"""A virtual environment on each machine, because pip refuses to install into that of Debian and Ubuntu (PEP 668)."""
_RAY = " ".join(["RAY_AUTH_MODE=token", *map("=".join, NO_USAGE_STATS.items()), f"{_PYTHON}/ray"])
_START_COMMAND = f"{_RAY} start --object-store-memory=104857600"
_CLIENTS = {"aws": "boto3", "gcp": "google-api-python-client cryptography", "local": ""}
"""Packages with which Ray on the head starts the other machines."""


def make_cluster(submission: Submission) -> dict[str, Any]:
    """Build the content of the file, as in ray/autoscaler/ray-schema.json."""
    given = submission.options
    install = f"{_PYTHON}/pip install -q -r ~/handpose/requirements.txt {_CLIENTS[given.provider]}"
    key = {} if given.ssh_private_key is None else {"ssh_private_key": given.ssh_private_key}
    return {
        "cluster_name": submission.name,
        **_make_machines(submission),
        "auth": {"ssh_user": given.ssh_user, **key},
        # The token is copied as a file with its mode. In a command it would appear in logs and process lists.
        "file_mounts": {"~/handpose": str(REPOSITORY), _TOKEN: str(expand_home(_TOKEN))},
        # /: at the top of the clone, not in packages.
        "rsync_exclude": ["/.git", "/.venv", "/outputs", "/data", "__pycache__"],
        "setup_commands": [
            *([given.setup] if given.setup else []),
            f"chmod 600 {_TOKEN}",
            f"{given.python} -m venv {_PYTHON.removesuffix('/bin')}",
            install.rstrip(),
            # `ray down` runs `ray stop` on the machines.
            f"grep -qs handpose_venv ~/.bashrc || echo 'export PATH={_PYTHON}:$PATH' >> ~/.bashrc",
        ],
        "head_setup_commands": [],  # Ray's defaults (2.60) install into another Python
        "head_start_ray_commands": [
            f"{_RAY} stop",
            f"{_START_COMMAND} --head --port=6379 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [f"{_RAY} stop", f"{_START_COMMAND} --address=$RAY_HEAD_IP:6379"],
    }


def _make_machines(submission: Submission) -> dict[str, Any]:
    given = submission.options
    if given.provider == "local":
        head, *workers = given.hosts
        return {"provider": {"type": "local", "head_ip": head, "worker_ips": workers}}
    provider = {"type": given.provider, "region": given.region}
    if given.provider == "gcp":
        provider |= {"project_id": given.project_id, "availability_zone": given.zone}
    num_workers = {"min_workers": given.nodes - 1, "max_workers": given.nodes - 1}
    return {
        "provider": provider,
        "max_workers": given.nodes - 1,
        "available_node_types": {"head": _make_node_type(given), "worker": _make_node_type(given) | num_workers},
        "head_node_type": "head",
    }


def _make_node_type(given: argparse.Namespace) -> dict[str, Any]:
    """Describe the head or a worker. They share no object: YAML would have an anchor and edit both at once."""
    return {"node_config": _make_aws_node(given) if given.provider == "aws" else _make_gcp_node(given), "resources": {}}


def _make_aws_node(given: argparse.Namespace) -> dict[str, Any]:
    """Describe an EC2 instance. Ray's default image (2.60) is Ubuntu 18.04, whose Python is too old."""
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": given.disk_gb, "VolumeType": "gp3"}}
    return {"InstanceType": given.instance_type, "ImageId": given.image, "BlockDeviceMappings": [disk]}


def _make_gcp_node(given: argparse.Namespace) -> dict[str, Any]:
    """Describe a Compute Engine instance, which has no default for the disk."""
    disk_parameters = {"diskSizeGb": given.disk_gb, "sourceImage": given.image}
    disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk_parameters}
    # Required with GPUs.
    scheduling = {"scheduling": {"onHostMaintenance": "TERMINATE"}} if given.gpus_per_node.number else {}
    return {"machineType": given.instance_type, "disks": [disk], **scheduling}


def _check_submission(submission: Submission) -> None:
    given = submission.options
    needed = {
        "local": ("hosts",),
        "aws": ("region", "instance_type", "image"),
        "gcp": ("region", "zone", "project_id", "instance_type", "image"),
    }[given.provider]
    missing = [f"--{name.replace('_', '-')}" for name in needed if not getattr(given, name)]
    if missing:
        raise UserError(f"--provider {given.provider} needs {', '.join(missing)}")
    if given.gpus_per_node.type is not None:
        raise UserError(
            f"--gpus-per-node {given.gpus_per_node}: --instance-type determines the type of the GPUs; give "
            f"--gpus-per-node {given.gpus_per_node.number}"
        )
    if given.provider == "local" and given.nodes not in (1, len(given.hosts)):
        raise UserError(f"--nodes {given.nodes}: --hosts names {len(given.hosts)} machines and uses all of them")
    num_machines = len(given.hosts) if given.provider == "local" else given.nodes
    if num_machines > 1 and not {"sweep.storage", "paths.output"} & set(map(override_key, submission.arguments)):
        raise UserError(
            "the machines share no folder: keep the sweep in an object store (sweep.storage=s3://BUCKET/sweeps), or "
            "give a folder that --setup mounts on all of them (paths.output=FOLDER)"
        )


def main(argv: list[str]) -> None:
    """Check the submission, write the file, and print the three commands."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--provider", choices=("aws", "gcp", "local"), required=True, help="a cloud, or your own machines"
    )
    parser.add_argument("--region", help="region of the cloud")
    parser.add_argument("--zone", help="zone, for gcp")
    parser.add_argument("--project-id", help="project, for gcp")
    parser.add_argument("--instance-type", help="machine type, which determines cores and GPUs")
    parser.add_argument("--image", help="AMI, or sourceImage for gcp, with Python 3.11 or newer and the GPU driver")
    parser.add_argument("--disk-gb", type=int, default=200, help="disk of each machine in a cloud")
    parser.add_argument("--hosts", nargs="+", help="addresses of your own machines, the head first")
    parser.add_argument("--setup", default="", help="shell commands to run on each machine before pip")
    parser.add_argument("--python", default="python3", help="Python on each machine, 3.11 or newer")
    parser.add_argument("--ssh-user", default="ubuntu", help="user for ssh on all machines; default: ubuntu")
    parser.add_argument(
        "--ssh-private-key", help="key for all machines; copied to the head, which connects to the others"
    )
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    with exit_on_user_error():
        submission = read_submission(parser, argv, is_here=False)
        _check_submission(submission)
        check_output_file(submission.options.output)
        text = yaml.safe_dump(make_cluster(submission), sort_keys=False)
        print(text, end="")
        given = submission.options
        if not given.dry_run:
            ensure_token(os.environ, home=expand_home("~"))
            with write_atomically(given.output) as part:
                part.write_text(text, encoding="utf-8")
        command = shlex.join(["cluster/sweep.py", "--", *submission.arguments])
        sweep = f"cd ~/handpose && RAY_AUTH_MODE=token {_PYTHON}/python {command}"
        # With the local provider, version 2 of Ray's autoscaler (2.60) never starts any machine but the head.
        switch = "RAY_UP_enable_autoscaler_v2=0 " if given.provider == "local" else ""
        ray = _format_for_shell(Path(sys.executable).with_name("ray"))
        file = shlex.quote(str(given.output))
        print(f"\n{switch}{ray} up -y {file}")
        print(f"{ray} exec --tmux {file} {shlex.quote(sweep)}")
        print(f"{ray} down -y {file}")


def _format_for_shell(program: Path) -> str:
    """Format the path of a program for a shell in the working folder."""
    here = Path.cwd()
    return shlex.quote(str(program.relative_to(here) if program.is_relative_to(here) else program))


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
