"""The commands and files in the documentation's pages."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from handpose.config_files import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "benchmarks/*.md", "cluster/README.md", "docs/**/*.md")
    for path in REPOSITORY.glob(pattern)
)

_BLOCK = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:\.venv/bin/)?python[ ][^`]+)`")
_HERE_DOCUMENT = re.compile(r"^cat >\s*(\S+) <<\s*'?(\w+)'?\n(.*?\n)\2$", flags=re.MULTILINE | re.DOTALL)
_OPTIONAL = re.compile(r"[ ]\[[^\]=]*\]")
_SHELL_WORDS = {"do", "done", "then", "fi", "else"}


class Command(NamedTuple):
    """A command of a page.

    Attributes:
        place: page and line, for messages.
        words: the program and its arguments; variables that are set for it alone are left out.
    """

    place: str
    words: tuple[str, ...]


def find_commands(text: str, page: str) -> Iterator[Command]:
    """Find the commands in bash blocks, and those of Python in the text around them.

    Args:
        text: Markdown.
        page: its name.
    """
    for block in _BLOCK.finditer(text):
        if block[2] == "bash":
            first_line = text.count("\n", 0, block.start()) + 2
            yield from _split(_HERE_DOCUMENT.sub(_blank, block[3]), page, first_line)
    around = _BLOCK.sub(_blank, text)
    for span in _INLINE.finditer(around):  # a table writes | as \|
        command = _OPTIONAL.sub("", span[1].replace("\\|", "|").replace(" ...", ""))
        if re.fullmatch(r"\S+ (-m )?\S+", command):  # names the program only
            command += " --help"
        yield from _split(command.replace("\n", " "), page, around.count("\n", 0, span.start()) + 1)


def find_files(text: str) -> dict[str, str]:
    """Find the files that a page tells the reader to write: name -> content.

    These are blocks of YAML or Python after a paragraph that names a file, as in "Write `my_space.yaml`:", and
    here-documents (cat > my_space.yaml <<'EOF'). If a paragraph names several files, the first one counts.
    """
    files = {found[1]: found[3] for found in _HERE_DOCUMENT.finditer(text)}
    for block in _BLOCK.finditer(text):
        paragraph = text[: block.start()].rstrip().rpartition("\n\n")[2]
        named = re.search(r"`([\w./-]+\.(?:yaml|py))`", paragraph)
        if named and block[2] in ("yaml", "python"):
            files[named[1]] = block[3]
    return files


def _blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")  # the lines after it keep their numbers


def _split(script: str, page: str, first_line: int) -> Iterator[Command]:
    """Split lines of shell into commands, at operators such as && and |."""
    lines, number = script.split("\n"), 0
    while number < len(lines):
        place, line = f"{page}:{first_line + number}", lines[number]
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = line[:-1] + lines[number]
        number += 1
        words: list[str] = []
        for word in [*_words(line), ";"]:
            if word and set(word) <= set("();|&"):
                words = list(_without_variables(words))
                if words:
                    yield Command(place, tuple(words))
                words = []
            else:
                words.append(word)


def _words(line: str) -> list[str]:
    line = re.sub(r"(?<=\s)\d?>>?\s*(?:&\d|[^\s'&]+)", " ", line)  # redirections
    lexer = shlex.shlex(re.sub(r"\$(USER|HOME|TMPDIR)\b", "/tmp", line), posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    return list(lexer)


def _without_variables(words: list[str]) -> Iterator[str]:
    """Leave out `NAME=value` and shell keywords before a program, and the prompt."""
    rest = list(words)
    while rest and (re.fullmatch(r"[A-Z_]+=.*", rest[0]) or rest[0] in _SHELL_WORDS or rest[0] == "$"):
        rest.pop(0)
    yield from rest


def read_page(path: Path) -> tuple[str, str]:
    """The name of a page in the repository, and its text."""
    return path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
