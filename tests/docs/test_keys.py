"""Every configuration key that the documentation names exists."""

import re
from collections.abc import Iterator

import pytest
import yaml

from docs.make_configuration import GROUPS, PAGE, read_choice
from handpose.config_files import CONFIGS
from handpose.schema import list_parameters
from tests.docs.pages import PAGES, read_page
from tests.examples_of_page import read_examples

_NAMED = re.compile(r"`\+?(?P<key>[a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`")
_FILES = {"css", "csv", "gz", "html", "json", "jsonl", "log", "md", "onnx", "py", "sh", "txt", "yaml", "zip"}
"""Endings of files such as `report.html`, which look like keys."""


def known_keys() -> set[str]:
    """The keys on the reference page with those above them, and all arguments of the libraries' classes."""
    listed = re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    above = {key.rsplit(".", i)[0] for key in listed for i in range(1, key.count(".") + 1)}
    return {*listed, *above, *_arguments(), *_keys_of_examples()}


def _keys_of_examples() -> Iterator[str]:
    """The keys of the options that docs/extending.md adds."""
    for path, text in read_examples().items():
        if path.startswith("configs/") and path.endswith(".yaml"):
            group = path.removeprefix("configs/").rpartition("/")[0].replace("/", ".")
            yield from (f"{group}.{name}" for name in yaml.safe_load(text))


def _arguments() -> Iterator[str]:
    for group in GROUPS:
        for path in (CONFIGS / group).glob("*.yaml"):
            for owner, target in read_choice(path).targets.items():
                prefix = ".".join(filter(None, [group.replace("/", "."), owner]))
                yield from (f"{prefix}.{name}" for name in list_parameters(target))


def find_unknown_keys(text: str, known: set[str]) -> set[str]:
    """Find keys of a configuration group in Markdown that are not known."""
    groups = {key.partition(".")[0] for key in known if "." in key}
    named = {found["key"] for found in _NAMED.finditer(text)}
    keys = {key for key in named if key.partition(".")[0] in groups and key.rpartition(".")[2] not in _FILES}
    return keys - known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: read_page(path)[0])
def test_the_keys_of_a_page_exist(path):
    assert find_unknown_keys(read_page(path)[1], known_keys()) == set()


def test_a_key_that_does_not_exist_is_found():
    text = "`sweep.num_trails=3` `+trainer.max_steps` `sweep.confirm` `report.html` `torch.optim` `trainer.absent`"
    assert find_unknown_keys(text, known_keys()) == {"sweep.num_trails", "trainer.absent"}
