"""One self-contained page: its style, its script and plotly.js are in it, and it asks the network for nothing."""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path

from handpose.report.figure import Figure

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page do, so that nothing is ever fetched."""


_MOST_PRINTED = 40


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass
class Page:
    """A page as it is put together. title: of the tab. sweep: what the identifiers of the present sweep begin with."""

    title: str
    sweep: str = ""
    _parts: list[str] = field(default_factory=list)
    _figures: list[Figure] = field(default_factory=list)
    _contents: list[tuple[str, str]] = field(default_factory=list)

    def head(self, text: str, lead: str) -> None:
        """The head line, and what the page is about."""
        self._parts.append(f"<header><h1>{escape(text)}</h1><p>{escape(lead)}</p></header>")

    def sweep_begins(self, name: str, prefix: str, sentence: str) -> None:
        """What follows is about one of several sweeps."""
        self.sweep = prefix
        self._contents.append((f"{prefix}sweep", name))
        self._parts.append(f'<h2 class="sweep" id="{prefix}sweep">{escape(name)}</h2><p>{escape(sentence)}</p>')

    def section(self, anchor: str, title: str, sentence: str) -> None:
        """A section with a sentence that says what it shows."""
        place = f"{self.sweep}{anchor}"
        if not self.sweep:  # of several sweeps the contents have one line each
            self._contents.append((place, title))
        self._parts.append(f'<h2 id="{place}">{escape(title)}</h2><p>{escape(sentence)}</p>')

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def add(self, markup: Markup) -> None:
        """Something that is HTML already."""
        self._parts.append(markup)

    def finding(self, said: str, kind: str, question: str, text: str, evidence: str, paste: str) -> None:
        """An answer of the advice. said: what its kind is called."""
        lines = preformatted(paste) if paste else ""
        self._parts.append(
            f'<div class="finding {kind}"><div class="kind">{escape(said)}</div><h3>{escape(question)}</h3>'
            f'<p>{escape(text)}</p><p class="evidence">{escape(evidence)}</p>{lines}</div>'
        )

    def chart(self, drawn: Figure, caption: str) -> None:
        """A chart over a sentence that says what it shows."""
        self._parts.append(self._chart(drawn, caption))

    def charts(self, drawn: Iterable[tuple[Figure, str]]) -> None:
        """Small charts side by side, where there is room."""
        self._parts.append(f'<div class="grid">{"".join(self._chart(*each) for each in drawn)}</div>')

    def _chart(self, drawn: Figure, caption: str) -> str:
        self._figures.append(drawn)
        place = (
            f'<div class="chart" data-figure="{len(self._figures) - 1}" data-sweep="{self.sweep}" '
            f'style="min-height:{drawn["height"]}px" role="img" aria-label="{escape(caption)}"></div>'
        )
        return f"<figure>{place}<figcaption>{escape(caption)}</figcaption></figure>"

    def html(self) -> str:
        """The whole page."""
        head, *body = self._parts
        links = "".join(f'<a href="#{place}">{escape(title)}</a>' for place, title in self._contents)
        plotly = resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{_file('page.css')}</style></head><body>",
                head,
                f"<nav>{links}</nav>",
                "<noscript><p>The charts need JavaScript; tables and advice do not.</p></noscript>",
                *body,
                f'<script type="application/json" id="figures">{_json(self._figures)}</script>',
                f"<script>{plotly}</script>",
                f"<script>{_file('page.js')}</script>",
                "</body></html>\n",
            ]
        )


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numeric: Iterable[int] = (),
    wide: Iterable[int] = (),
    caption: str = "",
) -> Markup:
    """A table that scrolls sideways where it is too wide. numeric, wide: numbers of such columns."""
    kinds = {**dict.fromkeys(numeric, "number"), **dict.fromkeys(wide, "wide")}
    titles = "".join(f"<th{_class(kinds.get(i))}>{_cell(title)}</th>" for i, title in enumerate(head))
    body = "".join(
        f"<tr>{''.join(f'<td{_class(kinds.get(i))}>{_cell(cell)}</td>' for i, cell in enumerate(row))}</tr>"
        for row in rows
    )
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Markup(
        f'<div class="scroll"><table>{said}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def trials_table(head: Sequence[str], rows: Sequence[Sequence[tuple[str, object]]], *, prefix: str) -> Markup:
    """The table of trials, which can be sorted. rows: texts, with what they are sorted by where it is something else.

    The first column is the trial's number, which gives the row its identifier. On paper only the first rows are shown.
    """
    titles = "".join(f'<th><button type="button">{escape(title)}</button></th>' for title in head)
    body = []
    for place, row in enumerate(rows):
        cells = "".join(f"<td{_sorted_by(value)}>{escape(text)}</td>" for text, value in row)
        beyond = ' class="beyond"' if place >= _MOST_PRINTED else ""
        body.append(f'<tr id="{prefix}trial-{row[0][0]}"{beyond}>{cells}</tr>')
    note = (
        f'<p class="print-only">The first {_MOST_PRINTED} of {len(rows)} trials.</p>'
        if len(rows) > _MOST_PRINTED
        else ""
    )
    rows_and_head = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody>"
    many = " many" if len(rows) > _MOST_PRINTED else ""  # laid out when they come into view
    return Markup(f'<div class="scroll trials{many}"><table>{rows_and_head}</table></div>{note}')


def _sorted_by(value: object) -> str:
    return "" if value is None else f' data-value="{escape(str(value))}"'


def cards(items: Iterable[tuple[str, str]]) -> Markup:
    """Figures that are seen first, each over what it is."""
    return Markup(
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in items
        )
        + "</div>"
    )


def preformatted(text: str) -> Markup:
    return Markup(f"<pre>{escape(text)}</pre>")


def folded(summary: str, content: Markup) -> Markup:
    """What is shown on a click."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def pictures(items: Iterable[tuple[bytes, str]]) -> Markup:
    """JPEG pictures with their captions."""
    figures = (
        f'<figure><img loading="lazy" alt="{escape(caption)}" src="data:image/jpeg;base64,'
        f'{base64.b64encode(jpeg).decode()}"><figcaption>{escape(caption)}</figcaption></figure>'
        for jpeg, caption in items
    )
    return Markup(f'<div class="hands">{"".join(figures)}</div>')


def _cell(content: object) -> str:
    return content if isinstance(content, Markup) else escape(str(content))


def _class(kind: str | None) -> str:
    return f' class="{kind}"' if kind else ""


def _json(figures: Sequence[Figure]) -> str:
    """Inside a script, where `</` would end it."""
    return json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")


def _file(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
