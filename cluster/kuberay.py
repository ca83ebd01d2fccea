"""Submit a sweep to Kubernetes as a RayJob of KubeRay (1.5.1 or newer). It resumes when its Ray cluster is lost.

    python cluster/kuberay.py --nodes 4 --gpus-per-node 1 --cpus-per-node 8 --memory 32Gi --image REGISTRY/hands:1 \\
        --claim sweeps --secret sweep-keys -- data=freihand data.root=/sweeps/FreiHAND sweep.num_trials=200

The image contains this project and its requirements. The claim is a volume for data and results that all pods can
write. Prints the manifest and applies it; with --dry-run only prints it. See docs/cluster/kuberay.md.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.submission import Submission, make_parser, read_submission
from cluster.sweep import ARGUMENTS_VARIABLE
from handpose.errors import UserError
from handpose.program import exit_on_user_error
from handpose.resources import Memory
from handpose.sweep.controller.slots import compute_trial_memory
from handpose.sweep.execution.privacy import NO_USAGE_STATS
from handpose.utf8 import use_utf8

_OBJECT_STORE_BYTES = 100 * 2**20
_MAX_NAME_LENGTH = 47  # KubeRay builds the names of pods and services from it, which have at most 63 characters
_OUTPUT_FOLDER = "/sweeps"
_QUANTITY = re.compile(r"(?P<number>\d+(\.\d+)?)((?P<prefix>[KMGT])(?P<binary>i?))?")


def make_manifest(submission: Submission) -> dict[str, Any]:
    """Build the RayJob. The head runs trials too, because the winner is retrained on the machine of the driver."""
    given = submission.options
    head = {
        "rayStartParams": _make_start_parameters("--head", given.memory),
        "template": _make_pod(submission, "ray-head"),
    }
    workers = {
        "groupName": "workers",
        "replicas": given.nodes - 1,
        "minReplicas": given.nodes - 1,
        "maxReplicas": given.nodes - 1,
        "rayStartParams": _make_start_parameters("--worker", given.memory),
        "template": _make_pod(submission, "ray-worker"),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": submission.name, "namespace": given.namespace},
        "spec": {
            "entrypoint": f"python {given.project}/cluster/sweep.py",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "backoffLimit": given.retries,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                # The operator creates the token, and passes it to all pods as a secret.
                "authOptions": {"mode": "token"},
                "headGroupSpec": head,
                "workerGroupSpecs": [workers] if given.nodes > 1 else [],
            },
        },
    }


def _make_start_parameters(kind: str, memory: str) -> dict[str, str]:
    # The operator asks the dashboard for the state of the job, so the dashboard cannot listen only on loopback. The
    # token protects it.
    dashboard = {"dashboard-host": "0.0.0.0"} if kind == "--head" else {}
    limit = _parse_quantity(memory)
    for_trials = compute_trial_memory(Memory(limit, limit, is_limited=True), with_driver=kind == "--head")
    return {"object-store-memory": str(_OBJECT_STORE_BYTES), "memory": str(for_trials), **dashboard}


def _parse_quantity(quantity: str) -> int:
    """Convert an amount of memory as Kubernetes writes it, such as 32Gi or 1.5G, to bytes."""
    parts = _QUANTITY.fullmatch(quantity)
    assert parts is not None, quantity
    return int(float(parts["number"]) * (1024 if parts["binary"] else 1000) ** " KMGT".index(parts["prefix"] or " "))


def _make_pod(submission: Submission, name: str) -> dict[str, Any]:
    given = submission.options
    resources = {"cpu": str(given.cpus_per_node), "memory": given.memory}
    if given.gpus_per_node:
        resources["nvidia.com/gpu"] = str(given.gpus_per_node)
    # Not in the entrypoint, because two shells with different quoting rules process it.
    arguments = json.dumps(list(submission.arguments))
    environment = {ARGUMENTS_VARIABLE: arguments, "DIR_SCRATCH": _OUTPUT_FOLDER, **NO_USAGE_STATS}
    container: dict[str, Any] = {
        "name": name,
        "image": given.image,
        "env": [{"name": each, "value": value} for each, value in environment.items()],
        "resources": {"limits": resources, "requests": dict(resources)},
    }
    pod: dict[str, Any] = {"containers": [container]}
    if given.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": given.secret}}]
    if given.claim is not None:
        container["volumeMounts"] = [{"name": "sweeps", "mountPath": _OUTPUT_FOLDER}]
        pod["volumes"] = [{"name": "sweeps", "persistentVolumeClaim": {"claimName": given.claim}}]
    return {"spec": pod}


def _check_submission(submission: Submission) -> None:
    given, name = submission.options, submission.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _MAX_NAME_LENGTH:
        raise UserError(
            f"sweep.name={name} must be a valid Kubernetes name: at most {_MAX_NAME_LENGTH} lower-case letters, digits "
            "and dashes, starting with a letter"
        )
    if re.search(r"[^\w./-]", given.project):
        raise UserError(f"--project {given.project} must be a path of letters, digits, dots, dashes and underlines")
    if given.cpus_per_node is None:
        raise UserError("--cpus-per-node is missing: a pod must request a number of cores")
    if not _QUANTITY.fullmatch(given.memory):
        raise UserError(f"--memory {given.memory} must be a Kubernetes quantity such as 32Gi")
    if given.retries < 0:
        raise UserError(f"--retries must be at least 0, but it is {given.retries}")
    if given.claim is None and not any(item.startswith("sweep.storage=") for item in submission.arguments):
        raise UserError(
            "--claim is missing: without a volume that all pods share, the sweep would be lost with its pods"
        )


def main(argv: list[str]) -> None:
    """Check the submission, print the manifest and apply it."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--image", required=True, help="container image with the project and its requirements")
    parser.add_argument("--project", default="/handpose", help="path of the project in the image")
    parser.add_argument("--memory", default="16Gi", help="memory of each pod")
    parser.add_argument(
        "--claim", help="a PersistentVolumeClaim (ReadWriteMany) for data and results, mounted at /sweeps"
    )
    parser.add_argument(
        "--secret", help="Secret whose entries become environment variables, such as keys of object stores or W&B"
    )
    parser.add_argument("--namespace", default="default", help="Kubernetes namespace; default: default")
    parser.add_argument("--retries", type=int, default=20, help="number of lost clusters after which the job fails")
    with exit_on_user_error():
        submission = read_submission(parser, argv, is_here=False)
        _check_submission(submission)
        text = yaml.safe_dump(make_manifest(submission), sort_keys=False)
        print(text, end="", flush=True)
        if submission.options.dry_run:
            return
        if shutil.which("kubectl") is None:
            raise UserError("kubectl is not installed; install it, or apply the manifest that --dry-run prints")
        if subprocess.run(["kubectl", "apply", "-f", "-"], input=text, encoding="utf-8", check=False).returncode:
            raise UserError("kubectl rejected the manifest; its message is above")


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
