"""A sweep in Weights & Biases: one run a trial, all in one group, beside TensorBoard. The package is optional."""

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from handpose.report.trial_table import TrialRow

_KEY_FILE = "key"


class WandbLog:
    """The runs of all trials.

    folder: of the sweep; its folder wandb/ is for what waits to be sent, and for the key that makes the runs' names its
    own: a sweep that goes on goes on with the same runs. project, group: as the site has them. run_name: of a trial.

    All is done in a thread of its own, so that no trial waits for a network. What goes wrong there is told once, and
    the sweep goes on without.
    """

    def __init__(self, folder: Path, *, project: str, group: str, run_name: Callable[[int], str]) -> None:
        self._folder, self._project, self._group, self._run_name = folder, project, group, run_name
        self._key = _read_or_make_key(folder / "wandb" / _KEY_FILE)
        self._runs: dict[int, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        self._works = True

    def open_run(self, row: TrialRow) -> None:
        """A trial begins, or goes on, maybe with other parameters."""
        self._run_in_background(
            lambda row: self._get_run(row).config.update(dict(row.params), allow_val_change=True), row
        )

    def log_costs(self, row: TrialRow, costs: Mapping[str, float]) -> None:
        """What the trial costs, before it is trained."""
        self._run_in_background(lambda row: self._get_run(row).summary.update(dict(costs)), row)

    def log_epoch(self, row: TrialRow, pictures: Mapping[str, Path]) -> None:
        """The metrics of the row's epoch. pictures: name -> JPEG file."""
        contents = {name: file.read_bytes() for name, file in pictures.items()}
        self._run_in_background(lambda row: self._log(row, contents), row)

    def close_run(self, row: TrialRow, *, ended_s: float) -> None:
        """The trial does not run, and may be over."""
        self._run_in_background(self._close_run, row)

    def close(self) -> None:
        """Send what is left."""
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
        except Exception as error:  # of wandb: no account, no network
            self._works = False
            print(f"wandb: {' '.join(str(error).split())}; the sweep continues without it", flush=True)

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
                reinit="create_new",  # the trials' runs are open at the same time
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True),
            )
        return self._runs[row.number]

    def _log(self, row: TrialRow, pictures: Mapping[str, bytes]) -> None:
        import wandb

        images = {f"val_pictures/{name}": wandb.Image(Image.open(BytesIO(pixels))) for name, pixels in pictures.items()}
        self._get_run(row).log({**row.metrics, "epochs": row.epochs, "seconds": row.seconds, **images}, step=row.epochs)

    def _close_run(self, row: TrialRow) -> None:
        run = self._get_run(row)
        run.summary.update({"state": row.state, "epochs": row.epochs, "seconds": row.seconds, "error": row.error})
        self._finish_run(row)

    def _finish_run(self, row: TrialRow) -> None:
        if row.number in self._runs:
            self._runs.pop(row.number).finish(exit_code=int(row.state in ("diverged", "failed")))


def _read_or_make_key(file: Path) -> str:
    """Of this sweep, the same in every process that goes on with it."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")
