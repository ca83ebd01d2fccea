"""Kill sweeps of real trials at random moments, resume them, and count what was lost, repeated or wrong.

    python benchmarks/crash_drill.py --driver-kills 20 --worker-kills 20 --output crash_drill.json

Each round is one sweep of real networks on synthetic hands. Its driver (`python tune.py`) and its workers are killed
with SIGKILL after random times, the driver at any moment after it was started, and each time it is restarted with
sweep.resume. Rounds of ASHA with one trial at a time are compared with the same sweep without kills, report by report
and to the last digit; the decisions of freeze_thaw depend on the time that an epoch takes. Every round is audited
(handpose/sweep/audit): events, replayed decisions, study, trials.csv.

With --commands, random commands are also given with handpose.sweep.control: while the sweep runs, just before its
driver is killed, and while no process runs it. The driver is killed only after the sweep has been written. At the end
each command must have been executed once or refused with an answer. The moments of the commands differ from run to run,
and so do the decisions after them. Therefore these rounds are not compared with a sweep without kills. Instead, the
audit repeats all decisions from the events.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.drill_commands import CommandGiver, check_commands, count_late_answers  # noqa: E402
from benchmarks.result_files import write_results  # noqa: E402
from handpose.sweep.audit.audit import audit  # noqa: E402
from handpose.sweep.record.events import (  # noqa: E402
    EVENTS_FILE,
    EpochReported,
    SweepSteered,
    TrialEnded,
    TrialSteered,
    TrialSuggested,
    read_events,
)

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
_STEERED_KILL_INTERVAL_S = (5.0, 25.0)
_LIMIT_S = 900.0
_MAX_KILLS_PER_ROUND = 5  # kills of each kind
_MAX_KILLS_PER_STEERED_ROUND = 3  # fewer, so that ten kills of each kind reach several modes


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
        commands: number of commands that were given; None without --commands.
        executed: number of these that were executed. The others were refused.
        late_answers: number of these after whose event the driver was killed, so that the next driver answered.
        moments: when a command was given -> number of commands.
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
    commands: int | None = None
    executed: int | None = None
    late_answers: int | None = None
    moments: dict[str, int] = field(default_factory=dict)


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
    parser.add_argument(
        "--commands", action="store_true", help="also give random commands with handpose.sweep.control to the sweeps"
    )
    parser.add_argument("overrides", nargs="*", help="overrides of tune.py for all sweeps, KEY=VALUE")
    given = parser.parse_args()
    generator = random.Random(given.seed)
    rounds: list[RoundResult] = []
    most = _MAX_KILLS_PER_STEERED_ROUND if given.commands else _MAX_KILLS_PER_ROUND
    with tempfile.TemporaryDirectory() as folder:
        while (
            _sum_over_rounds(rounds, "driver_kills") < given.driver_kills
            or _sum_over_rounds(rounds, "worker_kills") < given.worker_kills
        ):
            left = (
                min(most, given.driver_kills - _sum_over_rounds(rounds, "driver_kills")),
                min(most, given.worker_kills - _sum_over_rounds(rounds, "worker_kills")),
            )
            chosen = [each for each in _ROUNDS if each[0] in given.modes]
            kind, seed = chosen[len(rounds) % len(chosen)], len(rounds) // len(chosen)
            run_round = _run_steered_round if given.commands else _run_round
            rounds.append(run_round(Path(folder), len(rounds), kind, seed, generator, left, given.overrides))
            print(_format_round(rounds[-1]), flush=True)
    names = ["driver_kills", "worker_kills", "lost", "repeated", "wrong"]
    names += ["commands", "executed", "late_answers"] if given.commands else ["values_differ"]
    totals = {name: _sum_over_rounds(rounds, name) for name in names}
    print("\n" + "  ".join(f"{name} {value}" for name, value in totals.items()))
    write_results(given.output, {"totals": totals, "rounds": [asdict(each) for each in rounds]})
    sys.exit(1 if any(totals.get(name) for name in ("lost", "repeated", "wrong", "values_differ")) else 0)


def _sum_over_rounds(rounds: Sequence[RoundResult], name: str) -> int:
    return sum(getattr(each, name) or 0 for each in rounds)


def _format_round(done: RoundResult) -> str:
    compared = "not compared" if done.values_differ is None else f"differing {done.values_differ}"
    if done.commands is not None:
        moments = ", ".join(f"{number} {moment}" for moment, number in done.moments.items())
        compared = f"{done.commands} commands ({moments}), {done.executed} executed, "
        compared += f"{done.late_answers} answered after a kill; decisions replayed by the audit"
    alone = "" if done.seconds_alone is None else f" ({done.seconds_alone:.0f} s alone)"
    return (
        f"{done.mode:11} {done.num_slots} slot(s)  killed: driver {done.driver_kills}  workers {done.worker_kills}  "
        f"{done.reports} reports  lost {done.lost}  repeated {done.repeated}  wrong {done.wrong}  {compared}  "
        f"{done.seconds:.0f} s{alone}"
    )


_Kind: TypeAlias = tuple[str, int, tuple[str, ...]]
"""Mode, number of slots, and overrides of a round."""


def _run_round(
    folder: Path,
    number: int,
    kind: _Kind,
    seed: int,
    generator: random.Random,
    left: tuple[int, int],
    overrides: Sequence[str],
) -> RoundResult:
    mode, num_slots, _ = kind
    done = RoundResult(mode, num_slots, seed)
    common = _list_overrides(kind, seed, overrides)
    if num_slots == 1:
        began = time.monotonic()
        alone = _run_sweep(folder, f"alone_{number}", common, None, RoundResult("", 0, 0), (0, 0))
        done.seconds_alone = time.monotonic() - began
    began = time.monotonic()
    killed = _run_sweep(folder, f"killed_{number}", common, generator, done, left)
    done.seconds = time.monotonic() - began
    _audit_round(killed, done)
    if num_slots == 1:
        reference, decisions = _read_decisions(alone), _read_decisions(killed)
        done.values_differ = abs(len(reference) - len(decisions)) + sum(
            one != other for one, other in zip(reference, decisions, strict=False)
        )
    return done


def _run_steered_round(
    folder: Path,
    number: int,
    kind: _Kind,
    seed: int,
    generator: random.Random,
    left: tuple[int, int],
    overrides: Sequence[str],
) -> RoundResult:
    """Run a sweep that is killed and gets random commands, and check the sweep and the commands."""
    mode, num_slots, _ = kind
    done = RoundResult(mode, num_slots, seed)
    began = time.monotonic()
    name = f"steered_{number}"
    giver = CommandGiver(_get_sweep_folder(folder, name), generator)
    killed = _run_sweep(folder, name, _list_overrides(kind, seed, overrides), generator, done, left, giver)
    done.seconds = time.monotonic() - began
    _audit_round(killed, done)
    found = check_commands(killed, giver.given)
    done.lost, done.repeated, done.wrong = (
        before + len(sentences) for before, sentences in zip((done.lost, done.repeated, done.wrong), found, strict=True)
    )
    for sentence in (*found.lost, *found.repeated, *found.wrong):
        print(f"  {sentence}")
    steered = (TrialSteered, SweepSteered)
    done.commands = len(giver.given)
    done.executed = sum(isinstance(event, steered) for event in read_events(killed / EVENTS_FILE))
    done.late_answers = count_late_answers(killed, giver.given)
    done.moments = dict(Counter(each.moment for each in giver.given))
    return done


def _list_overrides(kind: _Kind, seed: int, overrides: Sequence[str]) -> list[str]:
    _, num_slots, scheduler = kind
    return [*_SMALL, *scheduler, f"sweep.max_concurrent={num_slots}", f"sweep.seed={seed}", *overrides]


def _audit_round(folder: Path, done: RoundResult) -> None:
    """Audit a sweep that has ended, and add the findings and the number of reports to the result."""
    found = audit(folder)
    done.lost, done.repeated, done.wrong = (len(sentences) for sentences in found)
    for sentence in (*found.lost, *found.repeated, *found.wrong):
        print(f"  {sentence}")
    done.reports = sum(isinstance(event, EpochReported) for event in read_events(folder / EVENTS_FILE))
    if not (folder / "retrain" / "metrics.json").is_file():
        print("  the winner was not retrained")
        done.lost += 1


def _read_decisions(folder: Path) -> list[dict[str, object]]:
    """Read proposals, reports and decisions, without times, nodes and segments."""
    kept = [
        event
        for event in read_events(folder / EVENTS_FILE)
        if isinstance(event, (TrialSuggested, EpochReported, TrialEnded))
    ]
    forgotten = ("at", "node", "resumed_from", "checkpoint")
    return [{name: value for name, value in asdict(event).items() if name not in forgotten} for event in kept]


def _get_sweep_folder(folder: Path, name: str) -> Path:
    return folder / "outputs" / "sweeps" / name


def _run_sweep(
    folder: Path,
    name: str,
    overrides: Sequence[str],
    generator: random.Random | None,
    done: RoundResult,
    max_kills: tuple[int, int],
    giver: CommandGiver | None = None,
) -> Path:
    """Run a sweep to its end, with kills drawn by the generator and commands of the giver. Return its folder."""
    sweep_folder = _get_sweep_folder(folder, name)
    limit, is_last = time.monotonic() + _LIMIT_S, giver is None
    while True:
        exists = (sweep_folder / "sweep.yaml").is_file()
        if not exists and sweep_folder.exists():
            subprocess.run(["rm", "-r", str(sweep_folder)], check=True)  # killed before the sweep was written
        command = [sys.executable, str(REPOSITORY / "tune.py")]
        command += [f"sweep.resume={sweep_folder}"] if exists else [f"sweep.name={name}", *overrides]
        with (folder / f"{name}.log").open("a", encoding="utf-8") as log:
            driver = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        status = _kill_at_random(driver, generator, done, max_kills, giver)
        if status == 0 and is_last:
            return sweep_folder
        if giver is not None and status == 0:  # a command may wait, or a budget may be spent
            giver.give_last()
            is_last = True
        elif status != -signal.SIGKILL or time.monotonic() > limit:
            log_text = (folder / f"{name}.log").read_text(encoding="utf-8")
            sys.exit(f"{' '.join(command)} ended with {status}:\n{log_text[-3000:]}")
        elif giver is not None and generator is not None and generator.random() < 0.5:
            giver.give_random("not running")


def _kill_at_random(
    driver: "subprocess.Popen[bytes]",
    generator: random.Random | None,
    done: RoundResult,
    max_kills: tuple[int, int],
    giver: CommandGiver | None,
) -> int:
    """Kill the driver and its workers at random times, and return the driver's exit status."""
    while True:
        interval_s = _KILL_INTERVAL_S if giver is None else _STEERED_KILL_INTERVAL_S
        gap_s = generator.uniform(*interval_s) if generator else _LIMIT_S
        status = _wait(driver, gap_s, giver)
        if status is not None:
            return status
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
            if giver is not None:
                if not giver.can_give:  # a kill before the sweep is written concerns no command
                    continue
                giver.give_before_kill()
            if driver.poll() is None:
                driver.kill()
                done.driver_kills += 1


def _wait(driver: "subprocess.Popen[bytes]", wait_s: float, giver: CommandGiver | None) -> int | None:
    """Wait for the end of the driver, and give commands meanwhile. Return its exit status; None if it still runs."""
    end = time.monotonic() + wait_s
    while (left_s := end - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return driver.wait(timeout=left_s if giver is None else min(left_s, 0.2))
        if giver is not None:
            giver.give_if_due()
    return None


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
