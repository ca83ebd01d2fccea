"""What the page shows of one sweep, read from its files when they have changed."""

import threading
import time
from pathlib import Path
from typing import Any

from handpose.report.plots import plot_best_so_far, plot_learning_curves
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.analysis.status import summarise_status
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.interventions import InterventionFiles

_CHANGING_FILES = (EVENTS_FILE, "confirm/confirm.yaml", "confirm/events.jsonl", "retrain/metrics.json", "best.yaml")


class LiveSweep:
    """A sweep whose files may change at any time.

    Args:
        folder: the folder of the sweep.

    Attributes:
        folder: the folder of the sweep.
        interventions: the commands of users.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.interventions = InterventionFiles(folder)
        self._lock = threading.Lock()
        self._seen: list[tuple[float, int] | None] = []
        self._snapshot: dict[str, Any] = {}
        self._next_read = 0.0

    def read(self) -> dict[str, Any]:
        """Return the status of the sweep and its charts.

        Returns:
            `status`: as `python -m handpose.sweep.status DIR --json` prints it. `charts`: name -> chart for plotly.js;
            empty before the first report. `read_at`: Unix time at which the files were read.

        Raises:
            UserError: the files are damaged.
        """
        with self._lock:
            seen = [self._get_state(name) for name in _CHANGING_FILES]
            if (seen != self._seen or self._is_running) and time.monotonic() >= self._next_read:
                began = time.monotonic()
                self._snapshot = self._read_files()
                self._seen = seen
                # Reading takes at most a tenth of the time, even with very many trials.
                self._next_read = began + max(1.0, 10 * (time.monotonic() - began))
            return self._snapshot

    @property
    def _is_running(self) -> bool:
        """Whether the times of the sweep advance even if its files have not changed."""
        return bool(self._snapshot.get("status", {}).get("state") == "running")

    def _get_state(self, name: str) -> tuple[float, int] | None:
        try:
            found = (self.folder / name).stat()
        except OSError:
            return None
        return found.st_mtime, found.st_size

    def _read_files(self) -> dict[str, Any]:
        status = summarise_status(self.folder)
        charts = {}
        if any(trial["epochs"] for trial in status["trials"]):
            record = read_sweep(self.folder, with_importance=False)
            charts = {"best": plot_best_so_far([record]), "curves": plot_learning_curves(record)}
        return {"status": status, "charts": charts, "read_at": time.time()}
