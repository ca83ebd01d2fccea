"""Measure training images/s beside busy processes, as GNU OpenMP's threads wait by default and as this project sets it.

    python benchmarks/contention.py
    python benchmarks/contention.py --rounds 3 --sides OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 GOMP_SPINCOUNT=10000

GNU OpenMP's threads spin at each barrier for some milliseconds before they sleep. If other processes take a core, the
threads of a training spin while the one they wait for has no core, and use up their own share of the cores.

    spinning    libgomp's default, which GOMP_SPINCOUNT=300000 sets
    project     a process that sets nothing itself, so that `handpose/__init__.py` decides
    others      variables that are given with --sides, to compare settings

Each side is a training in a process of its own, by our Trainer on drawn hands. All sides run in turns, while 0, 1, 2
and 4 processes that only compute run beside them; the table has the medians of the rounds. The fair rate is that of
`spinning` without busy processes times the fair share: cores / (threads + busy processes), at most 1. That is what a
scheduler gives that treats every thread alike. Linux's autogroups treat every session alike instead, so all processes
here belong to one session, as on a node without autogroups. Goals: `project` at least 0.8 of the fair rate, and at
least 0.98 of `spinning` without busy processes.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import handpose  # noqa: E402, F401  # before anything imports torch, as in train.py

# isort: split
import pytorch_lightning as pl  # noqa: E402

from benchmarks.data import make_config  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.training.fit import prepare_run  # noqa: E402
from handpose.training.results import RunFolders  # noqa: E402
from handpose.training.trainer import make_training_trainer, suppress_library_output  # noqa: E402

_SPINNING, _PROJECT = "spinning", "project"
_SIDES = {_SPINNING: {"GOMP_SPINCOUNT": "300000"}, _PROJECT: {}}
_NUM_IMAGES = 480
_WARM_UP_STEPS = 10
_COMPUTE = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


class MeasuredTraining:
    """A training in a process of its own, which stands still between two measurements. A context manager.

    Args:
        variables: environment variables of the process.
        given: the arguments of the command line.
        folder: the folder for the data and the outputs.
    """

    def __init__(self, variables: Mapping[str, str], given: argparse.Namespace, folder: Path) -> None:
        size = ("--threads", str(given.threads), "--image-size", str(given.image_size))
        network = ("--batch-size", str(given.batch_size), "--encoder", given.encoder)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *size, *network, "--train-in", str(folder)],
            env=_remove_openmp_variables(os.environ) | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "MeasuredTraining":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_until_ready(self) -> None:
        """Wait until the process has trained its first steps."""
        self._read_line()

    def measure_rate(self, seconds: float) -> float:
        """Train for this time, and return the images/s."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        return float(self._read_line())

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the training has failed; see its messages above")
        return line


def _remove_openmp_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}


class StepRate(pl.Callback):
    """Trains for as long as each line of stdin says, and prints the images/s."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._num_steps = 0
        self._began = self._seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < _WARM_UP_STEPS:
            return
        self._num_steps += 1
        passed = time.perf_counter() - self._began
        if self._num_steps and passed < self._seconds:
            return
        is_ready = trainer.global_step == _WARM_UP_STEPS
        print("ready" if is_ready else self._num_steps * self._batch_size / passed, flush=True)
        self._seconds = float(input())
        self._num_steps, self._began = 0, time.perf_counter()


def train(given: argparse.Namespace) -> None:
    """Train until this process is killed."""
    folder: Path = given.train_in
    overrides = [
        f"data.batch_size={given.batch_size}",
        f"num_threads={given.threads}",
        f"model.encoder.name={given.encoder}",
        "trainer.max_epochs=100000",
        "trainer.accelerator=cpu",
        "train_on_val=true",  # no validation interrupts the training
    ]
    config = make_config(folder, image_size=given.image_size, num_images=_NUM_IMAGES, overrides=overrides)
    prepared = prepare_run(config, stage="fit", quiet=True)
    callbacks = [StepRate(given.batch_size)]
    with suppress_library_output():
        trainer = make_training_trainer(config, RunFolders(folder, folder, folder), callbacks=callbacks, quiet=True)
        trainer.fit(prepared.module, datamodule=prepared.data)


@contextlib.contextmanager
def run_busy_processes(number: int) -> Iterator[None]:
    """Run processes within the block that only compute, in the session of this process."""
    processes = [subprocess.Popen([sys.executable, "-c", _COMPUTE]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compute_fair_share(*, cores: int, threads: int, busy: int) -> float:
    """Return the share of its idle rate that a training has if every thread on the machine gets the same time."""
    return min(1.0, cores / (threads + busy))


def measure_sides(
    trainings: Mapping[str, MeasuredTraining], busy_counts: Sequence[int], *, rounds: int, seconds: float
) -> dict[int, dict[str, list[float]]]:
    """Measure images/s of every side in turns: number of busy processes -> side -> rate in each round."""
    rates: dict[int, dict[str, list[float]]] = {busy: {name: [] for name in trainings} for busy in busy_counts}
    for number in range(rounds):
        for busy in busy_counts:
            with run_busy_processes(busy):
                order = list(trainings) if number % 2 == 0 else list(reversed(trainings))
                for name in order:
                    rates[busy][name].append(trainings[name].measure_rate(seconds))
    return rates


def summarise(rates: Mapping[int, Mapping[str, Sequence[float]]], *, cores: int, threads: int) -> list[dict[str, Any]]:
    """Return a row for each number of busy processes, with the medians and what they are of the fair rate."""
    medians = {busy: {name: statistics.median(each) for name, each in sides.items()} for busy, sides in rates.items()}
    idle_rate = medians[0][_SPINNING]
    rows = []
    for busy, sides in medians.items():
        share = compute_fair_share(cores=cores, threads=threads, busy=busy)
        rows.append(
            {
                "busy": busy,
                "fair_share": round(share, 3),
                "images_per_s": {name: round(rate, 1) for name, rate in sides.items()},
                "of_fair_rate": {name: round(rate / (share * idle_rate), 3) for name, rate in sides.items()},
                "over_spinning": {name: round(rate / sides[_SPINNING], 3) for name, rate in sides.items()},
                "runs": {name: [round(rate, 1) for rate in each] for name, each in rates[busy].items()},
            }
        )
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    width = max(len(name) for name in rows[0]["images_per_s"])
    print(f"{'busy':>4}{'fair share':>12}  {'side':{width}}{'images/s':>10}{'of fair':>9}{'over spinning':>15}")
    for row in rows:
        for name, rate in row["images_per_s"].items():
            print(
                f"{row['busy']:4}{row['fair_share']:12.2f}  {name:{width}}{rate:10.1f}"
                f"{row['of_fair_rate'][name]:9.2f}{row['over_spinning'][name]:15.2f}"
            )


def parse_sides(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parse sides such as `GOMP_SPINCOUNT=1000`; a comma separates the variables of a side."""
    return {text: dict(item.split("=", 1) for item in text.split(",")) for text in texts}


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of busy processes; with 0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a measurement, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--encoder", default="mobilenetv3_small_100")
    parser.add_argument("--sides", nargs="*", default=[], metavar="NAME=VALUE[,NAME=VALUE...]", help="further sides")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "contention.json")
    given = parser.parse_args()
    if given.train_in is not None:
        train(given)
        return
    cores = count_cores()
    print(f"{format_machine()}; {given.threads} threads, batches of {given.batch_size} images of {given.image_size} px")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="contention-")))
        trainings = {}
        for name, variables in (_SIDES | parse_sides(given.sides)).items():
            trainings[name] = stack.enter_context(MeasuredTraining(variables, given, folder))
            trainings[name].wait_until_ready()
        rates = measure_sides(trainings, given.busy, rounds=given.rounds, seconds=given.seconds)
    rows = summarise(rates, cores=cores, threads=given.threads)
    print_rows(rows)
    names = ("threads", "batch_size", "image_size", "encoder", "rounds", "seconds")
    write_results(given.output, {name: getattr(given, name) for name in names} | {"rows": rows})


if __name__ == "__main__":
    main()
