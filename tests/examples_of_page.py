"""The examples of docs/extending.md, written into a folder as a user would."""

import re
from pathlib import Path

from handpose.config_files import REPOSITORY

_PAGE = REPOSITORY / "docs" / "extending.md"
_FILE = re.compile(r"^`(?P<path>[\w/.]+)`\n\n```(?:python|yaml)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def read_examples() -> dict[str, str]:
    """Path of each file on the page -> its content."""
    return {found["path"]: found["text"] for found in _FILE.finditer(_PAGE.read_text(encoding="utf-8"))}


def write_examples(folder: Path) -> Path:
    """Write every file of the page into a folder."""
    for path, text in read_examples().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder
