"""Submit a sweep to Kubernetes as a RayJob of KubeRay (1.5.1 or newer). It resumes when its Ray cluster is lost.

    python cluster/kuberay.py --nodes 4 --gpus-per-node 1 --cpus-per-node 8 --memory 32Gi --image REGISTRY/hands:1 \\
        --claim sweeps --secret sweep-keys -- data=freihand data.root=/sweeps/FreiHAND sweep.num_trials=200

The image contains this project and its requirements. The claim is a volume for data and results that all pods can
write. Prints the manifest and applies it; with --dry-run only prints it. See docs/cluster/kuberay.md.
"""

import argparse
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
from cluster.sweep import ARGUMENTS_VARIABLE, NO_RETRY_OPTION
from handpose.errors import UserError
from handpose.program import exit_on_user_error
from handpose.resources import Memory
from handpose.sweep.controller.slots import compute_trial_memory
from handpose.sweep.execution.privacy import NO_USAGE_STATS
from handpose.utf8 import use_utf8

_OBJECT_STORE_BYTES = 100 * 2**20
_MAX_NAME_LENGTH = 47  # KubeRay builds the names of pods and services from it, which have at most 63 characters
_OUTPUT_FOLDER = "/sweeps"
_MIG_PROFILE = re.compile(r"\d+g\.\d+gb")
"""Name of a part of an NVIDIA GPU, which Kubernetes offers as a resource of its own."""
_QUANTITY = re.compile(r"(?P<number>\d+(\.\d+)?)((?P<prefix>[KMGT])(?P<binary>i?))?")


def make_manifest(submission: Submission) -> dict[str, Any]:
    """Build the RayJob. The head runs trials too, because the winner is retrained on the machine of the driver."""
    given = submission.options
    head = {
        "rayStartParams": _make_start_parameters("--head", given),
        "template": _make_pod(submission, "ray-head"),
    }
    workers = {
        "groupName": "workers",
        "replicas": given.nodes - 1,
        "minReplicas": given.nodes - 1,
        "maxReplicas": given.nodes - 1,
        "rayStartParams": _make_start_parameters("--worker", given),
        "template": _make_pod(submission, "ray-worker"),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": submission.name, "namespace": given.namespace, **_make_labels(given)},
        "spec": {
            "entrypoint": f"python {given.project}/cluster/sweep.py {NO_RETRY_OPTION}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "backoffLimit": given.retries,
            **_make_submitter(given),
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                # The operator creates the token, and passes it to all pods as a secret.
                "authOptions": {"mode": "token"},
                "headGroupSpec": head,
                "workerGroupSpecs": [workers] if given.nodes > 1 else [],
            },
        },
    }


def _make_labels(given: argparse.Namespace) -> dict[str, Any]:
    return {"labels": dict(item.split("=", 1) for item in given.label)} if given.label else {}


def _make_submitter(given: argparse.Namespace) -> dict[str, Any]:
    """Describe the pod that submits the sweep, which the operator otherwise creates without secrets for its image."""
    if not given.pull_secret:
        return {}
    container = {"name": "ray-job-submitter", "image": given.image}
    pod = {"containers": [container], "restartPolicy": "Never", "imagePullSecrets": _make_pull_secrets(given)}
    return {"submitterPodTemplate": {"spec": pod}}


def _make_pull_secrets(given: argparse.Namespace) -> list[dict[str, str]]:
    return [{"name": name} for name in given.pull_secret]


def _make_start_parameters(kind: str, given: argparse.Namespace) -> dict[str, str]:
    # The operator asks the dashboard for the state of the job, so the dashboard cannot listen only on loopback. The
    # token protects it.
    dashboard = {"dashboard-host": "0.0.0.0"} if kind == "--head" else {}
    limit = _parse_quantity(given.memory)
    for_trials = compute_trial_memory(Memory(limit, limit, is_limited=True), with_driver=kind == "--head")
    # The operator itself counts only resources whose names end with "gpu".
    gpus = {"num-gpus": str(given.gpus_per_node.number)} if given.gpus_per_node.number else {}
    return {"object-store-memory": str(_OBJECT_STORE_BYTES), "memory": str(for_trials), **gpus, **dashboard}


def _parse_quantity(quantity: str) -> int:
    """Convert an amount of memory as Kubernetes writes it, such as 32Gi or 1.5G, to bytes."""
    parts = _QUANTITY.fullmatch(quantity)
    assert parts is not None, quantity
    return int(float(parts["number"]) * (1024 if parts["binary"] else 1000) ** " KMGT".index(parts["prefix"] or " "))


def _make_pod(submission: Submission, name: str) -> dict[str, Any]:
    given = submission.options
    resources = {"cpu": str(given.cpus_per_node), "memory": given.memory}
    if given.gpus_per_node.number:
        kind = "gpu" if given.gpus_per_node.type is None else f"mig-{given.gpus_per_node.type}"
        resources[f"nvidia.com/{kind}"] = str(given.gpus_per_node.number)
    # Not in the entrypoint, because two shells with different quoting rules process it.
    arguments = json.dumps(list(submission.arguments))
    environment = {ARGUMENTS_VARIABLE: arguments, "DIR_SCRATCH": _OUTPUT_FOLDER, **NO_USAGE_STATS}
    container: dict[str, Any] = {
        "name": name,
        "image": given.image,
        "env": [{"name": each, "value": value} for each, value in environment.items()],
        "resources": {"limits": resources, "requests": dict(resources)},
    }
    # Without a claim, the sweep is in an object store. An emptyDir can be written by every user of an image, but a
    # folder at the root of the image cannot.
    claim = {"emptyDir": {}} if given.claim is None else {"persistentVolumeClaim": {"claimName": given.claim}}
    container["volumeMounts"] = [{"name": "sweeps", "mountPath": _OUTPUT_FOLDER}]
    pod: dict[str, Any] = {"containers": [container], "volumes": [{"name": "sweeps", **claim}]}
    if given.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": given.secret}}]
    if given.fs_group is not None:
        pod["securityContext"] = {"fsGroup": given.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    if given.node_selector:
        pod["nodeSelector"] = dict(item.split("=", 1) for item in given.node_selector)
    if given.toleration:
        pod["tolerations"] = [_parse_toleration(item) for item in given.toleration]
    if given.pull_secret:
        pod["imagePullSecrets"] = _make_pull_secrets(given)
    return {"spec": pod}


def _parse_toleration(text: str) -> dict[str, str]:
    """Parse KEY[=VALUE][:EFFECT], as `kubectl taint` writes taints."""
    label, _, effect = text.partition(":")
    key, equals, value = label.partition("=")
    match = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **match, **({"effect": effect} if effect else {})}


def _check_submission(submission: Submission) -> None:
    given, name = submission.options, submission.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _MAX_NAME_LENGTH:
        raise UserError(
            f"sweep.name={name} must be a valid Kubernetes name: at most {_MAX_NAME_LENGTH} lower-case letters, digits "
            "and dashes, starting with a letter"
        )
    if re.search(r"[^\w./-]", given.project):
        raise UserError(f"--project {given.project} must be a path of letters, digits, dots, dashes and underlines")
    if given.gpus_per_node.type is not None and not _MIG_PROFILE.fullmatch(given.gpus_per_node.type):
        raise UserError(
            f"--gpus-per-node {given.gpus_per_node}: Kubernetes knows types only of parts of GPUs, such as 1g.10gb:2; "
            f"give --gpus-per-node {given.gpus_per_node.number} --node-selector nvidia.com/gpu.product=NAME"
        )
    for option, items in (("--label", given.label), ("--node-selector", given.node_selector)):
        for item in items:
            if not re.fullmatch(r"[\w./-]+=[\w.-]*", item):
                raise UserError(f"{option} {item} must be KEY=VALUE")
    for item in given.toleration:
        if not re.fullmatch(r"[\w./-]+(=[\w.-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?", item):
            raise UserError(f"--toleration {item} must be KEY=VALUE:EFFECT, such as nvidia.com/gpu:NoSchedule")
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


def _check_has_not_ended(submission: Submission) -> None:
    """Raise UserError if a RayJob of this name has ended: `kubectl apply` would not start it again."""
    name, namespace = submission.name, ["-n", submission.options.namespace]
    command = ["kubectl", "get", "rayjob", name, *namespace, "-o", "jsonpath={.status.jobDeploymentStatus}"]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if found.returncode == 0 and found.stdout.strip() in ("Complete", "Failed"):
        remove = " ".join(["kubectl", "delete", "rayjob", name, *namespace])
        raise UserError(
            f"the RayJob {name} has ended ({found.stdout.strip()}), and applying it again would change nothing; run "
            f"`{remove}` and then this command again, which resumes the sweep if its state is in the volume or store"
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
    parser.add_argument(
        "--fs-group", type=int, help="group that can write the volume, for an image whose user is not root"
    )
    parser.add_argument(
        "--node-selector", action="append", default=[], metavar="KEY=VALUE", help="label of the nodes; can be repeated"
    )
    parser.add_argument(
        "--toleration",
        action="append",
        default=[],
        metavar="KEY[=VALUE][:EFFECT]",
        help="taint of nodes that the pods may use, such as nvidia.com/gpu:NoSchedule; can be repeated",
    )
    parser.add_argument(
        "--pull-secret", action="append", default=[], help="Secret with access to the image; can be repeated"
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="label of the RayJob, such as kueue.x-k8s.io/queue-name=QUEUE; can be repeated",
    )
    with exit_on_user_error():
        submission = read_submission(parser, argv, is_here=False)
        _check_submission(submission)
        text = yaml.safe_dump(make_manifest(submission), sort_keys=False)
        print(text, end="", flush=True)
        if submission.options.dry_run:
            return
        if shutil.which("kubectl") is None:
            raise UserError("kubectl is not installed; install it, or apply the manifest that --dry-run prints")
        _check_has_not_ended(submission)
        if subprocess.run(["kubectl", "apply", "-f", "-"], input=text, encoding="utf-8", check=False).returncode:
            raise UserError("kubectl rejected the manifest; its message is above")


if __name__ == "__main__":
    use_utf8()
    main(sys.argv[1:])
