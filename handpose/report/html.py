"""A self-contained HTML page, which includes its style sheet, its script and plotly.js and needs no network.

The HTML is in the templates in page/. `BLOCKS` provides the macros of blocks.html, which make tables, cards and
pictures.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from handpose.report.figure import Figure
from handpose.report.formatting import format_duration
from handpose.report.sweep_record import StoryLine

_FOLDER = Path(__file__).parent / "page"
_TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_TEMPLATES.filters["base64"] = lambda content: base64.b64encode(content).decode()

BLOCKS: Any = _TEMPLATES.get_template("blocks.html").module


@dataclass
class HtmlPage:
    """A page that is built block by block.

    Attributes:
        title: title of the browser tab.
        sweep: prefix of the HTML identifiers of the current sweep; empty on a page about one sweep.
    """

    title: str
    sweep: str = ""
    _header: str = ""
    _parts: list[Markup] = field(default_factory=list)
    _figures: list[Figure] = field(default_factory=list)
    _contents: list[tuple[str, str]] = field(default_factory=list)
    _stories: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add_header(self, text: str, lead: str) -> None:
        """Set the heading of the page and the sentence below it."""
        self._header = BLOCKS.header(text, lead)

    def start_sweep(self, name: str, prefix: str, sentence: str) -> None:
        """Start the part of the page about one of several sweeps."""
        self.sweep = prefix
        self._contents.append((f"{prefix}sweep", name))
        self.add_markup(BLOCKS.heading(f"{prefix}sweep", name, sentence, "sweep"))

    def add_section(self, anchor: str, title: str, sentence: str) -> None:
        """Start a section with a sentence that describes it."""
        if not self.sweep:  # with several sweeps, each sweep has only one entry in the table of contents
            self._contents.append((anchor, title))
        self.add_markup(BLOCKS.heading(f"{self.sweep}{anchor}", title, sentence))

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self.add_markup(BLOCKS.paragraph(text))

    def add_markup(self, block: Markup) -> None:
        """Add a block made by a macro of `BLOCKS`."""
        self._parts.append(block)

    def add_story(self, trial: int, story: Sequence[StoryLine]) -> None:
        """Add the story of a trial, which is shown when its number in the table of trials is clicked."""
        lines = [(format_duration(line.at_s), line.text) for line in story]
        self._stories[f"{self.sweep}trial-{trial}"] = lines

    def add_chart(self, figure: Figure, caption: str) -> None:
        """Add a chart with a caption below it."""
        self.add_markup(self._make_chart(figure, caption))

    def add_charts(self, figures: Iterable[tuple[Figure, str]]) -> None:
        """Add small charts with captions, side by side if there is room."""
        self.add_markup(BLOCKS.grid([self._make_chart(*each) for each in figures]))

    def _make_chart(self, drawn: Figure, caption: str) -> Markup:
        self._figures.append(drawn)
        return BLOCKS.chart(len(self._figures) - 1, self.sweep, drawn["height"], caption)

    def render(self) -> str:
        """Return the whole page."""
        plotly = resources.files("plotly").joinpath("package_data/plotly.min.js")
        files = {"style": _FOLDER / "page.css", "script": _FOLDER / "page.js", "plotly": plotly}
        texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        return _TEMPLATES.get_template("page.html").render(
            title=self.title,
            header=self._header,
            contents=self._contents,
            parts=self._parts,
            figures=self._figures,
            stories=self._stories,
            script_hashes=Markup(" ".join(_hash_for_policy(texts[name]) for name in ("plotly", "script"))),
            **{name: Markup(text) for name, text in texts.items()},
        )


def _hash_for_policy(script: str) -> str:
    """Return the hash that lets a browser run a script in the page (Content Security Policy Level 3)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
