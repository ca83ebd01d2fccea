"""docs/configuration.md is what its generator writes today, and every key has a description."""

import shutil
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from docs import make_configuration
from docs.make_configuration import GROUPS, PAGE, describe_values, make_page, read_choice
from handpose.config import compose, to_plain_values
from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.search.space import flatten_config


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of configs/ that the page is made of."""
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    monkeypatch.setattr(make_configuration, "CONFIGS", copy)
    return copy


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == make_page(), "stale; run `python docs/make_configuration.py`"


def test_every_key_of_a_sweep_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    keys = set(flatten_config(to_plain_values(compose("tune", []))))
    shown = {key for key in keys if f"| `{key}` |" in text}
    assert {key for key in keys - shown if not key.rpartition(".")[2].startswith("_")} == set()
    assert len(shown) > 100


def test_every_group_is_on_the_page():
    folders = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/**/*.yaml")}
    assert folders == set(GROUPS)


def test_a_changed_default_makes_the_page_stale(configs):
    path = configs / "sweep" / "default.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("num_trials: 12", "num_trials: 13"), encoding="utf-8")
    assert "| `sweep.num_trials` | `13` |" in make_page()


def test_a_key_without_a_description_is_an_error(configs):
    with (configs / "trainer" / "default.yaml").open("a", encoding="utf-8") as file:
        file.write("max_time: null\n")
    with pytest.raises(UserError, match=r"trainer\.max_time \(default\.yaml\) has no description"):
        make_page()


def test_a_choice_without_a_description_is_an_error(configs):
    (configs / "loss" / "mine.yaml").write_text("_target_: handpose.losses.CoordinateMse\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"configs/loss/mine\.yaml has no comment at its top"):
        make_page()


def test_a_file_is_read_with_its_comments(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# @package _global_\n# What it\n# is.\ndefaults:\n  - other\n"
        "a: [1, 2]  # a list\nb:\n  _target_: c.D\n  e: 'x#y'\n",
        encoding="utf-8",
    )
    choice = read_choice(path)
    assert choice.summary == "What it is."
    assert choice.keys == [("a", "[1, 2]", "a list"), ("b.e", "'x#y'", "")]
    assert choice.targets == {"b": "c.D"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool, "`true` or `false`"),
        (Annotated[int, Field(ge=1, le=8)], "integer ≥ 1, ≤ 8"),
        (Annotated[float, Field(gt=0)] | None, "number > 0 or `null`"),
        (float | Literal["auto"], "number or `auto`"),
        (Sequence[float], "list of numbers"),
        (Sequence[dict[str, int]] | None, ""),
        (Any, ""),
    ],
)
def test_types_are_described_in_words(kind, words):
    assert describe_values(kind) == words
