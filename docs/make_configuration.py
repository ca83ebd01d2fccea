"""Write docs/configuration.md from the files in configs/ and from the docstrings of the classes that they configure.

python docs/make_configuration.py

The description of a key is its entry under `Args:` or `Attributes:` of the class that takes it. Without one it is the
comment behind the key in its YAML file, or in another choice of the same group.
"""

import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.files import write_atomically
from handpose.schema import type_of

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration reference

```bash
python tune.py --cfg job                        # prints all keys of a sweep with their values
python train.py optimizer.lr=1e-3 --cfg job     # and of a training, as changed by the command line
```

Any key on this page can be set on the command line as `key=value`, and almost any can be searched
([search spaces](search_spaces.md)). A group is a folder in `configs/`, and each of its choices is a file there:
`augment=none` selects `configs/augment/none.yaml`. A key that the configuration does not have, or a value that is not
allowed, ends the program with a one-sentence error before any work starts.

Both programs have the same keys, except that the groups `sweep`, `scheduler`, `searcher` and `ray` and the keys
`search_space`, `retrain` and `report` are only for `tune.py`.

<!-- Written by docs/make_configuration.py. Edit the comments in configs/ or the docstrings, and run it again. -->
"""

GROUPS = {
    "budget": "How long a whole run may take ([budgets](resources.md#one-budget-for-everything)).",
    "sweep": "Number of trials, budgets, resources, failures, confirmation and retraining ([resources](resources.md)).",
    "scheduler": "Which trials stop, pause or change during training ([schedulers](schedulers.md)).",
    "searcher": "Which configurations are tried ([searchers](searchers.md)).",
    "searcher/common": "Keys that every searcher has, as `searcher.KEY`.",
    "ray": "Where the trials run ([clusters](cluster/index.md)).",
    "data": "The data set and its batches ([data](data.md)).",
    "model": "The network ([model](model.md)).",
    "model/encoder": "The network's first half, a timm model.",
    "model/decoder": "The network's second half: from feature maps to logits along three axes.",
    "heatmap": "The axes along which joints are predicted, and the target heatmaps.",
    "metrics": "Metrics of validation and test. All are computed; `sweep.metric` selects the one to optimise.",
    "loss": "The loss that training minimises.",
    "augment": "Random changes of the training images; the labels are changed with them.",
    "optimizer": "The optimiser, with the arguments of its PyTorch class.",
    "lr_schedule": "The learning rate over the run. All lengths are fractions of the run.",
    "test_time": "The views of an image over which test predictions are averaged.",
    "trainer": "The arguments of Lightning's Trainer ([training](training.md)).",
    "checkpoints": "The checkpoints of `train.py` and of the retraining.",
    "pictures": "Pictures of predictions in the log.",
    "logger": "Where losses, metrics and pictures are logged.",
    "experiment": "Complete configurations, selected with `python train.py experiment=NAME`.",
}
"""Every group, in the order of the page, with a sentence about it."""

DEFAULTS = {"budget", "sweep", "ray", "searcher/common", "model", "trainer", "checkpoints", "pictures"}
"""Groups with one choice, default.yaml, whose name is not shown."""


class Key(NamedTuple):
    """A key of a YAML file.

    Attributes:
        name: dotted, within the file.
        value: as it is written in the file.
        comment: behind the value; empty if there is none.
    """

    name: str
    value: str
    comment: str


class Choice(NamedTuple):
    """A YAML file.

    Attributes:
        name: of the choice.
        summary: the comment at the top of the file.
        keys: all keys that have a value, those of Hydra left out.
        targets: dotted prefix -> the class or function that takes the keys below it.
    """

    name: str
    summary: str
    keys: Sequence[Key]
    targets: dict[str, str]


def read_choice(path: Path) -> Choice:
    """Read a YAML file with its comments."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    top = [line.removeprefix("#").strip() for line in lines[: _first(lines)] if not line.startswith("# @")]
    keys, targets = [], {}
    for name, key, value in _leaves(yaml.compose(text), ""):
        written = text[value.start_mark.index : value.end_mark.index].strip()
        prefix, _, last = name.rpartition(".")
        if last == "_target_":
            targets[prefix] = written
        elif not last.startswith("_") and name.split(".")[0] not in ("defaults", "hydra"):
            comment = re.search(r"\s#\s+(.*)", lines[key.start_mark.line])
            keys.append(Key(name, written, comment[1] if comment else ""))
    return Choice(path.stem, " ".join(top), keys, targets)


def _first(lines: Sequence[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", key, value


def describe_arguments(target: str) -> dict[str, str]:
    """Descriptions of arguments: those under `Args:` or `Attributes:` in the docstring of what a `_target_` names."""
    if not target.startswith("handpose."):  # the comments in configs/ say what matters here of other libraries
        return {}
    text = inspect.getdoc(pkgutil.resolve_name(target)) or ""
    found: dict[str, str] = {}
    for block in re.findall(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n?|\n)+)", text, flags=re.MULTILINE):
        for name, first, more in re.findall(r"^ {4}(\w+): (.*)((?:\n {8}.*)*)", block, flags=re.MULTILINE):
            found.setdefault(name, re.sub(r"\bNone\b", "`null`", " ".join((first + more).split())))
    return found


def describe_values(kind: Any) -> str:
    """The values of a type in words; empty where it does not limit them to values of YAML."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return f"{describe_values(arguments[0])} {_bounds(arguments[1:])}".strip()
    if origin is Literal:
        return " or ".join(f"`{item}`" for item in arguments)
    if origin in (typing.Union, types.UnionType):
        described = list(dict.fromkeys(map(describe_values, arguments)))
        return " or ".join(described) if all(described) else ""
    if isinstance(origin, type) and issubclass(origin, Sequence) and describe_values(arguments[0]):
        return f"list of {describe_values(arguments[0])}s"
    names = {bool: "`true` or `false`", int: "integer", float: "number", str: "text", type(None): "`null`"}
    return names.get(kind, "")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [limit for item in metadata for limit in getattr(item, "metadata", [])]
    shown = [(sign, getattr(limit, name)) for limit in limits for name, sign in signs.items() if hasattr(limit, name)]
    return ", ".join(f"{sign} {'2^32' if bound == 2**32 else bound}" for sign, bound in shown)


def group_page(group: str) -> list[str]:
    """Write about a group: a table for each choice, of the keys that no earlier choice has with the same value.

    Raises:
        UserError: a choice or a key has no description.
    """
    paths = sorted((CONFIGS / group).glob("*.yaml"), key=lambda path: (path.stem != default_choice(group), path.stem))
    choices = [read_choice(path) for path in paths]
    comments = {key.name: key.comment for choice in reversed(choices) for key in choice.keys if key.comment}
    lines = [f"## {group}", "", GROUPS[group], ""]
    shown: set[tuple[str, str | None, str]] = set()
    for choice in choices:
        if group not in DEFAULTS:
            is_default = choice.name == default_choice(group)
            lines += [f"### {group}={choice.name}{' (default)' if is_default else ''}", ""]
            if not choice.summary:
                raise UserError(f"configs/{group}/{choice.name}.yaml has no comment at its top that describes it")
        lines += [choice.summary, ""] if choice.summary else []
        if group == "experiment":
            continue
        main = choice.targets.get("")
        keys = [key for key in choice.keys if (key.name, main, key.value) not in shown]
        shown |= {(key.name, main, key.value) for key in choice.keys}
        prefix = f"{group.removesuffix('/common').replace('/', '.')}."
        lines += table(prefix, choice, keys, comments)
    return lines


def table(prefix: str, choice: Choice, keys: Sequence[Key], comments: dict[str, str]) -> list[str]:
    """A table of keys with their defaults and what they mean.

    Args:
        prefix: of the keys.
        choice: the file that they are from.
        keys: the rows.
        comments: name of a key -> the comment about it in the group.

    Raises:
        UserError: a key has no description.
    """
    if not keys:
        return []
    lines = [_more_arguments(prefix, owner, target) for owner, target in choice.targets.items()]
    lines = [*filter(None, lines), "| key | default | meaning |", "| --- | --- | --- |"]
    for key in keys:
        owner, _, name = key.name.rpartition(".")
        target = choice.targets.get(owner)
        meaning = (describe_arguments(target) if target else {}).get(name) or key.comment or comments.get(key.name)
        if not meaning:
            raise UserError(f"{prefix}{key.name} ({choice.name}.yaml) has no description; add a comment to it")
        values = describe_values(type_of(prefix + key.name, target))
        sentence = _make_sentence(meaning)
        cells = [f"`{prefix}{key.name}`", f"`{key.value}`", f"{sentence} ({values})" if values else sentence]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _make_sentence(text: str) -> str:
    """Add a capital letter, unless the text starts with a value or a file name, and a full stop."""
    return re.sub(r"^(?!true|false|null)[a-z]+\b(?!\.\w)", lambda word: word[0].capitalize(), text.rstrip(".")) + "."


def _more_arguments(prefix: str, owner: str, target: str) -> str:
    if target.startswith("handpose."):
        return ""
    added = f"+{prefix}{owner}{'.' if owner else ''}NAME=VALUE"
    return f"Further arguments of `{target}` can be added as `{added}`.\n"


def default_choice(group: str) -> str:
    """The choice of a group in the defaults list of train.yaml, tune.yaml or the group above it."""
    files = [CONFIGS / "train.yaml", CONFIGS / "tune.yaml", CONFIGS / "model" / "default.yaml"]
    listed = [item for path in files for item in yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]]
    chosen = {name: choice for item in listed if isinstance(item, dict) for name, choice in item.items()}
    return str(chosen.get(group, chosen.get(group.rpartition("/")[2])))


def make_page() -> str:
    """The text of configuration.md."""
    lines = [INTRODUCTION, "## Keys without a group", ""]
    for name in ("train", "tune"):
        choice = read_choice(CONFIGS / f"{name}.yaml")
        lines += [choice.summary, "", *table("", choice, choice.keys, {})]
    for group in GROUPS:
        lines += group_page(group)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    with write_atomically(PAGE) as part:
        part.write_text(make_page(), encoding="utf-8")
