"""Where a result comes from."""

import subprocess

import torch
import yaml

from handpose.config_files import REPOSITORY
from handpose.sweep.record.provenance import collect_provenance, collect_versions, read_git_state
from handpose.yaml_files import write_yaml


def test_versions_are_those_that_run():
    assert collect_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_revision_is_gits():
    asked = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = asked.stdout.strip() if asked.returncode == 0 else None
    assert read_git_state()["revision"] == expected


def test_what_is_written_is_plain_yaml_and_nothing_is_left_beside_it(tmp_path):
    write_yaml(tmp_path / "a.yaml", collect_provenance(data="abc"))
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["data_fingerprint"] == "abc"
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
