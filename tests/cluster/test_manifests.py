"""The files for KubeRay and `ray up`, held against their schemas as far as they can be had."""

import json
from importlib.resources import files

import jsonschema
import pytest
import yaml

from cluster import kuberay, ray_up

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


def refused(launcher, capsys, argv):
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
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_a_ray_job_lets_nobody_in_without_the_token_and_comes_again(manifest):
    spec = manifest("--retries", "5", "--", "sweep.name=hands")["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["backoffLimit"] == 5
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2  # and the head, which trains too


def test_arguments_reach_a_pod_as_they_are(manifest):
    arguments = ["sweep.name=hands", "searcher.storage=${oc.env:STUDY_URL}", "data.root=/sweeps/my data"]
    spec = manifest("--", *arguments)["spec"]
    assert spec["entrypoint"] == "python /handpose/cluster/sweep.py"
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in head["env"]}
    assert json.loads(environment["SWEEP_ARGUMENTS"]) == arguments


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*POD, "--", "sweep.name=My_Hands"], "sweep.name=My_Hands must be a name of Kubernetes"),
        ([*POD[:-2], "--", "sweep.name=hands"], "--claim is missing"),
        ([*POD, "--memory", "a lot", "--", "sweep.name=hands"], "--memory a lot must be a quantity"),
        ([*POD, "--wall-time", "1", "--", "sweep.name=hands"], "--wall-time is no option"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(kuberay, capsys, argv)


AWS = ["--provider", "aws", "--region", "us-west-2", "--instance-type", "g5.xlarge", "--nodes", "4"]
GCP = ["--provider", "gcp", "--region", "r", "--zone", "z", "--project-id", "p", "--instance-type", "n1-standard-8"]
LOCAL = ["--provider", "local", "--hosts", "10.1.0.1", "10.1.0.2"]


@pytest.mark.parametrize("machines", [AWS, GCP, LOCAL], ids=["aws", "gcp", "local"])
def test_a_file_for_ray_up_fits_rays_own_schema(tmp_path, monkeypatch, capsys, machines):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    ray_up.main([*machines, "--output", "hands.yaml", "--", "sweep.name=hands"])
    told = capsys.readouterr().out
    content = yaml.safe_load((tmp_path / "hands.yaml").read_text())
    jsonschema.validate(content, json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text()))
    token = (tmp_path / ".ray" / "auth_token").read_text()
    assert token not in (tmp_path / "hands.yaml").read_text() + told
    assert content["file_mounts"]["~/.ray/auth_token"] == str(tmp_path / ".ray" / "auth_token")
    starts = [*content["head_start_ray_commands"], *content["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)
    assert "ray up -y hands.yaml" in told


def test_what_a_cloud_needs_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--provider", "aws", "--output", "hands.yaml", "--", "sweep.name=hands"]
    assert "--provider aws needs --region, --instance-type" in refused(ray_up, capsys, argv)
    assert list(tmp_path.iterdir()) == []
