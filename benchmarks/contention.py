"""Measure training images/s beside busy processes, with GNU OpenMP's default and with what this project does.

    python benchmarks/contention.py
    python benchmarks/contention.py --rounds 3 --sides OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 num_threads=1

GNU OpenMP's threads spin at each barrier for some milliseconds before they sleep. If other programs take a core, the
threads of a training spin while the one that they wait for has no core.

    spinning      the default of GNU OpenMP, which GOMP_SPINCOUNT=300000 sets
    train.py      this project, with as many threads as there are free cores (handpose/training/free_cores.py)
    trial         this project, with a fixed number of threads, which sleep while the cores are contended
    NAME=VALUE    given by --sides: environment variables, in capital letters, and overrides of train.py

Each side is a training in a process of its own with a thread per core, by our Trainer on drawn hands. The sides run in
turns, while 0, 1, 2 and 4 processes that only compute run beside them; the table has the medians of the rounds.

The fair rate is that of `spinning` without busy processes, times the fair share: cores / (threads + busy processes).
That is what a scheduler gives that treats every thread alike. Linux's autogroups treat every session alike instead, so
all processes here belong to one session, as on a node without autogroups. Goals: `train.py` at least 0.8 of the fair
rate, and at least 0.98 of `spinning` without busy processes.
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

import pytorch_lightning as pl

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.data import make_config  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.training.fit import prepare_run  # noqa: E402
from handpose.training.results import RunFolders  # noqa: E402
from handpose.training.trainer import make_training_trainer, suppress_library_output  # noqa: E402

_SPINNING, _TRAIN, _TRIAL = "spinning", "train.py", "trial"
_SIDES = {_SPINNING: ["GOMP_SPINCOUNT=300000"], _TRAIN: [], _TRIAL: [f"num_threads={count_cores()}"]}
_NUM_IMAGES = 480
_WARM_UP_STEPS = 5
_COMPUTE = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


class MeasuredTraining:
    """A training in a process of its own, which stands still between two measurements. A context manager.

    Args:
        settings: environment variables and overrides of this side.
        given: the arguments of the command line.
        folder: the folder for the data and the outputs.
    """

    def __init__(self, settings: Sequence[str], given: argparse.Namespace, folder: Path) -> None:
        self._settle_s = given.settle
        variables, overrides = split_settings(settings)
        size = ("--image-size", str(given.image_size))
        network = (f"data.batch_size={given.batch_size}", f"model.encoder.name={given.encoder}")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--train-in", str(folder), *size, "--sides", *network, *overrides],
            env=_remove_openmp_variables(os.environ) | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
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
        for duration in (self._settle_s, seconds):
            assert self._process.stdin is not None
            print(duration, file=self._process.stdin, flush=True)
            rate = float(self._read_line())
        return rate

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the training has failed; see its messages above")
        return line


def split_settings(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the settings of a side into environment variables, whose names are in capital letters, and overrides."""
    variables = [item for item in settings if item.partition("=")[0].isupper()]
    return dict(item.split("=", 1) for item in variables), [item for item in settings if item not in variables]


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
        is_ready = trainer.global_step == _WARM_UP_STEPS
        if passed < self._seconds and not is_ready:
            return
        print("ready" if is_ready else self._num_steps * self._batch_size / passed, flush=True)
        self._seconds = float(input())
        self._num_steps, self._began = 0, time.perf_counter()


def train(folder: Path, image_size: int, overrides: Sequence[str]) -> None:
    """Train until this process is killed."""
    fixed = ("trainer.max_epochs=100000", "trainer.accelerator=cpu")
    no_validation = "train_on_val=true"
    config = make_config(
        folder, image_size=image_size, num_images=_NUM_IMAGES, overrides=[*fixed, no_validation, *overrides]
    )
    prepared = prepare_run(config, stage="fit", quiet=True)
    callbacks = [StepRate(config.data.batch_size)]
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


def compute_fair_share(*, cores: int, busy: int) -> float:
    """Return the share of its idle rate that a training with a thread per core has if all threads get the same time."""
    return cores / (cores + busy)


def measure_sides(
    trainings: Mapping[str, MeasuredTraining], busy_counts: Sequence[int], *, rounds: int, seconds: float
) -> dict[int, dict[str, list[float]]]:
    """Measure images/s of every side in turns: number of busy processes -> side -> rate in each round."""
    rates: dict[int, dict[str, list[float]]] = {busy: {name: [] for name in trainings} for busy in busy_counts}
    for busy in busy_counts:
        with run_busy_processes(busy):
            for number in range(rounds):
                names = list(trainings)
                for name in names if number % 2 == 0 else reversed(names):
                    rates[busy][name].append(trainings[name].measure_rate(seconds))
    return rates


def summarise(rates: Mapping[int, Mapping[str, Sequence[float]]], *, cores: int) -> list[dict[str, Any]]:
    """Return a row for each number of busy processes, with the medians and what they are of the fair rate."""
    medians = {busy: {name: statistics.median(each) for name, each in sides.items()} for busy, sides in rates.items()}
    idle_rate = medians[0][_SPINNING]
    rows = []
    for busy, sides in medians.items():
        share = compute_fair_share(cores=cores, busy=busy)
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


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[1, 2, 4], help="numbers of busy processes besides 0")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="least seconds of a measurement (default: 10)")
    parser.add_argument("--settle", type=float, default=4.0, help="seconds of training before each measurement")
    parser.add_argument("--image-size", type=int, default=96, help="side of the images in pixels (default: 96)")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a batch (default: 16)")
    parser.add_argument("--encoder", default="mobilenetv3_small_100", help="timm encoder")
    parser.add_argument("--sides", nargs="*", default=[], metavar="NAME=VALUE[,NAME=VALUE...]", help="further sides")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)
    results = REPOSITORY / "benchmarks" / "results" / "contention.json"
    parser.add_argument("--output", type=Path, default=results, help="JSON file for the results")
    given = parser.parse_args()
    if given.train_in is not None:
        train(given.train_in, given.image_size, given.sides)
        return
    print(f"{format_machine()}; batches of {given.batch_size} images of {given.image_size} px")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="contention-")))
        trainings = {}
        for name, settings in (_SIDES | {text: text.split(",") for text in given.sides}).items():
            trainings[name] = stack.enter_context(MeasuredTraining(settings, given, folder))
            trainings[name].wait_until_ready()
        rates = measure_sides(trainings, [0, *given.busy], rounds=given.rounds, seconds=given.seconds)
    rows = summarise(rates, cores=count_cores())
    print_rows(rows)
    names = ("batch_size", "image_size", "encoder", "rounds", "seconds", "settle")
    write_results(given.output, {name: getattr(given, name) for name in names} | {"rows": rows})


if __name__ == "__main__":
    main()
