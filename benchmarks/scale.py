"""Measure the costs of a sweep's driver as the sweep grows, for 10 to 10,000 stub trials.

    python benchmarks/scale.py --output benchmarks/results/scale.json

driver: the real events, study (random proposals), trials.csv and TensorBoard logs under ASHA, without Ray and workers,
each size in its own process. `trial` and `report` are milliseconds in the last tenth of the trials, so that growth is
visible. `memory` is the growth of the process. `restored` is the time in which a new state reads everything.

wide: the same for many slots at once, with a row for each tenth of the reports: milliseconds of a proposal, a report, a
step (what is shown and written after each of Tune's steps), and a line (which an ended trial gets without a terminal).
All are processor time, so that other load on the machine does not count.

futures: milliseconds that Tune needs to find the next result among so many workers. It shuffles the futures and asks
Ray for the first one that is ready.

sampler: milliseconds of a proposal in a study with so many trials, by `curves` and `tpe` as configured, and by TPE with
one option changed. Random proposals are the baseline: they cost what our own code and the study need.

ray: run_sweep with Ray and two slots, and Tune with its defaults (new actors, its loggers) under its ASHA, over a stub
that reports up to nine epochs at once. `wall` and `cpu` (of the driver's process) are milliseconds per trial, between
the starts of consecutive trials in the second half of the sweep.

Goal: constant cost per trial.
"""

import argparse
import contextlib
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from hydra.utils import instantiate  # noqa: E402
from optuna.samplers import BaseSampler, RandomSampler, TPESampler  # noqa: E402

from benchmarks.bookkeeping import BookkeepingSweep  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from benchmarks.sweeps import run_in_fresh_process  # noqa: E402
from handpose.config import compose, quote_override  # noqa: E402
from handpose.report.terminal import SweepClock, format_trial  # noqa: E402
from handpose.search.optuna_searcher import OptunaSearcher  # noqa: E402
from handpose.search.searcher import TrialSnapshot  # noqa: E402
from handpose.search.space import Params, load_space  # noqa: E402
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE  # noqa: E402
from handpose.sweep.record.trial_segment import TrialSegment  # noqa: E402
from handpose.sweep.trainable.reporting import report_epoch  # noqa: E402

_METRIC = "val/pa_mpjpe_mm"
_EPOCHS = 9
_NUM_PROPOSALS = 15


def main() -> None:
    """Measure the parts and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS), help="what to measure")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[10, 100, 1000, 10_000],
        help="numbers of trials for the parts driver and sampler",
    )
    parser.add_argument(
        "--wide-slots", type=int, nargs="+", default=[10, 100, 1000], help="numbers of slots for the part wide"
    )
    parser.add_argument(
        "--wide-reports", type=int, default=100_000, help="number of reports for the part wide; default: %(default)s"
    )
    parser.add_argument(
        "--ray-sizes", type=int, nargs="*", default=[10, 100, 1000], help="numbers of trials with Ray; 10000 takes long"
    )
    parser.add_argument(
        "--plain-sizes",
        type=int,
        nargs="*",
        default=[10, 100],
        help="numbers of trials with plain Tune; 1000 takes half an hour",
    )
    parser.add_argument("--slots", type=int, default=2, help="slots of Ray; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement; default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    results = {}
    for part in given.parts:
        results[part] = _PARTS[part](given)
        print(format_table(part, results[part]), flush=True)
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    write_results(given.output, {"settings": settings, "parts": results})


def _measure_driver(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [_compute_medians(given.repeats, run_driver, num_trials=size) for size in given.sizes]


def _measure_wide(given: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = [{"num_slots": slots, "num_reports": given.wide_reports} for slots in given.wide_slots]
    return [row for size in sizes for row in run_in_fresh_process(run_wide, **size)]


def _measure_futures(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [_compute_medians(given.repeats, measure_next_result_ms, num_slots=slots) for slots in given.wide_slots]


def _measure_samplers(given: argparse.Namespace) -> list[dict[str, Any]]:
    return [_compute_medians(given.repeats, measure_proposals_ms, num_trials=size) for size in given.sizes]


def _measure_ray(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for side, function, sizes in (("ours", run_ours, given.ray_sizes), ("plain", run_plain, given.plain_sizes)):
        for size in sizes:
            row = _compute_medians(given.repeats, function, num_trials=size, num_slots=given.slots)
            rows.append({"side": side, **row})
    return rows


_PARTS: Mapping[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "driver": _measure_driver,
    "wide": _measure_wide,
    "futures": _measure_futures,
    "sampler": _measure_samplers,
    "ray": _measure_ray,
}


def _compute_medians(repeats: int, function: Callable[..., dict[str, float]], **arguments: Any) -> dict[str, float]:
    runs = [run_in_fresh_process(function, **arguments) for _ in range(repeats)]
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def format_table(part: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows of a part as a table."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    widths = {head: max(10, len(head) + 2) for head in heads}
    lines = [part, "".join(f"{head:>{widths[head]}}" for head in heads)]
    lines += ["".join(f"{row.get(head, ''):>{widths[head]}}" for head in heads) for row in rows]
    return "\n".join(lines) + "\n"


def compute_loss(params: Params, number: int, epoch: int) -> float:
    """Compute a learning curve that falls and is best at a learning rate of 3e-3, with noise for each trial."""
    noise = random.Random(number * 100 + epoch).gauss(0, 0.3)
    return 15 + abs(math.log10(params["optimizer.lr"]) + 2.5) * 4 + 10 / epoch + noise


def measure_rss_mb() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- the driver without Ray -------------------------------------------------------------------------------------------


def run_driver(num_trials: int) -> dict[str, float]:
    """Run a sweep of which only the bookkeeping is real, from its first to its last trial, and restore it."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = BookkeepingSweep(Path(folder) / "sweep", num_trials)
        sweep.open(resume=False)
        before_mb = measure_rss_mb()
        first = num_trials - max(1, num_trials // 10)
        grow_sweep(sweep, first)
        began = time.perf_counter()
        reports_ms = grow_sweep(sweep, num_trials)
        trial_ms = (time.perf_counter() - began) * 1e3 / (num_trials - first)
        memory_mb = measure_rss_mb() - before_mb
        table_ms = _time_ms(lambda: sweep.state.history.table.write_csv(Path(folder) / "trials.csv"))
        num_reports = sweep.state.history.num_reports
        sweep.close()
        restored_ms = _time_ms(lambda: sweep.open(resume=True))
        sweep.close()
    return {
        "trials": num_trials,
        "reports": num_reports,
        "trial_ms": trial_ms,
        "report_ms": statistics.median(reports_ms),
        "trials_csv_ms": table_ms,
        "memory_mb": memory_mb,
        "memory_kb_a_trial": memory_mb * 1e3 / num_trials,
        "restored_s": restored_ms / 1e3,
        "restored_ms_a_trial": restored_ms / num_trials,
    }


def grow_sweep(sweep: BookkeepingSweep, num_trials: int) -> list[float]:
    """Run until so many trials have started and all have ended. Return the cost of each report in milliseconds."""
    costs: list[float] = []
    running: list[tuple[TrialSegment, int]] = []
    state = sweep.state
    while True:
        while len(state.history.trials) < num_trials and (segment := state.next_segment()):
            running.append((segment, segment.epoch))
        if not running:
            return costs
        segment, epoch = running.pop(0)
        value = compute_loss(segment.params, segment.trial, epoch + 1)
        metrics = {_METRIC: value, "val/pck_auc": 0.5, "val/keypoint_error_px": 3.0}
        began = time.perf_counter()
        is_continued = state.process_report(segment.trial, epoch + 1, metrics, node="node")
        costs.append((time.perf_counter() - began) * 1e3)
        if is_continued:
            running.append((segment, epoch + 1))


def run_wide(num_slots: int, num_reports: int) -> list[dict[str, float]]:
    """Run a sweep on many slots until so many reports have arrived. After each report there is a step, as in Tune.

    Returns:
        A row for every tenth of the sweep. The rows are also printed.
    """
    rows, generator = list[dict[str, float]](), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        sweep = BookkeepingSweep(Path(folder) / "sweep", num_reports)
        sweep.open(resume=False, num_slots=num_slots)
        running, before_mb = deque[tuple[TrialSegment, int]](), measure_rss_mb()
        table, events = sweep.state.history.table, Path(folder) / "sweep" / EVENTS_FILE
        for tenth in range(1, 11):
            costs = _measure_reports(sweep, running, num_reports * tenth // 10)
            row = table.rows[generator.randrange(len(table.rows))]
            rows.append(
                {
                    "slots": num_slots,
                    "trials": len(table.rows),
                    "reports": sweep.state.history.num_reports,
                    **{f"{name}_ms": round(statistics.mean(spent), 3) for name, spent in costs.items()},
                    "line_ms": round(_time_ms(partial(format_trial, table, row, SweepClock(time_budget_s=None))), 2),
                    "memory_mb": round(measure_rss_mb() - before_mb),
                    "events_mb": round(events.stat().st_size / 1e6, 1),
                }
            )
            print(rows[-1], flush=True)
        sweep.close()
        rows[-1]["restored_s"] = round(_time_ms(lambda: sweep.open(resume=True)) / 1e3, 2)
        print(rows[-1], flush=True)
        sweep.close()
    return rows


def _measure_reports(
    sweep: BookkeepingSweep, running: "deque[tuple[TrialSegment, int]]", until: int
) -> dict[str, list[float]]:
    """Continue until there are so many reports. Return the processor time of each proposal, report and step in ms."""
    state, costs = sweep.state, {"proposal": list[float](), "report": list[float](), "step": list[float]()}
    while state.history.num_reports < until:
        before = time.process_time()
        while segment := state.next_segment():
            running.append((segment, segment.epoch))
            costs["proposal"].append((time.process_time() - before) * 1e3)
            before = time.process_time()
        segment, epoch = running.popleft()
        metrics = {_METRIC: compute_loss(segment.params, segment.trial, epoch + 1), "val/pck_auc": 0.5}
        began = time.process_time()
        is_continued = state.process_report(segment.trial, epoch + 1, metrics, node="node")
        reported = time.process_time()
        sweep.recorder.refresh()
        costs["report"].append((reported - began) * 1e3)
        costs["step"].append((time.process_time() - reported) * 1e3)
        if is_continued:
            running.append((segment, epoch + 1))
    return costs


def measure_next_result_ms(num_slots: int) -> dict[str, float]:
    """Measure the next result in the way of Tune's actor manager, in ray.air.execution."""
    import asyncio

    import ray

    class Worker:
        async def work(self, seconds: float) -> int:
            await asyncio.sleep(seconds)
            return 0

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    worker: Any = ray.remote(Worker).options(max_concurrency=2 * num_slots).remote()
    futures = [worker.work.remote(3600.0) for _ in range(num_slots)]
    costs = []
    for _ in range(50):
        ready = worker.work.remote(0.0)
        ray.wait([ready])
        began = time.perf_counter()
        waited_for = [*futures, ready]
        random.shuffle(waited_for)
        ray.wait(waited_for, num_returns=1, timeout=0.1)
        costs.append((time.perf_counter() - began) * 1e3)
    ray.shutdown()
    return {"slots": num_slots, "next_result_ms": statistics.median(costs)}


def _time_ms(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return (time.process_time() - began) * 1e3


# --- the sampler ------------------------------------------------------------------------------------------------------


def _make_configured_sampler(name: str) -> Callable[..., BaseSampler]:
    sampler: Callable[..., BaseSampler] = instantiate(compose("tune", [f"searcher={name}"]).searcher.sampler)
    return sampler


_TPE = partial(TPESampler, n_startup_trials=5, constant_liar=True)

SAMPLERS: Mapping[str, Callable[[], Callable[..., BaseSampler]]] = {
    "random": lambda: RandomSampler,
    "curves": partial(_make_configured_sampler, "curves"),
    "tpe": partial(_make_configured_sampler, "tpe"),
    "8 candidates": lambda: partial(_TPE, n_ei_candidates=8),
    "no liar": lambda: partial(TPESampler, n_startup_trials=5),
    "multivariate": lambda: partial(_TPE, multivariate=True),
    "multivariate, group": lambda: partial(_TPE, multivariate=True, group=True),
}
"""The configured samplers, and TPE with fewer candidates, without regard to running trials, and so on."""


def measure_proposals_ms(num_trials: int) -> dict[str, float]:
    """Measure a proposal of each sampler, in ms, when so many trials have ended under ASHA."""
    return {"trials": num_trials, **{name: _measure_proposal_ms(make(), num_trials) for name, make in SAMPLERS.items()}}


def _measure_proposal_ms(sampler: Callable[..., BaseSampler], num_trials: int) -> float:
    space = load_space("default")
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        searcher = OptunaSearcher(
            space=space,
            folder=Path(folder),
            name="scale",
            metric=_METRIC,
            mode="min",
            max_epochs=_EPOCHS,
            seed=0,
            defaults={},
            sampler=sampler,
        )
        with contextlib.closing(searcher):
            searcher.restore_trials(_make_ended_trial(number, generator) for number in range(num_trials))
            costs = []
            for number in range(num_trials, num_trials + _NUM_PROPOSALS):
                began = time.perf_counter()
                params = searcher.suggest(number)
                costs.append((time.perf_counter() - began) * 1e3)
                assert params is not None
                searcher.on_trial_update(TrialSnapshot(number, "stopped", params, {1: compute_loss(params, number, 1)}))
    return statistics.median(costs)


def _make_ended_trial(number: int, generator: random.Random) -> TrialSnapshot:
    """Make an ended trial. Of nine trials, six end at epoch 1, two at epoch 3, and one at the last epoch."""
    params = {
        "model.decoder.depth": generator.randrange(1, 6),
        "heatmap.sigma": 10 ** generator.uniform(-2, math.log10(0.08)),
        "optimizer.lr": 10 ** generator.uniform(math.log10(2e-4), -2),
    }
    epochs = (1, 1, 1, 1, 1, 1, 3, 3, _EPOCHS)[number % 9]
    values = {epoch: compute_loss(params, number, epoch) for epoch in range(1, epochs + 1)}
    return TrialSnapshot(number, "complete" if epochs == _EPOCHS else "stopped", params, values)


# --- with Ray ---------------------------------------------------------------------------------------------------------


def run_ours(num_trials: int, num_slots: int) -> dict[str, float]:
    """Run our sweep over the stub."""
    from ray import cloudpickle

    from handpose.sweep.driver.run import SweepRun, run_sweep

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # otherwise a worker would import everything here
    moments: list[tuple[float, float]] = []

    class Counted(OptunaSearcher):
        def suggest(self, number: int) -> Params | None:
            moments.append(_read_clocks())
            return super().suggest(number)

    def stub(segment: TrialSegment) -> None:
        for epoch in range(1, _EPOCHS + 1):
            report_epoch(epoch, {_METRIC: compute_loss(segment.params, segment.trial, epoch)})

    with tempfile.TemporaryDirectory() as folder:
        overrides = [quote_override("sweep.folder", folder), "sweep.name=scale", "sweep.gpus_per_trial=0"]
        overrides += [f"sweep.num_trials={num_trials}", f"sweep.max_epochs={_EPOCHS}", f"ray.num_cpus={num_slots}"]
        config, space = compose("tune", overrides), load_space("default")
        sweep = instantiate(config.sweep)
        began = _read_clocks()
        run = SweepRun(
            sweep=sweep,
            cluster=instantiate(config.ray),
            space=space,
            searcher=partial(Counted, sampler=RandomSampler, defaults={}),
            make_scheduler=bind_scheduler(instantiate(config.scheduler), sweep, space),
            trial_function=stub,
            command=str,
            description={"name": "scale"},
        )
        with run_sweep(run):
            pass
    return _summarise_moments(num_trials, began, moments)


def run_plain(num_trials: int, num_slots: int) -> dict[str, float]:
    """Run Tune with its defaults over the same stub."""
    import ray
    from ray import cloudpickle, tune
    from ray.tune.schedulers import ASHAScheduler

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # otherwise a worker would import everything here
    moments: list[tuple[float, float]] = []

    class Counter(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            moments.append(_read_clocks())

    def stub(config: dict[str, Any]) -> None:
        number = int(config["number"])
        for epoch in range(1, _EPOCHS + 1):
            tune.report({"loss": compute_loss(config, number, epoch)})

    space = {
        "model.decoder.depth": tune.randint(1, 6),
        "heatmap.sigma": tune.loguniform(0.01, 0.08),
        "optimizer.lr": tune.loguniform(2e-4, 1e-2),
        "number": tune.randint(0, 10**6),
    }
    with tempfile.TemporaryDirectory() as folder:
        began = _read_clocks()
        ray.init(num_cpus=num_slots)
        tune.Tuner(
            tune.with_resources(stub, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                num_samples=num_trials,
                scheduler=ASHAScheduler(max_t=_EPOCHS, grace_period=1, reduction_factor=3),
            ),
            run_config=tune.RunConfig(name="plain", storage_path=folder, callbacks=[Counter()]),
        ).fit()
        ray.shutdown()
    return _summarise_moments(num_trials, began, moments)


def _read_clocks() -> tuple[float, float]:
    """Return the wall time and the CPU time of this process in seconds."""
    return time.perf_counter(), time.process_time()


def _summarise_moments(num_trials: int, began: Sequence[float], moments: Sequence[Sequence[float]]) -> dict[str, float]:
    """Compute the time per trial in the second half, between the starts of consecutive trials."""
    first, last = (num_trials - 1) // 2, num_trials - 1
    wall, cpu = ((moments[last][i] - moments[first][i]) * 1e3 / (last - first) for i in (0, 1))
    return {
        "trials": num_trials,
        "wall_ms": wall,
        "cpu_ms": cpu,
        "whole_s": _read_clocks()[0] - began[0],
        "memory_mb": measure_rss_mb(),
    }


if __name__ == "__main__":
    main()
