"""Read and write YAML files. A duplicate key is an error, as in the YAML standard; PyYAML would use the last one."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from handpose.errors import UserError, join_lines
from handpose.files import write_atomically
from handpose.formats import upgrade
from handpose.utf8 import read_utf8

_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(path: Path) -> Any:
    """Load a YAML file in UTF-8, with or without a byte-order mark.

    Args:
        path: the path of the file.

    Raises:
        UserError: the file has another encoding, or a mapping has a duplicate key.
        OSError: the file cannot be opened.
        yaml.YAMLError: the file is not valid YAML.
    """
    return parse_yaml(read_utf8(path), path)


def parse_yaml(text: str, path: Path) -> Any:
    """Parse the text of a YAML file.

    Args:
        text: the text.
        path: the path of the file, for error messages.

    Raises:
        UserError: a mapping has a duplicate key.
        yaml.YAMLError: the text is not valid YAML.
    """
    stream = io.StringIO(text)
    stream.name = str(path)  # for error messages
    loader = yaml.CSafeLoader(stream)  # libyaml reads the file of a sweep ten times as fast as Python does
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, path, checked=set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node, path: Path, *, checked: set[yaml.Node]) -> None:
    """Raise UserError if a mapping in the node has a duplicate key.

    Args:
        node: a node of a document, which may have aliases.
        path: the path of the file.
        checked: nodes that were checked before.
    """
    if node in checked or isinstance(node, yaml.ScalarNode):
        return
    checked.add(node)
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            _check_keys(item, path, checked=checked)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        _check_keys(key, path, checked=checked)
        _check_keys(value, path, checked=checked)
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        line = key.start_mark.line + 1
        first = lines.get((key.tag, key.value))
        if first is not None:
            raise UserError(
                f"{path}: the key {key.value} is given twice, in lines {first} and {line}; keep one of them"
            )
        lines[key.tag, key.value] = line


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values to a YAML file.

    The file is replaced atomically: a reader never finds a half-written file.

    Args:
        path: the path of the file. Its folder is created if it does not exist.
        content: key -> plain value.
    """
    with write_atomically(path) as part:
        part.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file that a sweep wrote, with the names of this version.

    Args:
        path: the path of the file.

    Returns:
        The mapping. It is empty if the file does not exist or has no mapping.

    Raises:
        UserError: the file is damaged, or a later version of the project wrote it.
    """
    try:
        content = load_yaml(path) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged ({join_lines(error)})") from error
    content = content if isinstance(content, dict) else {}
    return upgrade(content, path)
