"""Progress of a running sweep: a live table in a terminal, or one line per trial if the output is not a terminal."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from handpose.report.formatting import (
    format_cost,
    format_cost_name,
    format_cost_value,
    format_duration,
    format_metric,
    format_metric_name,
    format_metric_value,
    format_params,
    format_value,
)
from handpose.report.trial_table import STATES, TrialRow, TrialState, TrialTable, shorten_names

_REFRESH_EVERY_S = 0.5
_MIN_LINE_INTERVAL_S = 0.05
_MAX_ROWS = 12
_MAX_RUNNING_ROWS = 4
_COLOURS: dict[TrialState, str] = {
    "running": "cyan",
    "waiting": "blue",
    "paused": "blue",
    "complete": "green",
    "stopped": "yellow",
    "diverged": "magenta",
    "infeasible": "magenta",
    "failed": "red",
}


class SweepView(Protocol):
    """A view of the table of trials while the sweep runs."""

    def refresh(self, table: TrialTable, *, at_once: bool = False) -> None:
        """Show the current table.

        This may be called much more often than the view is redrawn.

        Args:
            table: the trials.
            at_once: whether to redraw the view even if the last time was a moment ago.
        """

    def show_trial_end(self, table: TrialTable, row: TrialRow) -> None:
        """Show that a trial has ended, paused or failed."""

    def show_note(self, sentence: str) -> None:
        """Show a message that is not about a trial."""

    def close(self) -> None:
        """Stop updating, and leave the last state on the screen."""


def make_sweep_view(title: str, *, time_budget_s: float | None = None, used_s: float = 0.0) -> SweepView:
    """Make a live view in a terminal, or a plain one elsewhere.

    Args:
        title: the first line.
        time_budget_s: the time that the sweep may take; None for no limit.
        used_s: the time that a resumed sweep has used before.
    """
    console = Console()
    clock = SweepClock(time_budget_s=time_budget_s, used_s=used_s)
    return LiveView(title, console, clock) if console.is_terminal else PlainView(title, clock)


def format_warm_start(account: Mapping[str, Any]) -> str:
    """Format how the trials of one earlier sweep were used.

    Args:
        account: an element of `InitialTrials.import_summaries`.
    """
    parts = [f"{account['brought']} trials used"]
    parts += [f"{number} left out ({reason})" for reason, number in account["not_comparable"].items()]
    parts += [f"{number} outside the range of {key}" for key, number in account["dropped_out_of_range"].items()]
    if account["tried_first"]:
        parts.append(f"its best {account['tried_first']} are tried first")
    return f"warm start  {account['sweep']}: " + ", ".join(parts)


class SweepClock:
    """The time that a sweep has used, and an estimate of the time left.

    Args:
        time_budget_s: the time that the sweep may take; None for no limit.
        used_s: the time that a resumed sweep has used before.
    """

    def __init__(self, *, time_budget_s: float | None, used_s: float = 0.0) -> None:
        self._time_budget_s = time_budget_s
        self._started = time.monotonic() - used_s
        self._ended: float | None = None

    def stop(self) -> None:
        """Stop the clock. From then on, no time is left."""
        self._ended = time.monotonic()

    def get_used_s(self) -> float:
        """Return the seconds used so far, including those before the sweep was resumed."""
        return (time.monotonic() if self._ended is None else self._ended) - self._started

    def estimate_left_s(self, table: TrialTable) -> float:
        """Estimate the seconds left, assuming that future trials take as long as earlier ones; NaN if unknown."""
        if self._ended is not None:
            return 0.0
        left = max(
            _estimate_work_left(table) / table.num_slots, _estimate_longest_left(table)
        )  # if the first is NaN, max returns it
        time_budget_s = table.changed_limits.get("time_budget_s", self._time_budget_s)
        if time_budget_s is not None:
            left = min(time_budget_s - self.get_used_s(), left)  # if `left` is NaN, min returns the first
        return max(0.0, left) if math.isfinite(left) else math.nan


def _estimate_work_left(table: TrialTable) -> float:
    """Estimate the slot-seconds of the trials that have not started, and of the rest of those that have not ended."""
    to_come = table.num_trials - len(table.rows)
    each_s = _estimate_trial_s(table)
    running = [row for row in table.rows.values() if not row.is_over]
    return to_come * each_s + sum(max(each_s - row.seconds, 0.0) for row in running)


def _estimate_longest_left(table: TrialTable) -> float:
    """Estimate the seconds until the last running trial ends. At the end of a sweep some slots are empty."""
    running = [row.seconds for row in table.rows.values() if row.state == "running"]
    return max(_estimate_trial_s(table) - min(running), 0.0) if running else 0.0


def _estimate_trial_s(table: TrialTable) -> float:
    """Estimate the seconds per trial: the mean of those that have ended.

    If none has ended, the estimate is the time of a complete trial at the pace of those that have reported; NaN without
    any.
    """
    rows = table.rows.values()
    ended = [row.seconds for row in rows if row.is_over and row.epochs]
    if ended:
        return sum(ended) / len(ended)
    paces = [row.seconds / row.epochs for row in rows if row.epochs and not row.is_over]
    return table.max_epochs * sum(paces) / len(paces) if paces else math.nan


class PlainView:
    """A view that prints one line for each trial that has ended, paused or failed.

    Of very many trials it prints only some, because formatting a line takes longer the more trials there are.
    """

    def __init__(self, title: str, clock: SweepClock) -> None:
        self._clock = clock
        self._next_line = -math.inf
        self._num_left_out = 0
        print(title, flush=True)

    def refresh(self, table: TrialTable, *, at_once: bool = False) -> None:
        pass

    def show_trial_end(self, table: TrialTable, row: TrialRow) -> None:
        began = time.monotonic()
        if began < self._next_line:
            self._num_left_out += 1
            return
        if self._num_left_out:
            print(f"... and {self._num_left_out} more in trials.csv", flush=True)
        print(format_trial(table, row, self._clock), flush=True)
        self._num_left_out = 0
        took_s = time.monotonic() - began  # grows with the number of trials
        self._next_line = began + 20 * took_s if took_s > _MIN_LINE_INTERVAL_S else -math.inf

    def show_note(self, sentence: str) -> None:
        print(sentence, flush=True)

    def close(self) -> None:
        pass


def format_trial(table: TrialTable, row: TrialRow, clock: SweepClock) -> str:
    """Format a trial that has ended, paused or failed, in one line."""
    num_ended = sum(other.is_over for other in table.rows.values())
    value = table.get_value(row)
    reached = format_metric(table.metric, value) if math.isfinite(value) else "no value"
    shown = row.error or reached if row.state in ("failed", "waiting") else reached
    best = " *" if row in table.find_front() else ""
    parts = [
        f"[{num_ended}/{table.num_trials}] trial {row.number} {row.state}",
        f"epoch {row.epochs}/{table.max_epochs}",
        shown + best,
        *(format_cost(each.name, row.costs[each.name]) for each in table.objectives if each.name in row.costs),
        format_params(row.params),
        f"{format_duration(clock.get_used_s())} used" + _format_left(clock, table),
    ]
    return "  ".join(parts)


def _format_left(clock: SweepClock, table: TrialTable) -> str:
    left = clock.estimate_left_s(table)
    return f", about {format_duration(left, is_rough=True)} left" if math.isfinite(left) and left > 0 else ""


class LiveView:
    """A view that is redrawn in place: title, progress, the best trial so far, and a table of at most 12 trials."""

    def __init__(self, title: str, console: Console, clock: SweepClock) -> None:
        self._title = title
        self._clock = clock
        self._table: TrialTable | None = None
        self._next_draw = -math.inf
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def refresh(self, table: TrialTable, *, at_once: bool = False) -> None:
        self._table = table
        if at_once or time.monotonic() >= self._next_draw:
            self._draw(table)

    def show_trial_end(self, table: TrialTable, row: TrialRow) -> None:
        self.refresh(table)

    def show_note(self, sentence: str) -> None:
        self._live.console.print(sentence, style="dim", markup=False, highlight=False)

    def close(self) -> None:
        self._clock.stop()
        if self._table is not None:
            self._draw(self._table)
        self._live.stop()

    def _draw(self, table: TrialTable) -> None:
        began = time.monotonic()
        shown = render_sweep(self._title, table, self._clock, width=self._live.console.width)
        self._live.update(shown, refresh=True)
        # Drawing takes at most a twentieth of the time, even with very many trials.
        self._next_draw = began + max(_REFRESH_EVERY_S, 20 * (time.monotonic() - began))


def render_sweep(title: str, table: TrialTable, clock: SweepClock, *, width: int) -> RenderableType:
    """Render the live view for a terminal that is `width` columns wide."""
    return Group(
        _render_head(title, table, clock),
        _render_progress(table, width),
        _render_states(table),
        _render_best(table, width),
        Text(),
        _render_trials(table, width),
        *_render_last_error(table),
    )


def _render_head(title: str, table: TrialTable, clock: SweepClock) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    used = f"{format_duration(clock.get_used_s())} used{_format_left(clock, table)}"
    line.add_row(Text(title, style="bold"), Text(used, style="dim"))
    return line


def _render_progress(table: TrialTable, width: int) -> RenderableType:
    num_ended = sum(row.is_over for row in table.rows.values())
    text = Text(f" {num_ended}/{table.num_trials} trials", style="bold")
    if table.num_requested:
        text.append(
            f"  ·  {table.num_slots} at a time, nodes for {table.num_requested} more are requested", style="dim"
        )
    if table.checkpoint_bytes:
        held, budget = table.checkpoint_bytes / 1e9, table.checkpoint_budget_bytes / 1e9
        text.append(f"  ·  checkpoints {held:.1f} of {budget:g} GB", style="dim")
    if math.isfinite(table.gpu_hours_budget):
        text.append(f"  ·  {table.gpu_hours:.1f} of {table.gpu_hours_budget:g} GPU-hours", style="dim")
    line = Table.grid()
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_row(ProgressBar(total=table.num_trials, completed=num_ended, width=24 if width > 100 else 16), text)
    return line


def _render_states(table: TrialTable) -> RenderableType:
    counts = table.count_states()
    parts = [
        Text(f"{counts[state]}\N{NO-BREAK SPACE}{state}", style=_COLOURS[state]) for state in STATES if counts[state]
    ]
    return Text(" · ", style="dim").join(parts)


def _render_best(table: TrialTable, width: int) -> RenderableType:
    ranked = table.rank_trials()
    if not ranked:
        return Text("best  none yet" if table.rows else "starting workers", style="dim")
    best = ranked[0]
    searched = {key: value for key, value in best.params.items() if key in _list_searched_keys(table)}
    text = Text("best  ", no_wrap=True, overflow="ellipsis")
    text.append(format_metric(table.metric, table.get_value(best)), style="bold green")
    if table.objectives:
        text.append(f"  on a front of {len(table.find_front())} (*)")
    text.append(f"  trial {best.number} at epoch {best.epochs}/{table.max_epochs}  ")
    return text.append(_format_fitting_params(searched, width - text.cell_len))


def _format_fitting_params(params: Mapping[str, Any], width: int) -> str:
    """Format as many parameters as fit into the width, none of them truncated."""
    whole = format_params(params)
    if len(whole) <= width:
        return whole
    shown = whole[: max(0, width - 4)].rpartition(", ")[0]
    return f"{shown}, ..." if shown else "..."


def _list_searched_keys(table: TrialTable) -> list[str]:
    """List the keys whose values differ between the trials so far; all keys if there is only one trial."""
    rows = list(table.rows.values())
    keys = dict.fromkeys(key for row in rows for key in row.params)
    return [key for key in keys if len(rows) == 1 or len({str(row.params.get(key, "")) for row in rows}) > 1]


def _render_trials(table: TrialTable, width: int) -> RenderableType:
    rows, num_hidden = _choose_rows(table)
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", caption_justify="left", caption_style="dim")
    names = _choose_fitting_params(table, rows, width - 46 - 16 * len(table.objectives))
    costs = [format_cost_name(objective.name) for objective in table.objectives]
    titles = ["trial", "state", "epoch", format_metric_name(table.metric), *costs, *names.values(), "time"]
    for place, title in enumerate(titles):
        shown.add_column(title, justify="left" if place == 1 else "right", no_wrap=True)
    best = table.find_front()
    for row in rows:
        shown.add_row(*_make_cells(table, row, list(names), is_best=row in best))
    if num_hidden:
        shown.caption = f"and {num_hidden} more in trials.csv"
    return shown


def _choose_fitting_params(table: TrialTable, rows: Sequence[TrialRow], width: int) -> dict[str, str]:
    """Choose the parameters whose columns fit into the width. Returns key -> short name."""
    names = shorten_names(_list_searched_keys(table))
    fitting: dict[str, str] = {}
    for key, name in names.items():
        longest = max(len(format_value(row.params[key])) if key in row.params else 0 for row in rows)
        width -= max(len(name), longest) + 2
        if width < 0:
            break
        fitting[key] = name
    return fitting


def _render_last_error(table: TrialTable) -> list[RenderableType]:
    failed = [row for row in table.rows.values() if row.error]
    if not failed:
        return []
    row = max(failed, key=lambda row: row.number)
    return [Text(f"trial {row.number}: {row.error}", style="red", no_wrap=True, overflow="ellipsis")]


def _make_cells(table: TrialTable, row: TrialRow, keys: Sequence[str], *, is_best: bool) -> list[RenderableType]:
    value = table.get_value(row)
    return [
        str(row.number),
        Text(row.state, style=_COLOURS[row.state]),
        f"{row.epochs}/{table.max_epochs}",
        Text(format_metric_value(table.metric, value) if row.epochs else "-", style="bold" if is_best else ""),
        *(_make_cost_cell(row, each.name, is_best=is_best) for each in table.objectives),
        *(format_value(row.params[key]) if key in row.params else "" for key in keys),
        format_duration(row.seconds),
    ]


def _make_cost_cell(row: TrialRow, name: str, *, is_best: bool) -> RenderableType:
    if name not in row.costs:
        return "-"
    return Text(format_cost_value(name, row.costs[name]) + (" *" if is_best else "  "), style="bold" if is_best else "")


def _choose_rows(table: TrialTable) -> tuple[list[TrialRow], int]:
    """Choose the rows of the table: the best trials, then others that have ended or paused, then some that run.

    Returns:
        The rows, and the number of trials that are left out.
    """
    running = sorted((row for row in table.rows.values() if _may_run(row)), key=lambda row: row.number)
    ranked = [row for row in table.rank_trials() if not _may_run(row)]
    sound = {row.number for row in ranked}
    ended = ranked + [row for number, row in sorted(table.rows.items()) if not _may_run(row) and number not in sound]
    num_running = min(len(running), max(_MAX_RUNNING_ROWS, _MAX_ROWS - len(ended)))
    rows = ended[: _MAX_ROWS - num_running] + running[:num_running]
    return rows, len(table.rows) - len(rows)


def _may_run(row: TrialRow) -> bool:
    """Return whether a trial runs or waits to run. A paused trial may never be resumed."""
    return row.state in ("running", "waiting")
