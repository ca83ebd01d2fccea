"""Measure what our own code costs a sweep as its history grows: seconds to restore it, milliseconds per report.

    python benchmarks/bookkeeping.py --trials 10000 --output bookkeeping.json

A sweep without workers. The events, the study (random proposals), trials.csv and the TensorBoard logs are really
written, with ASHA and learning curves from a formula. At several sizes the process is treated as killed, and the sweep
is restored. Goals: restore 10,000 trials in at most 30 s, and process a report in at most 5 ms.
"""

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from optuna.samplers import RandomSampler

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from hydra.utils import instantiate  # noqa: E402

from handpose.config import compose, quote_override  # noqa: E402
from handpose.files import write_json  # noqa: E402
from handpose.report.terminal import PlainView, SweepClock  # noqa: E402
from handpose.report.trial_table import TrialTable  # noqa: E402
from handpose.schedulers.asha import Asha  # noqa: E402
from handpose.search.optuna_searcher import OptunaSearcher  # noqa: E402
from handpose.search.space import load_space  # noqa: E402
from handpose.sweep.controller.controller import SweepController  # noqa: E402
from handpose.sweep.controller.history import History  # noqa: E402
from handpose.sweep.driver.recorder import Recorder  # noqa: E402
from handpose.sweep.driver.run import open_trial_logs  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, EventLog  # noqa: E402
from handpose.sweep.record.settings import SweepSettings  # noqa: E402
from handpose.sweep.record.trial_segment import TrialSegment  # noqa: E402

_EPOCHS = 27
_SLOTS = 16
_METRIC = "val/pa_mpjpe_mm"


class SilentView(PlainView):
    """A view that shows nothing."""

    def __init__(self) -> None:
        self._clock = SweepClock(time_budget_s=None)

    def show_trial_end(self, table: TrialTable, row: object) -> None:
        pass


class BookkeepingSweep:
    """A sweep of which only the bookkeeping is real."""

    def __init__(self, folder: Path, num_trials: int) -> None:
        config = compose(
            "tune",
            [
                quote_override("sweep.folder", str(folder)),
                f"sweep.num_trials={num_trials}",
                f"sweep.max_epochs={_EPOCHS}",
                "sweep.name=bookkeeping",
            ],
        )
        self.settings: SweepSettings = instantiate(config.sweep)
        self.stack: list[Callable[[], None]] = []

    def open(self, *, resume: bool, num_slots: int = _SLOTS) -> None:
        """Open the sweep as run_sweep does, without Ray."""
        settings = self.settings
        self.searcher = OptunaSearcher(
            space=load_space("default"),
            folder=settings.path / "study",
            name=settings.name,
            metric=settings.metric,
            mode=settings.target.mode,
            max_epochs=settings.max_epochs,
            seed=0,
            defaults={},
            resume=resume,
            sampler=partial(RandomSampler),
        )
        self.log = EventLog(settings.path / EVENTS_FILE)
        scheduler = Asha(mode="stop", grace_period=1, reduction_factor=3, brackets=1, max_epochs=_EPOCHS, seed=0)
        table = TrialTable(*settings.target, settings.num_trials, settings.max_epochs)
        history = History(settings, scheduler=scheduler, table=table)
        self.state = SweepController(settings, log=self.log, history=history, searcher=self.searcher)
        logs = open_trial_logs(settings, table)
        recorder = Recorder(
            table,
            folder=settings.path,
            retention=history.retention,
            refresh_times=self.state.refresh_times,
            view=SilentView(),
            logs=logs,
        )
        recorder.restore(self.state.past_events)
        self.state.open(num_slots=num_slots, listener=recorder)
        self.recorder = recorder

    def close(self) -> None:
        """Close the files as if the process were killed: no event is written."""
        self.searcher.close()
        self.log.close()

    def grow(self, num_trials: int) -> list[float]:
        """Run until so many trials have started and all have ended. Return the cost of each report in milliseconds."""
        costs: list[float] = []
        running: list[tuple[TrialSegment, int]] = []
        while True:
            while len(self.state.history.trials) < num_trials and (segment := self.state.next_segment()):
                running.append((segment, segment.epoch))
            if not running:
                return costs
            segment, epoch = running.pop(0)
            metrics = {_METRIC: _compute_loss(segment, epoch + 1), "val/pck_auc": 0.5, "val/keypoint_error_px": 3.0}
            began = time.perf_counter()
            is_continued = self.state.process_report(segment.trial, epoch + 1, metrics, node="node")
            costs.append((time.perf_counter() - began) * 1e3)
            if is_continued:
                running.append((segment, epoch + 1))


def _compute_loss(segment: TrialSegment, epoch: int) -> float:
    noise = random.Random(segment.trial * 100 + epoch).gauss(0, 0.3)
    return 15 + abs(math.log10(segment.params["optimizer.lr"]) + 2.5) * 4 + 10 / epoch + noise


def main() -> None:
    """Print a table of trials, restore times and costs per report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=int, default=10_000, help="number of trials of the sweep; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    rows = []
    print(f"{'trials':>8}{'reports':>9}{'restored in s':>15}{'report ms, median':>19}{'99 %':>8}{'most':>8}")
    with tempfile.TemporaryDirectory() as folder:
        sweep = BookkeepingSweep(Path(folder) / "sweep", given.trials + 100)
        for number, size in enumerate((given.trials // 100, given.trials // 10, given.trials)):
            sweep.open(resume=number > 0)
            sweep.grow(size - 50)
            sweep.close()
            began = time.perf_counter()
            sweep.open(resume=True)
            restored_s = time.perf_counter() - began
            costs = sorted(sweep.grow(size))
            row = {
                "trials": size,
                "reports": sweep.state.history.num_reports,
                "restored_s": round(restored_s, 2),
                "report_ms_median": round(statistics.median(costs), 2),
                "report_ms_99": round(costs[int(len(costs) * 0.99)], 2),
                "report_ms_most": round(costs[-1], 2),
            }
            rows.append(row)
            print(
                f"{row['trials']:8}{row['reports']:9}{row['restored_s']:15.2f}{row['report_ms_median']:19.2f}"
                f"{row['report_ms_99']:8.2f}{row['report_ms_most']:8.2f}",
                flush=True,
            )
            sweep.close()
    if given.output:
        write_json(given.output, {"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
