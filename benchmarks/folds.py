"""Measure what several folds are worth on small data: how good the configuration is that a search would choose.

    python benchmarks/folds.py --root PHOTOGRAPHS --output benchmarks/results/folds.json

PHOTOGRAPHS is a small data set in FreiHAND's layout. Random configurations of the search space `recipe` (the first one
is the default) are trained on images of 64 pixels: with the data set's own validation split, with each of K folds, and
with the own split and --seeds further seeds. Each training records its validation error and its error on the test
split, both PA-MPJPE after the last epoch.

The test error of a configuration is the mean over the trainings with further seeds. No choice looks at these, so the
luck of a training cannot make both its choice and its result better. The regret of a choice is the test error of the
chosen configuration minus that of the best one of all. The choices:

single         the smallest validation error on the data set's own split
folds          the smallest mean over all folds
folds, early   as with ASHA: the best third after the first fold is trained with all folds, the best of these is chosen

They are compared for the same number of configurations, whatever the folds cost (free cost), and for the same number
of trainings (equal cost): all folds of n / K configurations, or one training of n. The regret is a mean over random
subsets of the configurations; its interval is a bootstrap over the configurations, in which the subsets are drawn
again. Every training is a line in --trainings as soon as it ends. An interrupted run continues, and a larger --num
adds configurations.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from benchmarks.record_curves import PHOTOGRAPHS, PRETRAINED  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from benchmarks.slots import list_proposals  # noqa: E402
from handpose.config import compose, quote_override  # noqa: E402
from handpose.errors import UserError  # noqa: E402
from handpose.resources import count_cores  # noqa: E402
from handpose.search.space import Params  # noqa: E402
from handpose.sweep.trainable.trial import add_param_overrides  # noqa: E402
from handpose.training.fit import RunFolders, train_and_test  # noqa: E402

VALIDATION, TEST = "val/pa_mpjpe_mm", "test/pa_mpjpe_mm"
_FIRST_PART = 3
"""One in so many configurations is trained with further folds after the first one."""
_SINGLE = -1
"""The fold of a training with the data set's own validation split."""


class Training(NamedTuple):
    """One training.

    Attributes:
        number: number of the configuration.
        params: its parameters.
        fold: the fold that is held out; -1: the data set's own validation split.
        seed: the seed of the training.
    """

    number: int
    params: Params
    fold: int
    seed: int


class Errors(NamedTuple):
    """Errors in mm of N configurations.

    Attributes:
        validation: (N, K + 1) with the data set's own split, then with each of the K folds.
        test: (N,) mean over the trainings with further seeds.
    """

    validation: NDArray[np.float64]
    test: NDArray[np.float64]


def choose_single(validation: NDArray[np.float64]) -> int:
    """Choose by the data set's own split; validation: (n, K + 1)."""
    return int(validation[:, 0].argmin())


def choose_by_folds(validation: NDArray[np.float64]) -> int:
    """Choose by the mean over all folds."""
    return int(validation[:, 1:].mean(axis=1).argmin())


def choose_early(validation: NDArray[np.float64]) -> int:
    """Choose by the mean over all folds among the best third of the first fold."""
    num_kept = max(1, len(validation) // _FIRST_PART)
    kept = np.argsort(validation[:, 1], kind="stable")[:num_kept]
    return int(kept[choose_by_folds(validation[kept])])


def count_trainings(name: str, num: int, num_folds: int) -> int:
    """Return how many trainings a choice among `num` configurations takes."""
    if name == "single":
        return num
    return num * num_folds if name == "folds" else num + max(1, num // _FIRST_PART) * (num_folds - 1)


CHOICES: Mapping[str, Callable[[NDArray[np.float64]], int]] = {
    "single": choose_single,
    "folds": choose_by_folds,
    "folds, early": choose_early,
}


def main() -> None:
    """Train what is missing, and print the table."""
    given = parse_arguments()
    overrides = list_overrides(given.root, given.epochs, pretrained=not given.random_weights)
    drawn = list_proposals([*overrides, "search_space=recipe", "searcher=random", f"sweep.num_trials={given.num}"])
    kinds = [(fold, 0) for fold in range(_SINGLE, given.folds)]
    kinds += [(_SINGLE, seed) for seed in range(1, given.seeds + 1)]
    trainings = [Training(number, params, *kind) for number, params in enumerate(drawn) for kind in kinds]
    conditions = {"epochs": given.epochs, "folds": given.folds, "pretrained": not given.random_weights}
    train_missing(given.trainings, trainings, overrides, conditions, num_jobs=given.jobs)
    errors = read_errors(given.trainings, trainings)
    if len(errors.test) < 4:
        sys.exit(f"only {len(errors.test)} configurations have been trained without divergence; 4 are needed")
    rows = summarise(errors, num_draws=given.draws)
    print(format_machine())
    print(format_table(rows, errors))
    counts = {"configurations": len(errors.test), "seeds": given.seeds}
    write_results(given.output, {**conditions, **counts, "rows": rows})


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the photographs, in FreiHAND's layout")
    parser.add_argument("--num", type=int, default=48, help="number of configurations; default: 48")
    parser.add_argument("--folds", type=int, default=5, help="number of folds; default: 5")
    parser.add_argument("--epochs", type=int, default=27, help="epochs of a training; default: 27")
    parser.add_argument("--jobs", type=int, default=count_cores(), help="trainings at a time; default: one per core")
    parser.add_argument("--seeds", type=int, default=2, help="further seeds for the test error; default: 2")
    parser.add_argument("--draws", type=int, default=400, help="bootstrap samples; default: 400")
    parser.add_argument("--random-weights", action="store_true", help="start from random weights, without the package")
    parser.add_argument(
        "--trainings",
        type=Path,
        default=Path("outputs/benchmarks/folds.jsonl"),
        help="JSONL file of the finished trainings; default: outputs/benchmarks/folds.jsonl",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    if given.folds < 2 or given.num < 4 or given.seeds < 1:
        parser.error("--folds must be at least 2, --num at least 4, and --seeds at least 1")
    return given


def list_overrides(root: Path, epochs: int, *, pretrained: bool) -> list[str]:
    """List the overrides of every training."""
    kept = [item for item in PHOTOGRAPHS if not item.startswith("trainer.max_epochs")]
    if not pretrained:
        kept = [item for item in kept if item not in PRETRAINED] + ["model.encoder.pretrained=false"]
    # Saved only after the last epoch, the checkpoint that is tested is the one whose validation error is recorded.
    kept += [f"trainer.max_epochs={epochs}", f"checkpoints.every_n_epochs={epochs}"]
    return [*kept, quote_override("data.root", str(root.resolve()))]


# --- trainings --------------------------------------------------------------------------------------------------------


def train_missing(
    file: Path,
    trainings: Sequence[Training],
    overrides: Sequence[str],
    conditions: Mapping[str, Any],
    *,
    num_jobs: int,
) -> None:
    """Train what the file does not have yet."""
    if not file.exists():
        append_line(file, conditions)
    header, *rows = read_lines(file)
    if header != conditions:
        sys.exit(f"{file} was recorded with {header}, and now {conditions} is given; move it away, or give the same")
    recorded = {_get_key(row): row["params"] for row in rows}
    changed = [each for each in trainings if recorded.get(_get_key(each._asdict()), each.params) != each.params]
    if changed:
        sys.exit(f"{file} has other parameters for configuration {changed[0].number}; move it away to train anew")
    missing = [each for each in trainings if _get_key(each._asdict()) not in recorded]
    with ProcessPoolExecutor(num_jobs) as pool:
        futures = [pool.submit(train, training, overrides, conditions["folds"]) for training in missing]
        try:
            for number, future in enumerate(as_completed(futures), start=len(trainings) - len(missing) + 1):
                line = future.result()
                append_line(file, line)
                print(
                    f"{number:4d}/{len(trainings)}  configuration {line['number']}, fold {line['fold']}, seed "
                    f"{line['seed']}: validation {line['validation']}, test {line['test']} mm",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted; the same command continues")


def train(training: Training, overrides: Sequence[str], num_folds: int) -> dict[str, Any]:
    """Train and test, and return the line of the file. The errors of a training that diverged are null."""
    chosen = {**training.params, "seed": training.seed, "num_threads": 1}
    fold = [] if training.fold == _SINGLE else [f"folds.num={num_folds}", f"folds.index={training.fold}"]
    quiet = ("logger=none", "trainer.enable_progress_bar=false")
    config = compose("train", [*add_param_overrides(overrides, chosen), *fold, *quiet])
    with TemporaryDirectory() as folder:
        try:
            result = train_and_test(config, RunFolders(*[Path(folder)] * 3), quiet=True)
        except UserError as error:  # the training diverged, so that there is no checkpoint to test
            print(f"configuration {training.number}, fold {training.fold}: {error}", file=sys.stderr, flush=True)
            return {**training._asdict(), "validation": None, "test": None}
    assert result.training is not None
    errors = {"validation": result.training.metrics[VALIDATION], "test": result.test_metrics[TEST]}
    return {**training._asdict(), **{name: float(f"{value:.6g}") for name, value in errors.items()}}


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """Append a line to the file of the trainings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of the file; one that is incomplete, because the run was killed, is left out."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read_errors(file: Path, trainings: Sequence[Training]) -> Errors:
    """Read the errors of the configurations whose trainings have all ended; those with a diverged one are left out."""
    _, *rows = read_lines(file)
    found = {_get_key(row): row for row in rows if row["test"] is not None}
    by_number: dict[int, list[Any]] = {}
    for training in trainings:
        by_number.setdefault(training.number, []).append(found.get(_get_key(training._asdict())))
    complete = [each for each in by_number.values() if all(row is not None for row in each)]
    return Errors(
        np.array([[row["validation"] for row in each if row["seed"] == 0] for each in complete]),
        np.array([np.mean([row["test"] for row in each if row["seed"]]) for each in complete]),
    )


def _get_key(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["number"], row["fold"], row["seed"]


# --- the table --------------------------------------------------------------------------------------------------------


def compute_regret(errors: Errors, name: str, num: int, rng: np.random.Generator, *, num_subsets: int) -> float:
    """Return the mean regret in mm of a choice among `num` configurations, over random subsets of them."""
    regrets = []
    for _ in range(num_subsets):
        drawn = rng.choice(len(errors.test), size=num, replace=False)
        regrets.append(errors.test[drawn[CHOICES[name](errors.validation[drawn])]] - errors.test.min())
    return float(np.mean(regrets))


def summarise(errors: Errors, *, num_draws: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return a row for each choice and number of trainings: the regret with its 95 % interval."""
    num_configurations, num_folds = len(errors.test), errors.validation.shape[1] - 1
    rows = []
    for comparison, sizes in list_comparisons(num_configurations, num_folds):
        for name, num in sizes.items():
            rng = np.random.default_rng(seed)
            means = []
            for draw in range(num_draws + 1):
                drawn = rng.integers(num_configurations, size=num_configurations) if draw else slice(None)
                sample = Errors(errors.validation[drawn], errors.test[drawn])
                subsets = 20 if draw else 2000
                means.append(compute_regret(sample, name, num, rng, num_subsets=subsets))
            low, high = np.quantile(means[1:], (0.025, 0.975))
            rows.append(
                {
                    "comparison": comparison,
                    "choice": name,
                    "configurations": num,
                    "trainings": count_trainings(name, num, num_folds),
                    "regret_mm": means[0],
                    "interval_mm": [float(low), float(high)],
                }
            )
    return rows


def list_comparisons(num_configurations: int, num_folds: int) -> Iterator[tuple[str, dict[str, int]]]:
    """List what is compared: name of the choice -> number of configurations, at equal numbers and at equal cost."""
    for num in sorted({num_configurations // 4, num_configurations // 2} - {0, 1}):
        yield "free cost", dict.fromkeys(CHOICES, num)
    for num in sorted({num_configurations // 2, num_configurations}):
        sizes = {
            name: max((each for each in range(1, num + 1) if count_trainings(name, each, num_folds) <= num), default=0)
            for name in CHOICES
        }
        if min(sizes.values()) >= 1:
            yield "equal cost", sizes


def format_table(rows: Sequence[Mapping[str, Any]], errors: Errors) -> str:
    """Format the rows as a table for a terminal."""
    test = errors.test
    single, folds = errors.validation[:, 0], errors.validation[:, 1:].mean(axis=1)
    ranks = [np.corrcoef(_rank(each), _rank(test))[0, 1] for each in (single, folds)]
    lines = [
        f"{len(test)} configurations; test error of the best {test.min():.2f} mm, median {np.median(test):.2f} mm",
        f"rank correlation with the test error: single split {ranks[0]:.2f}, mean over folds {ranks[1]:.2f}",
        f"{'':<16}{'choice':<16}{'configurations':>14}{'trainings':>11}{'regret, mm':>12}   95 % interval",
    ]
    for row in rows:
        low, high = row["interval_mm"]
        lines.append(
            f"{row['comparison']:<16}{row['choice']:<16}{row['configurations']:>14}{row['trainings']:>11}"
            f"{row['regret_mm']:>12.3f}   {low:.3f} to {high:.3f}"
        )
    return "\n".join(lines)


def _rank(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


if __name__ == "__main__":
    main()
