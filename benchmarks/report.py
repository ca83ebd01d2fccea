"""Measure the size of the report of a large sweep, the time to write it, and the time to open it in a browser.

    python benchmarks/report.py --trials 1000 --output benchmarks/results/report.json

The sweep has a conditional space, two objectives, failures, divergence, and trials whose cost is too high. Its events
and study are really written, with ASHA and random proposals; the learning curves come from a formula. The browser is a
headless Chromium (apt-get install chromium). --pictures DIR saves screenshots of the whole page, 390 and 1440 pixels
wide, light and dark, and a PDF of it. Goals: under 10 MB, opened in under 3 s, nothing wider than the window, no
messages on the console.
"""

import argparse
import base64
import heapq
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optuna.samplers import RandomSampler

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from hydra.utils import instantiate  # noqa: E402

from benchmarks.browser import Browser, Tab  # noqa: E402
from handpose.config import compose, list_location_overrides, quote_override  # noqa: E402
from handpose.files import write_json  # noqa: E402
from handpose.report.trial_table import TrialRow, TrialTable, make_second_objectives  # noqa: E402
from handpose.schedulers.asha import Asha  # noqa: E402
from handpose.search.optuna_searcher import OptunaSearcher  # noqa: E402
from handpose.search.space import Params, load_space  # noqa: E402
from handpose.sweep.analysis.report import write_report  # noqa: E402
from handpose.sweep.controller.controller import SegmentFailure, SweepController  # noqa: E402
from handpose.sweep.controller.history import History  # noqa: E402
from handpose.sweep.driver.resume import SweepTask, copy_space, make_sweep_record  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, EventLog  # noqa: E402
from handpose.sweep.record.provenance import collect_provenance  # noqa: E402
from handpose.sweep.record.settings import SweepSettings  # noqa: E402
from handpose.sweep.selection.confirm import CONFIRM_FILE, CONFIRM_FOLDER, choose_candidates, summarise_confirmation  # noqa: E402
from handpose.yaml_files import write_yaml  # noqa: E402

_METRIC = "val/pa_mpjpe_mm"
_SLOTS = 16
_DEFAULTS: Params = {"optimizer.lr": 5e-3, "heatmap.sigma": 0.04, "model/decoder": "pyramid", "model.decoder.depth": 3}
_SKIPS: Params = {"model.decoder.skips": "add"}


# --- a fabricated sweep -----------------------------------------------------------------------------------------------


def make_sweep(
    folder: Path, *, num_trials: int, max_epochs: int = 27, space: str = "decoder_family", is_over: bool = True
) -> TrialTable:
    """Write the files of a sweep to a folder, and return the table of the sweep.

    Args:
        folder: the folder.
        num_trials: number of trials.
        max_epochs: number of epochs of a complete trial.
        space: the search space.
        is_over: whether the sweep is finished and confirmed; else its last trials are running.
    """
    overrides = [
        f"sweep.num_trials={num_trials}",
        f"sweep.max_epochs={max_epochs}",
        f"sweep.name={folder.name}",
        "sweep.second_objective=latency_ms",
        "searcher.constraints.latency_ms=40",
        f"search_space={space}",
    ]
    config = compose("tune", [*overrides, quote_override("sweep.folder", str(folder))])
    found = load_space(space)
    task = SweepTask(config, overrides, list_location_overrides(config), {}, found)
    folder.mkdir(parents=True)
    copy_space(found, folder)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, collect_provenance(data="0123456789abcdef")))
    sweep = _FabricatedSweep(instantiate(config.sweep), space)
    sweep.run(num_left=0 if is_over else _SLOTS // 2)
    if is_over:
        _write_confirmation(folder, sweep.table)
        best = sweep.table.rank_trials()[0]
        write_yaml(
            folder / "best.yaml", {"trial": best.number, "command": f"python train.py best={folder.name}/best.yaml"}
        )
    return sweep.table


class _FabricatedSweep:
    """A sweep as in run_sweep, without Ray: reports come from a formula, and the clock is simulated."""

    def __init__(self, settings: SweepSettings, space: str) -> None:
        self.settings = settings
        self.now = 0.0
        self.searcher = OptunaSearcher(
            space=load_space(space),
            folder=settings.path / "study",
            name=settings.name,
            metric=settings.metric,
            mode=settings.target.mode,
            second_objective=settings.second_objective,
            max_epochs=settings.max_epochs,
            seed=0,
            defaults=_DEFAULTS | _SKIPS,
            constraints={"latency_ms": 40.0},
            sampler=partial(RandomSampler),
        )
        self.log = EventLog(settings.path / EVENTS_FILE)
        objectives = make_second_objectives(settings.second_objective)
        self.table = TrialTable(*settings.target, settings.num_trials, settings.max_epochs, objectives=objectives)
        scheduler = Asha(
            mode="stop", grace_period=1, reduction_factor=3, brackets=1, max_epochs=settings.max_epochs, seed=0
        )
        history = History(settings, scheduler=scheduler, table=self.table)
        self.state = SweepController(
            settings, log=self.log, history=history, searcher=self.searcher, clock=lambda: self.now
        )

    def run(self, *, num_left: int) -> None:
        """Run until at most so many trials are left running."""
        self.state.open(num_slots=_SLOTS)
        waiting: list[tuple[float, int, int]] = []  # (time of the report, trial, epoch)
        while True:
            while (segment := self.state.next_segment()) is not None:
                heapq.heappush(
                    waiting, (self.now + 12 + _compute_epoch_s(segment.params), segment.trial, segment.epoch + 1)
                )
            if not waiting and self.state.is_over:
                break
            if not waiting:  # a trial waits for its retry
                self.now += 10
                continue
            if len(waiting) <= num_left and len(self.table.rows) >= self.settings.num_trials:
                break
            self.now, trial, epoch = heapq.heappop(waiting)
            if self._report_epoch(trial, epoch):
                heapq.heappush(waiting, (self.now + _compute_epoch_s(self.table.rows[trial].params), trial, epoch + 1))
        if not num_left:
            self.state.close("finished")
        self.searcher.close()
        self.log.close()

    def _report_epoch(self, trial: int, epoch: int) -> bool:
        """Report an epoch as a worker would. Return whether the trial continues."""
        params = self.table.rows[trial].params
        draws = random.Random(1000 * trial + epoch)
        if epoch == 1 and not self.state.process_costs(trial, _compute_costs(params)):
            return False
        if draws.random() < 0.004:
            self.state.process_failure(
                trial, SegmentFailure("killed", "the worker's process was killed (signal 9)", "Traceback ...")
            )
            return False
        is_lost = params["optimizer.lr"] > 8e-3 and draws.random() < 0.15
        value = math.nan if is_lost else compute_loss(params, epoch) + draws.gauss(0, 0.25)
        return self.state.process_report(trial, epoch, {_METRIC: value, "val/pck_auc": 0.5}, node="node")


def compute_loss(params: Mapping[str, Any], epoch: int) -> float:
    """Compute a loss that is best at the upper end of sigma's range, a learning rate of 3e-3 and depth 4."""
    depth = params.get("model.decoder.depth")
    decoder = 2.5 if depth is None else 0.5 * abs(depth - 4)
    rate = 3 * abs(math.log10(params["optimizer.lr"] / 3e-3))
    return 9 + decoder + rate + 2 * math.log10(0.08 / params["heatmap.sigma"]) + 12 / epoch**0.8


def _compute_costs(params: Mapping[str, Any]) -> dict[str, float]:
    depth = params.get("model.decoder.depth", 7)
    return {"num_parameters": 1e6 * (1 + depth), "latency_ms": 6.0 + 5 * depth, "memory_mb": 200.0 + 30 * depth}


def _compute_epoch_s(params: Mapping[str, Any]) -> float:
    return 4.0 + params.get("model.decoder.depth", 4)


def _write_confirmation(folder: Path, table: TrialTable) -> None:
    chosen = choose_candidates(table, defaults=_DEFAULTS | _SKIPS, top_k=3)
    seeds = [1, 2, 3]
    rows: dict[int, TrialRow] = {}
    for seed in seeds:
        for place, candidate in enumerate(chosen):
            params = {**candidate.params, "seed": seed}
            value = compute_loss({**_DEFAULTS, **_SKIPS, **params}, table.max_epochs) + random.Random(
                seed * 10 + place
            ).gauss(0, 0.25)
            rows[len(rows)] = TrialRow(len(rows), params, "complete", table.max_epochs, {_METRIC: value})
    trained = replace(table, rows=rows)
    (folder / CONFIRM_FOLDER).mkdir()
    write_yaml(folder / CONFIRM_FOLDER / CONFIRM_FILE, summarise_confirmation(chosen, seeds, trained))


# --- in a browser -----------------------------------------------------------------------------------------------------


def measure_opening(browser: Browser, file: Path) -> tuple[float, float]:
    """Measure the seconds until the page is loaded and the visible part is drawn.

    Returns:
        The wall time, and the time of the page's thread only, which does not depend on the load of the machine.
    """
    with browser.open_tab(width=1440, height=900) as tab:
        tab.call("Performance.enable", timeDomain="threadTicks")
        began = time.perf_counter()
        tab.open(file.as_uri())
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        passed = time.perf_counter() - began
        spent = {each["name"]: each["value"] for each in tab.call("Performance.getMetrics")["metrics"]}
        return passed, spent["TaskDuration"]


def check_charts(browser: Browser, file: Path, *, width: int, pictures: Path | None) -> dict[str, Any]:
    """Draw all charts at a width. Return the page's width, the numbers of charts, and the console messages."""
    with browser.open_tab(width=width, height=900) as tab:
        tab.open(file.as_uri())
        tab.evaluate("for (const place of places) draw(place)")
        found = {
            "width": width,
            "page_width": tab.evaluate("document.documentElement.scrollWidth"),
            "charts": tab.evaluate("places.length"),
            "drawn": tab.evaluate("document.querySelectorAll('.chart .main-svg:first-child').length"),
            "console": list(tab.console_messages),
        }
        if pictures is not None:
            _save_picture(tab, pictures / f"{width}.png")
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
            time.sleep(1)
            _save_picture(tab, pictures / f"{width}_dark.png")
        return found


def _save_picture(tab: Tab, file: Path) -> None:
    shot = tab.call("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=tab.measure_page())
    file.write_bytes(base64.b64decode(shot["data"]))


def print_to_pdf(browser: Browser, file: Path) -> bytes:
    """Return the page as a PDF."""
    with browser.open_tab(width=1440, height=900) as tab:
        tab.open(file.as_uri())
        return base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])


def main() -> None:
    """Measure, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="number of trials of the sweep; default: %(default)s")
    parser.add_argument(
        "--runs",
        type=int,
        default=5,
        help="how often the report is opened; the table has the median; default: %(default)s",
    )
    parser.add_argument(
        "--chromium", default=shutil.which("chromium"), help="path of Chromium; without it the report is not opened"
    )
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder for screenshots and a PDF")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sweep"
        make_sweep(folder, num_trials=given.trials)
        file = folder / "report.html"
        began = time.perf_counter()
        write_report([folder], file, scientific="model.decoder.depth")
        figures: dict[str, Any] = {
            "trials": given.trials,
            "written_s": round(time.perf_counter() - began, 2),
            "megabytes": round(file.stat().st_size / 1e6, 2),
        }
        if given.chromium:
            if given.pictures:
                given.pictures.mkdir(parents=True, exist_ok=True)
            with Browser(given.chromium) as browser:
                times = [measure_opening(browser, file) for _ in range(given.runs)]
                figures["opened_s"], figures["opened_thread_s"] = (
                    round(statistics.median(each), 2) for each in zip(*times, strict=True)
                )
                figures["looks"] = [
                    check_charts(browser, file, width=width, pictures=given.pictures) for width in (390, 1440)
                ]
                if given.pictures:
                    (given.pictures / "print.pdf").write_bytes(print_to_pdf(browser, file))
    for name, value in figures.items():
        print(f"{name:>16}  {value}")
    if given.output:
        write_json(given.output, {"date": time.strftime("%Y-%m-%d"), **figures}, indent=1)


if __name__ == "__main__":
    main()
