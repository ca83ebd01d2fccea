"""The section of a report about the use of CPUs, GPUs and memory, with a verdict on what slowed the trials down."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from handpose.report.formatting import format_duration
from handpose.report.html import BLOCKS, HtmlPage
from handpose.report.sweep_record import SweepRecord
from handpose.report.utilisation import PHASE_NAMES, PHASES, Phase, Utilisation, Verdict, combine, judge

_MAX_ROWS = 30
"""With more trials, the section shows the median and the extremes instead of a row for each trial."""
_MAX_NUMBERS = 12


class _Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: its title, with the unit.
        read: returns the value of a trial; None: not measured.
    """

    title: str
    read: Callable[[Utilisation], float | None]


def _make_share_column(phase: Phase) -> _Column:
    return _Column(f"{PHASE_NAMES[phase]} %", lambda used: 100 * used.get_share(phase))


def add_utilisation_section(page: HtmlPage, record: SweepRecord) -> None:
    """Add the section. A sweep without measurements, for example one of an earlier version, has none."""
    used = {trial.number: trial.used for trial in record.trials if trial.used is not None}
    if record.used is None:
        return
    verdict, phase, share, remedy = judge(record.used)
    page.add_section(
        "utilisation",
        "Use of CPUs, GPUs and memory",
        f"{_capitalise(verdict)}: {PHASE_NAMES[phase]} took {share:.0%} of the {format_duration(record.used.total_s)} "
        f"of all trials together. {remedy}".strip(),
    )
    page.add_markup(BLOCKS.table(["verdict", "trials", "which", "what to do"], _list_verdicts(used), wide=(2, 3)))
    columns = _list_columns(record.used)
    if len(used) > _MAX_ROWS:
        _add_extremes(page, used, columns)
    else:
        _add_trials(page, used, columns)
    page.add_text(_explain(record.used))


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]


def _list_verdicts(used: Mapping[int, Utilisation]) -> list[list[object]]:
    """List the verdicts with their trials, the most frequent one first."""
    numbers: dict[Verdict, list[int]] = {}
    for number, each in sorted(used.items()):
        numbers.setdefault(judge(each).verdict, []).append(number)
    ordered = sorted(numbers.items(), key=lambda item: -len(item[1]))
    return [
        [verdict, len(trials), _format_numbers(trials), _find_remedy(verdict, [used[number] for number in trials])]
        for verdict, trials in ordered
    ]


def _find_remedy(verdict: Verdict, used: Sequence[Utilisation]) -> str:
    """Return the remedy for trials with the same verdict, with their common use of the GPU."""
    judged = judge(combine(used))
    return judged.remedy if judged.verdict == verdict else judge(used[0]).remedy


def _format_numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_MAX_NUMBERS])) + (", …" if len(numbers) > _MAX_NUMBERS else "")


def _list_columns(used: Utilisation) -> list[_Column]:
    """List the columns for which the sweep has a value."""
    gpu = "whole GPU" if used.gpus < 1 else "GPU"
    columns = [
        *map(_make_share_column, PHASES),
        _Column("CPU %", lambda each: each.cpu_percent),
        _Column("memory MB", lambda each: each.memory_mb),
        _Column(f"{gpu} %", lambda each: each.gpu_percent),
        _Column(f"{gpu} memory MB", lambda each: each.gpu_memory_mb),
        _Column(f"{gpu} power W", lambda each: each.gpu_power_w),
    ]
    return [column for column in columns if column.read(used) is not None]


def _add_trials(page: HtmlPage, used: Mapping[int, Utilisation], columns: list[_Column]) -> None:
    rows = [
        [number, judge(each).verdict, *(_format_value(column.read(each)) for column in columns)]
        for number, each in sorted(used.items())
    ]
    head = ["trial", "verdict", *(column.title for column in columns)]
    page.add_markup(BLOCKS.table(head, rows, numeric=(0, *range(2, len(head)))))


def _add_extremes(page: HtmlPage, used: Mapping[int, Utilisation], columns: list[_Column]) -> None:
    rows = []
    for column in columns:
        values = {number: value for number, each in used.items() if (value := column.read(each)) is not None}
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        median = statistics.median(values.values())
        rows.append(
            [
                column.title,
                _format_value(median),
                _format_value(values[low]),
                low,
                _format_value(values[high]),
                high,
            ]
        )
    head = ["", "median trial", "lowest", "in trial", "highest", "in trial"]
    page.add_markup(BLOCKS.table(head, rows, numeric=range(1, 6)))


def _format_value(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _explain(used: Utilisation) -> str:
    parts = [
        "The first columns are shares of the time until the last report of a trial. CPU: time of the processes of a "
        "trial, as a share of the cores that it holds. Memory: the largest sample of its processes, in which shared "
        "memory is divided among those that share it. With several workers per trial, the values are those of the "
        "first one."
    ]
    if used.gpu_memory_mb is not None and used.gpus < 1:
        parts.append("Trials share a GPU, so the values of the GPU are those of the whole GPU, with all of its trials.")
    return " ".join(parts)
