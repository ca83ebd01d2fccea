"""Shows the status of a sweep from its files, from another process; nothing is locked or changed."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from handpose.errors import UserError
from handpose.files import read_json
from handpose.report.formatting import format_duration, format_interval, format_metric, get_test_name
from handpose.report.reasons import format_spent_budget
from handpose.report.terminal import SweepClock, render_sweep
from handpose.report.trial_table import TrialRow
from handpose.report.utilisation import Utilisation, combine, judge
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.analysis.read_sweep import read_combined_seeds
from handpose.sweep.controller.history import History, make_empty_table
from handpose.sweep.record.events import EVENTS_FILE, Event, SweepClosed, SweepOpened, SweepSteered, read_events
from handpose.sweep.record.settings import STOP_WHEN_KEY, SweepSettings, format_resume_command, restore_settings
from handpose.sweep.record.utilisation_file import UTILISATION_FILE, read_utilisation
from handpose.sweep.storage.stored_sweep import open_sweep_for_reading
from handpose.urls import is_url
from handpose.yaml_files import read_yaml

STATUS_FORMAT = 1
"""Version of what `summarise_status` returns. Increase it when a field changes its meaning or is removed."""


def print_status(place: str) -> None:
    """Print the status of the sweep in a folder, or at the URL of an object store.

    Raises:
        UserError: there is no sweep.
    """
    console = Console()
    with open_sweep_for_reading(place) as folder:
        console.print(render_status(folder, width=console.width, place=place if is_url(place) else None), crop=False)


def render_status(folder: Path, *, width: int, place: str | None = None) -> RenderableType:
    """Render the sweep in a folder as its live view would, with the later steps: confirmation and retraining.

    Args:
        folder: folder of the sweep.
        width: width of the terminal in columns.
        place: what the command to resume names instead of the folder, such as a URL.

    Raises:
        UserError: there is no sweep, or its files are damaged.
    """
    record, go_on = _read_config(folder), format_resume_command(place or folder)
    sweep = restore_settings(record["sweep"], folder)
    events = read_events(folder / EVENTS_FILE)
    spaces = [event.space.name for event in events if isinstance(event, SweepSteered) and event.space is not None]
    space = Path([str(record["search_space"]), *spaces][-1]).stem
    shown = _render_sweep(sweep, f"sweep {sweep.name}  ·  {space}", width=width, go_on=go_on)
    confirming = folder / "confirm"
    if (confirming / EVENTS_FILE).is_file():
        of_the_sweep = {"second_objective": None, "time_budget_s": None, "gpu_hours": None, "stop_when": None}
        again = restore_settings(record["sweep"] | of_the_sweep, confirming)
        shown += [Text(), *_render_sweep(again, f"confirmation of {sweep.name}", width=width, go_on=go_on)]
    runs_again = bool(events) and not isinstance(
        events[-1], SweepClosed
    )  # results after an earlier end are out of date
    return Group(*shown, *map(Text, [] if runs_again else _describe_later_steps(folder, sweep.metric)))


def summarise_status(folder: Path) -> dict[str, Any]:
    """Summarise the sweep in a folder as plain values, for other programs; docs/report.md describes the fields.

    Raises:
        UserError: there is no sweep, or its files are damaged.
    """
    record = _read_config(folder)
    sweep = restore_settings(record["sweep"], folder)
    status = _read_status(sweep)
    table, last = status.history.table, status.last
    ranked = table.rank_trials()
    stage = _find_stage(folder, last)
    is_open = stage == "trials"  # results after an earlier end are out of date
    metrics = folder / "retrain" / "metrics.json"
    ended_by = status.history.spent_budget if isinstance(last, SweepClosed) and last.reason == "spent" else None
    left_s = status.make_clock(sweep.time_budget_s).estimate_left_s(table)
    measured = read_utilisation(folder / UTILISATION_FILE)
    used = {number: combine([each.used for each in parts]) for number, parts in measured.items()}
    return {
        "format": STATUS_FORMAT,
        "name": sweep.name,
        "state": last.reason if isinstance(last, SweepClosed) else "running",
        "ended_by": None if ended_by is None else ended_by._asdict(),
        "stage": stage,
        "silent_s": status.silent_s,
        "used_s": status.history.at,
        "left_s": left_s,
        "gpu_hours": status.history.count_gpu_hours(status.history.at),
        "num_trials": table.num_trials,
        "max_epochs": table.max_epochs,
        "num_slots": table.num_slots,
        "metric": table.metric,
        "mode": table.mode,
        "counts": dict(table.count_states()),
        "best": ranked[0].number if ranked else None,
        "utilisation": _summarise_utilisation(combine(list(used.values()))) if used else None,
        "trials": [_summarise_trial(row, used.get(number)) for number, row in sorted(table.rows.items())],
        "confirmed": None if is_open else read_yaml(folder / "confirm" / "confirm.yaml") or None,
        "retrained": read_json(metrics)["metrics"] if stage == "done" and metrics.is_file() else None,
    }


def _find_stage(folder: Path, last: Event | None) -> str:
    """Return the step of the sweep, or the one in which its process ended."""
    if not isinstance(last, SweepClosed) or last.reason not in ("finished", "spent"):
        return "trials"
    closed_at = (folder / EVENTS_FILE).stat().st_mtime
    for name, stage in (("report.html", "done"), ("best.yaml", "retraining")):
        file = folder / name
        if file.is_file() and file.stat().st_mtime >= closed_at:
            return stage
    return "confirmation"


def _summarise_trial(row: TrialRow, used: Utilisation | None) -> dict[str, Any]:
    names = ("number", "state", "epochs", "metrics", "costs", "seconds", "node", "params", "reason", "error")
    utilisation = None if used is None else _summarise_utilisation(used)
    return {name: getattr(row, name) for name in names} | {"utilisation": utilisation}


def _summarise_utilisation(used: Utilisation) -> dict[str, Any]:
    verdict, phase, share, remedy = judge(used)
    return {"verdict": verdict, "phase": phase, "share": share, "remedy": remedy, **asdict(used)}


@dataclass
class _SweepStatus:
    """What the events say about a sweep.

    Attributes:
        history: the history after all events so far.
        last: the last event.
        num_slots: highest number of trials that ran at a time.
        silent_s: seconds since the last event of a sweep that was not closed.
    """

    history: History
    last: Event | None = None
    num_slots: int = 1
    silent_s: float = 0.0

    def add_event(self, event: Event) -> None:
        """Apply the next event; past decisions are taken as recorded."""
        self.history.apply(event)
        self.last = event
        self.num_slots = max(self.num_slots, len(self.history.live["running"]))

    @property
    def is_running(self) -> bool:
        """Whether a process runs the sweep, as far as the events show.

        A process that was killed leaves no event, so this may be true for it.
        """
        return not isinstance(self.last, SweepClosed)

    def make_clock(self, time_budget_s: float | None) -> SweepClock:
        """Make a clock that has run as long as the sweep has."""
        clock = SweepClock(time_budget_s=time_budget_s, used_s=self.history.at + self.silent_s)
        if not self.is_running:
            clock.stop()
        return clock


def _read_status(sweep: SweepSettings) -> _SweepStatus:
    """Read the events of a sweep, and complete its table as a live view has it."""
    table = make_empty_table(sweep)
    status = _SweepStatus(History(sweep, scheduler=Fifo(), table=table))
    events = sweep.path / EVENTS_FILE
    for event in read_events(events):
        status.add_event(event)
    if status.is_running and events.exists():
        status.silent_s = max(0.0, time.time() - events.stat().st_mtime)
    now = status.history.at + status.silent_s
    for number in status.history.live["running"]:
        status.history.trials[number].update_seconds(now)
    table.gpu_hours = status.history.count_gpu_hours(now)
    table.num_trials, table.num_slots = status.history.num_trials, status.num_slots
    table.checkpoint_bytes = status.history.retention.total_bytes
    table.checkpoint_budget_bytes = status.history.retention.budget_bytes
    return status


def _render_sweep(sweep: SweepSettings, title: str, *, width: int, go_on: str) -> list[RenderableType]:
    status = _read_status(sweep)
    clock = status.make_clock(sweep.time_budget_s)
    lines = [Text(line, style="dim", no_wrap=True, overflow="ignore") for line in _describe_progress(status, go_on)]
    return [render_sweep(title, status.history.table, clock, width=width), *lines]


def _describe_progress(sweep_status: _SweepStatus, go_on: str) -> list[str]:
    """Return a sentence and, if the sweep can be resumed, the command on a separate line, so that it can be copied."""
    if isinstance(sweep_status.last, SweepClosed):
        reason = sweep_status.last.reason
        if reason == "finished":
            return [reason]
        budget = sweep_status.history.spent_budget
        if reason == "spent" and budget is not None:
            other = "a smaller value" if budget.key == STOP_WHEN_KEY else "a larger one"
            return [f"{format_spent_budget(*budget)}; to resume with {other}:", f"{go_on} {budget.resume_override}"]
        return [f"{reason}; to resume:", go_on]
    if sweep_status.last is None or isinstance(sweep_status.last, SweepOpened):
        return ["its workers are starting"]
    return [
        f"the last event was {format_duration(sweep_status.silent_s, is_rough=True)} ago; if its process has ended, "
        "resume with:",
        go_on,
    ]


def _describe_later_steps(folder: Path, metric: str) -> list[str]:
    """Return lines about the confirmation and the retraining, as far as they have begun."""
    lines = []
    confirmed = read_yaml(folder / "confirm" / "confirm.yaml")
    if confirmed.get("winner") is not None:
        winner = confirmed["candidates"][confirmed["winner"]]
        mean = format_metric(confirmed["metric"], winner["mean"])
        interval = format_interval(confirmed["metric"], winner.get("low"), winner.get("high"))
        lines.append(f"confirmed   {winner['label']}: mean {mean}{interval or ', no interval'}")
    retraining = folder / "retrain"
    if (retraining / "metrics.json").is_file():
        combined = read_combined_seeds(retraining)
        metrics = read_json(retraining / "metrics.json")["metrics"] if combined is None else combined.mean
        lines.append(_describe_retrained(metrics, metric))
    for place in (retraining, *sorted(retraining.glob("seed_*"))):
        if (place / "config.yaml").is_file() and not (place / "metrics.json").is_file():
            lines.append(_describe_retraining(place, metric))
    return ["", *lines] if lines else []


def _describe_retrained(metrics: Mapping[str, float | None], metric: str) -> str:
    tested = get_test_name(metric)
    value = metrics.get(tested)
    if value is None or not math.isfinite(value):
        return "retrained"
    return f"retrained   test {format_metric(tested, value)}"


def _describe_retraining(folder: Path, metric: str) -> str:
    """Describe the progress of the retraining, from its TensorBoard log."""
    max_epochs = read_yaml(folder / "config.yaml")["trainer"]["max_epochs"]
    seed = f"{folder.name.replace('_', ' ')}, " if folder.name.startswith("seed_") else ""
    log = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 1})
    if not (folder / "tensorboard").is_dir() or metric not in log.Reload().Tags()["scalars"]:
        return f"retraining  {seed}epoch 0/{max_epochs}"
    last = log.Scalars(metric)[-1]
    return f"retraining  {seed}epoch {last.step}/{max_epochs}, validation {format_metric(metric, last.value)}"


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_yaml(folder / "sweep.yaml").get("config")
    if not isinstance(config, dict) or not isinstance(config.get("sweep"), dict):
        raise UserError(f"{folder} has no sweep: there is no sweep.yaml of a sweep in it; give the folder of a sweep")
    return config
