"""The files for KubeRay and `ray up`, held against their schemas as far as they can be had."""

import json
import re
from importlib.resources import files

import jsonschema
import pytest
import yaml

from cluster import kuberay, ray_up
from handpose.config_files import REPOSITORY

POD = ["--nodes", "3", "--gpus-per-node", "1", "--cpus-per-node", "8", "--image", "r/hands:1", "--claim", "sweeps"]

# Fields of ray.io/v1 (KubeRay 1.6), written down from its API reference: name -> whether it must be there.
JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture
def manifest(tmp_path, monkeypatch, capsys):
    """The RayJob that a command line leads to."""
    monkeypatch.chdir(tmp_path)

    def made(*argv):
        kuberay.main([*POD, "--dry-run", *argv])
        return yaml.safe_load(capsys.readouterr().out)

    return made


def run_refused(launcher, capsys, argv):
    with pytest.raises(SystemExit) as left:
        launcher.main(argv)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_ray_job_has_the_fields_of_its_kind(manifest):
    job = manifest("--secret", "keys", "--", "sweep.name=hands")
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("ray.io/v1", "RayJob", "hands")
    assert set(job["spec"]) == JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == CLUSTER
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    assert set(cluster["workerGroupSpecs"][0]) == WORKERS
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["rayStartParams"]["num-gpus"] == "1"
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


@pytest.mark.parametrize(
    ("quantity", "num_bytes"), [("32Gi", 32 * 2**30), ("16G", 16e9), ("8000M", 8e9), ("1.5Ti", 1.5 * 2**40)]
)
def test_a_ray_job_leaves_memory_of_a_pod_to_ray_and_the_driver(manifest, quantity, num_bytes):
    cluster = manifest("--memory", quantity, "--", "sweep.name=hands")["spec"]["rayClusterSpec"]
    head, worker = (
        int(group["rayStartParams"]["memory"]) for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    assert 0.8 * num_bytes < worker < 0.95 * num_bytes - 300e6
    assert head < worker - 500e6


def test_a_ray_job_lets_nobody_in_without_the_token_and_comes_again(manifest):
    spec = manifest("--retries", "5", "--", "sweep.name=hands")["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["backoffLimit"] == 5
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2  # and the head, which trains too


def test_arguments_reach_a_pod_as_they_are(manifest):
    arguments = ["sweep.name=hands", "searcher.storage=${oc.env:STUDY_URL}", "data.root=/sweeps/my data"]
    spec = manifest("--", *arguments)["spec"]
    assert spec["entrypoint"] == "python /handpose/cluster/sweep.py --end-on-user-error"
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in head["env"]}
    assert json.loads(environment["SWEEP_ARGUMENTS"]) == arguments


def list_pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_pods_without_a_claim_can_write_their_results(manifest, tmp_path, monkeypatch, capsys):
    """Also where the image's user is not root, who alone could make a folder at its root."""
    monkeypatch.chdir(tmp_path)
    kuberay.main([*POD[:-2], "--dry-run", "--", "sweep.name=hands", "sweep.storage=s3://bucket/sweeps"])
    for pod in list_pods(yaml.safe_load(capsys.readouterr().out)):
        assert pod["volumes"] == [{"name": "sweeps", "emptyDir": {}}]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "sweeps", "mountPath": "/sweeps"}]
        assert {"name": "DIR_SCRATCH", "value": "/sweeps"} in pod["containers"][0]["env"]
    for pod in list_pods(manifest("--fs-group", "100", "--", "sweep.name=hands")):
        assert pod["securityContext"]["fsGroup"] == 100
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "sweeps"}


def test_a_cluster_decides_where_pods_run_and_from_where_their_image_comes(manifest):
    job = manifest(
        *("--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "team=hands", "--pull-secret", "registry"),
        *("--node-selector", "nvidia.com/gpu.product=A100", "--label", "kueue.x-k8s.io/queue-name=hands"),
        *("--", "sweep.name=hands"),
    )
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "hands"}
    for pod in list_pods(job):
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "hands"},
        ]
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "A100"}
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    submitter = job["spec"]["submitterPodTemplate"]["spec"]  # it has the image of the head
    assert submitter["imagePullSecrets"] == [{"name": "registry"}]
    assert submitter["containers"][0]["image"] == "r/hands:1"


def test_parts_of_gpus_are_a_resource_of_their_own_which_ray_is_told_of(manifest):
    job = manifest("--gpus-per-node", "1g.10gb:2", "--", "sweep.name=hands")
    for pod in list_pods(job):
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/mig-1g.10gb"] == "2"
        assert "nvidia.com/gpu" not in limits
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "2"


@pytest.mark.parametrize(
    ("state", "is_applied"), [("Complete", False), ("Failed", False), ("Running", True), ("", True)]
)
def test_a_ray_job_that_has_ended_is_not_applied_in_vain(tmp_path, monkeypatch, capsys, state, is_applied):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase $1 in get) echo "{state}";; apply) cat > /dev/null;; esac\n'
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    argv = [*POD, "--namespace", "team", "--", "sweep.name=hands"]
    if is_applied:
        kuberay.main(argv)
    else:
        told = run_refused(kuberay, capsys, argv)
        assert f"the RayJob hands has ended ({state})" in told
        assert "kubectl delete rayjob hands -n team" in told
    assert ("apply -f -" in (tmp_path / "calls").read_text()) is is_applied


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*POD, "--gpus-per-node", "a100:8", "--", "sweep.name=hands"], "--node-selector nvidia.com/gpu.product=NAME"),
        ([*POD, "--toleration", "a b", "--", "sweep.name=hands"], "--toleration a b must be KEY=VALUE:EFFECT"),
        ([*POD, "--label", "queue", "--", "sweep.name=hands"], "--label queue must be KEY=VALUE"),
        ([*POD, "--", "sweep.name=My_Hands"], "sweep.name=My_Hands must be a valid Kubernetes name"),
        ([*POD[:-2], "--", "sweep.name=hands"], "--claim is missing"),
        ([*POD, "--memory", "a lot", "--", "sweep.name=hands"], "--memory a lot must be a Kubernetes quantity"),
        ([*POD, "--wall-time", "1", "--", "sweep.name=hands"], "--wall-time is not an option"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in run_refused(kuberay, capsys, argv)


AWS = ["--provider", "aws", "--region", "r", "--instance-type", "g5.xlarge", "--image", "ami-1", "--nodes", "4"]
GCP = [
    *("--provider", "gcp", "--region", "r", "--zone", "z", "--project-id", "p", "--instance-type", "n1-standard-8"),
    *("--image", "projects/p/global/images/family/f", "--gpus-per-node", "1"),
]
LOCAL = ["--provider", "local", "--hosts", "10.1.0.1", "10.1.0.2", "--ssh-private-key", "~/.ssh/id_ed25519"]
SWEEP = ["--", "sweep.name=hands", "sweep.storage=s3://bucket/sweeps"]


@pytest.fixture
def run_ray_up(tmp_path, monkeypatch, capsys):
    """What ray_up.py writes and prints for some options; its home is a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)

    def made(options):
        ray_up.main([*options, "--output", "hands.yaml", *SWEEP])
        return yaml.safe_load((tmp_path / "hands.yaml").read_text()), capsys.readouterr().out

    return made


@pytest.mark.parametrize("machines", [AWS, GCP, LOCAL], ids=["aws", "gcp", "local"])
def test_what_a_user_edits_for_the_head_does_not_change_the_workers(tmp_path, run_ray_up, machines):
    """YAML writes an object that stands in two places once, with an anchor."""
    run_ray_up(machines)
    assert not re.search(r"[&*]id\d", (tmp_path / "hands.yaml").read_text())


@pytest.mark.parametrize("machines", [AWS, GCP, LOCAL], ids=["aws", "gcp", "local"])
def test_a_file_for_ray_up_fits_rays_own_schema(tmp_path, run_ray_up, machines):
    content, told = run_ray_up(machines)
    jsonschema.validate(content, json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text()))
    token = (tmp_path / ".ray" / "auth_token").read_text()
    assert token not in (tmp_path / "hands.yaml").read_text() + told
    assert content["file_mounts"]["~/.ray/auth_token"] == str(tmp_path / ".ray" / "auth_token")
    starts = [*content["head_start_ray_commands"], *content["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)
    assert "ray up -y hands.yaml" in told


def test_machines_of_a_cloud_have_an_image_and_a_disk(run_ray_up):
    for content in (run_ray_up(AWS)[0], run_ray_up(GCP)[0]):
        kinds = content["available_node_types"]
        assert kinds["head"]["node_config"] == kinds["worker"]["node_config"]
    (disk,) = run_ray_up(AWS)[0]["available_node_types"]["head"]["node_config"]["BlockDeviceMappings"]
    assert disk["Ebs"]["VolumeSize"] == 200
    machine = run_ray_up(GCP)[0]["available_node_types"]["head"]["node_config"]
    assert machine["disks"][0]["initializeParams"]["sourceImage"] == "projects/p/global/images/family/f"
    assert machine["scheduling"] == {"onHostMaintenance": "TERMINATE"}


def test_the_head_can_start_the_other_machines(run_ray_up):
    """From its own Python, into which Ray's own setup commands would not install what speaks to the cloud."""
    aws, gcp, local = (run_ray_up(machines) for machines in (AWS, GCP, LOCAL))
    assert any("pip install" in each and "boto3" in each for each in aws[0]["setup_commands"])
    assert any("google-api-python-client" in each for each in gcp[0]["setup_commands"])
    assert aws[0]["head_setup_commands"] == []
    assert local[0]["auth"]["ssh_private_key"] == "~/.ssh/id_ed25519"
    assert "RAY_UP_enable_autoscaler_v2=0 " in local[1]
    assert "RAY_UP" not in aws[1]


def test_all_of_the_project_travels(run_ray_up):
    patterns = run_ray_up(LOCAL)[0]["rsync_exclude"]
    anchored = {pattern[1:] for pattern in patterns if pattern.startswith("/")}
    anywhere = {pattern for pattern in patterns if not pattern.startswith("/")}
    files = [file.relative_to(REPOSITORY) for top in ("handpose", "configs") for file in (REPOSITORY / top).rglob("*")]
    sources = [file for file in files if file.suffix in (".py", ".yaml")]
    assert any(file.parts[:2] == ("configs", "data") for file in sources)
    assert not [file for file in sources if file.parts[0] in anchored or anywhere & set(file.parts)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([*AWS, "--output", "h.yaml", "--", "sweep.name=hands"], "the machines share no folder"),
        ([*LOCAL, "--output", "h.yaml", "--", "sweep.name=hands"], "sweep.storage=s3://BUCKET/sweeps"),
        ([*AWS, "--gpus-per-node", "a100:1", "--output", "h.yaml", *SWEEP], "--instance-type determines the type"),
        ([*LOCAL, "--nodes", "3", "--output", "h.yaml", *SWEEP], "--nodes 3: --hosts names 2 machines"),
    ],
)
def test_machines_that_cannot_make_a_sweep_are_refused(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in run_refused(ray_up, capsys, options)
    assert list(tmp_path.iterdir()) == []


def test_what_a_cloud_needs_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--provider", "aws", "--output", "hands.yaml", "--", "sweep.name=hands"]
    assert "--provider aws needs --region, --instance-type, --image" in run_refused(ray_up, capsys, argv)
    assert list(tmp_path.iterdir()) == []
