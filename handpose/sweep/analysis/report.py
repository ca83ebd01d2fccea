"""Makes the report of one or more sweeps from their folders: report.html and next_space.yaml."""

import errno
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.files import check_output_file, check_writable, write_atomically
from handpose.report.advice import Finding, format_advice, give_advice
from handpose.report.effects import find_shown_effects
from handpose.report.html import HtmlPage
from handpose.report.isolation import isolate_parameter
from handpose.report.next_space import suggest_next_space
from handpose.report.sections import add_comparison_section, add_sweep_sections, format_status
from handpose.report.sweep_record import SweepRecord
from handpose.search.space import Space, YamlSpace, generate_probe_params
from handpose.sweep.analysis.read_sweep import read_sweep

REPORT_FILE, NEXT_SPACE_FILE = "report.html", "next_space.yaml"


class SweepReport(NamedTuple):
    """A report, and what it was made from.

    Attributes:
        file: the HTML page.
        records: the sweeps.
        findings: findings about each sweep.
        next_spaces: search spaces for the next round, written into the sweeps' folders.
    """

    file: Path
    records: Sequence[SweepRecord]
    findings: Sequence[Sequence[Finding]]
    next_spaces: Sequence[Path]

    @property
    def text(self) -> str:
        """Text for the terminal: the advice, and the paths of the files."""
        lines: list[str] = []
        for record, findings in zip(self.records, self.findings, strict=True):
            lines += [record.name] * (len(self.records) > 1) + list(filter(None, [format_advice(findings)]))
        spaces = (["python", "tune.py", quote_override("search_space", str(path))] for path in self.next_spaces)
        lines += [f"next round  {shlex.join(command)}" for command in spaces]
        return "\n".join([*lines, f"report      {self.file}"])


def write_report(folders: Sequence[Path], file: Path, *, scientific: str | None = None) -> SweepReport:
    """Write a page about the sweeps in these folders, and a search space for the next round into each folder.

    The sweeps may still be running. Each file is written atomically.

    Args:
        folders: folders of the sweeps.
        file: the HTML page to write.
        scientific: a searched key whose values are compared, each with all other parameters optimised; None for no
            comparison.

    Raises:
        UserError: a folder holds no sweep, its files are damaged, or the key is not searched.
    """
    page, records, findings, spaces = _render(folders, scientific, output=file)
    with write_atomically(file) as part:
        part.write_text(page, encoding="utf-8")
    written = [
        _write_next_space(folder, space)
        for folder, space in zip(folders, spaces, strict=True)
        if file.parent.absolute() == folder or not _is_read_only(folder)
    ]
    return SweepReport(file, records, findings, [place for place in written if place is not None])


def render_report(folder: Path, *, scientific: str | None = None) -> tuple[str, str | None]:
    """Return the contents of report.html and next_space.yaml that `write_report` would write for one sweep.

    The second is None if there would be no such file.
    """
    page, _, _, (space,) = _render([folder], scientific)
    return page, space


class _RenderedReport(NamedTuple):
    page: str
    records: Sequence[SweepRecord]
    findings: Sequence[Sequence[Finding]]
    spaces: Sequence[str | None]


def _render(folders: Sequence[Path], scientific: str | None, *, output: Path | None = None) -> _RenderedReport:
    records = _make_names_unique([read_sweep(folder) for folder in folders])
    if output is not None:
        check_output_file(output)  # fail before the slow part
    effects = [find_shown_effects(record) for record in records]
    findings = [give_advice(record, shown) for record, shown in zip(records, effects, strict=True)]
    spaces = [suggest_next_space(record, shown) for record, shown in zip(records, effects, strict=True)]
    names = ", ".join(record.name for record in records)
    page = HtmlPage(f"Sweep {names}" if len(records) == 1 else f"Sweeps {names}")
    if len(records) == 1:
        page.add_header(f"Sweep {records[0].name}", format_status(records[0]))
    else:
        page.add_header(f"{len(records)} sweeps", names)
        add_comparison_section(page, records)
    for place, (record, found, space, shown) in enumerate(zip(records, findings, spaces, effects, strict=True)):
        if len(records) > 1:
            page.start_sweep(record.name, f"sweep-{place + 1}-", format_status(record))
        isolation = isolate_parameter(record, scientific) if scientific is not None else None
        add_sweep_sections(page, record, found, shown=shown, next_space=space, isolation=isolation)
    return _RenderedReport(page.render(), records, findings, spaces)


def _make_names_unique(records: Sequence[SweepRecord]) -> list[SweepRecord]:
    """Append numbers to the names of sweeps that have the same name."""
    names = [record.name for record in records]
    return [
        record if names.count(record.name) == 1 else replace(record, name=f"{record.name} ({place})")
        for place, record in enumerate(records, start=1)
    ]


def check_scientific_key(key: str | None, space: Space) -> None:
    """Check before a sweep that the space searches the key `report.scientific`.

    Raises:
        UserError: it does not.
    """
    if key is None:
        return
    searched = (
        space.parameters
        if isinstance(space, YamlSpace)
        else {each for point in generate_probe_params(space) for each in point}
    )
    if key not in searched:
        raise UserError(
            f"report.scientific={key} is not searched by {space.file}; it searches {', '.join(sorted(searched))}"
        )


def _write_next_space(folder: Path, text: str | None) -> Path | None:
    """Write next_space.yaml; without a text, remove the file of an earlier report, which is out of date."""
    file = folder / NEXT_SPACE_FILE
    if text is None:
        file.unlink(missing_ok=True)
        return None
    with write_atomically(file) as part:
        part.write_text(text, encoding="utf-8")
    return file


def _is_read_only(folder: Path) -> bool:
    """Return whether this user cannot write to the folder, for example because it belongs to another user."""
    try:
        check_writable(folder)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return False
