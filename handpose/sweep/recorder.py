"""Writes down what happens to the trials while a sweep runs: table, TensorBoard and terminal, from Tune's callbacks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from handpose.report.table import State, TrialRow, TrialTable
from handpose.report.tensorboard import TrialLog
from handpose.report.terminal import SweepView
from handpose.sweep.searcher import PARAMS
from handpose.sweep.space import Params

_CSV_EVERY_S = 1.0


class Recorder(tune.Callback):
    """Keeps the table of trials, and with it trials.csv, a TensorBoard run a trial, and the view in the terminal.

    table: to fill. folder: of the sweep. numbers: of Tune's trials, by id. command: that trains parameters again.
    view: shown while the sweep runs. is_interrupted: whether the sweep is being ended by hand.
    """

    def __init__(
        self,
        table: TrialTable,
        *,
        folder: Path,
        numbers: Mapping[str, int],
        command: Callable[[Params], str],
        view: SweepView,
        is_interrupted: Callable[[], bool],
    ) -> None:
        self.table = table
        self._folder = folder
        self._numbers = numbers
        self._command = command
        self._view = view
        self._is_interrupted = is_interrupted
        self._logs: dict[int, TrialLog] = {}
        self._started: dict[int, float] = {}
        self._is_behind = False  # trials.csv, of the table
        self._next_write = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with an experiment's settings; open files do not travel

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        number = self._numbers[trial.trial_id]
        if number in self.table.rows:  # goes on after a pause
            return
        params = dict(trial.config[PARAMS])
        self.table.rows[number] = TrialRow(number, params, command=self._command(params))
        self._started[number] = time.time()
        name = run_name(number)
        self._logs[number] = TrialLog(
            self._folder / "tensorboard" / name, name=name, params=params, started_s=self._started[number]
        )
        self._is_behind = True

    def on_trial_result(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._row(trial)
        params = dict(result["config"][PARAMS])  # it ran with these; trial.config may be of its next stretch already
        if params != row.params:  # changed by population based training: no command line leads there
            row.params, row.command = params, ""
        row.metrics = {name: value for name, value in result.items() if "/" in name}
        row.epochs = result["epoch"]
        row.node = result.get("hostname", "")
        self._logs[row.number].report(row.epochs, row.metrics)
        self._is_behind = True

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, self._state(self._row(trial)))

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        row = self._row(trial)
        row.error = cause(_text(trial.error_file))
        self._end(trial, "failed")

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        self._tick()
        if self._is_behind and time.monotonic() >= self._next_write:
            self._write()
        self._view.refresh(self.table)

    def on_experiment_end(self, trials: Sequence[Trial], **info: Any) -> None:
        """Tune ends trials without a word when the budget is spent or the sweep is interrupted."""
        for trial in trials:
            if not self._row(trial).is_over:
                self._end(trial, self._state(self._row(trial)))
        self._write()
        self._view.refresh(self.table, at_once=True)

    def _row(self, trial: Trial) -> TrialRow:
        number = self._numbers[trial.trial_id]
        if number not in self.table.rows:  # suggested, but never started
            params = dict(trial.config[PARAMS])
            self.table.rows[number] = TrialRow(number, params, command=self._command(params))
        return self.table.rows[number]

    def _state(self, row: TrialRow) -> State:
        if row.epochs and not math.isfinite(self.table.value(row)):
            return "diverged"
        if row.epochs >= self.table.max_epochs:
            return "complete"
        return "interrupted" if self._is_interrupted() else "stopped"

    def _end(self, trial: Trial, state: State) -> None:
        row = self._row(trial)
        self._tick()
        row.state = state
        log = self._logs.pop(row.number, None)
        if log is not None:
            log.close(failed=state in ("diverged", "failed"), ended_s=time.time())
        self._started.pop(row.number, None)
        self._is_behind = True
        self._view.ended(self.table, row)

    def _tick(self) -> None:
        for number, started in self._started.items():
            self.table.rows[number].seconds = time.time() - started

    def _write(self) -> None:
        began = time.monotonic()
        self.table.write_csv(self._folder / "trials.csv")
        self._is_behind = False
        # However long the table grows, writing it takes at most a twentieth of the time.
        self._next_write = began + max(_CSV_EVERY_S, 20 * (time.monotonic() - began))


def run_name(number: int) -> str:
    """Name of a trial's folder and TensorBoard run."""
    return f"trial_{number:04d}"


def _text(file: str | None) -> str:
    try:
        return Path(file).read_text() if file else ""
    except OSError:
        return ""


def cause(text: str) -> str:
    """What a trial's error.txt says, in a line: the end of a traceback, or that the worker is gone."""
    if "The actor died unexpectedly" in text:
        return "the worker process died: it was killed, ran out of memory or crashed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
