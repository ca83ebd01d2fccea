"""YAML files of users: a key that is given twice is refused, and what YAML allows is read as before."""

import shutil

import pytest
import yaml

from handpose import config_files
from handpose.config import compose
from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.evaluation import trained_network
from handpose.yaml_files import load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key a is given twice, in lines 1 and 3; keep one of them"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "the key b is given twice, in lines 2 and 4"),
        ("a: [{b: 1}, {b: 2, b: 3}]\n", "the key b is given twice, in lines 1 and 1"),
        ('# a comment\n"a": 1\na: 1\n', "the key a is given twice, in lines 2 and 3"),
        ("1: a\n1: b\n", "the key 1 is given twice, in lines 1 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_told_with_file_and_lines(tmp_path, text, sentence):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as told:
        load_yaml(file)
    assert str(told.value).startswith(f"{file}: {sentence}")


@pytest.mark.parametrize(
    "text",
    ["base: &b {x: 1, y: 2}\nnext: {<<: *b, x: 3}\nlast: {<<: *b}\n", "a: {k: 1}\nb: {k: 2}\n", "1: a\n'1': b\n", ""],
)
def test_what_yaml_allows_is_read_as_before(tmp_path, text):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    assert load_yaml(file) == yaml.safe_load(text)


@pytest.fixture
def new_choice(tmp_path, monkeypatch):
    """Writes a file into a group of a copy of configs/, which is used then."""
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    monkeypatch.setattr(config_files, "CONFIGS", copy)

    def write(group, text):
        file = copy / group / "a_new_one.yaml"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize("group", ["optimizer", "searcher", "scheduler", "model/decoder"])
def test_a_configuration_group_with_a_key_twice_is_one_sentence(new_choice, group):
    file = new_choice(group, "_target_: torch.optim.AdamW\nlr: 0.1\nlr: 0.2\n")
    with pytest.raises(UserError) as told:
        compose("tune", [f"{group}=a_new_one"])
    assert str(told.value) == f"{file}: the key lr is given twice, in lines 2 and 3; keep one of them"


def test_a_configuration_group_that_is_no_yaml_is_one_sentence(new_choice):
    file = new_choice("optimizer", "lr: [0.1\n")
    with pytest.raises(UserError, match=f"{file} is not valid YAML") as told:
        compose("train", ["optimizer=a_new_one"])
    assert "\n" not in str(told.value)


def test_a_best_yaml_with_a_key_twice_is_one_sentence(tmp_path):
    file = tmp_path / "best.yaml"
    file.write_text("overrides: [seed=1]\ntrial: 3\noverrides: [seed=2]\n")
    with pytest.raises(UserError, match=r"best\.yaml: the key overrides is given twice, in lines 1 and 3"):
        compose("train", [f"best={file}"])
    with pytest.raises(UserError, match="the key overrides is given twice"):
        read_yaml(file)


def test_a_data_set_of_the_user_with_a_key_twice_is_one_sentence(new_choice):
    new_choice("data", "source: {_target_: a.B}\nimage_size: 1\nimage_size: 2\n")
    with pytest.raises(UserError, match="the key image_size is given twice"):
        trained_network._find_data_choice("no.such.Target")
