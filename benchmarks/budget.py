"""Check that a sweep keeps its budget, on an idle and on a busy machine, and what it reaches in that time.

    python benchmarks/budget.py --output benchmarks/results/budget.json

Each run is `python tune.py budget.minutes=N` in an empty folder, so that the hands are drawn within the budget. With
`--busy 2` two processes that never rest run beside it, in the same session, as other users' programs would. The table
has the time that the program took, what was planned and what was trained, and the error on the test split of the
retrained winner and of the mean pose.

Goals: at most 10 % over the budget; test predictions in every run; on an idle machine with two cores, five minutes give
at most 0.8 of the error of the mean pose.

With `--kill`, each run is killed (SIGKILL) at a random moment of every stage and resumed at once. The time of all
processes together must stay within the budget too.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.contention import run_busy_processes  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.errors import UserError  # noqa: E402
from handpose.files import read_json  # noqa: E402
from handpose.sweep.budget.clock import BUDGET_FILE  # noqa: E402
from handpose.yaml_files import load_yaml  # noqa: E402

_STAGES = ("trials", "confirmation", "retraining")
_COLUMNS = (
    *("minutes", "busy", "used_s", "planned_trials", "trials", "epochs", "confirmed", "retrain_epochs"),
    *("pa_mpjpe_mm", "mean_pose_mm", "ratio"),
)


def main() -> None:
    """Run all combinations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 5, 10], help="budgets (default: 3 5 10)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="numbers of busy processes (default: 0 2)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each combination (default: 1)")
    parser.add_argument("--kill", action="store_true", help="kill each run in every stage, and resume it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("overrides", nargs="*", help="further arguments of tune.py")
    given = parser.parse_args()
    rng, rows = random.Random(given.seed), []
    print("  ".join(f"{name:>14}" for name in _COLUMNS), flush=True)
    for _, busy, minutes in itertools.product(range(given.repeats), given.busy, given.minutes):
        row = _measure(minutes, busy, given.overrides, kills=rng if given.kill else None)
        rows.append(row)
        print("  ".join(f"{_format(row[name]):>14}" for name in _COLUMNS), flush=True)
        write_results(given.output, {"runs": rows})


def _measure(minutes: float, busy: int, overrides: Sequence[str], *, kills: random.Random | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="budget-") as name, run_busy_processes(busy):
        place = Path(name)
        command = [sys.executable, str(REPOSITORY / "tune.py"), f"budget.minutes={minutes:g}", "sweep.name=timed"]
        command += overrides
        used_s = _run(place, command)[1] if kills is None else _run_killed(place, command, kills)
        return {"minutes": minutes, "busy": busy, "used_s": round(used_s, 1), **_read_outcome(place)}


def _run(place: Path, command: Sequence[str], *, kill: tuple[str, float] | None = None) -> tuple[bool, float]:
    """Run tune.py in a folder, and kill it some seconds after it has entered a stage.

    Args:
        place: the working folder, which holds data and results.
        command: the command line.
        kill: the stage, and the seconds; None: run it to its end.

    Returns:
        Whether it came to its end, and the seconds that it took.
    """
    variables = {"DIR_SCRATCH": str(place / "outputs"), "MP_DATA": str(place / "data")}
    began, log = time.monotonic(), place / "log.txt"
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=place, env=os.environ | variables, stdout=output, stderr=output)
        entered: float | None = None
        while process.poll() is None:
            time.sleep(0.1)
            if kill is None:
                continue
            if entered is None and kill[0] in _read_seconds(place):
                entered = time.monotonic()
            if entered is not None and time.monotonic() - entered >= kill[1]:
                process.kill()
                process.wait()
                return False, time.monotonic() - began
    if process.returncode:
        sys.exit("\n".join([f"tune.py ended with status {process.returncode}:", *_read_log(place)]))
    return True, time.monotonic() - began


def _run_killed(place: Path, command: Sequence[str], rng: random.Random) -> float:
    """Run tune.py, kill it in every stage and resume it. Return the seconds of all processes together."""
    total_s, go_on = 0.0, list(command)
    resume = [sys.executable, str(REPOSITORY / "tune.py"), f"sweep.resume={place / 'outputs/sweeps/timed'}"]
    for stage in _STAGES:
        is_over, seconds = _run(place, go_on, kill=(stage, rng.uniform(1.0, 20.0)))
        total_s += seconds
        if is_over:
            return total_s
        go_on = resume
    return total_s + _run(place, go_on)[1]


def _read_seconds(place: Path) -> dict[str, float]:
    try:
        seconds: dict[str, float] = read_json(place / "outputs/sweeps/timed" / BUDGET_FILE)["seconds"]
    except (OSError, UserError):  # there is none yet
        return {}
    return seconds


def _read_outcome(place: Path) -> dict[str, Any]:
    folder = place / "outputs/sweeps/timed"
    sweep = load_yaml(folder / "sweep.yaml")["config"]["sweep"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    confirm = folder / "confirm" / "confirm.yaml"
    runs = sum(len(each["values"]) for each in load_yaml(confirm)["candidates"]) if confirm.is_file() else 0
    metrics = read_json(folder / "retrain" / "metrics.json")["metrics"]
    assert (folder / "retrain" / "test_preds.json.gz").is_file()
    assert (folder / "report.html").is_file()
    return {
        "planned_trials": sweep["num_trials"],
        "trials": sum(event["event"] == "trial_suggested" for event in events),
        "epochs": sum(event["event"] == "epoch_reported" for event in events),
        "confirmed": runs,
        "retrain_epochs": _count_epochs(place),
        "pa_mpjpe_mm": metrics["test/pa_mpjpe_mm"],
        "mean_pose_mm": metrics["baseline/pa_mpjpe_mm"],
        "ratio": metrics["test/pa_mpjpe_mm"] / metrics["baseline/pa_mpjpe_mm"],
        "seconds": _read_seconds(place),
        "plan": [line for line in _read_log(place) if line.startswith("the budget")],
    }


def _count_epochs(place: Path) -> int:
    return len({line.split("/")[0] for line in _read_log(place) if line.startswith("epoch ")})


def _read_log(place: Path) -> list[str]:
    return (place / "log.txt").read_text(encoding="utf-8").splitlines()


def _format(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
