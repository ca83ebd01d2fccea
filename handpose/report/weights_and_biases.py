"""Weights & Biases log of a sweep: one run per trial, all in one group, in addition to TensorBoard.

The wandb package is optional.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from handpose.errors import join_lines
from handpose.report.sweep_record import StoryLine
from handpose.report.trial_table import TrialRow
from handpose.report.utilisation import Utilisation

_KEY_FILE = "key"


class WandbLog:
    """The Weights & Biases runs of all trials of a sweep.

    All work is done in a background thread, so that no trial waits for the network. The first error is printed, and the
    sweep continues without this log.

    Args:
        folder: folder of the sweep. Its folder wandb/ holds data that waits to be sent, and a key that is part of the
            identifiers of the runs, so that a resumed sweep continues the same runs.
        project: the Weights & Biases project.
        group: the group of the runs.
        run_name: returns the name of the run of a trial.
    """

    def __init__(self, folder: Path, *, project: str, group: str, run_name: Callable[[int], str]) -> None:
        self._folder, self._project, self._group, self._run_name = folder, project, group, run_name
        self._key = _read_or_make_key(folder / "wandb" / _KEY_FILE)
        self._runs: dict[int, Any] = {}
        self._utilisation: dict[int, dict[str, float]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        self._works = True

    def open_run(self, row: TrialRow) -> None:
        """Log that a trial starts or resumes, possibly with changed parameters."""
        self._run_in_background(
            lambda row: self._get_run(row).config.update(dict(row.params), allow_val_change=True), row
        )

    def log_costs(self, row: TrialRow, costs: Mapping[str, float]) -> None:
        """Log the costs of a trial, which are measured before it is trained."""
        self._run_in_background(lambda row: self._get_run(row).summary.update(dict(costs)), row)

    def log_utilisation(self, row: TrialRow, used: Utilisation) -> None:
        """Log what a trial has used from its last report to the row's epoch."""
        self._utilisation[row.number] = used.to_scalars()  # logged with the epoch, since a step is logged once

    def log_epoch(self, row: TrialRow, pictures: Mapping[str, Path]) -> None:
        """Log the metrics at the row's epoch.

        Args:
            row: the row of the trial.
            pictures: name -> JPEG file.
        """
        contents = {name: file.read_bytes() for name, file in pictures.items()}
        scalars = self._utilisation.pop(row.number, {})
        self._run_in_background(lambda row: self._log(row, scalars, contents), row)

    def close_run(self, row: TrialRow, *, ended_s: float, story: Sequence[StoryLine] = ()) -> None:
        """Log that a trial does not run any more, and finish its run. It may run again later."""
        self._run_in_background(self._close_run, row)

    def close(self) -> None:
        """Finish all runs, and wait until everything has been sent."""
        for number in list(self._runs):
            self._run_in_background(self._finish_run, TrialRow(number, {}))
        self._thread.shutdown(wait=True)

    def _run_in_background(self, action: Callable[[TrialRow], object], row: TrialRow) -> None:
        self._thread.submit(self._run_ignoring_errors, action, replace(row))

    def _run_ignoring_errors(self, action: Callable[[TrialRow], object], row: TrialRow) -> None:
        if not self._works:
            return
        try:
            action(row)
        except Exception as error:  # wandb raises many kinds, for example without an account or network
            self._works = False
            print(f"wandb: {join_lines(error)}; the sweep continues without it", flush=True)

    def _get_run(self, row: TrialRow) -> Any:
        if row.number not in self._runs:
            import wandb

            name = self._run_name(row.number)
            self._runs[row.number] = wandb.init(
                project=self._project,
                group=self._group,
                name=name,
                id=f"{self._key}-{name}",
                job_type="trial",
                dir=self._folder,
                resume="allow",
                reinit="create_new",  # runs of several trials are open at the same time
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True),
            )
        return self._runs[row.number]

    def _log(self, row: TrialRow, utilisation: Mapping[str, float], pictures: Mapping[str, bytes]) -> None:
        import wandb

        images = {f"val_pictures/{name}": wandb.Image(Image.open(BytesIO(pixels))) for name, pixels in pictures.items()}
        work = {"epochs": row.epochs, "seconds": row.seconds}
        self._get_run(row).log({**row.metrics, **work, **utilisation, **images}, step=row.epochs)

    def _close_run(self, row: TrialRow) -> None:
        run = self._get_run(row)
        ending = {"state": row.state, "reason": row.reason, "error": row.error}
        run.summary.update({**ending, "epochs": row.epochs, "seconds": row.seconds})
        self._finish_run(row)

    def _finish_run(self, row: TrialRow) -> None:
        if row.number in self._runs:
            self._runs.pop(row.number).finish(exit_code=int(row.state in ("diverged", "failed")))


def _read_or_make_key(file: Path) -> str:
    """Return the key of the sweep, which stays the same when the sweep is resumed."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")
