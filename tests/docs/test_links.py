"""Every link within the repository leads to a file, and to a heading of it where it names one."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, read_page

_LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<file>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def find_anchors(text: str) -> set[str]:
    """The anchors of all headings, as GitHub and MkDocs make them for plain titles."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def find_broken_links(text: str, page: Path) -> list[str]:
    """Find links to files and headings that do not exist."""
    broken = []
    for link in _LINK.finditer(text):
        target = page.parent / link["file"] if link["file"] else page
        if link["file"] and not target.exists():
            broken.append(link[0])
        elif link["anchor"]:
            content = target.read_text(encoding="utf-8") if link["file"] else text
            broken += [] if link["anchor"] in find_anchors(content) else [link[0]]
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: read_page(path)[0])
def test_the_links_of_a_page_lead_somewhere(path):
    assert find_broken_links(read_page(path)[1], path) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# What it `is`, now\n", encoding="utf-8")
    text = "[a](there.md) [b](there.md#what-it-is-now) [c](there.md#gone) [d](picture.png) [e](#gone) [f](https://x)"
    broken = ["](there.md#gone)", "](picture.png)", "](#gone)"]
    assert find_broken_links(text, tmp_path / "page.md") == broken
