"""Kill sweeps of real trials at random moments, resume them, and count what was lost, repeated or wrong.

    python benchmarks/crash_drill.py --driver-kills 20 --worker-kills 20 --output crash_drill.json

Each round is one sweep of real networks on synthetic hands. Its driver (`python tune.py`) and its workers are killed
with SIGKILL after random times, the driver at any moment after it was started, and each time it is restarted with
sweep.resume. Rounds of ASHA with one trial at a time are compared with the same sweep without kills, report by report
and to the last digit; the decisions of freeze_thaw depend on the time that an epoch takes. Every round is audited
(handpose/sweep/audit): events, replayed decisions, study, trials.csv.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from handpose.files import write_json  # noqa: E402
from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.record.events import EVENTS_FILE, EpochReported, TrialEnded, TrialSuggested, read_events  # noqa: E402

_SMALL = (
    "data.source.num_train=240",
    "data.source.num_eval=20",
    "data.image_size=64",
    "trainer.max_epochs=6",
    "sweep.num_trials=8",
    "sweep.max_epochs=9",
    "sweep.preflight=off",
    "sweep.confirm.seeds=0",
    "sweep.max_retries=1000",
    "sweep.retry_delay_s=0",
    "trainer.accelerator=cpu",
    "sweep.gpus_per_trial=0",
)
_ROUNDS = (
    ("stop", 1, ("scheduler=asha", "scheduler.mode=stop")),
    ("promote", 1, ("scheduler=asha", "scheduler.mode=promote")),
    ("promote", 2, ("scheduler=asha", "scheduler.mode=promote")),
    ("stop", 2, ("scheduler=asha", "scheduler.mode=stop", "scheduler.brackets=2")),
    ("freeze_thaw", 2, ("scheduler=freeze_thaw", "searcher=curves", "sweep.num_trials=12")),
)
_KILL_INTERVAL_S = (2.0, 20.0)
_LIMIT_S = 900.0
_MAX_KILLS_PER_ROUND = 5  # kills of each kind


@dataclass
class RoundResult:
    """The result of one sweep.

    Attributes:
        mode: mode of ASHA, or `freeze_thaw`.
        num_slots: number of trials at a time.
        seed: seed of the sweep.
        driver_kills: how often the driver was killed.
        worker_kills: how often a worker was killed.
        reports: number of reports.
        lost: number of findings of the audit about lost results.
        repeated: number of findings about repeated results.
        wrong: number of findings about wrong results.
        values_differ: number of proposals, reports and decisions that differ from those of the same sweep without
            kills; None if they were not compared.
        seconds: duration of the sweep.
        seconds_alone: duration of the sweep without kills.
    """

    mode: str
    num_slots: int
    seed: int
    driver_kills: int = 0
    worker_kills: int = 0
    reports: int = 0
    lost: int = 0
    repeated: int = 0
    wrong: int = 0
    values_differ: int | None = None
    seconds: float = 0.0
    seconds_alone: float | None = None


def main() -> None:
    """Run rounds until there were as many kills as requested. The exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--driver-kills", type=int, default=20, help="how often a driver is killed; default: %(default)s"
    )
    parser.add_argument(
        "--worker-kills", type=int, default=20, help="how often a worker is killed; default: %(default)s"
    )
    modes = sorted({mode for mode, *_ in _ROUNDS})
    parser.add_argument(
        "--modes", nargs="+", choices=modes, default=modes, help="modes of ASHA, or freeze_thaw; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments; default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("overrides", nargs="*", help="overrides of tune.py for all sweeps, KEY=VALUE")
    given = parser.parse_args()
    generator = random.Random(given.seed)
    rounds: list[RoundResult] = []
    with tempfile.TemporaryDirectory() as folder:
        while (
            _sum_over_rounds(rounds, "driver_kills") < given.driver_kills
            or _sum_over_rounds(rounds, "worker_kills") < given.worker_kills
        ):
            left = (
                min(_MAX_KILLS_PER_ROUND, given.driver_kills - _sum_over_rounds(rounds, "driver_kills")),
                min(_MAX_KILLS_PER_ROUND, given.worker_kills - _sum_over_rounds(rounds, "worker_kills")),
            )
            chosen = [each for each in _ROUNDS if each[0] in given.modes]
            kind, seed = chosen[len(rounds) % len(chosen)], len(rounds) // len(chosen)
            rounds.append(_run_round(Path(folder), len(rounds), kind, seed, generator, left, given.overrides))
            print(_format_round(rounds[-1]), flush=True)
    totals = {
        name: _sum_over_rounds(rounds, name) for name in ("driver_kills", "worker_kills", "lost", "repeated", "wrong")
    }
    totals["values_differ"] = _sum_over_rounds(rounds, "values_differ")
    print("\n" + "  ".join(f"{name} {value}" for name, value in totals.items()))
    if given.output:
        content = {"date": time.strftime("%Y-%m-%d"), "totals": totals, "rounds": [asdict(each) for each in rounds]}
        write_json(given.output, content, indent=1)
    sys.exit(1 if any(totals[name] for name in ("lost", "repeated", "wrong", "values_differ")) else 0)


def _sum_over_rounds(rounds: Sequence[RoundResult], name: str) -> int:
    return sum(getattr(each, name) or 0 for each in rounds)


def _format_round(done: RoundResult) -> str:
    compared = "not compared" if done.values_differ is None else f"differing {done.values_differ}"
    alone = "" if done.seconds_alone is None else f" ({done.seconds_alone:.0f} s alone)"
    return (
        f"{done.mode:11} {done.num_slots} slot(s)  killed: driver {done.driver_kills}  workers {done.worker_kills}  "
        f"{done.reports} reports  lost {done.lost}  repeated {done.repeated}  wrong {done.wrong}  {compared}  "
        f"{done.seconds:.0f} s{alone}"
    )


def _run_round(
    folder: Path,
    number: int,
    kind: tuple[str, int, tuple[str, ...]],
    seed: int,
    generator: random.Random,
    left: tuple[int, int],
    overrides: Sequence[str],
) -> RoundResult:
    mode, num_slots, scheduler = kind
    done = RoundResult(mode, num_slots, seed)
    common = [*_SMALL, *scheduler, f"sweep.max_concurrent={num_slots}", f"sweep.seed={done.seed}", *overrides]
    if num_slots == 1:
        began = time.monotonic()
        alone = _run_sweep(folder, f"alone_{number}", common, None, RoundResult("", 0, 0), (0, 0))
        done.seconds_alone = time.monotonic() - began
    began = time.monotonic()
    killed = _run_sweep(folder, f"killed_{number}", common, generator, done, left)
    done.seconds = time.monotonic() - began
    found = audit(killed)
    done.lost, done.repeated, done.wrong = (len(sentences) for sentences in found)
    for sentence in (*found.lost, *found.repeated, *found.wrong):
        print(f"  {sentence}")
    decisions = _read_decisions(killed)
    done.reports = sum("epoch" in each for each in decisions)
    if num_slots == 1:
        reference = _read_decisions(alone)
        done.values_differ = abs(len(reference) - len(decisions)) + sum(
            one != other for one, other in zip(reference, decisions, strict=False)
        )
    if not (killed / "retrain" / "metrics.json").is_file():
        done.lost += 1
    return done


def _read_decisions(folder: Path) -> list[dict[str, object]]:
    """Read proposals, reports and decisions, without times, nodes and segments."""
    kept = [
        event
        for event in read_events(folder / EVENTS_FILE)
        if isinstance(event, (TrialSuggested, EpochReported, TrialEnded))
    ]
    forgotten = ("at", "node", "resumed_from", "checkpoint")
    return [{name: value for name, value in asdict(event).items() if name not in forgotten} for event in kept]


def _run_sweep(
    folder: Path,
    name: str,
    overrides: Sequence[str],
    generator: random.Random | None,
    done: RoundResult,
    max_kills: tuple[int, int],
) -> Path:
    """Run a sweep to its end, with kills drawn by the generator, and return its folder."""
    sweep_folder = folder / "outputs" / "sweeps" / name
    limit = time.monotonic() + _LIMIT_S
    while True:
        exists = (sweep_folder / "sweep.yaml").is_file()
        if not exists and sweep_folder.exists():
            subprocess.run(["rm", "-r", str(sweep_folder)], check=True)  # killed before the sweep was written
        command = [sys.executable, str(REPOSITORY / "tune.py")]
        command += [f"sweep.resume={sweep_folder}"] if exists else [f"sweep.name={name}", *overrides]
        with (folder / f"{name}.log").open("a", encoding="utf-8") as log:
            driver = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        status = _kill_at_random(driver, generator, done, max_kills)
        if status == 0:
            return sweep_folder
        if status != -signal.SIGKILL or time.monotonic() > limit:
            log_text = (folder / f"{name}.log").read_text(encoding="utf-8")
            sys.exit(f"{' '.join(command)} ended with {status}:\n{log_text[-3000:]}")


def _kill_at_random(
    driver: "subprocess.Popen[bytes]", generator: random.Random | None, done: RoundResult, max_kills: tuple[int, int]
) -> int:
    """Kill the driver and its workers at random times, and return the driver's exit status."""
    while True:
        gap_s = generator.uniform(*_KILL_INTERVAL_S) if generator else _LIMIT_S
        try:
            return driver.wait(timeout=gap_s)
        except subprocess.TimeoutExpired:
            if generator is None:
                driver.kill()
                continue
        workers = _list_worker_pids(driver.pid)
        if (
            workers
            and done.worker_kills < max_kills[1]
            and (generator.random() < 0.5 or done.driver_kills >= max_kills[0])
        ):
            _kill_process(generator.choice(workers))
            done.worker_kills += 1
        elif done.driver_kills < max_kills[0] and driver.poll() is None:
            driver.kill()
            done.driver_kills += 1


def _list_worker_pids(driver: int) -> list[int]:
    """List the processes below the driver that run a trial."""
    parents: dict[int, int] = {}
    trials: list[int] = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            parents[int(place.name)] = int(fields[1])
            if (place / "cmdline").read_bytes().startswith(b"ray::ImplicitFunc"):
                trials.append(int(place.name))
        except OSError:  # it has ended
            continue
    return sorted(pid for pid in trials if _is_descendant(pid, driver, parents))


def _is_descendant(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


def _kill_process(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
